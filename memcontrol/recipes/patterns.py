"""Owns filters of names that take a mask's modules and no other: regular expressions and endings."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from memcontrol.core.errors import MemControlError
from memcontrol.recipes.plan import RecipePlan

_Parts = tuple[tuple[str, ...], ...]  # of names, each with its options


def merge_names(names: Iterable[str], dot: str = "[.]") -> list[str]:
    """Regular expressions that match exactly these names and share none: names that differ in one part become
    one. `dot` stands between parts. Trainers split at commas and `=`, and not every reader of TOML unescapes
    a key: none of these, no quote and no backslash is in them."""
    merged: set[_Parts] = {tuple((part,) for part in name.split(".")) for name in names}
    places = max((len(parts) for parts in merged), default=0)
    before = -1
    while len(merged) != before:
        before = len(merged)
        for place in reversed(range(places)):
            merged = _merge_at(merged, place)
    return [dot.join(map(_write_part, parts)) for parts in sorted(merged, key=_sort_naturally)]


def _merge_at(merged: Collection[_Parts], place: int) -> set[_Parts]:
    rest: dict[tuple, set[str]] = {}
    for parts in merged:
        options = parts[place] if place < len(parts) else ()
        rest.setdefault((parts[:place], parts[place + 1 :], bool(options)), set()).update(options)
    return {
        (*before, tuple(sorted(options, key=_split_numbers)), *after) if is_long else before
        for (before, after, is_long), options in rest.items()
    }


def _split_numbers(text: str) -> tuple:
    """So that 10 comes after 9."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text))


def _sort_naturally(parts: _Parts) -> tuple:
    return tuple(tuple(map(_split_numbers, options)) for options in parts)


def _write_part(options: tuple[str, ...]) -> str:
    escaped = [re.escape(option) for option in options]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def find_suffixes(plan: RecipePlan) -> list[str]:
    """The shortest endings of the mask's names that no other module's name has: peft matches a list by
    endings (peft/tuners/tuners_utils.py, check_target_module_exists)."""
    mask = plan.modules
    outside = {ending for name in plan.names if name not in mask for ending in _list_endings(name)}
    found = dict.fromkeys(
        next((ending for ending in _list_endings(name) if ending not in outside), None) for name in mask
    )
    if None in found:
        raise MemControlError("it has a list of endings of names, which would take other layers too")
    return [ending for ending in found if ending]


def _list_endings(name: str) -> list[str]:
    """From the last part to the whole name."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]
