"""What drives which reward, on rewards whose effects are known."""

from dataclasses import replace

import numpy as np
import pytest
from test_study import MIXED, SPACE

from memcontrol.core.errors import MemControlError
from memcontrol.search.encoding import SpaceEncoding
from memcontrol.search.importance import label_change, list_untold, measure_importance
from memcontrol.study.record import Record


def make_records(space, n, rewards, seed=0):
    rng, points, found = np.random.default_rng(seed), SpaceEncoding(space), []
    import random

    rows = points.canonicalize(points.random(2 * n, random.Random(seed)))
    for row in rng.permutation(rows)[:n]:
        choice = points.choice(row)
        if choice.groups:
            fid, memorization = rewards(choice, points.row(choice))
            searched = {"fid": fid + rng.normal(0, 0.05), "memorization": memorization, "fid_error": 0.05}
            record = Record(len(found), "RUNNING", (choice,)).as_running()
            found.append(
                replace(
                    record,
                    state="COMPLETE",
                    objectives={"fid": "minimize", "memorization": "minimize"},
                    searched=searched,
                )
            )
    return found


def test_known_effects_are_found_within_their_errors():
    def rewards(choice, row):
        return 10 - 2 * ("up_attention" in choice.groups) - 1 * row[-1], 0.1 * (
            "down_attention" in choice.groups
        )

    effects = {
        effect.coordinate: effect for effect in measure_importance(make_records(SPACE, 60, rewards), SPACE)
    }
    true = {
        "up_attention": (-2, 0),
        "down_attention": (0, 0.1),
        "mid_attention": (0, 0),
        "rate": (-1, 0),
        "rank": (0, 0),
    }
    for name, (fid, memorization) in true.items():
        for objective, expected in (("fid", fid), ("memorization", memorization)):
            found = effects[name].effects[objective]
            reach = max(3 * found.error, 0.02 if objective == "fid" else 0.002)
            assert abs(found.value - expected) < reach, (name, objective, found)
    driver = effects["up_attention"].effects["fid"]
    assert abs(driver.value) > 5 * driver.error
    assert effects["up_attention"].as_dict()["to"] is True


def test_only_changes_that_a_choice_can_have_count():
    """c knows difffit alone, so what its method changes to is no contrast; a has three methods."""
    effects = measure_importance(
        make_records(MIXED, 50, lambda choice, row: (float(len(choice.groups)), 0.1)), MIXED
    )
    assert {effect.coordinate for effect in effects} >= {"a", "b", "c", "a.method", "rate"} and all(
        effect.n_choices > 0 for effect in effects
    )
    effect = next(effect for effect in effects if effect.coordinate == "a").effects["fid"]
    assert effect.value == pytest.approx(1, abs=0.2)


def test_too_few_trials_are_named():
    with pytest.raises(MemControlError, match="importance needs 6 ended trials"):
        measure_importance(make_records(SPACE, 4, lambda choice, row: (1.0, 0.1)), SPACE)


def test_what_no_two_trials_differ_in_is_left_out_and_rounding_is_nothing():
    records = make_records(SPACE, 30, lambda choice, row: (float(len(choice.groups)), 0.1))
    same = [record for record in records if "up_attention" in record.chosen.groups]
    found = {effect.coordinate: effect.effects for effect in measure_importance(same, SPACE)}
    assert list_untold(same, SPACE) == ["up_attention"] and "up_attention" not in found
    assert list_untold(records, SPACE) == []
    assert all(effect["memorization"].value == 0 for effect in found.values())  # all are 0.1
    assert any(effect["fid"].value for effect in found.values())


def test_a_setting_that_is_a_mapping_is_said_in_words():
    label = label_change("inner.skip", None, '{"bins": 20, "ratio": 1.5}')
    assert label == "inner.skip: off to bins 20, ratio 1.5"
    assert label_change("inner.skip", None, "{}") == "inner.skip: off to on"
