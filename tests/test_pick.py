"""Picking: the rule's conditions one by one, limits, numbers."""

from dataclasses import replace

import pytest

from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.study.pareto import Limit
from memcontrol.study.pick import choose_trial, find_trial, select_front, select_ties, select_to_confirm
from memcontrol.study.record import Record


def record(number, fid, memorization, anchor=None, low=0.0, state="COMPLETE"):
    rewards = {"fid": fid, "memorization": memorization, "copy_rate_low": low, "copy_rate_line": 0.01}
    return Record(
        number,
        state,
        (),
        anchor,
        Choice((), "full", 1e-3),
        {"fid": "minimize", "memorization": "minimize"},
        rewards,
    )


NONE, FULL = record(0, 60, 0.0, "none"), record(2, 16, 0.25, "full", low=0.1)


def test_the_knee_is_about_as_good_as_full_fine_tuning_and_does_not_copy():
    good = record(4, 15.0, 0.09)
    trials = [
        NONE,
        record(1, 14.0, 0.12, "all", low=0.02),
        FULL,
        record(3, 17.0, 0.03),
        good,
        record(5, 20.0, 0.02),
    ]
    assert choose_trial(trials) is good
    assert choose_trial(trials, "quality").number == 1 and choose_trial(trials, "memorization").number == 5
    assert choose_trial(trials, limits=["memorization<=0.025"]).number == 5


def test_conditions_that_no_trial_meets_are_dropped():
    assert choose_trial([NONE, FULL, record(3, 17.0, 0.03)]).number == 2
    assert choose_trial([NONE, FULL, record(3, 16.7, 0.03)]).number == 3
    assert choose_trial([FULL, record(3, 15.0, 0.03, low=0.5), record(4, 15.5, 0.02, low=0.5)]).number in (
        3,
        4,
    )
    assert choose_trial([record(3, 15.0, 0.03)]).number == 3


def test_what_did_not_finish_or_does_not_train_is_never_picked():
    assert choose_trial([NONE, FULL, record(3, 0, 0, state="PRUNED")]) is FULL
    with pytest.raises(MemControlError, match="only the untrained base"):
        choose_trial([NONE])
    with pytest.raises(MemControlError, match="no trial of this study has finished"):
        choose_trial([record(3, 0, 0, state="RUNNING")])


def test_limits_that_none_keeps_say_what_was_reached():
    with pytest.raises(MemControlError, match="no finished trial keeps fid<=1; the best reached: fid 16"):
        choose_trial([FULL, record(3, 17.0, 0.03)], limits=["fid<=1"])
    with pytest.raises(MemControlError, match="unknown reward 'beauty'"):
        choose_trial([FULL], limits=["beauty<=1"])
    with pytest.raises(MemControlError, match="allowed: knee, quality, memorization"):
        choose_trial([FULL], rule="elbow")


def test_by_number():
    assert find_trial([NONE, FULL], 2) is FULL
    with pytest.raises(MemControlError, match="trial 7 is not among the finished ones: 0, 2"):
        find_trial([NONE, FULL], 7)


def test_what_is_confirmed_until_the_front_stands():
    """The lucky trial falls back when it is measured again, and the one behind it is measured in its turn."""
    lucky, second, far = record(3, 12.0, 0.1), record(4, 13.0, 0.1), record(5, 30.0, 0.3)
    trials = [NONE, FULL, lucky, second, far]
    assert [r.number for r in select_to_confirm(trials)] == [0, 2, 3]
    again = [
        replace(r, confirmed={**r.searched, "fid": 15.0 if r is lucky else r.searched["fid"]})
        if r in (NONE, FULL, lucky)
        else r
        for r in trials
    ]
    assert [r.number for r in select_front(again)] == [4, 0] and [
        r.number for r in select_to_confirm(again)
    ] == [4]
    again[3] = replace(second, confirmed=second.searched)
    assert select_to_confirm(again) == []
    limited = [record(3, 12.0, 0.1, low=0.2), record(4, 13.0, 0.2), record(5, 14.0, 0.3)]
    assert [r.number for r in select_to_confirm(limited, [Limit("copy_rate_low", "<=", 0.1)])] == [3, 4]


def test_pick_trusts_what_was_measured_again():
    known = replace(record(4, 13.0, 0.1), confirmed=record(4, 13.0, 0.1).searched)
    assert choose_trial([FULL, record(3, 12.0, 0.05), known]) is known
    assert choose_trial([FULL, record(3, 12.0, 0.05)]).number == 3


def test_ties_are_those_whose_place_the_errors_leave_open():
    def measured(number, fid, error, memorization=0.1):
        one = record(number, fid, memorization)
        return replace(one, searched={**one.searched, "fid_error": error, "memorization_error": 0.01})

    best, near, clear = measured(1, 10.0, 1.0), measured(2, 12.0, 1.0), measured(3, 13.0, 1.0)
    # 2 sqrt(1 + 1) = 2.83
    assert select_front([best, near, clear]) == [best] and select_ties([best, near, clear]) == [near]
    assert (
        select_ties([best, measured(2, 12.0, 0.1)]) == [measured(2, 12.0, 0.1)]
        and select_ties([measured(1, 10.0, 0.1), measured(2, 12.0, 0.1)]) == []
    )
    lucky = measured(4, 20.0, 1.0, 0.099)  # on the front by less than its error, and clearly worse otherwise
    firm = measured(5, 20.0, 1.0, 0.02)
    assert (
        select_front([best, lucky]) == [best, lucky]
        and select_ties([best, lucky]) == [lucky]
        and select_ties([best, firm]) == []
    )
