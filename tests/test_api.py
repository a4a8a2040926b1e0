"""The commands as functions: they give what the commands print."""

import io
import json
import shutil
from pathlib import Path

import pytest
from commands import run

import memcontrol
from memcontrol.core.errors import MemControlError


def printed(*args):
    return json.loads(run(*args, "--json", check=True).stdout)


@pytest.fixture
def copied(shown, tmp_path):
    """The finished study for a test that searches it: other processes read and search theirs at the same
    time."""
    return Path(shutil.copytree(shown.parent, tmp_path / "copied")) / shown.name


def test_functions_give_what_commands_print(shown):
    folder = Path(printed("status", shown)["trials"][0]["run"]).parent
    assert [record.as_dict() for record in memcontrol.front(shown)] == printed("front", shown)
    assert memcontrol.pick(str(shown)).as_dict() == printed("pick", shown)
    assert [record.number for record in memcontrol.status(shown)] == [
        trial["trial"] for trial in printed("status", shown)["trials"]
    ]
    assert {**memcontrol.report(shown), "written": ""} == {**printed("report", shown), "written": ""}
    a, b = (
        folder / record.chosen.key for record in memcontrol.front(shown)[:1] + memcontrol.status(shown)[1:2]
    )
    assert {name: float(value) for name, value in memcontrol.compare(a, b).items()} == {
        name: row["difference"] for name, row in printed("compare", a, b).items()
    }


def test_a_search_from_python_continues_and_says_nothing_when_quiet(copied, capfd):
    before = memcontrol.status(copied)
    found = memcontrol.search(copied, quiet=True)
    assert found == [record for record in before if record.finished]
    assert capfd.readouterr() == ("", "")


def test_a_lost_database_is_rebuilt_from_runs_of_the_same_config_only(copied):
    study = copied
    before = [record for record in memcontrol.status(study) if record.finished]
    next(study.parent.rglob("study.db")).unlink()
    with pytest.raises(MemControlError, match=r"inner.max_grad_norm \(1.0 there, 2.0 here\)"):
        memcontrol.search(study, "inner.max_grad_norm=2.0", quiet=True)
    assert not list(study.parent.rglob("study.db"))  # restoring the key is all it takes
    found = memcontrol.search(study, quiet=True)
    assert [(record.choice, record.searched) for record in found] == [
        (record.choice, record.searched) for record in before
    ]


def test_mistakes_are_one_kind_of_error(shown, tmp_path):
    for mistake in (
        lambda: memcontrol.front(tmp_path / "none.yaml"),
        lambda: memcontrol.pick(shown, limits=["fid<=0"]),
        lambda: memcontrol.search(shown, "nonsense=1"),
        lambda: memcontrol.init(tmp_path),
    ):
        with pytest.raises(MemControlError):
            mistake()


def test_every_name_is_there_and_no_other():
    for name in memcontrol.__all__:
        assert callable(getattr(memcontrol, name)), name
        assert getattr(memcontrol, name).__doc__
    with pytest.raises(AttributeError):
        getattr(memcontrol, "nonsense")  # noqa: B009


def test_quiet_and_verbose(copied):
    def search(*options):
        return run("search", copied, *options, check=True)

    assert search("--quiet").stderr == search("--quiet").stdout == ""
    loud = search("--verbose").stderr
    assert " INFO " in loud or " DEBUG " in loud
    log = next(copied.parent.rglob("search.log")).read_text()
    assert "lora" in log and " INFO " in log
    assert (
        "begins: search of" in log
        and '"max_grad' not in log
        and '"budget_images": 64' in log
        and log.rstrip().endswith("INFO ended")
    )
    assert "trial 0 COMPLETE: fid " in log


@pytest.mark.parametrize("width", [80, 100, 200])
def test_tables_fit_their_terminal_and_keep_what_a_row_is(shown, width):
    import io

    from rich.console import Console

    from memcontrol.study.pick import find_pick
    from memcontrol.study.place import StudyPlace
    from memcontrol.view.tables import make_study_table

    study, out = StudyPlace.load(shown).open(), io.StringIO()
    records = [record for record in study.records() if record.finished]
    Console(width=width, file=out).print(make_study_table(records, 6, "trials", find_pick(records, study)))
    lines = out.getvalue().splitlines()
    assert all(len(line) <= width for line in lines) and lines[1][-1] == "┓"
    assert all(
        word in out.getvalue() for word in (">", "full", "none", "no training", "FID", "memorization")
    ) and ("KID" in out.getvalue()) == (width == 200)


def test_a_run_and_a_folder_are_audited_as_the_command_does(shown, tmp_path):
    full = next(record for record in memcontrol.status(shown) if record.anchor == "full")
    assert memcontrol.audit(model=full.run) == printed(
        "audit", "--model", full.run, "--out", tmp_path / "audit"
    )
    for wrong in (
        {},
        {"images": tmp_path, "model": full.run},
        {"model": "tiny"},
        {"model": full.run, "steps": 3},
        {"images": tmp_path, "train": tmp_path, "holdout": tmp_path, "sample": 3},
    ):
        with pytest.raises(MemControlError):
            memcontrol.audit(**wrong)


def test_a_search_says_first_that_its_network_may_not_know_the_images(study_file, monkeypatch, capsys):
    from memcontrol.commands import search as searching
    from memcontrol.study.place import StudyPlace
    from memcontrol.view.words import NETWORK_DOUBT

    monkeypatch.setattr(searching, "search_study", lambda *_: io.StringIO())
    split = {"train": 32, "holdout": 40, "test": 48}
    for path, extractor, said in (
        ("digits", "tiny", False),
        ("elsewhere", "tiny", True),
        ("elsewhere", "efficientnet-lite0", False),
    ):
        file = study_file(
            data={"path": path, **split}, rewards={"extractor": extractor, "objectives": ["kid"]}
        )
        searching.run_search(StudyPlace.load(file), None)
        assert (f"warning: {NETWORK_DOUBT}" in capsys.readouterr().err) == said
