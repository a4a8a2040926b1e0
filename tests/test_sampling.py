"""What is tried next: never twice the same, the same for the same records, and drawn before it is needed."""

import math
import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from simulated import Clock
from test_study import MIXED, SPACE, opened, result

from benchmarks.sampling import measured
from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError, SpaceExhausted
from memcontrol.core.space_yaml import parse_space
from memcontrol.search import sampler
from memcontrol.search.optuna_samplers import mirror_record
from memcontrol.search.sampler import PrefetchedChoices, Sampler
from memcontrol.search.surrogate import winsorize
from memcontrol.study.record import Record
from memcontrol.study.trials import make_distributions

KINDS = ("auto", "gp", "tpe", "nsga2", "random")


def suggest(records, space=SPACE, seed=0, limits=(), kind="auto"):
    return Sampler(space, seed, 2, limits, kind).draw(records)


@pytest.mark.parametrize("kind", KINDS)
def test_suggestions_never_repeat_and_depend_on_records_and_seed_alone(kind, tmp_path):
    study, seen = opened(tmp_path), []
    for i in range(15):
        records = study.records()
        choice = suggest(records, kind=kind)
        assert choice == suggest(records, kind=kind)
        assert (
            choice.groups
            and set(choice.groups) <= set(SPACE.select_groups(choice.method))
            and not any(choice.is_same_as(other) for other in seen)
        )
        seen.append(choice)
        number = study.begin([choice], SPACE)
        if i % 3:
            study.finish(number, [result(choice, 10 - len(choice.groups), len(choice.groups) / 10)])
    assert len({suggest([], seed=seed, kind=kind) for seed in range(6)}) > 2


def test_a_space_that_holds_nothing_new_says_so(tmp_path):
    values = {
        "groups": {"a": "a"},
        "learning_rate": {"lora": [1e-3, 1.05e-3], "full": [1e-3, 1e-2]},
        "rank": [4],
    }
    space, study = parse_space(values, "one"), opened(tmp_path)
    study.begin([suggest(study.records(), space)], space)
    with pytest.raises(MemControlError, match="exhausted"):
        suggest(study.records(), space)


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_space_is_tried_to_its_last_choice(kind):
    """Three groups under one method and one learning rate hold seven choices, and a sampler repeats itself
    long before the last."""
    values = {
        "groups": {"a": "a", "b": "b", "c": "c"},
        "learning_rate": {"lora": [1e-3, 1.05e-3], "full": [1e-3, 1e-2]},
        "rank": [4],
    }
    space, records = parse_space(values, "three"), []
    for i in range(7):
        records.append(ended(Record(i, "RUNNING", (suggest(records, space, kind=kind),)).as_running(), i))
    assert len({record.choice.groups for record in records}) == 7
    with pytest.raises(MemControlError, match="exhausted"):
        suggest(records, space, kind=kind)


def test_the_samplers_coordinates_give_the_choice_back(tmp_path):
    study = opened(tmp_path)
    choice = Choice(("down_attention", "up_resnet"), "lora", 2.5e-3, 8)
    study.begin([choice], SPACE)
    frozen = mirror_record(study.records()[0], SPACE)
    assert (
        frozen.params.keys() == make_distributions(SPACE).keys()
        and SPACE.make_choice_at(frozen.params) == choice
    )
    low, high = SPACE.learning_rate["lora"]
    assert math.isclose(frozen.params["rate"], math.log(2.5e-3 / low) / math.log(high / low))


def test_mixed_suggestions_are_recorded_as_they_are(tmp_path):
    study = opened(tmp_path)
    for _ in range(10):
        choice = suggest(study.records(), MIXED)
        number = study.begin([choice], MIXED)
        record = study.records()[number]
        assert record.choice == choice and MIXED.make_choice_at(
            mirror_record(record, MIXED).params
        ).is_same_as(choice)
        study.finish(number, [result(choice, 10 - len(choice.groups))])


def test_limits_steer_the_sampler_away(tmp_path):
    """Among many trials of two methods, of which one always breaks a limit, the sampler asks for the
    other."""
    study = opened(tmp_path, rewards={"limits": {"copy_rate": 0.02}})
    rng = random.Random(0)
    for i in range(24):
        method = ("lora", "attention")[i % 2]
        choice = SPACE.choice(SPACE.select_groups(method)[: 1 + i % 3], method, rng.random())
        told = result(choice, 10.0)
        told["rewards"]["copy_rate"] = 0.01 if method == "lora" else 0.5
        study.finish(study.begin([choice], SPACE), [told])
    records = study.records()
    counts = [suggest(records, seed=seed, limits=study.limits).methods[0] for seed in range(12)]
    assert counts.count("lora") > 9


