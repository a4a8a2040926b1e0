"""What a search will take: the sum of its parts, by hand."""

import json
from dataclasses import replace

import pytest

from memcontrol.config.load import load_config
from memcontrol.core.jobs import Calibration, TrialCost
from memcontrol.core.space_yaml import load_space
from memcontrol.search.prediction import (
    describe_prediction,
    expect_front_size,
    find_last_end,
    format_duration,
    predict_search,
)

COST = TrialCost(
    setup_seconds=1.0,
    step_seconds=0.5,
    after_seconds=4.0,
    samples_bytes=1000,
    rest_bytes=5000,
    weights_bytes=2000,
    rounds_bytes=700,
)
ANCHORS = load_space("digits").list_anchors()


UNTRAINED = replace(COST, setup_seconds=0.0, step_seconds=0.0)
KINDS = {
    "none": (UNTRAINED,),
    "all": (COST,),
    "full": (replace(COST, step_seconds=1.0),),
    "sampled": (COST, replace(COST, step_seconds=0.3)),
}
CALIBRATION = Calibration(
    start_seconds=10.0,
    batch_size=64,
    shared_bytes=3000,
    peak_mib=500.0,
    by_kind=KINDS,
    two_batches=replace(UNTRAINED, after_seconds=7.0),  # a batch more costs 3 s
)


@pytest.mark.parametrize(
    "n_samples, two_seconds, expected",
    [(256, 3.0, 4.0), (256, 9.0, 16.0), (16, 9.0, 1.0), (16, 20.0, 1.0), (16, 3.0, 4.0)],
)
def test_prediction_is_within_what_batches_can_take_whatever_the_noise(n_samples, two_seconds, expected):
    """A batch takes 4 s, so a further one takes from 0 s to 4 s, even if two seemed to take less than one or
    more than twice as long; a quarter of a batch takes no negative time."""
    rewards = {"n_samples": n_samples, "confirm": 0}
    config = load_config({"name": "a", "data": "digits", "rewards": rewards, "search": {"trials": 2}})
    noisy = replace(CALIBRATION, two_batches=replace(UNTRAINED, after_seconds=two_seconds))
    assert predict_search(config, ANCHORS, [noisy]).runs["none"] == pytest.approx(expected)


def test_a_prediction_is_the_sum_of_its_parts():
    config = load_config(
        {
            "name": "a",
            "data": "digits",
            "inner": {"budget_images": 100, "batch_size": 10, "rounds": 1},
            "rewards": {"n_samples": 256, "confirm": 0},
            "search": {"trials": 2},
        }
    )
    found = predict_search(config, ANCHORS, [CALIBRATION])
    after = 4 + 3 * 3  # four batches
    assert found.runs == pytest.approx(
        {"none": after, "all": 1 + 5 + after, "full": 1 + 10 + after, "sampled": 1 + 4 + after}
    )
    assert found.seconds == pytest.approx(10 + after + 3 * (6 + after) + 3 * (11 + after) + 2 * (5 + after))
    assert (
        found.disk_mib * 2**20 == pytest.approx(3000 + 9 * (5000 + 4 * 1000))
        and found.checkpoints_mib * 2**20 == pytest.approx(700)
        and found.memory_mib == 500
        and found.n_confirmed == 0
    )
    again = config.replaced({"rewards.confirm": 2})
    assert predict_search(again, ANCHORS, [CALIBRATION]).seconds - found.seconds == pytest.approx(
        expect_front_size(5) * 2 * after
    )
    text = "\n".join(describe_prediction(found))
    assert "9 runs" in text and "500 MiB" in text and "none 13 s, all 19 s, full 24 s" in text


