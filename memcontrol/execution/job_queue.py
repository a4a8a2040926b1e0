"""Owns how jobs are carried through: handed to free places, tried again where an attempt fails, given up
after three."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from memcontrol.core import interrupt
from memcontrol.core.attempts import note_failure
from memcontrol.core.errors import MemControlError
from memcontrol.core.jobs import END_EVENTS, Event, Failed, GivenUp, Job, Stopped, TrialJob
from memcontrol.execution.executor import Executor

Show = Callable[[Event], None]
N_TRIES = 3


class JobQueue:
    """Jobs that wait for a place or run; each ends in exactly one event."""

    def __init__(self, executor: Executor, show: Show):
        self.executor, self.show = executor, show
        self.waiting: deque[Job] = deque()
        self.failures: Counter[Path] = Counter()  # of jobs that are no trials; a trial's are in its folder

    def count_room(self) -> int:
        """How many more jobs would find a place at once."""
        return self.executor.count_free() - len(self.waiting)

    def add(self, job: Job) -> None:
        self.waiting.append(job)
        self.hand_out()

    def hand_out(self) -> None:
        while self.waiting and self.executor.count_free():
            self.executor.submit(self.waiting.popleft())

    def collect_ends(self, timeout_seconds: float = 1.0) -> Iterator[Event]:
        """Ends so far, waiting up to the timeout for the first: one of END_EVENTS, but `GivenUp` in place of
        a last failure.

        Raises MemControlError for what only the user can mend.
        """
        interrupt.check()
        self.hand_out()
        for event in self.executor.events(timeout_seconds):
            self.show(event)
            if isinstance(event, Stopped):
                raise MemControlError(event.reason)
            if isinstance(event, Failed) and not isinstance(event, GivenUp):
                yield from self.try_again(event)
            elif isinstance(event, END_EVENTS):  # those that need no further attempt
                yield event
            self.hand_out()

    def try_again(self, event: Failed) -> Iterator[Event]:
        """Its end, where it was tried often enough."""
        assert event.job is not None, "an attempt is always at a job"
        if self.count_failure(event.job, event.reason) < N_TRIES:
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
