"""Picking: the rule's conditions one by one, limits, numbers."""

import math
import random
from dataclasses import replace

import pytest

from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.study.pareto import Limit
from memcontrol.study.pick import choose_trial, find_trial, select_front, select_ties, select_to_confirm
from memcontrol.study.record import Record
from memcontrol.view.tables import make_study_table


def record(number, fid, memorization, anchor=None, low=0.0, state="COMPLETE", **more):
    """Errors of FIDs make a difference of 0.8 one that is seen."""
    rewards = {
        "fid": fid,
        "fid_error": 0.3,
        "memorization": memorization,
        "copy_rate_low": low,
        "copy_rate_line": 0.01,
    }
    return Record(
        number,
        state,
        (),
        anchor,
        Choice((), "full", 1e-3),
        {"fid": "minimize", "memorization": "minimize"},
        rewards | more,
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


def pair(full, mask, copying, scale=1.0, shift=0.0, error=None, none=None):
    """Full fine-tuning and a mask, (first objective, M, copies?) each, in other units of the first
    objective."""

    def make(number, given, anchor=None):
        quality, memorization, copies = given
        known = {} if error is None else {"fid_error": scale * error}
        one = record(number, scale * quality + shift, memorization, anchor, **known)
        p = 0.001 if copies else 0.4
        searched = {**one.searched, "copying_p": p, "clear_copy_rate": 0.0}
        if error is None:
            del searched["fid_error"]
        return replace(one, searched=searched)

    trials = [make(2, (*full, copying[0]), "full"), make(3, (*mask, copying[1]))]
    return trials if none is None else [make(0, (*none, False), "none"), *trials]


@pytest.mark.parametrize("scale", (1.0, 1e-3, 1e3))
@pytest.mark.parametrize("shift", (0.0, -200.0, 1e-4))
@pytest.mark.parametrize("error", (None, 1.5))
@pytest.mark.parametrize("none", (None, (300.0, 0.0)))
def test_units_and_origin_of_an_objective_change_nothing(scale, shift, error, none):
    """Full fine-tuning at 200 copies much; a mask at 203 hardly, whatever the FID is measured in."""
    trials = pair((200.0, 0.40), (203.0, 0.03), (True, True), scale, shift, error, none)
    assert choose_trial(trials).number == 3
    worse = pair((200.0, 0.40), (260.0, 0.03), (True, True), scale, shift, 1.5, none)
    assert choose_trial(worse).number == 2


def test_the_knee_is_defined_where_full_fine_tuning_is_among_the_best():
    """A lies a tenth before it and copies, B nine tenths behind it and hardly does."""
    full, a, b = record(2, 20.0, 0.40, "full"), record(3, 19.9, 0.30), record(4, 20.9, 0.05)
    copying = {"copying_p": 0.001, "clear_copy_rate": 0.0, "fid_error": 1.0}
    trials = [replace(one, searched={**one.searched, **copying}) for one in (full, a, b)]
    assert choose_trial(trials).number == 4


def test_what_is_worse_within_its_error_is_no_worse():
    full = record(2, 0.0001, 0.2, "full", copying_p=0.0025, copy_rate=0.2, fid_error=0.003)
    mask = record(3, 0.002, 0.01, copying_p=0.4, copy_rate=0.01, fid_error=0.003)
    assert choose_trial([full, mask]).number == 3


def test_copying_goes_by_the_permuted_labels_and_by_clear_copies():
    """The clean one is the farthest from the knee, where the condition is dropped since all copy."""
    clean, sure, clear = (
        record(i, 15.0 + i / 20, memorization, copying_p=p, clear_copy_rate=rate)
        for i, (memorization, p, rate) in enumerate([(0.3, 0.05, 0.0), (0.1, 0.04, 0.0), (0.05, 0.5, 0.01)])
    )
    assert choose_trial([sure, clear, clean]) is clean
    copying = replace(clean, searched={**clean.searched, "copying_p": 0.04})
    assert choose_trial([sure, clear, copying]) is clear


def test_what_did_not_finish_or_does_not_train_is_never_picked():
    assert choose_trial([NONE, FULL, record(3, 0, 0, state="PRUNED")]) is FULL
    with pytest.raises(MemControlError, match="only the untrained base"):
        choose_trial([NONE])
    with pytest.raises(MemControlError, match="no trial of this study has finished"):
        choose_trial([record(3, 0, 0, state="RUNNING")])


def test_limits_that_none_keeps_say_what_was_reached():
    with pytest.raises(MemControlError, match="no finished trial keeps fid<=1; the best reached: fid 16"):
        choose_trial([FULL, record(3, 17.0, 0.03)], limits=["fid<=1"])
    with pytest.raises(MemControlError, match="unknown reward 'beauty'; memcontrol rewards lists all$"):
        choose_trial([FULL], limits=["beauty<=1"])
    with pytest.raises(MemControlError, match="unknown reward 'memorisation'; did you mean memorization\\?"):
        choose_trial([FULL], limits=["memorisation<=1"])
    with pytest.raises(MemControlError, match="this study did not measure membership_auc"):
        choose_trial([FULL], limits=["membership_auc<=0.6"])
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


@pytest.mark.parametrize("seed", range(8))
def test_ties_of_random_trials_against_brute_force(seed):
    rng = random.Random(seed)
    trials = [
        record(i, rng.gauss(0, 1), rng.gauss(0, 0.1), fid_error=rng.random(), memorization_error=0.05)
        for i in range(60)
    ]

    def beats(a, b):
        reach = [2 * math.hypot(*both) for both in zip(a.errors, b.errors)]
        gains = [y - x for x, y in zip(a.losses, b.losses)]
        return any(g > r for g, r in zip(gains, reach)) and not any(-g > r for g, r in zip(gains, reach))

    front = select_front(trials)
    expected = [one for one in trials if (one in front) == any(beats(other, one) for other in trials)]
    assert select_ties(trials) == expected


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


def test_each_mark_of_a_trial_has_its_own_place():
    """Two on the front of which one is there by chance only, one off it by chance, one off it; the pick was
    measured again."""
    best, lucky = record(4, 10.0, 0.10), record(5, 12.0, 0.0999, memorization_error=0.02)
    near, far = record(6, 10.1, 0.11, memorization_error=0.02), record(7, 30.0, 0.3)
    picked = replace(best, confirmed=best.searched)
    rows = make_study_table([picked, lucky, near, far], 1, "", picked).rows
    assert [name for name, *_ in rows] == [">* +4", "  = 6", " *= 5", "    7"]
