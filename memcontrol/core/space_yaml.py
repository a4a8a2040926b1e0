"""Owns the YAML of search spaces: the shipped ones, reading, writing."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from memcontrol.core.choice import EVERYTHING, RANKED, SEARCHED_METHODS, freeze, thaw
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import PACKAGE
from memcontrol.core.space import Coordinate, Group, SearchSpace, make_range
from memcontrol.core.yaml_reader import parse_yaml

_RANGE_STEPS = 20  # of a range, unless told otherwise


def _find_space_folder() -> Path:
    """In a wheel the spaces lie inside the package; in a source tree, beside it."""
    inside = PACKAGE / "search_spaces"
    return inside if inside.is_dir() else PACKAGE.parent / "search_spaces"


def list_shipped_spaces() -> dict[str, Path]:
    return {path.stem: path for path in sorted(_find_space_folder().glob("*.yaml"))}


def name_space(name_or_file: str) -> str:
    """What a space is called in words: a file by its name."""
    return Path(name_or_file).stem if name_or_file.endswith((".yaml", ".yml")) else name_or_file


def load_space(name_or_file: str) -> SearchSpace:
    """A shipped space by name, or one from a YAML file. Raises MemControlError."""
    shipped = list_shipped_spaces()
    path = shipped.get(name_or_file, Path(name_or_file))
    if not path.is_file():
        raise MemControlError(
            f"space '{name_or_file}': no such file and not shipped; shipped are {', '.join(shipped)}"
        )
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MemControlError(f"space {path}: not valid YAML: {' '.join(str(error).split())}") from None
    return parse_space(values, path.stem)


def parse_space(values: Any, name: str) -> SearchSpace:
    """The space that a YAML's values describe; the grammar is in search_spaces/README.md. Raises
    MemControlError."""

    def refuse(text: str):
        raise MemControlError(f"space '{name}': {text}")

    keys = ("description", "groups", "always", "methods", "mix", "learning_rate", "rank", "alpha", "over")
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
    methods = _parse_methods("'methods'", values.get("methods", ["lora"]), SEARCHED_METHODS, refuse)
    rank = _parse_ranks("'rank'", values.get("rank", [4]), refuse)
    alpha = _parse_alpha("'alpha'", values.get("alpha", 1.0), refuse)
    return SearchSpace(
        name=name,
        groups={
            str(group): _parse_group(str(group), entry, Group((), methods, rank, alpha), refuse)
            for group, entry in groups.items()
        },
        methods=methods,
        learning_rate=_parse_rates(values.get("learning_rate"), dict.fromkeys([*methods, "full"]), refuse),
        rank=rank,
        always=_parse_always(values.get("always", []), refuse),
        mix=mix,
        description=" ".join(str(values.get("description", "")).split()),
        over=parse_over("'over'", values.get("over", {}), refuse),
    )


def _parse_group(name: str, entry: Any, default: Group, refuse) -> Group:
    """A group as patterns alone takes methods, ranks and alpha from the space."""
    if not isinstance(entry, dict):
        entry = {"patterns": entry}
    allowed = ("patterns", "methods", "rank", "alpha")
    if "patterns" not in entry or not set(entry) <= set(allowed):
        refuse(f"group '{name}' has {', '.join(map(str, entry))}; allowed: {', '.join(allowed)}")
    where = f"group '{name}'"
    return Group(
        _parse_patterns(where, entry["patterns"], refuse),
        _parse_methods(f"{where}: 'methods'", entry["methods"], default.methods, refuse)
        if "methods" in entry
        else default.methods,
        _parse_ranks(f"{where}: 'rank'", entry["rank"], refuse) if "rank" in entry else default.rank,
        _parse_alpha(f"{where}: 'alpha'", entry["alpha"], refuse) if "alpha" in entry else default.alpha,
    )


def _parse_methods(where: str, methods: Any, allowed: Sequence[str], refuse) -> tuple[str, ...]:
    if not isinstance(methods, list) or not methods or not set(map(str, methods)) <= set(allowed):
        refuse(f"{where} is {methods!r}; allowed: a list of {', '.join(allowed)}")
    return tuple(dict.fromkeys(methods))


def _parse_always(entries: Any, refuse) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and set(entry) == {"method", "patterns"} for entry in entries
    ):
        refuse(f"'always' is {entries!r}; allowed: a list of {{method: ..., patterns: ...}}")
    allowed = [method for method in SEARCHED_METHODS if method not in RANKED]
    for entry in entries:
        _parse_methods("'always': method", [entry["method"]], allowed, refuse)
    return tuple(
        (entry["method"], _parse_patterns("'always'", entry["patterns"], refuse)) for entry in entries
    )


def _parse_patterns(where: str, patterns: Any, refuse) -> tuple[str, ...]:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if (
        not isinstance(patterns, list)
        or not patterns
        or not all(isinstance(pattern, str) for pattern in patterns)
    ):
        refuse(f"{where} is {patterns!r}; allowed: a regular expression or a list of them")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            refuse(f"{where}: '{pattern}' is no regular expression ({error})")
    return tuple(patterns)


def _parse_rates(ranges: Any, methods: Collection[str], refuse) -> dict[str, tuple[float, float]]:
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


def _parse_ranks(where: str, ranks: Any, refuse) -> tuple[int, ...]:
    if not isinstance(ranks, list) or not ranks or not all(type(rank) is int and rank > 0 for rank in ranks):
        refuse(f"{where} is {ranks!r}; allowed: a list of whole numbers above 0")
    return tuple(sorted(set(ranks)))


def _parse_alpha(where: str, alpha: Any, refuse) -> float:
    """alpha / rank, the factor on a low-rank adapter's output."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        refuse(f"{where} is {alpha!r}; allowed: a number above 0 (alpha / rank)")
    return float(alpha)


