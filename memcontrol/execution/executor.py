"""Owns the one face of all executors, which run jobs: what they are asked, and what they say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FAILED_KINDS = ("failed", "lost")  # of an attempt: it raised, or its process, node or time came to an end
END_KINDS = ("prepared", "done", "stop", *FAILED_KINDS)


@dataclass(frozen=True)
class Event:
    """What a worker said of a job: progress, warning, or one of ENDS."""

    job: dict
    kind: str
    detail: dict = field(default_factory=dict)


class Executor(ABC):
    """Takes jobs while it has free places and says what becomes of them; every job ends in exactly one of
    ENDS.

    A job that runs longer than its `time_limit_seconds` is ended and counts as lost. Nothing is tried again
    here.
    """

    @abstractmethod
    def free(self) -> int: ...

    @abstractmethod
    def submit(self, job: dict) -> None: ...

    @abstractmethod
    def events(self, timeout_seconds: float) -> Iterator[Event]:
        """Events so far; waits up to the timeout for the first."""

    @abstractmethod
    def cancel(self, job: dict) -> None:
        """Ends a running job at once; it counts as lost."""

    @abstractmethod
    def close(self) -> None:
        """Ends everything at once, running jobs included; their folders keep what was written."""


def make_event(job: dict, line: dict) -> Event:
    return Event(job, line["event"], {key: value for key, value in line.items() if key != "event"})


def find_job_folder(job: dict) -> Path:
    """Where a job's log lies, and what it writes."""
    return Path(next(job[kind] for kind in ("trial", "prepare", "confirm", "help") if kind in job))


def pick_time_limit(job: dict | None, time_limit_seconds: float | None) -> float | None:
    """The limit is of an attempt at a trial; preparing and confirming have none."""
    return time_limit_seconds if job and "trial" in job else None


def describe_overrun(seconds: float) -> str:
    return f"it ran longer than search.time_limit_minutes ({seconds / 60:g})"
