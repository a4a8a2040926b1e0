"""Owns what is made of trials that other programs enqueue, ask for or tell: plain Optuna, or a dashboard that
may write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from memcontrol.core.choice import EVERYTHING, RANKED, Choice, Frozen, Setting, thaw
from memcontrol.core.errors import MemControlError
from memcontrol.core.space import Coordinate, SearchSpace


@dataclass(frozen=True)
class ForeignTrial:
    """A trial that another program made. One that waits has what it was enqueued with."""

    number: int
    trial_id: int
    enqueued: dict[str, Any] | None = None
    choice: Choice | None = None  # whole, where `memcontrol enqueue` asked for it

    def read_choice(self, space: SearchSpace) -> Choice:
        """What it is enqueued with, as trials show their choices: groups as true and false, a method, a rank,
        a learning rate. Groups that it leaves out are off; of the rest, the first method, the middle rank and
        rate stand in. Raises MemControlError where the space has no such choice."""
        if self.choice is not None:
            return settle_choice(self.choice, space)
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


def settle_choice(choice: Choice, space: SearchSpace) -> Choice:
    """A choice that somebody gives, as the space writes it: its groups in the space's order, its learning
    rates and settings as they are, without what needs no training, at which a search measures every
    fine-tuning. Of settings that it leaves out, the config's own value, or the first. Raises MemControlError
    where it is none of the space."""
    choice = choice.trained
    if EVERYTHING in choice.groups or choice.method == "none":
        raise MemControlError(
            f"choice: method '{choice.method}' of the whole denoiser is an anchor's (search.anchors); name "
            "groups of the space"
        )
    space.check_choice(choice)
    groups = tuple(name for name in space.groups if name in choice.groups)
    if not groups and not space.always:
        raise MemControlError(f"choice: it has no group; space '{space.name}' has {', '.join(space.groups)}")
    for name in groups:
        _check_group(name, choice.setting(name), space)
    each = {name: choice.setting(name) for name in groups}
    if not space.mix and len({(setting.method, setting.learning_rate) for setting in each.values()}) > 1:
        raise MemControlError(
            f"choice: groups differ in method or learning rate; space '{space.name}' has one for all (mix)"
        )
    most = Counter(each.values()).most_common(1)[0][0] if each else choice.default
    differing = tuple((name, setting) for name, setting in each.items() if setting != most)
    return replace(
        choice,
        groups=groups,
        method=most.method,
        learning_rate=most.learning_rate,
        rank=most.rank,
        per_group=differing,
        settings=_settle_settings(choice, space),
    )


def _settle_settings(choice: Choice, space: SearchSpace) -> tuple[tuple[str, Frozen], ...]:
    """Raises MemControlError for a value that the space has not."""
    own = dict(choice.settings)
    for key, value in own.items():
        coordinate = space.over[key]
        if coordinate.limits is not None:
            _read_in_range(key, value, space)
        elif value not in coordinate.options:
            raise MemControlError(
                f"choice: setting {key} is {thaw(value)!r}; allowed: {', '.join(map(str, coordinate.labels))}"
            )
    found = space.read_settings(space.find_point(choice))
    if astray := own.keys() - found:
        raise MemControlError(f"choice: setting {min(astray)} is of something that the choice turns off")
    kept = {
        key: space.over[key].usual for key in found if _is_in_range(space.over[key].usual, space.over[key])
    }
    return tuple(sorted({**found, **kept, **own}.items()))


def _is_in_range(value: Any, coordinate: Coordinate) -> bool:
    """Whether it is a number of a range, on its grid or not."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (
        coordinate.limits is not None and is_number and coordinate.limits[0] <= value <= coordinate.limits[1]
    )


def _check_group(name: str, setting: Setting, space: SearchSpace) -> None:
    """Raises MemControlError where the space has no such method, rank or learning rate for the group."""
    group = space.groups[name]
    methods = group.methods if space.mix else [one for one in group.methods if one in space.methods]
    if setting.method not in methods:
        raise MemControlError(
            f"choice: method '{setting.method}' cannot train group '{name}'; allowed: {', '.join(methods)}"
        )
    ranks = group.rank if setting.method in RANKED else (None,)
    if setting.rank not in ranks:
        raise MemControlError(
            f"choice: rank {setting.rank} of group '{name}' with {setting.method}; allowed: "
            f"{', '.join(map(str, ranks))}"
        )
    check_rate(setting.method, setting.learning_rate, space)


def _read_in_range(name: str, value: Any, space: SearchSpace) -> Any:
    if not _is_in_range(value, space.over[name]):
        low, high = space.over[name].limits or (0, 0)
        raise MemControlError(f"{name} is {value!r}; allowed: {low:g} to {high:g}")
    return space.over[name].read_label(value)


def _pick_first(name: str, options: Sequence[Any]) -> Any:
    return options[len(options) // 2] if name == "rank" or name.endswith(".rank") else options[0]


def _set_rate(choice: Choice, rate: Any, space: SearchSpace) -> Choice:
    check_rate(choice.method, rate, space)
    return replace(choice, learning_rate=float(rate))


def check_rate(method: str, rate: Any, space: SearchSpace) -> None:
    """Raises MemControlError for what is no learning rate of the method's range."""
    low, high = space.learning_rate[method]
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not low <= rate <= high:
        raise MemControlError(f"learning_rate is {rate!r}; of {method} allowed: {low:g} to {high:g}")


def describe_foreign(trials: Sequence[ForeignTrial]) -> str:
    """What is passed over; empty where nothing is."""
    numbers = ", ".join(str(trial.number) for trial in trials if trial.enqueued is None)
    if not numbers:
        return ""
    return (
        f"trials that another program made are passed over: {numbers}; memcontrol runs those that are "
        "enqueued with groups, method, rank and learning_rate of the space"
    )
