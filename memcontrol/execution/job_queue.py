"""Owns how jobs are carried through: handed to free places, tried again where an attempt fails, given up
after three, waited for where another process has taken them over."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from memcontrol.core import interrupt
from memcontrol.core.console import LOG
from memcontrol.core.errors import MemControlError
from memcontrol.core.jobs import END_EVENTS, Done, Event, Failed, GivenUp, Job, Overtaken, Stopped, TrialJob
from memcontrol.execution.attempts import note_failure
from memcontrol.execution.executor import Executor

Show = Callable[[Event], None]
N_TRIES = 3
_SILENT_SECONDS = 600.0  # after which whoever has taken a job over is thought dead


@dataclass
class Elsewhere:
    """A job that a process which is not ours has taken over, and when that last gave a sign of life."""

    job: Job
    signs: dict[Path, int] = field(default_factory=dict)  # its folder's files, and when they changed
    seen_at: float = 0.0

    def look(self) -> None:
        signs = {}
        for path in self.job.folder.glob("*.*"):
            with contextlib.suppress(FileNotFoundError):
                signs[path] = path.stat().st_mtime_ns
        if signs != self.signs:
            self.signs, self.seen_at = signs, time.monotonic()

    @property
    def is_silent(self) -> bool:
        return time.monotonic() - self.seen_at > _SILENT_SECONDS


class JobQueue:
    """Jobs that wait for a place or run; each ends in exactly one event."""

    def __init__(self, executor: Executor, show: Show):
        self.executor, self.show = executor, show
        self.waiting: deque[Job] = deque()
        self.elsewhere: list[Elsewhere] = []
        self.failures: Counter[Path] = Counter()  # of jobs that are no trials; a trial's are in its folder
        self.look: Callable[[], None] = lambda: (
            None
        )  # called while ends are waited for; may hold the queue, or raise
        self.is_held = False  # nothing is handed out any more
        self.n_at_work = 0  # jobs that the executor has
        self.n_places: int | None = None  # where an operator has changed their number

    def count_room(self) -> int:
        """How many more jobs would find a place at once."""
        return 0 if self.is_held else self.executor.count_free() - len(self.waiting)

    def add(self, job: Job) -> None:
        self.waiting.append(job)
        self.hand_out()

    def hand_out(self) -> None:
        while self.waiting and not self.is_held and self.executor.count_free():
            self.n_at_work += 1
            self.executor.submit(self.waiting.popleft())

    def collect_ends(self, timeout_seconds: float = 1.0) -> Iterator[Event]:
        """Ends so far, waiting up to the timeout for the first: one of END_EVENTS, but `GivenUp` in place of
        a last failure, and none that was overtaken.

        Raises MemControlError for what only the user can mend.
        """
        interrupt.check()
        self.look()
        began = time.monotonic()
        yield from self.look_elsewhere()
        self.hand_out()
        for event in self.executor.events(timeout_seconds):
            self.show(event)
            self.n_at_work -= isinstance(event, END_EVENTS)
            yield from self.take_in(event)
            self.hand_out()
        if self.elsewhere:  # an executor that has nothing to do does not wait
            time.sleep(max(began + timeout_seconds - time.monotonic(), 0))

    def take_in(self, event: Event) -> Iterator[Event]:
        """The event, where it ends its job."""
        if isinstance(event, Stopped):
            raise MemControlError(event.reason)
        if isinstance(event, Overtaken):
            assert event.job is not None
            LOG.info("%s: waiting for its result", event.reason)
            self.elsewhere.append(Elsewhere(event.job))
        elif isinstance(event, Failed) and not isinstance(event, GivenUp):
            yield from self.try_again(event)
        elif isinstance(event, END_EVENTS):  # those that need no further attempt
            yield event

    def look_elsewhere(self) -> Iterator[Event]:
        """Ends of jobs that others have taken over; one of whom nothing is heard is not waited for."""
        for one in list(self.elsewhere):
            one.look()
            if one.job.is_done() or one.is_silent:
                self.elsewhere.remove(one)
                if one.job.is_done():
                    yield Done(one.job)
                else:
                    self.waiting.appendleft(one.job)

    def try_again(self, event: Failed) -> Iterator[Event]:
        """Its end, where it was tried often enough, or died when all was done."""
        assert event.job is not None, "an attempt is always at a job"
        if event.job.is_done():
            yield Done(event.job)
        elif self.count_failure(event.job, event.reason) < N_TRIES:
            self.waiting.appendleft(event.job)
        else:
            yield GivenUp(event.job, event.reason, event.traceback)

    def count_failure(self, job: Job, reason: str) -> int:
        if isinstance(job, TrialJob):
            return note_failure(job.folder, reason)
        self.failures[job.folder] += 1
        return self.failures[job.folder]

    def run(self, jobs: Iterable[Job]) -> Iterator[Event]:
        """Carries these through, whatever else waits; their ends as they come."""
        n_before = len(self.waiting)
        self.waiting.extend(jobs)
        n_left = len(self.waiting) - n_before
        while n_left:
            for event in self.collect_ends():
                n_left -= 1
                yield event
