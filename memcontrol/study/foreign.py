"""Owns what is made of trials that other programs enqueue, ask for or tell: plain Optuna, or a dashboard that
may write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.space import SearchSpace


@dataclass(frozen=True)
class ForeignTrial:
    """A trial that another program made. One that waits has what it was enqueued with."""

    number: int
    trial_id: int
    enqueued: dict[str, Any] | None = None

    def read_choice(self, space: SearchSpace) -> Choice:
        """What it is enqueued with, as trials show their choices: groups as true and false, a method, a rank,
        a learning rate. Groups that it leaves out are off; of the rest, the first method, the middle rank and
        rate stand in. Raises MemControlError where the space has no such choice."""
        given = dict(self.enqueued or {})
        rate = given.pop("learning_rate", None)
        options = space.list_coordinates()
        for name, value in given.items():
            if name in space.over and space.over[name].limits is not None:
                given[name] = _read_in_range(name, value, space)
                continue
            if name not in options or value not in options[name]:
                allowed = list(options[name]) if name in options else ", ".join((*options, "learning_rate"))
                raise MemControlError(f"{name} is {value!r}; allowed: {allowed}")
            given[name] = options[name][options[name].index(value)]  # 8 for 8.0
        first = {
            name: False if name in space.groups else _pick_first(name, options[name]) for name in options
        }
        choice = space.make_choice_at({**first, "rate": 0.5, **given})
        return choice if rate is None else _set_rate(choice, rate, space)


def _read_in_range(name: str, value: Any, space: SearchSpace) -> Any:
    low, high = space.over[name].limits or (0, 0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise MemControlError(f"{name} is {value!r}; allowed: {low:g} to {high:g}")
    return space.over[name].read_label(value)


def _pick_first(name: str, options: Sequence[Any]) -> Any:
    return options[len(options) // 2] if name == "rank" or name.endswith(".rank") else options[0]


def _set_rate(choice: Choice, rate: Any, space: SearchSpace) -> Choice:
    low, high = space.learning_rate[choice.method]
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not low <= rate <= high:
        raise MemControlError(f"learning_rate is {rate!r}; of {choice.method} allowed: {low:g} to {high:g}")
    return replace(choice, learning_rate=float(rate))


def describe_foreign(trials: Sequence[ForeignTrial]) -> str:
    """What is passed over; empty where nothing is."""
    numbers = ", ".join(str(trial.number) for trial in trials if trial.enqueued is None)
    if not numbers:
        return ""
    return (
        f"trials that another program made are passed over: {numbers}; memcontrol runs those that are "
        "enqueued with groups, method, rank and learning_rate of the space"
    )
