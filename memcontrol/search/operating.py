"""Owns what a running search does at the word of others, and of the clock: it looks into the database every
few seconds, ends in time, changes its number of workers."""

from __future__ import annotations

import time
from collections.abc import Sequence

from memcontrol.core.errors import SearchEnded
from memcontrol.core.files import write_json
from memcontrol.execution.job_queue import JobQueue
from memcontrol.search.locks import read_holder
from memcontrol.study.database import Tell
from memcontrol.study.orders import Order, find_stop, find_workers
from memcontrol.study.place import StudyPlace
from memcontrol.study.record import Record
from memcontrol.study.store import Study

LOOK_SECONDS = 2.0
_AWAY_SECONDS = 15.0  # between two looks at a database that is away
_ENDING_SECONDS = 10.0  # for checkpoints, of the time that a search is given; at most a twentieth of it


class Operator:
    """Stands in the queue of jobs: where the search is to end, nothing more is handed out, and once nothing
    is at work it raises SearchEnded; at once where it is to end now, or its time is over."""

    def __init__(self, place: StudyPlace, jobs: JobQueue, say: Tell, hours: float | None = None):
        self.place, self.jobs, self.say, self.hours = place, jobs, say, hours
        self.study: Study | None = None
        self.why = ""  # it ends
        self.workers: Order | None = None  # the last that was followed
        self.due = 0.0
        seconds = 3600 * hours if hours else 0.0
        self.deadline = time.monotonic() + seconds - min(_ENDING_SECONDS, seconds / 20) if hours else None
        jobs.look = self.look

    def open(self, study: Study) -> None:
        self.study = study

    def look(self) -> None:
        """Raises SearchEnded."""
        self.watch_clock()
        if self.study is not None and time.monotonic() >= self.due:
            self.read(self.study)
        if self.jobs.is_held and not self.jobs.n_at_work:
            raise SearchEnded(self.why)

    def watch_clock(self) -> None:
        """Begins nothing that would surely not end in time, and ends when it is over."""
        if self.deadline is None:
            return
        left = self.deadline - time.monotonic()
        shortest = find_shortest(self.study.records()) if self.study and not self.jobs.is_held else 0.0
        if left <= shortest:
            self.hold(f"its time is over (--hours {self.hours:g})")
        if left <= 0:
            raise SearchEnded(self.why)

    def hold(self, why: str) -> None:
        if not self.jobs.is_held:
            self.why, self.jobs.is_held = why, True
            self.say(f"no further trial begins: {why}")

    def read(self, study: Study) -> None:
        before = dict(study.dropped)
        self.due = time.monotonic() + (LOOK_SECONDS if study.heed() else _AWAY_SECONDS)
        for number in sorted({*before, *study.dropped}):
            self.tell_dropped(number, before.get(number), study.dropped.get(number))
        if (workers := find_workers(study)) != self.workers:
            self.workers = workers
            if workers:
                self.change_workers(workers)
        if stop := find_stop(study):
            self.hold(f"memcontrol stop asked for it ({stop.by}, {stop.at})")
            if stop.value == "now":
                raise SearchEnded(self.why)

    def tell_dropped(self, number: int, before: str | None, now: str | None) -> None:
        if now and not before:
            self.say(f"trial {number} counts for nothing from now on (memcontrol drop): {now}")
        elif before and not now:
            self.say(f"trial {number} counts again (memcontrol drop --undo)")

    def change_workers(self, order: Order) -> None:
        if not self.jobs.executor.resize(order.value):
            self.say(f"{order.value} workers were asked for ({order.by}); this executor cannot change them")
            return
        self.jobs.n_places = order.value
        folder = self.place.folder
        write_json(folder.holder_file, {**read_holder(folder), "workers": order.value})
        self.say(f"the search goes on with {order.value} workers, as asked by {order.by}")


def find_shortest(records: Sequence[Record]) -> float:
    """The seconds of the shortest fine-tuning so far, on whatever machine; 0 before there was one."""
    trained = [record for record in records if record.anchor != "none" and not record.is_variant]
    return min((record.seconds for record in trained if record.seconds), default=0.0)
