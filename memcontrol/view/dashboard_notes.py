"""Owns what a search leaves in the study for optuna-dashboard to show: notes in Markdown, and plots."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from memcontrol.core.run_folder import StudyFolder
from memcontrol.core.space import SearchSpace
from memcontrol.search.observer import Observer
from memcontrol.study.hypervolume import find_reference_point
from memcontrol.study.optuna_private import Notes
from memcontrol.study.pick import find_pick
from memcontrol.study.record import Record
from memcontrol.study.store import Study
from memcontrol.view.front_data import make_front_data, mark_trials
from memcontrol.view.front_plotly import plot_front, plot_hypervolume
from memcontrol.view.note_text import YOURS, write_study_note, write_trial_note

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


_PUBLISH_SECONDS = 30.0  # between two looks at the whole study
_FRONT, _HYPERVOLUME = "front", "hypervolume"


class Publisher(Observer):
    """Writes what has changed since it last looked. One process writes to a study, so what it wrote needs no
    reading."""

    study: Study

    def __init__(self, space: SearchSpace, folder: StudyFolder):
        self.space, self.folder = space, folder
        self.written: dict[int | None, str] = {}  # by trial; None: the study's own
        self.seen: dict[int, Record] = {}
        self.due = 0.0

    @cached_property
    def data(self) -> dict[str, Any]:
        return self.folder.summarize_data()

    def opened(self, study: Study) -> None:
        self.study = study
        self.written = study.patiently(lambda: _read_notes(study))

    def tick(self) -> None:
        """Publishes at most every PUBLISH_SECONDS: what is written grows with the study."""
        if time.monotonic() >= self.due:
            self.publish()

    def over(self) -> None:
        self.publish(over=True)

    def publish(self, over: bool = False) -> None:
        """`over`: the search ends, and what still runs is interrupted."""
        records = self.study.records()
        changed = [record for record in records if self.seen.get(record.number) != record]
        if changed or over:
            self.write(records, changed, over)
        self.seen = {record.number: record for record in records}
        self.due = time.monotonic() + _PUBLISH_SECONDS

    def write(self, records: Sequence[Record], changed: Sequence[Record], over: bool) -> None:
        notes = self.study.patiently(lambda: Notes(self.study.inner))
        config, objectives = self.study.config, self.study.objectives
        trials = mark_trials(records, find_pick(records, self.study), len(self.space.groups))
        for record in changed:
            if record.state != "RUNNING":
                self.note(notes, record.number, write_trial_note(record, self.space))
        self.note(notes, None, write_study_note(config, self.space, trials, objectives, self.data, over))
        complete = [trial for trial in trials if trial["state"] == "COMPLETE"]
        if complete and len(objectives) > 1:
            self.plot(_FRONT, plot_front(make_front_data(complete, objectives), f"{config.name}: front"))
        if reference := self.study.attributes.get("reference") or find_reference_point(records):
            self.plot(_HYPERVOLUME, plot_hypervolume(records, reference, f"{config.name}: hypervolume"))

    def plot(self, name: str, figure: Figure) -> None:
        from optuna_dashboard import save_plotly_graph_object

        self.study.patiently(lambda: save_plotly_graph_object(self.study.inner, figure, graph_object_id=name))

    def note(self, notes: Notes, number: int | None, text: str) -> None:
        if self.written.get(number) != text:
            self.study.patiently(lambda: save_note(self.study, notes, number, text))
            self.written[number] = text


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
