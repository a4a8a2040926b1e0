"""Owns which executor a study's config names, and that it is ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from memcontrol.config.search import SearchConfig
from memcontrol.config.study import Config
from memcontrol.core.run_folder import StudyFolder
from memcontrol.execution.executor import Executor
from memcontrol.execution.local import Inline, Local, list_gpus

_N_WORKERS = 2  # where no GPU says how many


@contextlib.contextmanager
def open_executor(config: Config, folder: Path, command: str = "search") -> Iterator[Executor]:
    """The executor, ended when the block is left; what one of the same command has left at work, it takes
    over."""
    executor = make_executor(config, folder, command)
    try:
        yield executor
    finally:
        executor.close()


def make_executor(config: Config, folder: Path, command: str = "search") -> Executor:
    """The executor that the config's `search` names; `folder` is the study's. Raises MemControlError where
    its library is missing."""
    search, slurm = config.search, StudyFolder(folder).slurm / command
    limit = search.time_limit_minutes and 60 * search.time_limit_minutes
    if slurm.is_dir() and search.executor != "slurm":
        from memcontrol.execution.slurm_cluster import withdraw_jobs

        withdraw_jobs(slurm)
    if search.executor == "inline":
        return Inline()
    if search.executor == "ray":
        from memcontrol.execution.ray_cluster import Ray

        return Ray(config.ray, count_workers(search), limit, search.gpus_per_trial)
    if search.executor == "slurm":
        from memcontrol.execution.slurm_cluster import Slurm

        return Slurm(config.slurm, count_workers(search), limit, slurm, search.gpus_per_trial)
    return Local(count_workers(search), search.processes_per_trial, limit, folder)


def count_workers(search: SearchConfig) -> int:
    """How many trials run at a time: `search.workers`, or on this machine one for each GPU or each
    `search.processes_per_trial` of them, and 2 without GPUs or elsewhere."""
    if search.workers is not None:
        return search.workers
    n_gpus = len(list_gpus()) if search.executor == "local" else 0
    return max(1, n_gpus // search.processes_per_trial) if n_gpus else _N_WORKERS


def describe_sharing(search: SearchConfig) -> str:
    """What to know where workers share a GPU; empty where none does."""
    n_workers, n_gpus, n_each = count_workers(search), len(list_gpus()), search.processes_per_trial
    if search.executor != "local" or not n_gpus or n_workers * n_each <= max(n_gpus, n_each):
        return ""
    most = -(-n_workers * n_each // n_gpus)
    return (
        f"{n_workers} workers share {n_gpus} GPU{'s' if n_gpus > 1 else ''}: each loads the base and needs a "
        f"trial's memory for itself, so that a card must hold {most} times as much (leave search.workers out "
        "for one on each GPU)"
    )
