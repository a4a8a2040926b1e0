"""Owns what a search will take, told before it begins: time, memory and disk, from a calibration on the same machines."""

from __future__ import annotations

import contextlib
import heapq
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memcontrol.config import Config
from memcontrol.errors import MemControlError
from memcontrol.jobs import Jobs

N_RATES = 3  # learning rates that the anchors `all` and `full` are tried at


@dataclass(frozen=True)
class Prediction:
    """Seconds of the whole search and of its runs by kind; of a worker's memory, and disk in all, MiB."""

    seconds: float
    runs: dict[str, float]
    memory_mib: float
    disk_mib: float
    n_confirmed: int


def calibrations_of(config: Config, folder: Path, jobs: Jobs, n_workers: int) -> list[dict[str, Any]]:
    """Short trials on every worker at once, as a search runs them, in a folder that is removed again. Raises MemControlError."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    places = [folder / f"calibration-{i}" for i in range(n_workers)]
    try:
        found = list(jobs.run([{"prepare": str(place), "config": config.model_dump(mode="json"), "calibrate": True} for place in places]))
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


def predicted(config: Config, calibrations: Sequence[dict[str, Any]], n_workers: int) -> Prediction:
    """From one calibration of each worker, all made at the same time."""
    n_samples, attack = config.rewards.n_samples, config.rewards.extraction
    n_batches = n_samples / calibrations[0]["batch"] + (attack.prompts * attack.images / calibrations[0]["batch"] if attack else 0)
    first, second = (statistics.mean(one["none"][i]["after"] for one in calibrations) for i in (0, 1))

    def after(batches: float) -> float:
        """Seconds of sampling and scoring so many batches, with nothing trained."""
        return first + (batches - 1) * (second - first)

    def seconds(one: dict[str, float]) -> float:
        steps = config.inner.budget_steps * one["step"]
        return one["setup"] + steps + after(n_batches) * one["after"] / first

    runs = {name: statistics.mean(seconds(part) for one in calibrations for part in one[name]) for name in ("all", "full", "sampled")}
    runs["none"] = after(n_batches)
    n_confirmed = front_size(config.search.trials + 3) if config.rewards.confirm else 0
    confirmed = config.rewards.confirm * after(n_batches) * statistics.mean(part["after"] for one in calibrations for part in one["sampled"]) / first
    order = [runs["none"], *[runs["all"]] * N_RATES, *[runs["full"]] * N_RATES, *[runs["sampled"]] * config.search.trials]
    start = statistics.mean(one["start"] for one in calibrations)
    time = start + spread(order, n_workers) + spread([confirmed] * n_confirmed, n_workers)
    return Prediction(time, runs, max(one["peak_mib"] for one in calibrations), disk(config, calibrations, n_batches) / 2**20, n_confirmed)


def spread(jobs: Sequence[float], n_workers: int) -> float:
    """When the last ends, each job given to the first worker that is free."""
    free = [0.0] * n_workers
    for seconds in jobs:
        heapq.heappush(free, heapq.heappop(free) + seconds)
    return max(free)


def front_size(n: int) -> int:
    """How many trials will be measured again: the expected front of n points in the plane, 1 + 1/2 + ... + 1/n, taken twice, since others
    move up as figures come in."""
    return min(n, round(2 * sum(1 / i for i in range(1, n + 1))))


def disk(config: Config, calibrations: Sequence[dict[str, Any]], n_batches: float) -> float:
    """Bytes of all run folders. Weights and pictures stay; of samples as many as there are."""

    def of(one: dict[str, float]) -> float:
        return one["rest_bytes"] + n_batches * one["samples_bytes"]

    counts = {"none": 1, "all": N_RATES, "full": N_RATES, "sampled": config.search.trials}
    return sum(n * statistics.mean(of(one[name][0] if name == "none" else part) for one in calibrations for part in one[name]) for name, n in counts.items())


def said_of_time(seconds: float) -> str:
    """ "12 s", "5.5 min", "3.2 h" """
    for size, unit in ((1, "s"), (60, "min"), (3600, "h"), (86400, "days")):
        if seconds < 100 * size or unit == "days":
            break
    return f"{seconds / size:.0f} {unit}" if unit == "s" else f"{seconds / size:.1f} {unit}"


def lines_of(config: Config, found: Prediction, n_workers: int) -> list[str]:
    """What `search --dry-run` says."""
    runs = ", ".join(f"{name} {said_of_time(found.runs[name])}" for name in ("none", "all", "full", "sampled"))
    n_runs = 1 + 2 * N_RATES + config.search.trials
    hours = math.fsum([found.runs["none"], N_RATES * (found.runs["all"] + found.runs["full"]), config.search.trials * found.runs["sampled"]]) / 3600
    return [
        f"predicted time: {said_of_time(found.seconds)} with {n_workers} worker(s), {n_runs} runs ({hours:.2g} hours of a worker), and {found.n_confirmed} trials measured again",
        f"predicted time of a run: {runs}",
        f"predicted memory of a worker: {found.memory_mib:.0f} MiB (the most that the calibration held)",
        f"predicted disk: {found.disk_mib:.0f} MiB",
    ]  # fmt: skip
