"""The same choice fine-tuned again: which are, their spread, what is believed of them, and a search that does
it."""

import json
import sqlite3
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_search import list_trials, memcontrol

from memcontrol.core.choice import Choice
from memcontrol.core.run_folder import locate_study_folder
from memcontrol.core.space_yaml import load_space
from memcontrol.search.encoding import SpaceEncoding
from memcontrol.search.surrogate import gather_training_set
from memcontrol.study.record import Record
from memcontrol.study.replicates import (
    average_fine_tunings,
    errors_by_luck,
    estimate_spread,
    select_to_replicate,
)

OBJECTIVES = {"fid": "minimize", "recall": "maximize"}


def record(number, fid, recall, anchor=None, again=()):
    rewards = {"fid": fid, "recall": recall, "fid_error": 0.5, "recall_error": 0.01}
    return Record(
        number,
        "COMPLETE",
        (),
        anchor,
        Choice((), "full", 1e-3),
        OBJECTIVES,
        rewards,
        replicates=tuple({"fid": f, "recall": r} for f, r in again),
    )


def test_the_front_and_full_fine_tuning_are_fine_tuned_again():
    trials = [
        record(0, 5.0, 0.9, "none"),
        record(1, 20.0, 0.5, "full"),
        record(2, 10.0, 0.95),
        record(3, 12.0, 0.6),
    ]
    assert [one.number for one in select_to_replicate(trials, 2)] == [1, 2]
    assert select_to_replicate(trials, 0) == []
    done = [replace(one, replicates=({}, {})) for one in trials]
    assert select_to_replicate(done, 2) == [] and [one.number for one in select_to_replicate(done, 3)] == [
        1,
        2,
    ]


def test_the_spread_is_pooled_within_choices():
    """By hand: two and three fine-tunings leave one and two degrees of freedom."""
    trials = [
        record(0, 10.0, 0.5, again=[(14.0, 0.7)]),
        record(1, 20.0, 0.4, again=[(21.0, 0.4), (25.0, 0.1)]),
        record(2, 0.0, 0.0),
    ]
    pooled = (statistics.variance([10, 14]) + 2 * statistics.variance([20, 21, 25])) / 3
    assert estimate_spread(trials) == pytest.approx(
        [
            pooled**0.5,
            ((statistics.variance([0.5, 0.7]) + 2 * statistics.variance([0.4, 0.4, 0.1])) / 3) ** 0.5,
        ]
    )
    assert estimate_spread(trials[2:]) is None
    assert average_fine_tunings(trials[1]) == pytest.approx([22.0, -0.3]) and average_fine_tunings(
        trials[2]
    ) == pytest.approx([0.0, 0.0])
    assert errors_by_luck(trials, estimate_spread(trials))[:, 0] == pytest.approx(
        [(pooled / n) ** 0.5 for n in (2, 3, 1)]
    )
    assert errors_by_luck(trials, None) == pytest.approx(np.zeros((3, 2)))


def test_the_model_is_told_of_the_spread_by_full_fine_tuning_too():
    """Which no point of the space stands for, and which is fine-tuned again in every study."""
    space = load_space("digits")
    choices = [Choice(("mid_attention",), "lora", rate, 2) for rate in (1e-3, 2e-3)]
    trials = [replace(record(i + 1, 10.0 + i, 0.5), choice=choice) for i, choice in enumerate(choices)]
    assert not gather_training_set(trials, SpaceEncoding(space), ()).own_errors.any()
    evidence = gather_training_set(
        [record(0, 20.0, 0.5, "full", again=[(24.0, 0.7)]), *trials], SpaceEncoding(space), ()
    )
    assert evidence.own_errors == pytest.approx(np.array([[8**0.5, 0.02**0.5]] * 2)) and evidence.values[
        :, 0
    ] == pytest.approx([10.0, 11.0])


def test_a_search_fine_tunes_its_front_again_once(study_file):
    """Asked for afterwards, of a finished study; what is there is not done again."""
    rewards = {"n_samples": 64, "sampling_steps": 1, "confirm": 0, "objectives": ["kid", "memorization"]}
    study = study_file(rewards=rewards, search={"trials": 1, "workers": 2})
    memcontrol("search", study)
    before = list_trials(study)
    assert all(trial["replicates"] == [] for trial in before)
    said = memcontrol("search", study, "search.replicates=2").stderr
    assert "standard deviation between fine-tunings of the same choice" in said
    again = [trial for trial in list_trials(study) if trial["replicates"]]
    assert (
        again and any(trial["anchor"] == "full" for trial in again) and len(list_trials(study)) == len(before)
    )
    for trial in again:
        results = [
            json.loads(Path(trial["run"], f"replicate-{i}", "result.json").read_text()) for i in (0, 1)
        ]
        assert trial["replicates"] == [result["rewards"] for result in results]
        kids = [trial["searched"]["kid"], *(rewards["kid"] for rewards in trial["replicates"])]
        assert len(set(kids)) == 3
        # other seeds of training, not only of sampling
        assert len({result["first_loss"] for result in results}) == 2
    times = {
        path: path.stat().st_mtime_ns
        for path in locate_study_folder(study, "small").glob("*/replicate-*/result.json")
    }
    # as after a crash before they were recorded
    with sqlite3.connect(locate_study_folder(study, "small") / "study.db") as database:
        database.execute("DELETE FROM study_system_attributes WHERE key LIKE 'memcontrol:replicates:%'")
    memcontrol("search", study, "search.replicates=2")
    assert [trial for trial in list_trials(study) if trial["replicates"]] == again
    assert {
        path: path.stat().st_mtime_ns
        for path in locate_study_folder(study, "small").glob("*/replicate-*/result.json")
    } == times
