"""Owns what is known here of the insides of Optuna and optuna-dashboard: their underscored names and the keys
of their attributes. tests/test_optuna_private.py holds each of them against the installed versions."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.artifacts import ArtifactMeta
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from sqlalchemy.exc import IntegrityError

METRIC_NAMES = "study:metric_names"  # of a study, where optuna.Study.set_metric_names keeps them
ENQUEUED = "fixed_params"  # of a trial, what optuna.Study.enqueue_trial was given


def get_storage(study: optuna.Study) -> BaseStorage:
    return study._storage


def get_study_id(study: optuna.Study) -> int:
    return study._study_id


def get_trial_id(trial: FrozenTrial) -> int:
    return trial._trial_id


def _unwrap(storage: BaseStorage) -> Any:
    """The database: a study keeps its own behind a cache."""
    return getattr(storage, "_backend", storage)


def close_storage(storage: BaseStorage) -> None:
    """Ends the connections of a database, which would otherwise stay open until the process ends."""
    storage.remove_session()
    _unwrap(storage).engine.dispose()


def find_schema_head() -> str:
    """The version of its tables that this Optuna makes, by its migrations; no database is asked."""
    from alembic.script import ScriptDirectory
    from optuna.storages._rdb import storage

    head = ScriptDirectory(str(Path(storage.__file__).parent / "alembic")).get_current_head()
    assert head is not None, "there is one line of migrations"
    return head


@contextlib.contextmanager
def _begin_transaction(storage: BaseStorage) -> Iterator[Any]:
    """All that is written in the block, or nothing."""
    session = _unwrap(storage).scoped_session()
    try:
        yield session
        session.commit()
    except BaseException:
        session.rollback()
        raise
    finally:
        storage.remove_session()


def create_study(
    storage: BaseStorage,
    name: str,
    directions: Sequence[StudyDirection],
    metric_names: Sequence[str],
    attributes: dict[str, Any],
) -> optuna.Study:
    """A study with its system attributes, in one transaction: optuna.create_study writes them afterwards, one
    by one. Raises DuplicatedStudyError."""
    from optuna.storages._rdb import models

    attributes = {METRIC_NAMES: list(metric_names), **attributes}
    try:
        with _begin_transaction(storage) as session:
            goals = [models.StudyDirectionModel(objective=i, direction=d) for i, d in enumerate(directions)]
            study = models.StudyModel(study_name=name, directions=goals)
            session.add(study)
            session.flush()  # gives it its id
            for key, value in attributes.items():
                session.add(
                    models.StudySystemAttributeModel(
                        study_id=study.study_id, key=key, value_json=json.dumps(value)
                    )
                )
    except IntegrityError:
        raise optuna.exceptions.DuplicatedStudyError(name) from None
    return optuna.load_study(study_name=name, storage=storage)


def revise_trial(
    storage: BaseStorage, trial_id: int, values: Sequence[float], told: dict[str, Any], own: dict[str, Any]
) -> None:
    """Writes other values to a trial that has ended, and user and system attributes, in one transaction:
    Optuna refuses every change of such a trial, and so would always show what was measured first."""
    from optuna.storages._rdb import models

    with _begin_transaction(storage) as session:
        trial = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
        for i, value in enumerate(values):
            row: Any = models.TrialValueModel.find_by_trial_and_objective(trial, i, session)
            row.value, row.value_type = models.TrialValueModel.value_to_stored_repr(value)
        for model, attributes in (
            (models.TrialUserAttributeModel, told),
            (models.TrialSystemAttributeModel, own),
        ):
            for key, value in attributes.items():
                known = model.find_by_trial_and_key(trial, key, session)
                if known is None:
                    session.add(model(trial_id=trial_id, key=key, value_json=json.dumps(value)))
                else:
                    known.value_json = json.dumps(value)


def read_attributes(study: optuna.Study) -> dict[str, Any]:
    """The study's system attributes, which dashboards do not print as they do a user's."""
    return get_storage(study).get_study_system_attrs(get_study_id(study))


def read_attributes_below(study: optuna.Study, prefixes: Sequence[str]) -> dict[str, Any]:
    """Those whose keys begin so, as the database has them now: all of them grow with every trial's note."""
    from optuna.storages._rdb import models
    from sqlalchemy import or_

    table = models.StudySystemAttributeModel
    named = or_(*(table.key.startswith(prefix, autoescape=True) for prefix in prefixes))
    with _begin_transaction(get_storage(study)) as session:
        rows = session.query(table).filter(table.study_id == get_study_id(study), named).all()
        return {row.key: json.loads(row.value_json) for row in rows}


