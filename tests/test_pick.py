"""Picking: the rule's conditions one by one, limits, numbers."""

import pytest

from memcontrol.errors import MemControlError
from memcontrol.pick import by_number, pick
from memcontrol.space import Choice
from memcontrol.study import Record


def record(number, fid, memorization, anchor=None, low=0.0, state="COMPLETE"):
    values = {"fid": fid, "memorization": memorization} if state == "COMPLETE" else {}
    rewards = {**values, "copy_rate_low": low, "copy_rate_line": 0.01}
    return Record(number, state, (), anchor, Choice((), "full", 1e-3), values, rewards)


NONE, FULL = record(0, 60, 0.0, "none"), record(2, 16, 0.25, "full", low=0.1)


def test_the_knee_is_about_as_good_as_full_fine_tuning_and_does_not_copy():
    good = record(4, 15.0, 0.09)
    trials = [NONE, record(1, 14.0, 0.12, "all", low=0.02), FULL, record(3, 17.0, 0.03), good, record(5, 20.0, 0.02)]
    assert pick(trials) is good
    assert pick(trials, "quality").number == 1 and pick(trials, "memorization").number == 5
    assert pick(trials, limits=["memorization<=0.025"]).number == 5


def test_conditions_that_no_trial_meets_are_dropped():
    assert pick([NONE, FULL, record(3, 17.0, 0.03)]).number == 2
    assert pick([NONE, FULL, record(3, 16.7, 0.03)]).number == 3
    assert pick([FULL, record(3, 15.0, 0.03, low=0.5), record(4, 15.5, 0.02, low=0.5)]).number in (3, 4)
    assert pick([record(3, 15.0, 0.03)]).number == 3


def test_what_did_not_finish_or_does_not_train_is_never_picked():
    assert pick([NONE, FULL, record(3, 0, 0, state="PRUNED")]) is FULL
    with pytest.raises(MemControlError, match="only the untrained base"):
        pick([NONE])
    with pytest.raises(MemControlError, match="no trial of this study has finished"):
        pick([record(3, 0, 0, state="RUNNING")])


def test_limits_that_none_keeps_say_what_was_reached():
    with pytest.raises(MemControlError, match="no finished trial keeps fid<=1; the least reached: fid 16"):
        pick([FULL, record(3, 17.0, 0.03)], limits=["fid<=1"])
    with pytest.raises(MemControlError, match="unknown reward 'beauty'"):
        pick([FULL], limits=["beauty<=1"])
    with pytest.raises(MemControlError, match="allowed: knee, quality, memorization"):
        pick([FULL], rule="elbow")


def test_by_number():
    assert by_number([NONE, FULL], 2) is FULL
    with pytest.raises(MemControlError, match="trial 7 is not among the finished ones: 0, 2"):
        by_number([NONE, FULL], 7)
