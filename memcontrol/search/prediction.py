"""Owns what a search will take, told before it begins: time, memory and disk, from a calibration on the same
machines."""

from __future__ import annotations

import contextlib
import heapq
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from memcontrol.config.rewards import RewardsConfig
from memcontrol.config.settings import load_study_space
from memcontrol.config.study import Config
from memcontrol.core.choice import BUDGET_KEY, Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.jobs import Calibrated, CalibrateJob, Calibration, GivenUp, TrialCost
from memcontrol.core.run_folder import StudyFolder
from memcontrol.core.space import SearchSpace
from memcontrol.execution.job_queue import JobQueue

_BATCH_KEY = "inner.batch_size"


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
    disk_gb: float | None  # the bound on it
    n_confirmed: int
    n_workers: int
    stops_early: bool


def run_calibrations(config: Config, folder: Path, jobs: JobQueue) -> list[Calibration]:
    """Short trials on every worker at once, as a search runs them, in a folder that is removed again. Raises
    MemControlError."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    places = [StudyFolder(folder).calibration(i) for i in range(jobs.count_room())]
    try:
        ends = list(jobs.run([CalibrateJob(place, config.model_dump(mode="json")) for place in places]))
    finally:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
        if folder in made:
            for log in StudyFolder(folder).list_worker_logs():
                log.unlink(missing_ok=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
    for end in ends:
        if isinstance(end, GivenUp):
            raise MemControlError(f"the calibration failed: {end.reason}")
    return [Calibration.from_dict(end.calibration) for end in ends if isinstance(end, Calibrated)]


def predict_search(
    config: Config, anchors: Mapping[str, Sequence[Choice]], calibrations: Sequence[Calibration]
) -> Prediction:
    """From one calibration of each worker, all made at the same time; `anchors` are those of the search."""
    n_runs = {name: len(choices) for name, choices in anchors.items()} | {"sampled": config.search.trials}
    costs = {kind: [cost for one in calibrations for cost in one.by_kind[kind]] for kind in n_runs}
    space = load_study_space(config)
    n_steps = dict.fromkeys(n_runs, float(config.inner.budget_steps))
    n_steps["sampled"] = expect_steps(config, space)
    # of each sampled trial, and of each anchor that is trained
    if n_variants := len(space.list_variants(Choice((), "full", 1.0))):
        n_trained = sum(name != "none" for name in anchors)
        n_runs["variants"] = n_variants * (config.search.trials + n_trained)
        costs["variants"], n_steps["variants"] = costs["sampled"], 0.0
    n_batches = _count_samples(config.rewards) / calibrations[0].batch_size
    one_batch = [cost for one in calibrations for cost in one.by_kind["none"]]
    stretch = _estimate_stretch(one_batch, [one.two_batches for one in calibrations], n_batches)
    n_workers = len(calibrations)
    n_front = expect_front_size(config.search.trials + len(anchors))
    n_kept = dict(n_runs)
    if config.search.keep == "front":  # an anchor's best learning rate, and as many as are measured again
        n_kept = dict.fromkeys(anchors, 1) | {"sampled": min(config.search.trials, n_front)}
    runs = {kind: _predict_run_seconds(found, n_steps[kind], stretch) for kind, found in costs.items()}
    n_confirmed = n_front if config.rewards.confirm else 0
    confirming = (
        config.rewards.confirm * stretch * statistics.mean(cost.after_seconds for cost in costs["sampled"])
    )
    queued = [runs[kind] for kind, n in n_runs.items() for _ in range(n)]
    last_ends = find_last_end(queued, n_workers) + find_last_end([confirming] * n_confirmed, n_workers)
    return Prediction(
        seconds=statistics.mean(one.start_seconds for one in calibrations) + last_ends,
        runs=runs,
        n_runs=n_runs,
        memory_mib=max(one.peak_mib for one in calibrations),
        disk_mib=(calibrations[0].shared_bytes + _predict_runs_bytes(costs, n_runs, n_kept, n_batches))
        / 2**20,
        checkpoints_mib=_predict_checkpoint_bytes(costs, n_workers) / 2**20,
        disk_gb=config.search.disk_gb,
        n_confirmed=n_confirmed,
        n_workers=n_workers,
        stops_early=config.search.early_stopping is not None,
    )


def _count_samples(rewards: RewardsConfig) -> int:
    """How many images a trial makes."""
    attack = rewards.extraction
    return rewards.n_samples + (attack.prompts * attack.images if attack else 0)


def _estimate_stretch(one: Sequence[TrialCost], two: Sequence[TrialCost], n_batches: float) -> float:
    """How many times as long it takes to sample and score n batches as one, from trials of one batch and of
    two: each further batch adds their difference, which noise must make neither negative nor more than one
    batch with all that comes but once."""
    once, twice = (statistics.mean(cost.after_seconds for cost in costs) for costs in (one, two))
    return (once + (n_batches - 1) * min(max(twice - once, 0.0), once)) / once


def expect_steps(config: Config, space: SearchSpace) -> float:
    """Of a sampled trial: the mean over what `search.over` says of budgets and batches."""
    over, inner = space.over, config.inner
    budgets = over[BUDGET_KEY].options if BUDGET_KEY in over else (inner.budget_images,)
    sizes = over[_BATCH_KEY].options if _BATCH_KEY in over else (inner.batch_size,)
    pairs = ((float(budget), float(size)) for budget in budgets for size in sizes)  # type: ignore[arg-type]
    return statistics.mean(math.ceil(budget / size) for budget, size in pairs)


def _predict_run_seconds(costs: Sequence[TrialCost], n_steps: float, stretch: float) -> float:
    return statistics.mean(
        cost.setup_seconds + n_steps * cost.step_seconds + stretch * cost.after_seconds for cost in costs
    )


def _predict_runs_bytes(
    costs: Mapping[str, Sequence[TrialCost]],
    n_runs: Mapping[str, int],
    n_kept: Mapping[str, int],
    n_batches: float,
) -> float:
    """Of the runs at the end of the search, of which so many keep their weights and samples."""
    total = 0.0
    for kind, n in n_runs.items():
        large = statistics.mean(cost.weights_bytes + n_batches * cost.samples_bytes for cost in costs[kind])
        rest = statistics.mean(cost.rest_bytes - cost.weights_bytes for cost in costs[kind])
        total += n * rest + n_kept[kind] * large
    return total


def _predict_checkpoint_bytes(costs: Mapping[str, Sequence[TrialCost]], n_workers: int) -> float:
    """Where every worker trains the kind that has the largest."""
    return n_workers * max(statistics.mean(cost.rounds_bytes for cost in found) for found in costs.values())


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
        "checkpoints while it trains" + _compare_with_bound(found),
    ]


def _compare_with_bound(found: Prediction) -> str:
    n_gb = (found.disk_mib + found.checkpoints_mib) * 2**20 / 1e9
    if found.disk_gb is None or n_gb <= found.disk_gb:
        return ""
    return (
        f"; together {n_gb:.3g} GB, more than search.disk_gb, {found.disk_gb:g}: the search will stop at it"
    )
