"""Owns which executor a study's config names, and that it is ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from memcontrol.core.config import Config
from memcontrol.execution.executor import Executor
from memcontrol.execution.local import Inline, Local


@contextlib.contextmanager
def open_executor(config: Config, folder: Path) -> Iterator[Executor]:
    """The executor, ended at once when the block is left."""
    executor = make_executor(config, folder)
    try:
        yield executor
    finally:
        executor.close()


def make_executor(config: Config, folder: Path) -> Executor:
    """The executor that the config's `search` names; `folder` is the study's. Raises MemControlError where
    its library is missing."""
    search = config.search
    limit = search.time_limit_minutes and 60 * search.time_limit_minutes
    if search.executor == "inline":
        return Inline()
    if search.executor == "ray":
        from memcontrol.execution.ray_cluster import Ray

        return Ray(config.ray, search.workers, limit)
    if search.executor == "slurm":
        from memcontrol.execution.slurm_cluster import Slurm

        return Slurm(config.slurm, search.workers, limit, folder)
    return Local(search.workers, search.processes, limit)
