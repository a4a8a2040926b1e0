"""Owns what a search will take, told before it begins: time, memory and disk, from a calibration on the same
machines."""

from __future__ import annotations

import contextlib
import heapq
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memcontrol.core.choice import Choice
from memcontrol.core.config import Config
from memcontrol.core.errors import MemControlError
from memcontrol.execution.job_queue import JobQueue


@dataclass(frozen=True)
class Prediction:
    """Seconds of the whole search and of a run by kind, and how many of these there are; in MiB a worker's
    memory, and the study folder's disk at the end and beside it, while workers train, for their
    checkpoints."""

    seconds: float
    runs: dict[str, float]
    n_runs: dict[str, int]
    memory_mib: float
    disk_mib: float
    checkpoints_mib: float
    n_confirmed: int
    n_workers: int
    stops_early: bool


def run_calibrations(config: Config, folder: Path, jobs: JobQueue) -> list[dict[str, Any]]:
    """Short trials on every worker at once, as a search runs them, in a folder that is removed again. Raises
    MemControlError."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    places = [folder / f"calibration-{i}" for i in range(jobs.room())]
    try:
        found = list(
            jobs.run(
                [
                    {"prepare": str(place), "config": config.model_dump(mode="json"), "calibrate": True}
                    for place in places
                ]
            )
        )
    finally:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
    for end in found:
        if end.kind == "given up":
            raise MemControlError(f"the calibration failed: {end.detail['reason']}")
    return [end.detail for end in found]


def predict_search(
    config: Config, anchors: Mapping[str, Sequence[Choice]], calibrations: Sequence[dict[str, Any]]
) -> Prediction:
    """From one calibration of each worker, all made at the same time; `anchors` are those of the space."""
    attack = config.rewards.extraction
    n_batches = (config.rewards.n_samples + (attack.prompts * attack.images if attack else 0)) / calibrations[
        0
    ]["batch"]
    n_runs = {name: len(choices) for name, choices in anchors.items()} | {"sampled": config.search.trials}

    def mean(name: str, of: Callable[[dict[str, float]], float]) -> float:
        return statistics.mean(of(part) for one in calibrations for part in one[name])

    once, twice = (mean(name, lambda part: part["after"]) for name in ("none", "twice"))
    longer = (once + (n_batches - 1) * (twice - once)) / once  # than sampling and scoring one batch takes
    runs = {
        name: mean(
            name,
            lambda part: part["setup"] + config.inner.budget_steps * part["step"] + longer * part["after"],
        )
        for name in n_runs
    }
    disk = calibrations[0]["shared_bytes"] + sum(
        n * mean(name, lambda part: part["rest_bytes"] + n_batches * part["samples_bytes"])
        for name, n in n_runs.items()
    )
    rounds = len(calibrations) * max(mean(name, lambda part: part["rounds_bytes"]) for name in n_runs)
    n_confirmed = expect_front_size(config.search.trials + len(anchors)) if config.rewards.confirm else 0
    again = config.rewards.confirm * longer * mean("sampled", lambda part: part["after"])
    seconds = statistics.mean(one["start"] for one in calibrations)
    seconds += find_last_end(
        [runs[name] for name, n in n_runs.items() for _ in range(n)], len(calibrations)
    ) + find_last_end([again] * n_confirmed, len(calibrations))
    return Prediction(
        seconds,
        runs,
        n_runs,
        max(one["peak_mib"] for one in calibrations),
        disk / 2**20,
        rounds / 2**20,
        n_confirmed,
        len(calibrations),
        config.search.early_stopping is not None,
    )


def find_last_end(jobs: Sequence[float], n_workers: int) -> float:
    """When the last ends, each job given to the first worker that is free."""
    free = [0.0] * n_workers
    for seconds in jobs:
        heapq.heappush(free, heapq.heappop(free) + seconds)
    return max(free)


def expect_front_size(n: int) -> int:
    """How many trials will be measured again: the expected front of n points in the plane, 1 + 1/2 + ... +
    1/n, taken twice, since others move up as rewards come in."""
    return min(n, round(2 * sum(1 / i for i in range(1, n + 1))))


def format_duration(seconds: float) -> str:
    """As "12 s", "5.5 min", "3.2 h", "4.6 days"."""
    for size, unit in ((1, "s"), (60, "min"), (3600, "h"), (86400, "days")):
        if seconds < 100 * size or unit == "days":
            break
    return f"{seconds / size:.0f} {unit}" if unit == "s" else f"{seconds / size:.1f} {unit}"


def describe_prediction(found: Prediction) -> list[str]:
    """What `search --dry-run` says."""
    runs = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in found.runs.items())
    hours = sum(n * found.runs[name] for name, n in found.n_runs.items()) / 3600
    return [
        f"predicted time: {format_duration(found.seconds)} with {found.n_workers} worker(s), "
        f"{sum(found.n_runs.values())} runs ({hours:.2g} hours of a worker), and "
        f"{found.n_confirmed} trials measured again"
        + (", if none is stopped early" if found.stops_early else ""),
        f"predicted time of a run: {runs}",
        f"predicted memory of a worker: {found.memory_mib:.0f} MiB (the most that the calibration held)",
        f"predicted disk: {found.disk_mib:.0f} MiB, and {found.checkpoints_mib:.0f} MiB for "
        "checkpoints while it trains",
    ]
