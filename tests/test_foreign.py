"""A study that plain Optuna or a dashboard has touched: what others made, told, enqueued or deleted."""

import contextlib
import json
import re
import sqlite3

import optuna
import pytest
from commands import run
from simulated import Simulated, few_groups, search
from test_orchestrate import study_in

from memcontrol.commands.front import front
from memcontrol.commands.status import status
from memcontrol.core.jobs import TrialJob
from memcontrol.core.reward_table import list_losses
from memcontrol.core.space_yaml import load_space
from memcontrol.study.pareto import find_front

FLOATS = {"x": optuna.distributions.FloatDistribution(0, 1)}


def open_plain(file):
    """As a user's own script would."""
    return optuna.load_study(study_name="s", storage=f"sqlite:///{file.parent}/runs/s/study.db")


class Between(Simulated):
    """Does something once, when the n-th trial is begun."""

    def __init__(self, n, act):
        super().__init__()
        self.n, self.act, self.n_begun = n, act, 0

    def submit(self, job):
        if isinstance(job, TrialJob):
            self.n_begun += 1
            if self.n_begun == self.n:
                self.act(job)
        super().submit(job)


class Stopped(Exception):
    """What ends a search in the middle."""


def stop(job):
    raise Stopped


def leave_running(file, n=8):
    """A search that is stopped as its n-th run begins, whose trial is then interrupted."""
    with contextlib.suppress(Stopped):
        search(file, Between(n, stop)).close()
    (running,) = [record.number for record in status(file) if record.state == "RUNNING"]
    return running


def assert_goes_on(file, n_sampled=9):
    """Every choice that was asked for has one finished record, and all commands answer."""
    said = []
    search(file, Simulated(), lambda event: said.append(getattr(event, "text", ""))).close()
    records = status(file)
    complete = [record for record in records if record.finished]
    choices = [choice for record in complete for choice in record.candidates]
    assert len(set(choices)) == len(choices) and all(
        record.state in ("COMPLETE", "FAIL") for record in records
    )
    assert len(complete) >= n_sampled + 3
    assert front(file)
    return records, "\n".join(said)


@pytest.mark.parametrize("n", [6, 8])  # an anchor, which tries several choices, and a sampled trial
@pytest.mark.parametrize("state", ["COMPLETE", "PRUNED", "FAIL"])
def test_a_trial_that_was_told_by_others_is_run_again(tmp_path, state, n):
    file = study_in(tmp_path)
    number = leave_running(file, n)
    values = [1.0, 2.0] if state == "COMPLETE" else None
    open_plain(file).tell(number, values, optuna.trial.TrialState[state])
    told = status(file)[number]
    assert told.state == "FAIL" and f"another program told it {state}" in told.reason
    records, _ = assert_goes_on(file)
    again = [r for r in records if r.candidates == told.candidates and r.finished]
    assert len(again) == 1 and again[0].searched == few_groups(again[0].choice.as_dict())


def test_trials_that_others_asked_for_or_finished_are_passed_over_with_one_word(tmp_path):
    file = study_in(tmp_path)
    leave_running(file)
    plain = open_plain(file)
    plain.ask()  # left running
    done = plain.ask(FLOATS)
    plain.tell(done, [1.0, 1.0])
    plain.add_trial(optuna.trial.create_trial(values=[0.0, 0.0], params={"x": 0.5}, distributions=FLOATS))
    records, said = assert_goes_on(file)
    assert said.count("trials that another program made are passed over") == 1
    assert len([record for record in records if record.finished]) == 12 and min(front(file)[0].losses) > 0


