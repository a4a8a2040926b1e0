"""Owns what a search leaves in the study for optuna-dashboard to show: notes in Markdown, and plots."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from memcontrol.core.run_folder import StudyFolder
from memcontrol.core.space import SearchSpace
from memcontrol.dashboard.note_text import YOURS, write_study_note, write_trial_note
from memcontrol.search.observer import Observer
from memcontrol.study.database import is_away
from memcontrol.study.hypervolume import find_reference_point
from memcontrol.study.optuna_private import AttributeWriter, Notes, write_attribute
from memcontrol.study.pick import find_pick
from memcontrol.study.record import Record
from memcontrol.study.store import Study
from memcontrol.view.front_data import make_front_data, mark_trials
from memcontrol.view.front_plotly import plot_front, plot_hypervolume

_PUBLISH_SECONDS = 30.0  # between two looks at the whole study
_MOST = 0.1  # of the time that may be spent on looks: what there is to look at grows with the study
_FRONT, _HYPERVOLUME = "front", "hypervolume"


class Publisher(Observer):
    """Writes what has changed since it last looked: in a thread while the search goes on, so that nothing
    waits for it, and what is left where the search ends. One process writes to a study, so what it wrote
    needs no reading."""

    study: Study

    def __init__(self, space: SearchSpace, folder: StudyFolder):
        self.space, self.folder = space, folder
        self.written: dict[int | None, str] = {}  # by trial; None: the study's own
        self.seen: dict[int, Record] = {}
        self.due = 0.0
        self.pool = ThreadPoolExecutor(1, "notes")
        self.writing: Future[None] | None = None
        self.is_broken_off = False

    @cached_property
    def data(self) -> dict[str, Any]:
        return self.folder.summarize_data()

    def opened(self, study: Study) -> None:
        self.study = study
        self.written = study.patiently(lambda: _read_notes(study))

    def tick(self) -> None:
        """Begins to publish where it is time and nothing is being written any more."""
        if self.writing is not None and self.writing.done():
            self.gather()
        if self.writing is None and time.monotonic() >= self.due:
            self.writing = self.pool.submit(self.publish_aside, self.study.records())

    def broken_off(self) -> None:
        self.is_broken_off = True
        self.pool.shutdown()

    def over(self) -> None:
        """Returns once everything is written."""
        self.gather()
        self.pool.shutdown()
        self.publish(over=True)

    def gather(self) -> None:
        """Waits for the thread. What it failed at is done here, where an error can be told."""
        writing, self.writing = self.writing, None
        if writing is not None and writing.exception() is not None:
            self.publish()

    def publish(self, over: bool = False) -> None:
        """`over`: the search ends, and what still runs is interrupted."""
        study = self.study
        self.look(study.records(), _Pen(study.patiently, write_attribute), over)

    def publish_aside(self, records: Sequence[Record]) -> None:
        """Where the database is away, the search waits for it; the next look then writes what is left."""
        started, study = time.monotonic(), self.study
        try:
            self.look(records, _Pen(lambda call: call(), study.write_aside))
        except Exception as error:
            if not is_away(error, study.url):
                raise
        finally:
            study.storage.remove_session()  # this thread's
            now = time.monotonic()
            self.due = now + max(_PUBLISH_SECONDS, (now - started) / _MOST)

    def look(self, records: Sequence[Record], pen: _Pen, over: bool = False) -> None:
        changed = [record for record in records if self.seen.get(record.number) != record]
        if changed or over:
            self.write(records, changed, pen, over)
        self.seen = {record.number: record for record in records}
        self.due = time.monotonic() + _PUBLISH_SECONDS

    def write(self, records: Sequence[Record], changed: Sequence[Record], pen: _Pen, over: bool) -> None:
        notes = pen.call(lambda: Notes(self.study.inner, pen.write))
        config, objectives = self.study.config, self.study.objectives
        trials = mark_trials(records, find_pick(records, self.study), len(self.space.groups))
        for record in changed:
            if record.state != "RUNNING":
                self.note(pen, notes, record.number, write_trial_note(record, self.space, config.data.path))
        self.note(pen, notes, None, write_study_note(config, self.space, trials, objectives, self.data, over))
        complete = [trial for trial in trials if trial["state"] == "COMPLETE"]
        if complete and len(objectives) > 1:
            front = plot_front(make_front_data(complete, objectives), f"{config.name}: front")
            pen.call(lambda: notes.save_plot(_FRONT, front))
        if reference := self.study.attributes.get("reference") or find_reference_point(records):
            volumes = plot_hypervolume(records, reference, f"{config.name}: hypervolume")
            pen.call(lambda: notes.save_plot(_HYPERVOLUME, volumes))

    def note(self, pen: _Pen, notes: Notes, number: int | None, text: str) -> None:
        if self.written.get(number) != text and not self.is_broken_off:
            pen.call(lambda: save_note(self.study, notes, number, text))
            self.written[number] = text


@dataclass(frozen=True)
class _Pen:
    """How a study is written to: `call` does what needs the database, and `write` writes an attribute."""

    call: Callable[[Callable[[], Any]], Any]
    write: AttributeWriter


def _read_notes(study: Study) -> dict[int | None, str]:
    """Our part of every note, by its trial's number; None: the study's own."""
    numbers: dict[int | None, int | None] = {trial_id: number for number, trial_id in study.ids.items()}
    numbers[None] = None
    texts = Notes(study.inner).texts()
    return {
        numbers[trial_id]: text.partition(YOURS)[0] for trial_id, text in texts.items() if trial_id in numbers
    }


def save_note(study: Study, notes: Notes, number: int | None, text: str) -> None:
    """Above what a person has written into the note."""
    trial_id = None if number is None else study.ids[number]
    before = notes.read(trial_id)
    whole = text + YOURS + before.partition(YOURS)[2]
    if whole != before:
        notes.save(trial_id, whole)
