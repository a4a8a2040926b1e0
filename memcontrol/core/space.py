"""Owns the search space: named layer groups, methods and ranges, and the choices in it."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memcontrol.core.choice import ANCHORS, EVERYTHING, RANKED, Choice, Frozen, Setting, thaw
from memcontrol.core.errors import MemControlError

_THIRDS = (1 / 6, 3 / 6, 5 / 6)  # the middles of a range's three thirds


def interpolate_rate(limits: tuple[float, float], share: float) -> float:
    """The learning rate at `share` (0..1) of the range on a log scale, to three digits."""
    low, high = limits
    return float(f"{low * (high / low) ** share:.3g}")


@dataclass(frozen=True)
class Group:
    """Modules that are turned on together: patterns on their names, the methods that may train them, ranks
    and alpha / rank."""

    patterns: tuple[str, ...]
    methods: tuple[str, ...]
    rank: tuple[int, ...]
    alpha: float


@dataclass(frozen=True)
class Coordinate:
    """A key of the config that a choice has a value of its own for: one of `options`; those of a range are
    the places of a grid of equal `steps` over its `limits`."""

    options: tuple[Frozen, ...]
    limits: tuple[float, float] | None = None
    log: bool = False
    steps: int = 0  # of a range
    usual: Frozen = None  # the config's own value, where that is known

    @property
    def labels(self) -> tuple[str | int | float | bool | None, ...]:
        """The options as a database and a table show them."""
        return tuple(
            json.dumps(thaw(option)) if isinstance(option, tuple) else option for option in self.options
        )

    def find_label(self, value: Frozen) -> str | int | float | bool | None:
        """Of an option; of a range, the nearest. Raises ValueError for what is none."""
        if self.limits is None:
            return self.labels[self.options.index(value)]
        return self.options[self.find_nearest(value)]  # type: ignore[return-value]

    def read_label(self, label: Any) -> Frozen:
        """The option that a label, or any number in a range, stands for. Raises ValueError."""
        if self.limits is None:
            return self.options[self.labels.index(label)]
        return self.options[self.find_nearest(label)]

    def find_nearest(self, value: Any) -> int:
        """The place of a range's grid that a number is nearest to."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{value!r} is no number")
        places = [self.measure(option) for option in self.options]
        own = self.measure(min(max(value, self.limits[0]), self.limits[1])) if self.limits else 0.0
        return min(range(len(places)), key=lambda i: abs(places[i] - own))

    def measure(self, value: Any) -> float:
        return math.log(value) if self.log else float(value)


def make_range(low: float, high: float, log: bool, steps: int) -> Coordinate:
    """A grid of `steps` equal steps from low to high, whole numbers where both are, else to three digits."""
    shares = [i / steps for i in range(steps + 1)]
    values = [low * (high / low) ** share if log else low + (high - low) * share for share in shares]
    whole = isinstance(low, int) and isinstance(high, int)
    inner = [round(value) if whole else float(f"{value:.3g}") for value in values[1:-1]]
    options = dict.fromkeys([low, *(min(max(value, low), high) for value in inner), high])
    return Coordinate(tuple(options), (low, high), log, steps)