@pytest.mark.parametrize("when", ["before", "meanwhile", "after"])
def test_an_enqueued_mask_is_run(tmp_path, when):
    file = study_in(tmp_path)
    asked = {"mid_attention": 1, "up_resnet": True, "method": "lora", "rank": 2.0, "learning_rate": 3e-3}

    def enqueue(job=None):
        open_plain(file).enqueue_trial(asked)

    if when == "before":
        leave_running(file)
        enqueue()
    search(file, Between(8, enqueue if when == "meanwhile" else lambda job: None)).close()
    if when == "after":
        enqueue()
    records, _ = assert_goes_on(file)
    (found,) = [
        r
        for r in records
        if r.choice.groups == ("mid_attention", "up_resnet") and r.choice.learning_rate == 3e-3
    ]
    assert found.finished and (found.choice.method, found.choice.rank) == ("lora", 2)
    shown = open_plain(file).trials[found.number]
    assert shown.params == {**dict.fromkeys(load_space("digits").groups, False), **asked}
    assert shown.values == list(found.values.values())


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"nothing": True}, "nothing is True; allowed: .*learning_rate"),
        ({"mid_attention": "yes"}, "mid_attention is 'yes'; allowed: "),
        ({"mid_attention": True, "learning_rate": 9.0}, "learning_rate is 9.0; of .* allowed: "),
        ({"mid_attention": True, "learning_rate": "x"}, "learning_rate is 'x'"),
        ({"method": "nonsense"}, "method is 'nonsense'"),
        ({"rank": 3.5}, "rank is 3.5"),
    ],
)
def test_what_the_space_does_not_have_is_passed_over_with_its_reason(tmp_path, asked, words):
    file = study_in(tmp_path)
    leave_running(file)
    open_plain(file).enqueue_trial(asked)
    records, said = assert_goes_on(file)
    assert len(records) == 12
    assert re.search("trial 4, which another program enqueued, is passed over: " + words, said)


def delete_trial(file, number):
    with contextlib.closing(sqlite3.connect(file.parent / "runs" / "s" / "study.db")) as database:
        (trial_id,) = database.execute("SELECT trial_id FROM trials WHERE number = ?", (number,)).fetchone()
        tables = (
            "trial_values",
            "trial_params",
            "trial_user_attributes",
            "trial_system_attributes",
            "trials",
        )
        for table in tables:
            database.execute(f"DELETE FROM {table} WHERE trial_id = ?", (trial_id,))
        database.commit()


@pytest.mark.parametrize("act", ["told", "failed", "deleted"])
def test_a_trial_that_others_end_while_it_runs_is_entered_anew(tmp_path, act):
    file = study_in(tmp_path)
    met = []

    def meddle(job):
        met.append(job.number)
        if act == "deleted":
            delete_trial(file, job.number)
        else:
            plain = open_plain(file)
            told = act == "told"
            plain.tell(
                job.number, [0.0, 0.0] if told else None, None if told else optuna.trial.TrialState.FAIL
            )

    search(file, Between(8, meddle)).close()
    records, _ = assert_goes_on(file)
    assert all(
        record.searched == few_groups(record.choice.as_dict()) for record in records if record.finished
    )
    # the number of a trial that is gone may be given again
    assert act == "deleted" or not records[met[0]].finished
    assert [trial.number for trial in open_plain(file).trials] == [record.number for record in records]


def test_trials_that_others_deleted_are_made_up_for_and_no_number_is_given_twice(tmp_path):
    """Optuna counts what is there."""
    file = study_in(tmp_path)
    search(file, Simulated()).close()
    for number in (5, 8):
        delete_trial(file, number)
    records, _ = assert_goes_on(file)
    numbers = [record.number for record in records]
    assert len(set(numbers)) == len(records) == 12
    assert sorted(trial.number for trial in open_plain(file).trials) == sorted(numbers)


def test_a_study_that_is_deleted_while_it_is_searched_ends_in_one_line(tmp_path):
    file = study_in(tmp_path)
    url = f"sqlite:///{tmp_path}/runs/s/study.db"
    with pytest.raises(Exception) as ended:
        search(file, Between(8, lambda job: optuna.delete_study(study_name="s", storage=url)))
    assert type(ended.value).__name__ == "MemControlError" and "was deleted from its database" in str(
        ended.value
    )
    records, _ = assert_goes_on(file)  # what had finished is entered again
    assert all(record.finished for record in records)


def test_an_empty_study_of_the_same_name_is_taken_over_or_refused(tmp_path):
    file = study_in(tmp_path)
    url = f"sqlite:///{tmp_path}/runs/s/study.db"
    (tmp_path / "runs" / "s").mkdir(parents=True)
    optuna.create_study(study_name="s", storage=url, directions=["minimize", "minimize"])
    assert_goes_on(file)
    optuna.delete_study(study_name="s", storage=url)
    optuna.create_study(study_name="s", storage=url, directions=["maximize", "minimize"])
    with pytest.raises(
        Exception, match="is to maximize, minimize, and the objectives fid, memorization are to"
    ):
        search(file, Simulated())