def ended(record, i):
    return replace(
        record,
        state="COMPLETE",
        objectives={"fid": "minimize", "memorization": "minimize"},
        searched={"fid": float(i * 7 % 5), "memorization": float(i * 3 % 4)},
    )


@pytest.mark.parametrize("kind", ["auto", "tpe", "random"])
def test_a_sampler_that_lives_on_draws_what_a_new_one_does(kind):
    """Trials end in another order than they began in, some fail; the last counts as running whether it has
    ended or not."""
    living, records = Sampler(SPACE, 3, 2, (), kind), []
    for i in range(16):
        choice = living.draw(records)
        assert choice == Sampler(SPACE, 3, 2, (), kind).draw(records)
        if records:
            assert choice == Sampler(SPACE, 3, 2, (), kind).draw([*records[:-1], ended(records[-1], 1)])
        records.append(Record(i, "RUNNING", (choice,), choice=choice))
        if i % 3 == 2:
            records[i - 2 : i] = [
                replace(records[i - 2], state="FAIL") if i == 5 else ended(records[i - 2], i),
                ended(records[i - 1], i),
            ]


class Slow:
    """A sampler that draws when it is let."""

    def __init__(self):
        self.let, self.seen = threading.Semaphore(0), []

    def prepare_draw(self, records, hurried):
        self.seen.append([record.number for record in records])

        def draw():
            self.let.acquire()
            if len(self.seen) == 4:
                raise SpaceExhausted("exhausted")
            return len(self.seen)

        return draw


def test_choices_are_drawn_while_trials_run():
    slow = Slow()
    ahead = PrefetchedChoices(slow)
    for _ in range(3):
        ahead.prepare([], 2)  # one draw at a time
    assert slow.seen == [[]] and not ahead.ready
    slow.let.release()
    while not ahead.ready:
        ahead.prepare([], 2)
        time.sleep(0.01)
    assert slow.seen == [[], [0]]  # the one that is ready counts as a running trial
    assert ahead.take([]) == 1  # without waiting for the second
    threading.Timer(0.2, slow.let.release).start()
    assert ahead.take([]) == 2
    slow.let.release(5)
    assert ahead.take([]) == 3
    with pytest.raises(SpaceExhausted):
        ahead.take([])
    ahead.close()


@pytest.mark.parametrize(
    "family, kind, least",
    [("mask", "auto", 0.95), ("mask", "tpe", 0.85), ("mask with settings", "auto", 0.95)],
)
def test_the_front_of_a_mask_problem_is_found_in_fifty_trials(family, kind, least, monkeypatch):
    """13 groups whose gains fade together against what they cost, or 9 with a budget and a ratio beside; the
    true front by brute force, four workers."""
    monkeypatch.setattr("benchmarks.sampling.CHECKS", (50,))
    found = [measured((family, kind, seed)) for seed in (0, 1)]
    assert sum(one["ratios"][49] for one in found) / 2 >= least and not any(one["twice"] for one in found)


def test_a_sampler_that_learns_beats_one_that_does_not():
    """NSGA-II needs its generations: after a hundred trials it is above chance."""
    ratios = {
        kind: sum(measured(("mubqp", kind, seed))["ratios"][99] for seed in range(3))
        for kind in ("tpe", "nsga2", "random")
    }
    assert ratios["tpe"] > ratios["nsga2"] > ratios["random"]


def test_sampler_hurries_while_draws_take_longer_than_trials(monkeypatch):
    """A model that takes longer for a choice than four workers for a trial is used now and then only; the
    rest is drawn in a hurry. By a clock that only draws and trials move."""
    clock, hurried = Clock(), []
    monkeypatch.setattr(sampler, "time", clock)

    class Tardy:
        def prepare_draw(self, records, hurry):
            hurried.append(hurry)
            return lambda: clock.sleep(0 if hurry else 0.2)

    ahead = PrefetchedChoices(Tardy())
    for _ in range(14):
        ahead.take([])
        clock.sleep(0.01)
    assert not any(hurried[:9]) and hurried[9:] == [True] * 5
    for _ in range(12):
        ahead.prepare([], 1)
        ahead.drawing.result()  # it is drawn while trials run
        clock.sleep(0.05)
        ahead.take([])
    ahead.close()
    assert not hurried[-1]  # it had the time again


def test_the_gaussian_process_wants_two_objectives():
    with pytest.raises(MemControlError, match="gp models two objectives, and there are 3"):
        Sampler(SPACE, 0, 3, (), "gp")
    assert Sampler(SPACE, 0, 3).draw([]).groups


def test_what_is_far_from_the_front_is_cut_and_nothing_else():
    # medians 2.5 and 2.5, so cut at 2.5 + 3 x 1.5 = 7
    values = np.array([[1.0, 4], [2, 3], [3, 2], [100, 1]])
    assert winsorize(values).tolist() == [[1, 4], [2, 3], [3, 2], [7, 1]]
