"""Owns how Optuna's trials and our records become each other: what a trial is called, holds and shows."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from memcontrol.config.differing import flatten_keys
from memcontrol.core.choice import ANCHORS, EVERYTHING, Choice
from memcontrol.core.space import Coordinate, SearchSpace
from memcontrol.study.foreign import ForeignTrial
from memcontrol.study.optuna_private import ENQUEUED, get_trial_id
from memcontrol.study.pareto import Limit
from memcontrol.study.record import Record, add_result, format_time

# before the names of our attributes: system attributes, since dashboards print user attributes whole
OWN = "memcontrol:"


def compute_excesses(rewards: dict[str, float], limits: Sequence[Limit]) -> dict[str, float]:
    """How far each limited reward lies beyond its limit; at most 0 where it keeps it."""
    return {limit.reward: limit.excess(rewards[limit.reward]) for limit in limits if limit.reward in rewards}


def select_own(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Ours among Optuna's system attributes."""
    return {name.removeprefix(OWN): value for name, value in attributes.items() if name.startswith(OWN)}


def drop_params(trial: optuna.trial.FrozenTrial) -> optuna.trial.FrozenTrial:
    bare = copy.copy(trial)
    bare.params, bare.distributions = {}, {}
    return bare


def make_foreign(trial: optuna.trial.FrozenTrial) -> ForeignTrial:
    enqueued = trial.system_attrs.get(ENQUEUED) if trial.state == TrialState.WAITING else None
    asked = dict(enqueued) if isinstance(enqueued, Mapping) else None
    return ForeignTrial(trial.number, get_trial_id(trial), asked)


def make_record(trial: optuna.trial.FrozenTrial, objectives: dict[str, str]) -> Record:
    attributes = select_own(trial.system_attrs)
    candidates = tuple(Choice.from_dict(values) for values in attributes.get("candidates", ()))
    result, state = attributes.get("result", {}), trial.state.name
    anchor = trial.user_attrs.get("anchor")
    if trial.state.is_finished() and not result:
        reason = f"another program told it {state}, without a result of its run"
        result = {"reason": reason, "choice": candidates[0].as_dict()}
        state = TrialState.FAIL.name
    begun = Record(
        trial.number,
        "RUNNING",
        candidates,
        anchor if anchor in ANCHORS else None,
        objectives=objectives,
        begun=format_time(trial.datetime_start),
        enqueued=ENQUEUED in trial.system_attrs,
    ).as_running()
    return add_result(replace(begun, state=state, ended=format_time(trial.datetime_complete)), result)


def make_attributes(record: Record) -> dict[str, float]:
    """What plain Optuna shows of a finished trial beside its values: every reward, and, where objectives were
    measured again, what the search had measured."""
    searched = {f"{name} (searched)": record.searched[name] for name in record.objectives}
    return record.rewards | (searched if record.confirmed else {})


def describe_coordinates(choice: Choice | None, space: SearchSpace) -> dict[str, Any]:
    """A choice in columns: each group as true or false, what a group differs in, and every other setting."""
    if choice is None:
        return dict.fromkeys(f"group.{name}" for name in space.groups)
    values = choice.as_dict()
    values.pop("groups")
    on = {f"group.{name}": bool({name, EVERYTHING} & set(choice.groups)) for name in space.groups}
    return on | flatten_keys(values)


def make_readable_params(choice: Choice, space: SearchSpace) -> dict[str, Any]:
    """The choice as the dashboard shows it: which groups are on, how they are trained, and the learning
    rate."""
    own = dict(choice.settings)
    point = {} if choice.is_outside else space.find_point(choice)
    left_out = {"rate", *(space.over.keys() - own)} | ({"rank"} if choice.rank is None else set())
    free = {name: own[name] for name in own if name in space.free}
    shown = {name: value for name, value in point.items() if name not in left_out}
    return shown | free | {"learning_rate": choice.learning_rate}


def make_readable_distributions(params: dict[str, Any], space: SearchSpace) -> dict[str, BaseDistribution]:
    lows, highs = zip(*space.learning_rate.values())
    found = make_distributions(space) | {"learning_rate": FloatDistribution(min(lows), max(highs), log=True)}
    # as numbers, of which a later search may have more; categories have to stay as they were
    for name, one in space.free.items():
        shares: list[Any] = sorted(one.options)
        found[name] = FloatDistribution(float(shares[0]), float(shares[-1]))
    return {name: found[name] for name in params}


def make_distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    found: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(options) for name, options in space.list_coordinates().items()
    }
    found |= {name: _make_distribution(one) for name, one in space.over.items() if one.limits}
    return found | {"rate": FloatDistribution(0, 1)}


def _make_distribution(coordinate: Coordinate) -> BaseDistribution:
    """Of a range, whose grid the space finds for any number in it."""
    assert coordinate.limits is not None, "it is one"
    low, high = coordinate.limits
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=coordinate.log)
    return FloatDistribution(low, high, log=coordinate.log)