def test_plain_optuna_shows_what_front_shows(tmp_path):
    """Values, rewards and feasibility, also of trials that were measured again."""
    file = study_in(tmp_path)
    study = search(file, Simulated())
    for record in study.records()[3:7]:  # measured again, and worse
        study.confirm(record.number, {name: value + 3 for name, value in record.searched.items()})
    study.close()
    records, plain = {record.number: record for record in status(file)}, open_plain(file)
    for trial in plain.trials:
        record = records[trial.number]
        assert trial.values == list(record.values.values())
        assert {name: trial.user_attrs[name] for name in record.rewards} == record.rewards
        feasible = all(excess <= 0 for excess in trial.constraints.values())
        assert feasible == (record.rewards["memorization"] <= 0.2)
        if record.confirmed:
            assert trial.user_attrs["fid (searched)"] == record.searched["fid"]
    assert plain.metric_names == ["fid", "memorization"]
    feasible = [record for record in records.values() if record.rewards["memorization"] <= 0.2]
    losses = [list_losses(record.rewards, record.objectives) for record in feasible]
    assert {trial.number for trial in plain.best_trials} == {feasible[i].number for i in find_front(losses)}


def test_what_others_wrote_over_is_shown_right_again_by_the_next_search(tmp_path):
    file = study_in(tmp_path)
    search(file, Simulated()).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "runs" / "s" / "study.db")) as database:
        database.execute("UPDATE trial_values SET value = 0")
        database.execute("DELETE FROM trial_user_attributes WHERE key = 'fid'")
        database.commit()
    search(file, Simulated()).close()
    for trial, record in zip(open_plain(file).trials, status(file)):
        assert (
            trial.values == list(record.values.values()) and trial.user_attrs["fid"] == record.rewards["fid"]
        )


def test_tables_and_json_mark_what_keeps_no_limit(tmp_path):
    file = study_in(tmp_path)
    search(file, Simulated()).close()
    said = json.loads(run("front", file, "--json", check=True).stdout)
    assert {one["keeps_limits"] for one in said} == {True, False}
    assert all(one["keeps_limits"] == (one["rewards"]["memorization"] <= 0.2) for one in said)
    for command in ("front", "status"):
        shown = run(command, file, check=True).stdout
        assert "! not within memorization<=0.2" in shown and " !" in shown


@pytest.mark.parametrize(
    "meddle",
    [
        lambda plain: plain.ask().suggest_float("learning_rate", 0, 1),
        lambda plain: plain.ask().suggest_categorical("method", ["this", "that"]),
        lambda plain: plain.ask().suggest_categorical("mid_attention", [True, False]),
    ],
    ids=["rate", "method", "group"],
)
def test_parameters_of_others_under_our_names_stop_nothing(tmp_path, meddle):
    """Optuna keeps to the first values that a study's trials have of a name."""
    file = study_in(tmp_path)
    leave_running(file, 6)  # an anchor, none of which has parameters
    meddle(open_plain(file))
    open_plain(file).enqueue_trial({"mid_attention": True, "learning_rate": 2e-3})
    assert_goes_on(file)


def test_trials_of_another_study_of_ours_and_copies_are_passed_over(tmp_path):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(study_in(tmp_path / name))
    search(files[0], Simulated(rewards=lambda choice: {"fid": 0.1, "memorization": 0.1})).close()
    search(files[1], Simulated()).close()
    before = status(files[1])
    plain = open_plain(files[1])
    plain.add_trials(open_plain(files[0]).trials[3:])
    plain.add_trial(plain.trials[4])
    assert status(files[1]) == before and assert_goes_on(files[1])[0] == before


@pytest.mark.parametrize("attribute", ["nonsense", 3])
def test_an_anchor_that_others_made_up_is_none(tmp_path, attribute):
    file = study_in(tmp_path)
    number = leave_running(file)
    plain = open_plain(file)
    plain._storage.set_trial_user_attr(plain.trials[number]._trial_id, "anchor", attribute)
    records, _ = assert_goes_on(file)
    assert records[number].anchor is None