def write_attribute(study: optuna.Study, key: str, value: Any) -> None:
    get_storage(study).set_study_system_attr(get_study_id(study), key, value)


def add_trial(study: optuna.Study, trial: FrozenTrial) -> int:
    """Writes the trial as it is, which may be running, in one transaction. Returns its id;
    optuna.Study.add_trial keeps that to itself."""
    return get_storage(study).create_new_trial(get_study_id(study), template_trial=trial)


def renumber_trial(storage: BaseStorage, trial_id: int, number: int) -> None:
    """Gives a trial another number. Optuna counts the trials of before, so that where one was deleted the
    next gets a number that another has."""
    from optuna.storages._rdb import models

    with _begin_transaction(storage) as session:
        models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True).number = number


def name_constraint(name: str) -> str:
    """The attribute under which optuna.Trial.set_constraint keeps a value. That refuses a second one, where a
    write that was not acknowledged must be repeated."""
    return f"constraints:{name}"


def record_artifact(storage: BaseStorage, trial_id: int, meta: ArtifactMeta) -> None:
    """Names an artifact in its trial, as optuna.artifacts.upload_artifact does, which draws a new id each
    time."""
    storage.set_trial_system_attr(trial_id, f"artifacts:{meta.artifact_id}", json.dumps(asdict(meta)))


AttributeWriter = Callable[[optuna.Study, str, Any], None]
_SHOWN = re.compile(r"dashboard:(?:(?:(\d+):)?note_.*|plot_data:(.+):\d+)")


class Notes:
    """What optuna-dashboard shows of a study: Markdown notes, by trial id, of which None is the study's own,
    and plots, by name. All are read at once, and each is looked for among its own: the library reads the
    study's attributes, which grow with every trial, again for each."""

    def __init__(self, study: optuna.Study, write: AttributeWriter = write_attribute):
        self.study = study
        self.write = lambda key, value: write(study, key, value)
        self.parts: dict[int | str | None, dict[str, Any]] = {}
        for key, value in read_attributes(study).items():
            if match := _SHOWN.fullmatch(key):
                part = match[2] or (int(match[1]) if match[1] else None)
                self.parts.setdefault(part, {})[key] = value

    def texts(self) -> dict[int | None, str]:
        """Every note that there is."""
        return {part: self.read(part) for part in self.parts if not isinstance(part, str)}

    def read(self, trial_id: int | None) -> str:
        from optuna_dashboard import get_note

        return get_note(_NoteOwner(self.study, self.open(trial_id), trial_id))

    def save(self, trial_id: int | None, text: str) -> None:
        from optuna_dashboard import save_note

        save_note(_NoteOwner(self.study, self.open(trial_id), trial_id), text)

    def save_plot(self, name: str, figure: Any) -> None:
        from optuna_dashboard import save_plotly_graph_object

        owner = _PlotOwner(self.open(name), get_study_id(self.study))
        save_plotly_graph_object(owner, figure, graph_object_id=name)

    def open(self, part: int | str | None) -> _Part:
        return _Part(self.parts.setdefault(part, {}), self.write)


@dataclass(frozen=True)
class _Part:
    """A note or a plot, which the library keeps in numbered pieces. To the library this is the storage."""

    attributes: dict[str, Any]
    write: Callable[[str, Any], None]

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self.attributes

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        if key not in self.attributes or self.attributes[key] != value:
            self.write(key, value)
            self.attributes[key] = value


@dataclass(frozen=True)
class _NoteOwner:
    """What the library's notes ask of a trial, and no more: a real optuna.Trial would ask the sampler for
    parameters. Without an id it stands for the study."""

    study: optuna.Study
    storage: _Part
    _trial_id: int | None


@dataclass(frozen=True)
class _PlotOwner:
    """What the library's plots ask of a study."""

    _storage: _Part
    _study_id: int
