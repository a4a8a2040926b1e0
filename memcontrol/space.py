"""Owns search spaces: a YAML of named layer groups, methods and ranges, and the Choice sampled from it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from memcontrol.errors import MemControlError

SEARCHED_METHODS = ("lora", "attention")
METHODS = ("none", *SEARCHED_METHODS, "full")
SAME_RATE = math.log(1.1)  # learning rates within 10 % count as the same choice


@dataclass(frozen=True)
class Choice:
    """Which groups are trained, how, and how fast. `none` trains nothing, `full` every parameter of the denoiser."""

    groups: tuple[str, ...]
    method: str
    learning_rate: float
    rank: int | None = None

    @property
    def key(self) -> str:
        """Eight hexadecimal digits that name the choice's folder."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]

    def same_as(self, other: Choice) -> bool:
        """The same groups, method and rank, at a learning rate within 10 %."""
        if (set(self.groups), self.method, self.rank) != (set(other.groups), other.method, other.rank):
            return False
        if self.method == "none" or self.learning_rate == other.learning_rate:
            return True
        return abs(math.log(self.learning_rate / other.learning_rate)) <= SAME_RATE

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "groups": list(self.groups)}

    @classmethod
    def from_dict(cls, values: dict) -> Choice:
        """Raises MemControlError where a key is missing, unknown or of the wrong kind."""
        try:
            choice = cls(**{**values, "groups": tuple(values["groups"]), "learning_rate": float(values["learning_rate"])})
        except (TypeError, KeyError, ValueError) as error:
            raise MemControlError(
                f"choice {values!r} is not complete ({error}); it needs groups, method, learning_rate and, for lora, rank"
            ) from None
        if choice.method not in METHODS:
            raise MemControlError(f"choice: method '{choice.method}' is unknown; allowed: {', '.join(METHODS)}")
        if choice.method == "lora" and not isinstance(choice.rank, int):
            raise MemControlError("choice: method lora needs a whole-number rank")
        return choice


def three_rates(low: float, high: float) -> tuple[float, ...]:
    """The middles of the range's three thirds, on a log scale, to three digits."""
    return tuple(rounded(low * (high / low) ** share) for share in (1 / 6, 3 / 6, 5 / 6))


def rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


