"""Owns what is known here of the insides of Optuna and optuna-dashboard: their underscored names and the keys
of their attributes. tests/test_optuna_private.py holds each of them against the installed versions."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.artifacts import ArtifactMeta
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

GENERATION = "NSGAIISampler:generation"  # of a trial, where NSGA-II looks for it


def get_storage(study: optuna.Study) -> BaseStorage:
    return study._storage


def get_study_id(study: optuna.Study) -> int:
    return study._study_id


def get_trial_id(trial: FrozenTrial) -> int:
    return trial._trial_id


def close_storage(storage: BaseStorage) -> None:
    """Ends the connections of a database, which would otherwise stay open until the process ends."""
    storage.remove_session()
    database: Any = getattr(storage, "_backend", storage)  # a study keeps its own behind a cache
    database.engine.dispose()


def read_attributes(study: optuna.Study) -> dict[str, Any]:
    """The study's system attributes, which dashboards do not print as they do a user's."""
    return get_storage(study).get_study_system_attrs(get_study_id(study))


def write_attribute(study: optuna.Study, key: str, value: Any) -> None:
    get_storage(study).set_study_system_attr(get_study_id(study), key, value)


def add_trial(study: optuna.Study, trial: FrozenTrial) -> int:
    """Writes the trial as it is, which may be running, in one transaction. Returns its id;
    optuna.Study.add_trial keeps that to itself."""
    return get_storage(study).create_new_trial(get_study_id(study), template_trial=trial)


def name_constraint(name: str) -> str:
    """The attribute under which optuna.Trial.set_constraint keeps a value. That refuses a second one, where a
    write that was not acknowledged must be repeated."""
    return f"constraints:{name}"


def record_artifact(storage: BaseStorage, trial_id: int, meta: ArtifactMeta) -> None:
    """Names an artifact in its trial, as optuna.artifacts.upload_artifact does, which draws a new id each
    time."""
    storage.set_trial_system_attr(trial_id, f"artifacts:{meta.artifact_id}", json.dumps(asdict(meta)))


class Notes:
    """The Markdown notes that optuna-dashboard shows, by trial id; None is the study's own. All are read at
    once: the library reads the study's attributes, which grow with every trial, again for each note. To the
    library this is the storage."""

    def __init__(self, study: optuna.Study):
        self.study, self.attributes = study, read_attributes(study)

    def texts(self) -> dict[int | None, str]:
        """Every note that there is. The library keeps one in numbered pieces."""
        pieces: dict[int | None, dict[int, str]] = {}
        for key, text in self.attributes.items():
            if match := re.fullmatch(r"dashboard:(?:(\d+):)?note_str:(\d+)", key):
                pieces.setdefault(int(match[1]) if match[1] else None, {})[int(match[2])] = text
        return {
            trial_id: "".join(numbered[i] for i in sorted(numbered)) for trial_id, numbered in pieces.items()
        }

    def read(self, trial_id: int | None) -> str:
        from optuna_dashboard import get_note

        return get_note(_NoteOwner(self.study, self, trial_id))

    def save(self, trial_id: int | None, text: str) -> None:
        from optuna_dashboard import save_note

        save_note(_NoteOwner(self.study, self, trial_id), text)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self.attributes

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        write_attribute(self.study, key, value)
        self.attributes[key] = value


@dataclass(frozen=True)
class _NoteOwner:
    """What the library's notes ask of a trial, and no more: a real optuna.Trial would ask the sampler for
    parameters. Without an id it stands for the study."""

    study: optuna.Study
    storage: Notes
    _trial_id: int | None
