"""Owns the one face of all executors, which run jobs: what they are asked, and what they say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from memcontrol.core.jobs import Event, Job, Progress, TrialJob
from memcontrol.execution.attempts import read_progress


class Executor(ABC):
    """Takes jobs while it has free places and says what becomes of them; every job ends in exactly one of
    END_EVENTS.

    A job that runs longer than its `time_limit_seconds` is ended and counts as lost. Nothing is tried again
    here.
    """

    @property
    def left_at_work(self) -> frozenset[Path]:
        """The folders of jobs that an earlier process left at work; such a job is not begun again where it is
        asked for, but taken over."""
        return frozenset()

    @abstractmethod
    def count_free(self) -> int: ...

    @abstractmethod
    def submit(self, job: Job) -> None: ...

    def resize(self, n_places: int) -> bool:
        """Has as many places from now on; those of jobs that run beyond it end with them. Whether it can."""
        return False

    @abstractmethod
    def events(self, timeout_seconds: float) -> Iterator[Event]:
        """Events so far; waits up to the timeout for the first."""

    @abstractmethod
    def close(self) -> None:
        """Ends everything at once, running jobs included; their folders keep what was written."""


def pick_time_limit(job: Job | None, time_limit_seconds: float | None) -> float | None:
    """The limit is of an attempt at a trial; preparing and confirming have none."""
    return time_limit_seconds if isinstance(job, TrialJob) else None


def describe_overrun(seconds: float) -> str:
    return f"it ran longer than search.time_limit_minutes ({seconds / 60:g})"


def read_new_progress(job: Job, told: Progress | None) -> Progress | None:
    """How far the job is by what its folder says; None where nothing new was said since."""
    said = read_progress(job.folder)
    if said is None:
        return None
    found = Progress(job, said["stage"], said["done"], said["total"])
    return None if found == told else found
