"""What a search will take: the sum of its parts, by hand."""

import pytest

from memcontrol.core.config import load_config
from memcontrol.core.space_yaml import load_space
from memcontrol.search.prediction import (
    describe_prediction,
    expect_front_size,
    find_last_end,
    format_duration,
    predict_search,
)

PART = {
    "setup": 1.0,
    "step": 0.5,
    "after": 4.0,
    "samples_bytes": 1000,
    "rest_bytes": 5000,
    "rounds_bytes": 700,
}
ANCHORS = load_space("digits").anchors()


def calibration(**keys):
    # a batch more costs 3 s
    none, twice = ({**PART, "setup": 0.0, "step": 0.0, "after": after} for after in (4.0, 7.0))
    return {
        "start": 10.0,
        "batch": 64,
        "shared_bytes": 3000,
        "peak_mib": 500.0,
        "none": [none],
        "twice": [twice],
        "all": [PART],
        "full": [{**PART, "step": 1.0}],
        "sampled": [PART, {**PART, "step": 0.3}],
        **keys,
    }


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
    found = predict_search(config, ANCHORS, [calibration()])
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
    assert predict_search(again, ANCHORS, [calibration()]).seconds - found.seconds == pytest.approx(
        expect_front_size(5) * 2 * after
    )
    text = "\n".join(describe_prediction(found))
    assert "9 runs" in text and "500 MiB" in text and "none 13 s, all 19 s, full 24 s" in text


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
