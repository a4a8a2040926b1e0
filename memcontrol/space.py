"""Owns search spaces: a YAML of named layer groups, methods and ranges, and the Choice sampled from it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from memcontrol.errors import MemControlError

RANKED = ("lora", "dora", "loha", "lokr", "oft")  # their size is a rank; of oft, the block size
SEARCHED_METHODS = (*RANKED, "ia3", "ln_tuning", "svdiff", "difffit", "attention", "norm", "bias", "full")
METHODS = ("none", *SEARCHED_METHODS)
EVERYTHING = "*"  # stands for the whole denoiser, in the anchor `full`
SAME_RATE = math.log(1.1)  # learning rates within 10 % count as the same choice


@dataclass(frozen=True)
class Setting:
    """How one group is trained."""

    method: str
    learning_rate: float
    rank: int | None = None

    def same_as(self, other: Setting) -> bool:
        """The same method and rank, at a learning rate within 10 %."""
        if (self.method, self.rank) != (other.method, other.rank):
            return False
        return self.learning_rate == other.learning_rate or abs(math.log(self.learning_rate / other.learning_rate)) <= SAME_RATE


@dataclass(frozen=True)
class Choice:
    """Which groups are trained, how, and how fast; `per_group` holds the groups that differ from the rest.

    Without groups only what the space always trains is trained; `none` trains nothing; the group * is the whole denoiser.
    """

    groups: tuple[str, ...]
    method: str
    learning_rate: float
    rank: int | None = None
    per_group: tuple[tuple[str, Setting], ...] = ()

    @property
    def default(self) -> Setting:
        return Setting(self.method, self.learning_rate, self.rank)

    def setting(self, group: str) -> Setting:
        return dict(self.per_group).get(group, self.default)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods in use, each once."""
        return tuple(dict.fromkeys(self.setting(group).method for group in self.groups)) or (self.method,)

    @property
    def key(self) -> str:
        """Eight hexadecimal digits that name the choice's folder."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:8]

    def same_as(self, other: Choice) -> bool:
        """The same groups, each with the same method and rank, at learning rates within 10 %."""
        if set(self.groups) != set(other.groups) or "none" in (self.method, other.method):
            return self.method == other.method == "none"
        return self.default.same_as(other.default) and all(self.setting(group).same_as(other.setting(group)) for group in self.groups)

    def as_dict(self) -> dict[str, Any]:
        values = {"groups": list(self.groups), "learning_rate": self.learning_rate, "method": self.method, "rank": self.rank}
        return {**values, "per_group": {group: asdict(setting) for group, setting in self.per_group}} if self.per_group else values

    @classmethod
    def from_dict(cls, values: dict) -> Choice:
        """Raises MemControlError where a key is missing, unknown or of the wrong kind."""
        try:
            differing = tuple(
                (group, Setting(**{**setting, "learning_rate": float(setting["learning_rate"])}))
                for group, setting in values.get("per_group", {}).items()
            )
            rate = float(values["learning_rate"])
            choice = cls(**{**values, "groups": tuple(values["groups"]), "learning_rate": rate, "per_group": differing})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise MemControlError(
                f"choice {values!r} is not complete ({error}); it needs groups, method, learning_rate and, for lora, rank"
            ) from None
        for setting in (choice.default, *(setting for _, setting in choice.per_group)):
            check_setting(setting)
        return choice


def check_setting(setting: Setting) -> None:
    if setting.method not in METHODS:
        raise MemControlError(f"choice: method '{setting.method}' is unknown; allowed: {', '.join(METHODS)}")
    if setting.method in RANKED and not (type(setting.rank) is int and setting.rank > 0):
        raise MemControlError(f"choice: method {setting.method} needs a whole-number rank")


THIRDS = (1 / 6, 3 / 6, 5 / 6)  # the middles of a range's three thirds


def rate_at(limits: tuple[float, float], share: float) -> float:
    """The learning rate at `share` (0..1) of the range on a log scale, to three digits."""
    low, high = limits
    return float(f"{low * (high / low) ** share:.3g}")


@dataclass(frozen=True)
class Group:
    """Modules that are turned on together: patterns on their names, the methods that may train them, ranks and alpha / rank."""

    patterns: tuple[str, ...]
    methods: tuple[str, ...]
    rank: tuple[int, ...]
    alpha: float


@dataclass(frozen=True)
class SearchSpace:
    """Groups of modules, methods, learning-rate ranges; `always` is trained in every choice but `none` and `full`.

    Where `mix` is set, each group has a method of its own; otherwise one method trains all groups of a choice.
    """

    name: str
    groups: dict[str, Group]
    methods: tuple[str, ...]
    learning_rate: dict[str, tuple[float, float]]
    rank: tuple[int, ...]
    always: tuple[tuple[str, tuple[str, ...]], ...] = ()
    mix: bool = False
    description: str = ""

    def anchors(self) -> dict[str, list[Choice]]:
        """No training; plain PEFT with every group on; full fine-tuning: the last two at three learning rates each."""
        plain = self.methods[0]
        return {
            "none": [Choice((), "none", 0.0)],
            "all": [self.choice(self.groups_for(plain), plain, share) for share in THIRDS],
            "full": [Choice((EVERYTHING,), "full", rate_at(self.learning_rate["full"], share)) for share in THIRDS],
        }

    def choice(
        self, groups: Sequence[str], method: str, share: float, rank: int | None = None,
        methods: dict[str, str] | None = None, ranks: dict[str, int] | None = None,
    ) -> Choice:
        """A choice whose learning rates lie at `share` (0..1, log scale) of each method's range.

        `methods` and `ranks` name those of single groups; a rank left open is the middle one.
        """

        def setting(group: str | None, method: str) -> Setting:
            allowed = self.groups[group].rank if group else self.rank
            chosen = (ranks or {}).get(group) if group and allowed != self.rank else rank
            middle = allowed[len(allowed) // 2]
            return Setting(method, rate_at(self.learning_rate[method], share), (chosen or middle) if method in RANKED else None)

        each = {group: setting(group, (methods or {}).get(group, method)) for group in groups}
        default = Counter(each.values()).most_common(1)[0][0] if each else setting(None, method)
        differing = tuple((group, own) for group, own in each.items() if own != default)
        return Choice(tuple(groups), default.method, default.learning_rate, default.rank, differing)

    def coordinates(self) -> dict[str, tuple]:
        """Name to options of every categorical coordinate that a choice is sampled in; beside them stands `rate`, in 0..1."""
        found: dict[str, tuple] = {group: (False, True) for group in self.groups}
        if self.mix:
            found |= {f"{name}.method": group.methods for name, group in self.groups.items() if len(group.methods) > 1}
        else:
            found["method"] = self.methods
        found["rank"] = self.rank
        return found | {f"{name}.rank": group.rank for name, group in self.groups.items() if group.rank != self.rank}

    def choice_at(self, params: dict[str, Any]) -> Choice:
        """The choice at a point: a value for each of `coordinates` and for `rate`."""
        method = params.get("method", self.methods[0])
        methods = {name: params.get(f"{name}.method", group.methods[0]) for name, group in self.groups.items()} if self.mix else None
        allowed = self.groups if self.mix else self.groups_for(method)
        ranks = {name: params[f"{name}.rank"] for name in self.groups if f"{name}.rank" in params}
        return self.choice([name for name in allowed if params[name]], method, params["rate"], params["rank"], methods, ranks)

    def point_of(self, choice: Choice) -> dict[str, Any]:
        """Where a choice lies in `coordinates` and `rate`; what it leaves open is at the first option."""
        coordinates = self.coordinates()
        point: dict[str, Any] = {name: options[0] for name, options in coordinates.items()}
        point |= {name: name in choice.groups for name in self.groups}
        own = {"method": choice.method, "rank": choice.rank}
        for group in choice.groups:
            setting = choice.setting(group)
            own |= {f"{group}.method": setting.method, f"{group}.rank": setting.rank}
        point |= {name: value for name, value in own.items() if value is not None and value in coordinates.get(name, ())}
        low, high = self.learning_rate[choice.method]
        return point | {"rate": min(max(math.log(choice.learning_rate / low) / math.log(high / low), 0.0), 1.0)}

    def groups_for(self, method: str) -> tuple[str, ...]:
        return tuple(group for group in self.groups if method in self.groups[group].methods)

    def module_names(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Group to the module names that its patterns match. Raises MemControlError: nothing matched, or shared modules."""
        found: dict[str, list[str]] = {}
        owner: dict[str, str] = {}
        for group in self.groups:
            found[group] = self.matched(f"group '{group}'", self.groups[group].patterns, names)
            for name in found[group]:
                if name in owner:
                    raise MemControlError(
                        f"space '{self.name}': groups '{owner[name]}' and '{group}' share module '{name}'; "
                        "a module may belong to one group"
                    )
                owner[name] = group
        return found

    def matched(self, owner: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
        """The names that any pattern matches. Raises MemControlError where a pattern matches none."""
        found: list[str] = []
        for pattern in patterns:
            modules = [name for name in names if re.fullmatch(pattern, name)]
            if not modules:
                raise MemControlError(
                    f"space '{self.name}': pattern '{pattern}' of {owner} matches no module of the base that can be trained; "
                    f"names look like '{names[len(names) // 2]}'"
                )
            found += modules
        return list(dict.fromkeys(found))

    def always_names(self, names: Sequence[str]) -> list[tuple[str, list[str]]]:
        """(method, module names) of what is trained in every choice."""
        return [(method, self.matched("'always'", patterns, names)) for method, patterns in self.always]

    def check_choice(self, choice: Choice) -> None:
        """Raises MemControlError where the choice names a group or a method that this space does not have for it."""
        for group in choice.groups:
            if group not in (*self.groups, EVERYTHING):
                raise MemControlError(f"choice: unknown group '{group}'; space '{self.name}' has {', '.join(self.groups)}")


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
    """The space that a YAML's values describe; the grammar is in search_spaces/README.md. Raises MemControlError."""

    def refuse(text: str):
        raise MemControlError(f"space '{name}': {text}")

    keys = ("description", "groups", "always", "methods", "mix", "learning_rate", "rank", "alpha")
    if not isinstance(values, dict):
        refuse(f"holds {type(values).__name__}, not keys; allowed: {', '.join(keys)}")
    for key in values:
        if key not in keys:
            refuse(f"unknown key '{key}'; allowed: {', '.join(keys)}")
    groups, mix = values.get("groups"), values.get("mix", False)
    if not isinstance(groups, dict) or not groups:
        refuse("'groups' must map at least one group name to a pattern or a list of patterns")
    for reserved in {EVERYTHING, "method", "rank", "rate", "learning_rate"} & set(map(str, groups)):
        refuse(f"a group may not be called '{reserved}'")
    if not isinstance(mix, bool):
        refuse(f"'mix' is {mix!r}; allowed: true or false")
    methods = methods_of("'methods'", values.get("methods", ["lora"]), SEARCHED_METHODS, refuse)
    rank, alpha = ranks_of("'rank'", values.get("rank", [4]), refuse), alpha_of("'alpha'", values.get("alpha", 1.0), refuse)
    return SearchSpace(
        name=name,
        groups={str(group): group_of(str(group), entry, Group((), methods, rank, alpha), refuse) for group, entry in groups.items()},
        methods=methods,
        learning_rate=rates_of(values.get("learning_rate"), dict.fromkeys([*methods, "full"]), refuse),
        rank=rank,
        always=always_of(values.get("always", []), refuse),
        mix=mix,
        description=" ".join(str(values.get("description", "")).split()),
    )


def group_of(name: str, entry: Any, default: Group, refuse) -> Group:
    """A group as patterns alone takes methods, ranks and alpha from the space."""
    if not isinstance(entry, dict):
        entry = {"patterns": entry}
    allowed = ("patterns", "methods", "rank", "alpha")
    if "patterns" not in entry or not set(entry) <= set(allowed):
        refuse(f"group '{name}' has {', '.join(map(str, entry))}; allowed: {', '.join(allowed)}")
    where = f"group '{name}'"
    return Group(
        patterns_of(where, entry["patterns"], refuse),
        methods_of(f"{where}: 'methods'", entry["methods"], default.methods, refuse) if "methods" in entry else default.methods,
        ranks_of(f"{where}: 'rank'", entry["rank"], refuse) if "rank" in entry else default.rank,
        alpha_of(f"{where}: 'alpha'", entry["alpha"], refuse) if "alpha" in entry else default.alpha,
    )


def methods_of(where: str, methods: Any, allowed: Sequence[str], refuse) -> tuple[str, ...]:
    if not isinstance(methods, list) or not methods or not set(map(str, methods)) <= set(allowed):
        refuse(f"{where} is {methods!r}; allowed: a list of {', '.join(allowed)}")
    return tuple(dict.fromkeys(methods))


def always_of(entries: Any, refuse) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and set(entry) == {"method", "patterns"} for entry in entries):
        refuse(f"'always' is {entries!r}; allowed: a list of {{method: ..., patterns: ...}}")
    allowed = [method for method in SEARCHED_METHODS if method not in RANKED]
    for entry in entries:
        methods_of("'always': method", [entry["method"]], allowed, refuse)
    return tuple((entry["method"], patterns_of("'always'", entry["patterns"], refuse)) for entry in entries)


