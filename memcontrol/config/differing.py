"""Owns whether two configs give the same numbers: the keys that may change, and those that differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memcontrol.config.places import name_files
from memcontrol.config.study import Config

# What may change between two runs of one study: where and how fast it runs, not what it finds. Images may
# move; split.json knows them.
FREE_KEYS = (
    "storage",
    "base_offload",
    "data.path",
    "search.trials",
    "search.anchors",
    "search.strengths",
    "search.checkpoints",
    "search.workers",
    "search.executor",
    "search.processes",
    "search.gpus_per_trial",
    "search.time_limit_minutes",
    "search.accumulate_on_oom",
    "search.stop_when_flat",
    "search.replicates",
    "search.keep",
    "search.disk_gb",
    "search.track",
    "ray",
    "slurm",
)


def flatten_keys(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flatten_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def find_differing_keys(stored: Config, given: Config, beside: Sequence[str] = ()) -> list[str]:
    """Dotted keys, of those that numbers depend on and are not below one of `beside`, whose values differ:
    "inner.batch_size (8 there, 16 here)"."""
    there, here = (_make_comparable(config) for config in (stored, given))
    of_memory = (f"inner.{key}" for key in given.inner.memory_keys)
    free_keys = (*FREE_KEYS, *of_memory, *beside)
    return [
        f"{key} ({there.get(key)} there, {here.get(key)} here)"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key) and not any(f"{key}.".startswith(f"{free}.") for free in free_keys)
    ]


def _make_comparable(config: Config) -> dict:
    """The config as a mapping, files by their names: a study's folder may move."""
    values = flatten_keys(config.model_dump(mode="json"))
    places = name_files(config)
    kept = {key: value for key, value in values.items() if key.partition(".")[0] != "base" or key in places}
    return kept | places