def test_prediction_takes_the_mean_of_its_workers_and_their_checkpoints_side_by_side():
    config = load_config(
        {
            "name": "a",
            "data": "digits",
            "inner": {"budget_images": 100, "batch_size": 10, "rounds": 1},
            "rewards": {"n_samples": 64, "confirm": 0},
            "search": {"trials": 0},
        }
    )
    slow = {kind: tuple(replace(cost, after_seconds=8.0) for cost in costs) for kind, costs in KINDS.items()}
    large = {**slow, "full": (replace(COST, step_seconds=1.0, after_seconds=8.0, rounds_bytes=900),)}
    other = replace(CALIBRATION, start_seconds=20.0, peak_mib=800.0, by_kind=large)
    found = predict_search(config, ANCHORS, [CALIBRATION, other])
    # one batch: nothing is stretched; after the last step 4 s on one worker, 8 s on the other
    assert found.runs == pytest.approx({"none": 6, "all": 12, "full": 17, "sampled": 11})
    # none, three times all, three times full: one worker ends at 6 + 12 + 17 + 17, the other at 12 + 12 + 17
    assert found.n_runs == {"none": 1, "all": 3, "full": 3, "sampled": 0}
    assert found.seconds == pytest.approx(15 + 52)
    assert found.checkpoints_mib * 2**20 == pytest.approx(2 * (700 + 900) / 2)
    assert found.memory_mib == 800 and found.n_workers == 2


def test_disk_is_less_where_only_the_front_keeps_its_weights_and_samples():
    keys = {"trials": 20, "keep": "front", "disk_gb": 1e-6}
    config = load_config({"name": "a", "data": "digits", "rewards": {"n_samples": 256}, "search": keys})
    found = predict_search(config, ANCHORS, [CALIBRATION])
    # of 27 runs with 5000 and 4 x 1000 bytes, an anchor's best each and the front of 23 keep 2000 + 4000
    n_kept = 3 + expect_front_size(23)
    assert found.disk_mib * 2**20 == pytest.approx(3000 + 27 * 3000 + n_kept * (2000 + 4000))
    assert "more than search.disk_gb, 1e-06: the search will stop" in describe_prediction(found)[-1]


@pytest.mark.parametrize("anchors, n_runs", [(["all"], 3), ([], 0)])
def test_only_the_searchs_own_anchors_are_predicted(anchors, n_runs):
    inner = {"budget_images": 100, "batch_size": 10, "rounds": 1}
    search = {"trials": 2, "anchors": anchors}
    rewards = {"n_samples": 256, "confirm": 0}
    config = load_config(
        {"name": "a", "data": "digits", "inner": inner, "rewards": rewards, "search": search}
    )
    known = {kind: costs for kind, costs in KINDS.items() if kind in ("none", "sampled", *anchors)}
    calibration = replace(CALIBRATION, by_kind=known)
    found = predict_search(config, load_space("digits").list_anchors(anchors), [calibration])
    after = 4 + 3 * 3  # four batches
    assert found.n_runs == dict.fromkeys(anchors, n_runs) | {"sampled": 2}
    assert found.seconds == pytest.approx(10 + n_runs * (6 + after) + 2 * (5 + after))


def test_calibration_survives_its_journey_as_json():
    assert Calibration.from_dict(json.loads(json.dumps(CALIBRATION.as_dict()))) == CALIBRATION


def test_jobs_go_to_the_first_free_worker():
    assert (
        find_last_end([3, 3, 3], 1) == 9
        and find_last_end([3, 3, 3], 2) == 6
        and find_last_end([1, 5, 1, 1], 2) == 5
        and find_last_end([], 4) == 0
    )


def test_a_front_is_never_larger_than_its_study():
    assert [expect_front_size(n) for n in (1, 2, 7, 23, 103)] == [1, 2, 5, 7, 10]


@pytest.mark.parametrize(
    "seconds, said", [(12, "12 s"), (99, "99 s"), (330, "5.5 min"), (7000, "1.9 h"), (400_000, "4.6 days")]
)
def test_times_are_said_in_fitting_units(seconds, said):
    assert format_duration(seconds) == said