def parse_over(where: str, entries: Any, refuse) -> dict[str, Coordinate]:
    """By key of the config: a list of values, or {low, high, log, steps}. What the config allows of them is
    not looked at. `refuse` raises."""
    if not isinstance(entries, dict) or not all(isinstance(key, str) for key in entries):
        refuse(f"{where} is {entries!r}; allowed: keys of inner, such as {{inner.weight_decay: [0, 0.01]}}")
    return {key: _parse_coordinate(f"{where}: {key}", entry, refuse) for key, entry in entries.items()}


def _parse_coordinate(where: str, entry: Any, refuse) -> Coordinate:
    if isinstance(entry, dict):
        return _parse_range(where, entry, refuse)
    if not isinstance(entry, (list, tuple)) or not entry:
        refuse(f"{where} is {entry!r}; allowed: a list of values, or a range such as {{low: 1, high: 8}}")
    if any(isinstance(value, (list, tuple)) for value in entry):
        refuse(f"{where} is {list(entry)!r}; its values may not be lists themselves")
    options = [freeze(value) for value in entry]
    if len(set(map(repr, options))) < len(options):
        refuse(f"{where} is {list(entry)!r}; give each value once")
    return Coordinate(tuple(options))


def _parse_range(where: str, entry: dict, refuse) -> Coordinate:
    low, high = entry.get("low", math.nan), entry.get("high", math.nan)
    log, steps = entry.get("log", False), entry.get("steps", _RANGE_STEPS)
    is_known = set(entry) <= {"low", "high", "log", "steps"} and isinstance(log, bool)
    if not (is_known and _is_number(low) and _is_number(high) and isinstance(steps, int)):
        refuse(
            f"{where} is {entry!r}; allowed: {{low, high}}, beside them log: true and steps: {_RANGE_STEPS}"
        )
    if not low < high or (log and low <= 0) or steps < 1:
        refuse(f"{where} is {entry!r}; low must be below high, above 0 where log is true, and steps above 0")
    return make_range(low, high, log, steps)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _dump_coordinate(coordinate: Coordinate) -> Any:
    if coordinate.limits is None:
        return [thaw(option) for option in coordinate.options]
    low, high = coordinate.limits
    return {"low": low, "high": high, "log": coordinate.log, "steps": coordinate.steps}


def dump_space(space: SearchSpace) -> dict[str, Any]:
    """The space as its YAML holds it; `parse_space` reads it back."""
    return {
        "description": space.description,
        "groups": {
            name: {
                "patterns": list(group.patterns),
                "methods": list(group.methods),
                "rank": list(group.rank),
                "alpha": group.alpha,
            }
            for name, group in space.groups.items()
        },
        "always": [{"method": method, "patterns": list(patterns)} for method, patterns in space.always],
        "methods": list(space.methods),
        "mix": space.mix,
        "learning_rate": {method: list(limits) for method, limits in space.learning_rate.items()},
        "rank": list(space.rank),
    } | ({"over": {key: _dump_coordinate(one) for key, one in space.over.items()}} if space.over else {})
