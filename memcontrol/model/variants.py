"""Owns which of several sets of weights a folder in diffusers' format holds: `*.safetensors`, and variants
such as `*.fp16.safetensors`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from memcontrol.core.errors import MemControlError

PLAIN = ""  # the variant without a name
_SHARD = r"(?:-\d+-of-\d+)?"
_WEIGHTS = re.compile(
    rf"([^/]+)/(?:diffusion_pytorch_model|pytorch_model|model){_SHARD}(?:\.(\w+?))?{_SHARD}"
    r"\.(?:safetensors|bin)"
)


def find_variants(files: Iterable[str], parts: Collection[str]) -> dict[str, set[str]]:
    """The variants of each of the parts, from the files' names in the folder."""
    found: dict[str, set[str]] = {part: set() for part in parts}
    for part, variant in (match.groups() for match in map(_WEIGHTS.fullmatch, files) if match):
        if part in found:
            found[part].add(variant or PLAIN)
    return found


def choose_variant(base: str, found: Mapping[str, Collection[str]], asked: str | None) -> str | None:
    """The one that was asked for; else none, or what parts have that have no plain weights: fp16 first.
    Raises MemControlError where a part has neither it nor plain weights."""
    empty = [part for part, variants in found.items() if not variants]
    if empty:
        raise MemControlError(f"base '{base}' has no weights of {', '.join(empty)}; give a whole pipeline")
    lacking = [set(variants) for variants in found.values() if PLAIN not in variants]
    known = set().union(*found.values()) - {PLAIN}
    fitting = set.intersection(*lacking) if lacking else known
    if asked and asked not in fitting:
        raise MemControlError(
            f"base '{base}' has no weights of variant '{asked}'; there are: {_list_names(found)}"
        )
    if not fitting and lacking:
        raise MemControlError(
            f"base '{base}' has parts whose variants do not fit together: "
            + ", ".join(f"{part} {', '.join(sorted(variants))}" for part, variants in found.items())
        )
    if asked or not lacking:
        return asked
    return min(fitting, key=lambda name: (name != "fp16", name))


def _list_names(found: Mapping[str, Collection[str]]) -> str:
    names = sorted(set().union(*found.values()))
    return ", ".join(name or "those without a variant" for name in names)
