"""Owns how jobs are carried through: handed to free places, tried again where an attempt fails, given up
after three."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path

from memcontrol.core import interrupt
from memcontrol.core.attempts import note_failure
from memcontrol.core.errors import MemControlError
from memcontrol.execution.executor import END_KINDS, FAILED_KINDS, Event, Executor

Show = Callable[[Event], None]
N_TRIES = 3


class JobQueue:
    """Jobs that wait for a place or run; each ends in exactly one event."""

    def __init__(self, executor: Executor, show: Show):
        self.executor, self.show = executor, show
        self.waiting: deque[dict] = deque()
        self.failures: Counter[str] = Counter()  # of jobs that are no trials; a trial's are in its folder

    def room(self) -> int:
        """How many more jobs would find a place at once."""
        return self.executor.free() - len(self.waiting)

    def add(self, job: dict) -> None:
        self.waiting.append(job)
        self.hand_out()

    def hand_out(self) -> None:
        while self.waiting and self.executor.free():
            self.executor.submit(self.waiting.popleft())

    def ends(self, timeout_seconds: float = 1.0) -> Iterator[Event]:
        """Ends so far, waiting up to the timeout for the first: `prepared`, `done`, or `given up` with the
        reason.

        Raises MemControlError for what only the user can mend.
        """
        interrupt.check()
        self.hand_out()
        for event in self.executor.events(timeout_seconds):
            self.show(event)
            if event.kind == "stop":
                raise MemControlError(event.detail["reason"])
            if event.kind in FAILED_KINDS:
                if self.count_failure(event) < N_TRIES:
                    self.waiting.appendleft(event.job)
                else:
                    yield Event(event.job, "given up", event.detail)
            elif event.kind in END_KINDS:
                yield event
            self.hand_out()

    def count_failure(self, event: Event) -> int:
        reason = event.detail["reason"]
        if "trial" in event.job:
            return note_failure(Path(event.job["trial"]), reason)
        key = event.job.get("confirm") or event.job["prepare"]
        self.failures[key] += 1
        return self.failures[key]

    def run(self, jobs: list[dict]) -> Iterator[Event]:
        """Carries these through, whatever else waits; their ends as they come."""
        for job in jobs:
            self.waiting.append(job)
        n_left = len(jobs)
        while n_left:
            for event in self.ends():
                n_left -= 1
                yield event
