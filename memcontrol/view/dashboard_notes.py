"""Owns what a search leaves in the study for optuna-dashboard to show: notes in Markdown, and plots."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from memcontrol.core.run_folder import summarize_data
from memcontrol.core.space import SearchSpace
from memcontrol.study.hypervolume import find_reference_point
from memcontrol.study.pick import find_pick
from memcontrol.study.record import Record
from memcontrol.study.store import Study
from memcontrol.view.front_data import make_front_data, mark_trials
from memcontrol.view.front_plotly import plot_front, plot_hypervolume
from memcontrol.view.note_text import YOURS, write_study_note, write_trial_note

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PUBLISH_SECONDS = 30.0  # between two looks at the whole study
FRONT, HYPERVOLUME = "front", "hypervolume"


class Publisher:
    """Writes what has changed since it last looked. One process writes to a study, so what it wrote needs no
    reading."""

    def __init__(self, study: Study, space: SearchSpace, folder: Path):
        self.study, self.space, self.folder = study, space, folder
        self.written = study.patiently(lambda: read_notes(study))  # by trial; None: the study's own
        self.seen: dict[int, Record] = {}
        self.due = 0.0

    @cached_property
    def data(self) -> dict[str, Any]:
        return summarize_data(self.folder)

    def look(self) -> None:
        """At most every PUBLISH_SECONDS: what is written grows with the study."""
        if time.monotonic() >= self.due:
            self.publish()

    def publish(self, over: bool = False) -> None:
        """`over`: the search ends, and what still runs is interrupted."""
        records = self.study.records()
        changed = [record for record in records if self.seen.get(record.number) != record]
        if changed or over:
            self.write(records, changed, over)
        self.seen, self.due = (
            {record.number: record for record in records},
            time.monotonic() + PUBLISH_SECONDS,
        )

    def write(self, records: Sequence[Record], changed: Sequence[Record], over: bool) -> None:
        stored = self.study.patiently(lambda: NoteStorage(self.study))
        config, objectives = self.study.config, self.study.objectives
        trials = mark_trials(records, find_pick(records, self.study), len(self.space.groups))
        for record in changed:
            if record.state != "RUNNING":
                self.note(stored, record.number, write_trial_note(record, self.space))
        self.note(stored, None, write_study_note(config, self.space, trials, objectives, self.data, over))
        complete = [trial for trial in trials if trial["state"] == "COMPLETE"]
        if complete and len(objectives) > 1:
            self.plot(FRONT, plot_front(make_front_data(complete, objectives), f"{config.name}: front"))
        if reference := self.study.attributes.get("reference") or find_reference_point(records):
            self.plot(HYPERVOLUME, plot_hypervolume(records, reference, f"{config.name}: hypervolume"))

    def plot(self, name: str, figure: Figure) -> None:
        from optuna_dashboard import save_plotly_graph_object

        self.study.patiently(lambda: save_plotly_graph_object(self.study.inner, figure, graph_object_id=name))

    def note(self, stored: NoteStorage, number: int | None, text: str) -> None:
        if self.written.get(number) != text:
            self.study.patiently(lambda: save_note(self.study, stored, number, text))
            self.written[number] = text


def read_notes(study: Study) -> dict[int | None, str]:
    """Our part of every note, read at once: the library reads all of a study's attributes for each."""
    attributes = study.storage.get_study_system_attrs(study.inner._study_id)
    chunks: dict[int | None, dict[int, str]] = {}
    for name, text in attributes.items():
        if found := re.fullmatch(r"dashboard:(?:(\d+):)?note_str:(\d+)", name):
            chunks.setdefault(int(found[1]) if found[1] else None, {})[int(found[2])] = text
    numbers: dict[int | None, int | None] = {trial_id: number for number, trial_id in study.ids.items()} | {
        None: None
    }
    whole = {
        numbers[trial_id]: "".join(parts[i] for i in sorted(parts))
        for trial_id, parts in chunks.items()
        if trial_id in numbers
    }
    return {number: text.partition(YOURS)[0] for number, text in whole.items()}


class NoteStorage:
    """The study's storage as far as the library's notes ask for it: of the attributes, which grow with every
    trial, all are read for each note, and here once."""

    def __init__(self, study: Study):
        self.storage, self.attributes = (
            study.storage,
            study.storage.get_study_system_attrs(study.inner._study_id),
        )

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self.attributes

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self.storage.set_study_system_attr(study_id, key, value)
        self.attributes[key] = value


def save_note(study: Study, stored: NoteStorage, number: int | None, text: str) -> None:
    """Above what a person has written into the note."""
    from optuna_dashboard import get_note
    from optuna_dashboard import save_note as save

    # Of a trial the library asks for these three only; a real optuna.Trial would ask the sampler for more.
    # Without a number it is the study's.
    owner: Any = SimpleNamespace(
        study=study.inner, storage=stored, _trial_id=None if number is None else study.ids[number]
    )
    before = get_note(owner)
    whole = text + YOURS + before.partition(YOURS)[2]
    if whole != before:
        save(owner, whole)