@dataclass(frozen=True)
class SearchSpace:
    """Groups of modules, methods, learning-rate ranges; `always` is trained in every choice but `none` and
    `full`.

    Where `mix` is set, each group has a method of its own; otherwise one method trains all groups of a
    choice. `over` holds, by key, what else of the config a choice decides; `free` what it decides that needs
    no training: each fine-tuning is measured at all of these.
    """

    name: str
    groups: dict[str, Group]
    methods: tuple[str, ...]
    learning_rate: dict[str, tuple[float, float]]
    rank: tuple[int, ...]
    always: tuple[tuple[str, tuple[str, ...]], ...] = ()
    mix: bool = False
    description: str = ""
    over: dict[str, Coordinate] = field(default_factory=dict)
    free: dict[str, Coordinate] = field(default_factory=dict)

    def list_variants(self, choice: Choice) -> list[Choice]:
        """What a choice's fine-tuning is measured at beside itself."""
        if choice.method == "none":
            return []
        each = itertools.product(*(one.options for one in self.free.values()))
        usual = {key: one.usual for key, one in self.free.items()}
        differing = (dict(zip(self.free, values)).items() - usual.items() for values in each)
        return [choice.with_settings(dict(settings)) for settings in differing if settings]

    def list_anchors(self, wanted: Collection[str] = ANCHORS) -> dict[str, list[Choice]]:
        """No training; plain PEFT with every group on; full fine-tuning: the last two at three learning rates
        each. Those that are wanted, in this order."""
        plain = self.methods[0]
        found = {
            "none": [Choice((), "none", 0.0)],
            "all": [self.choice(self.select_groups(plain), plain, share) for share in _THIRDS],
            "full": [
                Choice((EVERYTHING,), "full", interpolate_rate(self.learning_rate["full"], share))
                for share in _THIRDS
            ],
        }
        return {name: choices for name, choices in found.items() if name in wanted}

    def choice(
        self,
        groups: Sequence[str],
        method: str,
        share: float,
        rank: int | None = None,
        methods: dict[str, str] | None = None,
        ranks: dict[str, int] | None = None,
        settings: dict[str, Frozen] | None = None,
    ) -> Choice:
        """A choice whose learning rates lie at `share` (0..1, log scale) of each method's range.

        `methods` and `ranks` name those of single groups; a rank left open is the middle one.
        """

        def setting(group: str | None, method: str) -> Setting:
            allowed = self.groups[group].rank if group else self.rank
            chosen = (ranks or {}).get(group) if group and allowed != self.rank else rank
            middle = allowed[len(allowed) // 2]
            return Setting(
                method,
                interpolate_rate(self.learning_rate[method], share),
                (chosen or middle) if method in RANKED else None,
            )

        each = {group: setting(group, (methods or {}).get(group, method)) for group in groups}
        default = Counter(each.values()).most_common(1)[0][0] if each else setting(None, method)
        differing = tuple((group, own) for group, own in each.items() if own != default)
        own = tuple(sorted((settings or {}).items()))
        return Choice(tuple(groups), default.method, default.learning_rate, default.rank, differing, own)

    def list_coordinates(self) -> dict[str, tuple]:
        """Name to options of every categorical coordinate that a choice is sampled in; beside them stands
        `rate`, in 0..1."""
        found: dict[str, tuple] = {group: (False, True) for group in self.groups}
        if self.mix:
            found |= {
                f"{name}.method": group.methods
                for name, group in self.groups.items()
                if len(group.methods) > 1
            }
        else:
            found["method"] = self.methods
        found["rank"] = self.rank
        found |= {
            f"{name}.rank": group.rank for name, group in self.groups.items() if group.rank != self.rank
        }
        return found | {key: coordinate.labels for key, coordinate in self.over.items()}

    def make_choice_at(self, params: dict[str, Any]) -> Choice:
        """The choice at a point: a value for each of `coordinates` and for `rate`."""
        method = params.get("method", self.methods[0])
        methods = (
            {name: params.get(f"{name}.method", group.methods[0]) for name, group in self.groups.items()}
            if self.mix
            else None
        )
        allowed = self.groups if self.mix else self.select_groups(method)
        ranks = {name: params[f"{name}.rank"] for name in self.groups if f"{name}.rank" in params}
        return self.choice(
            [name for name in allowed if params[name]],
            method,
            params["rate"],
            params["rank"],
            methods,
            ranks,
            self.read_settings(params),
        )

    def read_settings(self, params: dict[str, Any]) -> dict[str, Frozen]:
        """A point's values of `over`, less those inside a setting that is off."""
        found = {key: coordinate.read_label(params[key]) for key, coordinate in self.over.items()}
        return {key: value for key, value in found.items() if not _is_inside_off(key, found)}

    def find_point(self, choice: Choice) -> dict[str, Any]:
        """Where a choice lies in `coordinates` and `rate`; what it leaves open is at the first option."""
        coordinates = self.list_coordinates()
        point: dict[str, Any] = {name: options[0] for name, options in coordinates.items()}
        point |= {name: name in choice.groups for name in self.groups}
        own = {"method": choice.method, "rank": choice.rank}
        for group in choice.groups:
            setting = choice.setting(group)
            own |= {f"{group}.method": setting.method, f"{group}.rank": setting.rank}
        point |= {
            name: value
            for name, value in own.items()
            if value is not None and value in coordinates.get(name, ())
        }
        own_settings = dict(choice.settings)
        for key, coordinate in self.over.items():
            with contextlib.suppress(ValueError):  # another space's, which this one does not have
                point[key] = coordinate.find_label(own_settings.get(key, coordinate.usual))
        low, high = self.learning_rate[choice.method]
        return point | {
            "rate": min(max(math.log(choice.learning_rate / low) / math.log(high / low), 0.0), 1.0)
        }

    def select_groups(self, method: str) -> tuple[str, ...]:
        return tuple(group for group in self.groups if method in self.groups[group].methods)

    def match_modules(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Group to the module names that its patterns match. Raises MemControlError: nothing matched, or
        shared modules."""
        found: dict[str, list[str]] = {}
        owner: dict[str, str] = {}
        for group in self.groups:
            found[group] = self.match_patterns(f"group '{group}'", self.groups[group].patterns, names)
            for name in found[group]:
                if name in owner:
                    raise MemControlError(
                        f"space '{self.name}': groups '{owner[name]}' and '{group}' share module '{name}'; "
                        "a module may belong to one group"
                    )
                owner[name] = group
        return found

    def match_patterns(self, owner: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
        """The names that any pattern matches. Raises MemControlError where a pattern matches none."""
        found: list[str] = []
        for pattern in patterns:
            modules = [name for name in names if re.fullmatch(pattern, name)]
            if not modules:
                raise MemControlError(
                    f"space '{self.name}': pattern '{pattern}' of {owner} matches no module of the base "
                    f"that can be trained; names look like '{names[len(names) // 2]}'; `space: auto` makes "
                    "groups of any base's own modules"
                )
            found += modules
        return list(dict.fromkeys(found))

    def match_always(self, names: Sequence[str]) -> list[tuple[str, list[str]]]:
        """(method, module names) of what is trained in every choice."""
        return [
            (method, self.match_patterns("'always'", patterns, names)) for method, patterns in self.always
        ]

    def check_choice(self, choice: Choice) -> None:
        """Raises MemControlError where the choice names a group or a method that this space does not have for
        it."""
        for group in choice.groups:
            if group not in (*self.groups, EVERYTHING):
                raise MemControlError(
                    f"choice: unknown group '{group}'; space '{self.name}' has {', '.join(self.groups)}"
                )
        for key, _ in choice.trained.settings:
            if key not in self.over:
                have = ", ".join(self.over) or "none"
                raise MemControlError(f"choice: unknown setting '{key}'; space '{self.name}' has {have}")


def _is_inside_off(key: str, settings: Mapping[str, Frozen]) -> bool:
    """Whether a setting that holds the key is off."""
    return any(key.startswith(f"{other}.") and value is None for other, value in settings.items())
