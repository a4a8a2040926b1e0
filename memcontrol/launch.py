"""Owns which executor a study's config names."""

from __future__ import annotations

from pathlib import Path

from memcontrol.config import Config
from memcontrol.executors import Executor
from memcontrol.local_executor import Inline, Local


def make_executor(config: Config, folder: Path) -> Executor:
    """The executor that the config's `search` names; `folder` is the study's. Raises MemControlError where its library is missing."""
    search = config.search
    limit = search.time_limit_minutes and 60 * search.time_limit_minutes
    if search.executor == "inline":
        return Inline()
    if search.executor == "ray":
        from memcontrol.ray_executor import Ray

        return Ray(config.ray, search.workers, limit)
    if search.executor == "slurm":
        from memcontrol.slurm_executor import Slurm

        return Slurm(config.slurm, search.workers, limit, folder)
    return Local(search.workers, search.processes, limit)
