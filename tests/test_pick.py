"""Picking: the rule's conditions one by one, limits, numbers."""

from dataclasses import replace

import pytest

from memcontrol.errors import MemControlError
from memcontrol.pareto import Limit
from memcontrol.picking import by_number, front_of, pick, ties_of, to_confirm
from memcontrol.space import Choice
from memcontrol.study import Record


def record(number, fid, memorization, anchor=None, low=0.0, state="COMPLETE"):
    rewards = {"fid": fid, "memorization": memorization, "copy_rate_low": low, "copy_rate_line": 0.01}
    return Record(number, state, (), anchor, Choice((), "full", 1e-3), {"fid": "minimize", "memorization": "minimize"}, rewards)


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
    with pytest.raises(MemControlError, match="no finished trial keeps fid<=1; the best reached: fid 16"):
        pick([FULL, record(3, 17.0, 0.03)], limits=["fid<=1"])
    with pytest.raises(MemControlError, match="unknown reward 'beauty'"):
        pick([FULL], limits=["beauty<=1"])
    with pytest.raises(MemControlError, match="allowed: knee, quality, memorization"):
        pick([FULL], rule="elbow")


def test_by_number():
    assert by_number([NONE, FULL], 2) is FULL
    with pytest.raises(MemControlError, match="trial 7 is not among the finished ones: 0, 2"):
        by_number([NONE, FULL], 7)


def test_what_is_confirmed_until_the_front_stands():
    """The lucky trial falls back when it is measured again, and the one behind it is measured in its turn."""
    lucky, second, far = record(3, 12.0, 0.1), record(4, 13.0, 0.1), record(5, 30.0, 0.3)
    trials = [NONE, FULL, lucky, second, far]
    assert [r.number for r in to_confirm(trials)] == [0, 2, 3]
    again = [replace(r, confirmed={**r.searched, "fid": 15.0 if r is lucky else r.searched["fid"]}) if r in (NONE, FULL, lucky) else r for r in trials]
    assert [r.number for r in front_of(again)] == [4, 0] and [r.number for r in to_confirm(again)] == [4]
    again[3] = replace(second, confirmed=second.searched)
    assert to_confirm(again) == []
    limited = [record(3, 12.0, 0.1, low=0.2), record(4, 13.0, 0.2), record(5, 14.0, 0.3)]
    assert [r.number for r in to_confirm(limited, [Limit("copy_rate_low", "<=", 0.1)])] == [3, 4]


def test_pick_trusts_what_was_measured_again():
    known = replace(record(4, 13.0, 0.1), confirmed=record(4, 13.0, 0.1).searched)
    assert pick([FULL, record(3, 12.0, 0.05), known]) is known
    assert pick([FULL, record(3, 12.0, 0.05)]).number == 3


def test_ties_are_those_whose_place_the_errors_leave_open():
    def measured(number, fid, error, memorization=0.1):
        one = record(number, fid, memorization)
        return replace(one, searched={**one.searched, "fid_error": error, "memorization_error": 0.01})

    best, near, clear = measured(1, 10.0, 1.0), measured(2, 12.0, 1.0), measured(3, 13.0, 1.0)
    assert front_of([best, near, clear]) == [best] and ties_of([best, near, clear]) == [near]  # 2 sqrt(1 + 1) = 2.83
    assert ties_of([best, measured(2, 12.0, 0.1)]) == [measured(2, 12.0, 0.1)] and ties_of([measured(1, 10.0, 0.1), measured(2, 12.0, 0.1)]) == []
    lucky = measured(4, 20.0, 1.0, 0.099)  # on the front by less than its error, and clearly worse otherwise
    firm = measured(5, 20.0, 1.0, 0.02)
    assert front_of([best, lucky]) == [best, lucky] and ties_of([best, lucky]) == [lucky] and ties_of([best, firm]) == []
