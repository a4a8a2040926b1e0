"""Owns `ray` and `slurm`: what a trial reserves there."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from memcontrol.config.strict import Count, NotNegative, Strict


class RayConfig(Strict):
    """An existing Ray cluster, or one started on the spot; what each trial reserves."""

    address: str | None = None
    """a Ray cluster (`auto`, `ray://head:10001`); none: one is started on this machine"""
    gpus: NotNegative | None = None
    """GPUs that a trial reserves; none: where the cluster has any, `search.gpus_per_trial`"""
    cpus: NotNegative = 1
    """cores that a trial reserves"""


class SlurmConfig(Strict):
    """Jobs of a Slurm cluster; `search.workers` is how many are in flight."""

    partition: str | None = None
    """the partition"""
    time_minutes: Count = 240
    """the job's time limit"""
    gres: str | None = None
    """such as `gpu:1`; none: with a `search.gpus_per_trial` above 1 as many GPUs"""
    cpus: Count = 1
    """cores, and threads"""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """memory"""
    account: str | None = None
    """whose time it is"""
    extra: dict[str, str | int] = {}
    """further options of sbatch, such as `{qos: long}`"""

    @property
    def gpus(self) -> int | None:
        """How many `gres` reserves (`gpu`, `gpu:2`, `gpu:a100:2`); none where it does not say."""
        named = [part.split(":") for part in (self.gres or "").split(",")]
        counts = [int(words[-1]) if words[-1].isdigit() else 1 for words in named if words[0] == "gpu"]
        return sum(counts) if counts else None
