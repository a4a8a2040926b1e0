"""What a terminal of 80 columns shows: all that one must type, marks in places of their own, and what a shell
completes."""

import re
import shutil
import subprocess
from dataclasses import replace
from io import StringIO

import pytest
from commands import run
from rich.console import Console

from memcontrol.core.choice import Choice
from memcontrol.core.estimate import Estimate
from memcontrol.core.reward_table import REWARDS
from memcontrol.core.space_yaml import list_shipped_spaces
from memcontrol.dashboard.note_text import write_standings
from memcontrol.search.importance import Effect, measure_importance
from memcontrol.study.pareto import Limit
from memcontrol.study.record import Record
from memcontrol.view.tables import RewardList, describe_clear_effects, make_importance_table, make_study_table

OBJECTIVES = {"kid": "minimize", "memorization": "minimize"}


def show(table, width=80):
    """As a terminal without colour prints it."""
    out = StringIO()
    Console(width=width, file=out, markup=False, emoji=False).print(table)
    assert "\x1b" not in out.getvalue() and "\u2026" not in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= width
    return out.getvalue()


def make_record(number, kid, memorization, **more):
    """With a standard error of 0.1 in both."""
    rewards = {"kid": kid, "memorization": memorization, "kid_error": 0.1, "memorization_error": 0.1}
    choice = Choice(("up_attention",), "lora", 1e-3 * (number + 1), 4)
    record = Record(number, "COMPLETE", (choice,), choice=choice, objectives=OBJECTIVES, searched=rewards)
    return replace(record, **more)


def test_on_the_front_tied_measured_again_and_picked_are_marks_of_their_own():
    """Trial 7 is surely better than 33 in one objective, and within error in the other; 5 is beaten by 7, but
    within error."""
    pick = make_record(2, 1.0, 9.0)
    pick = replace(pick, confirmed=pick.searched)
    others = {33: (5.0, 5.0), 4: (9.0, 1.0), 7: (4.0, 5.02), 5: (4.05, 5.05), 6: (9.5, 9.5)}
    records = [pick, *(make_record(number, *values) for number, values in others.items())]
    shown = show(make_study_table(records, 6, "trials", pick, None, [Limit("kid", "<=", 9.2)]))
    marks = {int(number): marks for marks, number in re.findall(r"\u2502 ([ >*=+]{4})(\d+)[ !]", shown)}
    assert marks == {2: ">* +", 7: " *  ", 5: "  = ", 33: " *= ", 4: " *  ", 6: "    "}
    assert "! not within" in shown and re.search("    6 !", shown)


def test_names_that_are_typed_are_whole_in_eighty_columns():
    shown = show(RewardList())
    assert all(re.search(rf"\b{name}\b", shown) for name in REWARDS)
    assert "--json" in shown and "interval" in show(RewardList(), 160)
    long = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_and_some_more_of_it"
    table = show(make_importance_table([Effect(long, False, True, {"kid": Estimate(1.0, 0.1)}, 3)], "s"))
    cells = re.findall(r"\u2502 (\S*(?: on)?) +\u2502", table)
    assert long in "".join(cells).replace(" on", "")


def test_what_is_clear_is_marked_without_colour_and_what_is_missing_is_said():
    values = {"kid": Estimate(1.0, 0.1), "memorization": Estimate(0.1, 0.1)}
    effects = [Effect("a", False, True, values, 3)]
    assert "+1 \u00b1 0.1 *" in show(make_importance_table(effects, "s"))
    assert "+0.1 \u00b1 0.1 *" not in show(make_importance_table(effects, "s"))
    records = [make_record(number, 1.0, 9.0) for number in range(7)]
    variant = records[0].chosen.with_settings({"strength": 0.5})
    measured = [replace(records[0], number=number, candidates=(variant,)) for number in (7, 8)]
    said = describe_clear_effects(effects, "my.yaml", [*records, *measured])
    assert said.startswith("1 of 2 effects are clear after 9 trials")
    assert said.endswith("memcontrol search my.yaml --trials 28")
    clear = [Effect("a", False, True, {"kid": Estimate(1.0, 0.1)}, 3)]
    assert describe_clear_effects(clear, "my.yaml", records) == ""


def test_how_many_trials_importance_lacks_is_a_command():
    from test_importance import SPACE, make_records

    from memcontrol.core.errors import MemControlError

    records = make_records(SPACE, 4, lambda choice, row: (1.0, 0.1))
    n = 6 - len(records)
    failed = replace(records[0], number=99, state="FAIL")
    with pytest.raises(MemControlError, match=f"{n} too few: memcontrol search my.yaml --trials 6$"):
        measure_importance([*records, failed], SPACE, "my.yaml")


def test_a_dashboards_note_has_the_same_four_marks():
    trial = {
        "origin": "sampled",
        "said": "",
        "values": {"kid": 1.0, "memorization": 1.0},
        "state": "COMPLETE",
    }
    trial |= {"rewards": {"kid": 1.0, "memorization": 1.0}, "trial": 3}
    marked = {"front": True, "tie": True, "confirmed": True, "pick": True}
    note = write_standings([trial | marked], OBJECTIVES)
    assert "front, within error, measured again, **the pick**" in note


def test_front_and_status_mark_the_pick_that_pick_names(shown):
    picked = re.search(r">.{3}(\d+)", run("pick", shown, check=True).stdout)[1]
    for command in ("front", "status"):
        assert re.search(r">.{3}(\d+)", run(command, shown, check=True).stdout)[1] == picked


@pytest.fixture(scope="module")
def ask_bash(tmp_path_factory):
    """What bash completes after words, by the script, where a study has the trials 0, 1 and 12."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    place = tmp_path_factory.mktemp("shell")
    (place / "script").write_text(run("completion", "bash", check=True).stdout)
    (place / "mine.yaml").touch()
    command = """
source ./script
memcontrol() { printf 'trial,state\\n0,COMPLETE\\n1,FAIL\\n12,COMPLETE\\n'; }
COMP_WORDS=(memcontrol "$@"); COMP_CWORD=$#
_shtab_memcontrol
printf '%s\\n' "${COMPREPLY[@]}"
"""

    def ask(*words):
        call = ["bash", "-c", command, "bash", *words]
        done = subprocess.run(call, cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done
        return done.stdout.split()

    return ask


def test_a_shell_completes_commands_options_spaces_rules_and_trials(ask_bash):
    assert ask_bash("doc") == ["doctor"]
    assert ask_bash("pick", "mine.yaml", "--ru") == ["--rule"]
    assert ask_bash("pick", "mine.yaml", "--rule", "") == ["knee", "quality", "memorization"]
    assert ask_bash("spaces", "show", "") == ["auto", *list_shipped_spaces()]
    assert "mine.yaml" in ask_bash("spaces", "check", "") and "digits" in ask_bash("spaces", "check", "d")
    assert ask_bash("pick", "mi") == ["mine.yaml"]
    for command in ("pick", "drop", "retrain", "recipe"):
        assert ask_bash(command, "mine.yaml", "--trial", "1") == ["1", "12"]
    assert ask_bash("pick", "--trial", "") == []  # of no study
    assert ask_bash("fork", "mine.yaml", "--as", "") == []


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_scripts_of_other_shells_know_the_same(shell):
    script = run("completion", shell, check=True).stdout
    assert "sd15-blocks" in script and "knee" in script
    assert ("_memcontrol_trials" in script) == (shell == "zsh")