def patterns_of(where: str, patterns: Any, refuse) -> tuple[str, ...]:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list) or not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        refuse(f"{where} is {patterns!r}; allowed: a regular expression or a list of them")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            refuse(f"{where}: '{pattern}' is no regular expression ({error})")
    return tuple(patterns)


def rates_of(ranges: Any, methods: Collection[str], refuse) -> dict[str, tuple[float, float]]:
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


def ranks_of(where: str, ranks: Any, refuse) -> tuple[int, ...]:
    if not isinstance(ranks, list) or not ranks or not all(type(rank) is int and rank > 0 for rank in ranks):
        refuse(f"{where} is {ranks!r}; allowed: a list of whole numbers above 0")
    return tuple(sorted(set(ranks)))


def alpha_of(where: str, alpha: Any, refuse) -> float:
    """alpha / rank, the factor on a low-rank adapter's output."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        refuse(f"{where} is {alpha!r}; allowed: a number above 0 (alpha / rank)")
    return float(alpha)


def space_as_dict(space: SearchSpace) -> dict[str, Any]:
    """The space as its YAML holds it; `parse_space` reads it back."""
    return {
        "description": space.description,
        "groups": {
            name: {"patterns": list(group.patterns), "methods": list(group.methods), "rank": list(group.rank), "alpha": group.alpha}
            for name, group in space.groups.items()
        },
        "always": [{"method": method, "patterns": list(patterns)} for method, patterns in space.always],
        "methods": list(space.methods),
        "mix": space.mix,
        "learning_rate": {method: list(limits) for method, limits in space.learning_rate.items()},
        "rank": list(space.rank),
    }
