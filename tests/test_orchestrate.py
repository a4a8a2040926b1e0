"""The search loop over simulated trials: dying at any step loses nothing and repeats nothing."""

import contextlib
import json
import os

import pytest
import yaml
from chaos import measure_front
from simulated import Simulated, search

from memcontrol.config.load import load_config
from memcontrol.core.jobs import Failed, TrialJob
from memcontrol.core.run_folder import locate_study_folder
from memcontrol.execution.attempts import read_attempts
from memcontrol.search.orchestrator import Search
from memcontrol.study.opening import open_study
from memcontrol.study.store import Study

STEPS = {
    "begin": (Study, "begin"),
    "keep in memory": (Study, "keep"),
    "finish": (Study, "finish"),
    "submit": (Simulated, "submit"),
    "end of a trial": (Simulated, "ended"),
    "collect": (Search, "collect"),
}
STORAGE = ("create_new_trial", "set_trial_system_attr", "set_trial_state_values")
N_SAMPLED = 9  # more than the sampler spreads before it models anything


class Dead(BaseException):
    """What no `except Exception` catches, as kill -9 is what no code catches."""


def dying(function, at, when):
    """The function; its `at`-th call dies before or after it did its work."""
    calls = iter(range(1, 10_000))

    def call(*args, **keys):
        now = next(calls) == at
        if now and when == "before":
            raise Dead
        found = function(*args, **keys)
        if now:
            raise Dead
        return found

    return call


def study_in(folder, **keys):
    path = folder / "study.yaml"
    rewards = {"confirm": 0, "limits": {"memorization": 0.2}}
    path.write_text(
        yaml.safe_dump(
            {
                "name": "s",
                "data": "digits",
                "space": "digits",
                "rewards": rewards,
                "search": {"trials": N_SAMPLED, "workers": 1, **keys},
            }
        )
    )
    return path


def assert_whole(study_file, n_deaths):
    config = load_config(study_file)
    folder = locate_study_folder(study_file, config.name)
    study = open_study(config, folder, study_file, create=False)
    records, trials = study.records(), study.inner.get_trials()
    study.close()
    assert [record.state for record in records] == ["COMPLETE"] * (N_SAMPLED + 3) and [
        trial.number for trial in trials
    ] == list(range(N_SAMPLED + 3))
    choices = [choice for record in records for choice in record.candidates]
    assert len(set(choices)) == len(choices)
    for record, trial in zip(records, trials):
        result = json.loads((folder / record.choice.key / "result.json").read_text())
        assert record.searched == result["rewards"]
        assert trial.values == list(record.values.values()) and set(trial.constraints) == {"memorization"}
    attempts = [read_attempts(folder / choice.key) for choice in choices]
    assert sum(map(len, attempts)) <= len(choices) + n_deaths
    assert {path.parent.name for path in folder.glob("*/result.json")} == {choice.key for choice in choices}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    study = study_in(tmp_path_factory.mktemp("undisturbed"))
    search(study, Simulated()).close()
    return measure_front(study)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", [*STEPS, *STORAGE])
def test_dying_at_any_step_loses_and_repeats_nothing(step, when, tmp_path, monkeypatch, undisturbed):
    """Of the searches that are begun over the same study, each dies at a later call; the last one runs to its
    end."""
    study, n_deaths = study_in(tmp_path), 0
    for at in range(3, 16, 3):
        with monkeypatch.context() as patch, contextlib.suppress(Dead):
            if step in STEPS:
                patch.setattr(*STEPS[step], dying(getattr(*STEPS[step]), at, when))
            else:
                from optuna.storages._cached_storage import _CachedStorage

                patch.setattr(_CachedStorage, step, dying(getattr(_CachedStorage, step), at, when))
            search(study, Simulated()).close()
            break
        n_deaths += 1
    else:
        search(study, Simulated()).close()
    assert n_deaths
    assert_whole(study, n_deaths)
    assert measure_front(study) == undisturbed  # with one worker, the same is asked for whatever dies


class Failing(Simulated):
    """Full fine-tuning dies, whatever is tried."""

    def ended(self, begun, end, job):
        if isinstance(job, TrialJob) and job.choice.method == "full":
            return Failed(job, "made up")
        return super().ended(begun, end, job)


def test_an_anchor_whose_choices_all_fail_is_one_failure_and_the_search_goes_on(tmp_path):
    study = search(study_in(tmp_path), Failing())
    states = {record.anchor: (record.state, record.reason) for record in study.records() if record.anchor}
    assert (
        states["full"] == ("FAIL", "3 attempts failed, the last: made up") and states["all"][0] == "COMPLETE"
    )
    assert sum(record.finished for record in study.records()) == N_SAMPLED + 2
    study.close()


def test_places_are_busy_until_no_trial_is_left(tmp_path):
    """Three of them, and trials of ten seconds and eleven: none waits before the last trials, which two may
    end without."""
    executor = Simulated(3, seconds=10.0)
    search(study_in(tmp_path, workers=3, sampler="random"), executor).close()
    idle = 3 * (executor.last - executor.first) - executor.busy
    assert executor.n_ended > 3 * 3 and -1e-6 < idle < 2 * 11 + 1e-6


def test_what_a_killed_search_left_half_written_goes(tmp_path):
    """In the artifacts, which the search alone writes; of runs, whose worker may be on another machine, what
    has not changed for a day."""
    path, executor = study_in(tmp_path), Simulated(1)
    search(path, executor).close()
    folder = locate_study_folder(path, load_config(path).name)
    run = next(folder.glob("*/result.json")).parent
    halves = [folder / "artifacts" / ".a.12.part", run / ".samples.safetensors.12.part", run / ".b.13.part"]
    for half in halves:
        half.parent.mkdir(exist_ok=True)  # simulated trials have no pictures
        half.write_text("half")
    os.utime(halves[1], (0, 0))
    search(path, Simulated(1)).close()
    assert [half.exists() for half in halves] == [False, False, True]