@dataclass(frozen=True)
class SearchSpace:
    """Groups (name to patterns on module names, and the methods that may train them), learning-rate ranges, ranks of LoRA."""

    name: str
    groups: dict[str, tuple[str, ...]]
    group_methods: dict[str, tuple[str, ...]]
    methods: tuple[str, ...]
    learning_rate: dict[str, tuple[float, float]]
    rank: tuple[int, ...]
    description: str = ""

    def anchors(self) -> dict[str, list[Choice]]:
        """No training; plain PEFT with every group on; full fine-tuning: the last two at three learning rates each."""
        plain = self.methods[0]
        every, rank = self.groups_for(plain), self.rank[len(self.rank) // 2] if plain == "lora" else None
        return {
            "none": [Choice((), "none", 0.0)],
            "all": [Choice(every, plain, rate, rank) for rate in three_rates(*self.learning_rate[plain])],
            "full": [Choice((), "full", rate) for rate in three_rates(*self.learning_rate["full"])],
        }

    def groups_for(self, method: str) -> tuple[str, ...]:
        return tuple(group for group in self.groups if method in self.group_methods[group])

    def module_names(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Group to the module names that its patterns match. Raises MemControlError: nothing matched, or shared modules."""
        found: dict[str, list[str]] = {}
        owner: dict[str, str] = {}
        for group, patterns in self.groups.items():
            matched = [[name for name in names if re.fullmatch(pattern, name)] for pattern in patterns]
            for pattern, modules in zip(patterns, matched):
                if not modules:
                    raise MemControlError(
                        f"space '{self.name}': pattern '{pattern}' of group '{group}' matches no Linear or Conv2d module of "
                        f"the base; names look like '{names[len(names) // 2]}'"
                    )
            found[group] = list(dict.fromkeys(name for modules in matched for name in modules))
            for name in found[group]:
                if name in owner:
                    raise MemControlError(
                        f"space '{self.name}': groups '{owner[name]}' and '{group}' share module '{name}'; "
                        "a module may belong to one group"
                    )
                owner[name] = group
        return found

    def modules(self, names: Sequence[str], choice: Choice) -> list[str]:
        """The names, of `names`, that the choice trains."""
        unknown = [group for group in choice.groups if group not in self.groups]
        if unknown:
            raise MemControlError(f"choice: unknown group '{unknown[0]}'; space '{self.name}' has {', '.join(self.groups)}")
        by_group = self.module_names(names)
        return [name for group in choice.groups for name in by_group[group]]


def space_folder() -> Path:
    """In a wheel the spaces lie inside the package; in a source tree, beside it."""
    inside = Path(__file__).parent / "search_spaces"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "search_spaces"


def shipped_spaces() -> dict[str, Path]:
    return {path.stem: path for path in sorted(space_folder().glob("*.yaml"))}


def load_space(name_or_file: str) -> SearchSpace:
    """A shipped space by name, or one from a YAML file. Raises MemControlError."""
    shipped = shipped_spaces()
    path = shipped.get(name_or_file, Path(name_or_file))
    if not path.is_file():
        raise MemControlError(f"space '{name_or_file}': no such file and not shipped; shipped are {', '.join(shipped)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MemControlError(f"space {path}: not valid YAML: {' '.join(str(error).split())}") from None
    return parse_space(values, path.stem)


def parse_space(values: Any, name: str) -> SearchSpace:
    def refuse(text: str):
        raise MemControlError(f"space '{name}': {text}")

    keys = ("description", "groups", "methods", "learning_rate", "rank")
    if not isinstance(values, dict):
        refuse(f"holds {type(values).__name__}, not keys; allowed: {', '.join(keys)}")
    for key in values:
        if key not in keys:
            refuse(f"unknown key '{key}'; allowed: {', '.join(keys)}")
    groups, methods = values.get("groups"), values.get("methods", ["lora"])
    if not isinstance(groups, dict) or not groups:
        refuse("'groups' must map at least one group name to a pattern or a list of patterns")
    if not isinstance(methods, list) or not methods or not set(methods) <= set(SEARCHED_METHODS):
        refuse(f"'methods' is {methods!r}; allowed: a list of {', '.join(SEARCHED_METHODS)}")
    return SearchSpace(
        name=name,
        groups={str(group): patterns_of(group, long_form(entry, methods)["patterns"], refuse) for group, entry in groups.items()},
        group_methods={str(group): group_methods_of(group, long_form(entry, methods), methods, refuse) for group, entry in groups.items()},
        methods=tuple(methods),
        learning_rate=rates_of(values.get("learning_rate"), [*methods, "full"], refuse),
        rank=ranks_of(values.get("rank", [4]), refuse),
        description=str(values.get("description", "")),
    )


def long_form(entry: Any, methods: list[str]) -> dict:
    """A group as patterns alone may be trained by every method."""
    return {"methods": methods, **entry} if isinstance(entry, dict) and "patterns" in entry else {"patterns": entry, "methods": methods}


def group_methods_of(group: str, entry: dict, methods: list[str], refuse) -> tuple[str, ...]:
    if set(entry) != {"patterns", "methods"}:
        refuse(f"group '{group}' has {', '.join(map(str, entry))}; allowed: patterns, methods")
    if not isinstance(entry["methods"], list) or not entry["methods"] or not set(entry["methods"]) <= set(methods):
        refuse(f"group '{group}': methods is {entry['methods']!r}; allowed: a list of {', '.join(methods)}")
    return tuple(entry["methods"])


def patterns_of(group: str, patterns: Any, refuse) -> tuple[str, ...]:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list) or not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        refuse(f"group '{group}' is {patterns!r}; allowed: a regular expression or a list of them")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            refuse(f"group '{group}': '{pattern}' is no regular expression ({error})")
    return tuple(patterns)


def rates_of(ranges: Any, methods: list[str], refuse) -> dict[str, tuple[float, float]]:
    if not isinstance(ranges, dict) or set(ranges) != set(methods):
        refuse(f"'learning_rate' must give a range [low, high] for each of {', '.join(methods)}")
    found = {}
    for method, limits in ranges.items():
        try:
            low, high = (float(limit) for limit in limits)
        except (TypeError, ValueError):
            low = high = math.nan
        if not 0 < low < high:
            refuse(f"learning_rate of {method} is {limits!r}; allowed: [low, high] with 0 < low < high")
        found[method] = (low, high)
    return found


def ranks_of(ranks: Any, refuse) -> tuple[int, ...]:
    if not isinstance(ranks, list) or not ranks or not all(type(rank) is int and rank > 0 for rank in ranks):
        refuse(f"'rank' is {ranks!r}; allowed: a list of whole numbers above 0")
    return tuple(sorted(set(ranks)))


def space_as_dict(space: SearchSpace) -> dict[str, Any]:
    """The space as its YAML holds it; `parse_space` reads it back."""
    return {
        "description": space.description,
        "groups": {group: {"patterns": list(space.groups[group]), "methods": list(space.group_methods[group])} for group in space.groups},
        "methods": list(space.methods),
        "learning_rate": {method: list(limits) for method, limits in space.learning_rate.items()},
        "rank": list(space.rank),
    }
