"""Owns how a study is opened: where its database is, whether that holds it, and that it is about what the
study file asks for."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection

from memcontrol.config.differing import find_differing_keys
from memcontrol.config.load import load_config
from memcontrol.config.places import adopt_places
from memcontrol.config.study import Config
from memcontrol.core.errors import MemControlError
from memcontrol.core.reward_table import MINIMIZE
from memcontrol.core.run_folder import StudyFolder
from memcontrol.study.database import (
    SQLITE,
    StudyLock,
    Tell,
    explain_open_error,
    hide_password,
    is_sqlite,
    make_database_file,
    make_engine_arguments,
    make_engine_url,
    split_sqlite_url,
    validate_url,
)
from memcontrol.study.identity import (
    describe_listing,
    describe_study,
    explain_differences,
    find_differences,
    refuse_foreign_data,
)
from memcontrol.study.optuna_private import (
    METRIC_NAMES,
    close_storage,
    create_study,
    read_attributes,
    write_attribute,
)
from memcontrol.study.store import Study
from memcontrol.study.trials import OWN


def resolve_storage_url(config: Config, folder: Path, study_file: Path) -> str:
    """The database: SQLite in the study's folder unless the config names another; relative SQLite paths start
    at the study file. Raises MemControlError where it is no URL."""
    if config.storage is None:
        return f"{SQLITE}{StudyFolder(folder).database}"
    storage = config.storage.replace("sqlite+pysqlite:", "sqlite:", 1)
    if is_sqlite(storage):
        path, options = split_sqlite_url(storage)
        if path.name in ("", ":memory:"):
            raise _refuse_memory(storage)
        where = os.path.join(study_file.resolve().parent, path)
        return f"{SQLITE}{where}?{options}" if options else f"{SQLITE}{where}"
    if storage.startswith("sqlite:"):
        raise _refuse_memory(storage)
    return validate_url(config.storage)


def open_study(
    config: Config,
    folder: Path,
    study_file: Path,
    *,
    create: bool,
    directions: Sequence[str] = (),
    say: Tell = lambda line: None,
    lock: StudyLock | None = None,
) -> Study:
    """The config's study. To be searched (`create`), what is stored of it must agree with what is given in
    all that numbers depend on, the content of files included; to be looked at, it must be about the same
    images. A new one is given its objectives' directions; without them each is minimised. `say` is told when
    the database is away. Raises MemControlError."""
    known, url = is_searched(config, folder, study_file), resolve_storage_url(config, folder, study_file)
    if not known and not create:
        raise _explain_no_study(config, study_file, folder)
    storage = _open_storage(url)
    try:
        if not known:
            about = describe_study(config, StudyFolder(folder), directions)
            inner = _create_study(storage, config, directions, about | _describe_origin(config))
            return Study(inner, config, folder, url, say, lock)
        inner = optuna.load_study(study_name=config.name, storage=storage)
        if create and not inner.trials and not _is_ours(inner):
            _claim_empty_study(inner, config, folder, directions)
        stored = adopt_places(_read_stored_config(inner), config)
        study = Study(inner, stored, folder, url, say, lock)
        if create:
            _check_agrees(study, config, directions, study_file)
            study.config = config
        else:
            refuse_foreign_data(stored, study.about, config, StudyFolder(folder), study_file)
        return study
    except MemControlError:
        close_storage(storage)
        raise


def _describe_origin(config: Config) -> dict[str, Any]:
    """The images' files as they lie here, and what tells this study from all others."""
    return {"listing": describe_listing(config), "token": uuid.uuid4().hex}


def _create_study(
    storage: optuna.storages.RDBStorage, config: Config, directions: Sequence[str], about: dict[str, Any]
) -> optuna.Study:
    """Raises MemControlError where another process has just made one of this name."""
    goals = _list_goals(config, directions)
    try:
        return create_study(
            storage, config.name, goals, config.rewards.names, _list_attributes(config, about)
        )
    except optuna.exceptions.DuplicatedStudyError:
        raise MemControlError(
            f"study '{config.name}' was begun in this database just now by another process; wait for it, or "
            "choose another name"
        ) from None


def _list_goals(config: Config, directions: Sequence[str]) -> list[StudyDirection]:
    return [StudyDirection[name.upper()] for name in directions or [MINIMIZE] * len(config.rewards.names)]


def _list_attributes(config: Config, about: dict[str, Any]) -> dict[str, Any]:
    return {f"{OWN}config": json.dumps(config.dump_as_written()), f"{OWN}about": about}


def _is_ours(inner: optuna.Study) -> bool:
    return f"{OWN}config" in read_attributes(inner)


def _claim_empty_study(inner: optuna.Study, config: Config, folder: Path, directions: Sequence[str]) -> None:
    """Makes an empty study ours, which was made by hand or by a process that died just then. Raises
    MemControlError where it is for other objectives."""
    goals = _list_goals(config, directions)
    if inner.directions != goals:
        wanted, there = (", ".join(goal.name.lower() for goal in one) for one in (goals, inner.directions))
        raise MemControlError(
            f"an empty study '{config.name}' in this storage is to {there}, and the objectives "
            f"{', '.join(config.rewards.names)} are to {wanted}; delete it there, or choose another name"
        )
    about = describe_study(config, StudyFolder(folder), directions) | _describe_origin(config)
    for key, value in {METRIC_NAMES: config.rewards.names, **_list_attributes(config, about)}.items():
        write_attribute(inner, key, value)


def _check_agrees(study: Study, config: Config, directions: Sequence[str], study_file: Path) -> None:
    """Raises MemControlError for what differs; parts that are known now for the first time are recorded. Own
    rewards may be mended as long as no trial was scored by them."""
    found = describe_study(config, StudyFolder(study.folder), directions)
    is_scored = any(record.finished for record in study.records()) or any(
        run.is_complete or run.count_rungs() for run in StudyFolder(study.folder).list_runs()
    )
    stored = {key: value for key, value in study.about.items() if key != "own_rewards" or is_scored}
    differing = find_differing_keys(study.config, config, ["space"] if "space" in stored else [])
    differing += find_differences(stored, found)
    if directions and list(directions) != study.directions:
        there, here = ", ".join(study.directions), ", ".join(directions)
        differing.append(f"the objectives' directions ({there} there, {here} here)")
    if differing:
        raise explain_differences(config.name, differing, study_file)
    if found.keys() - stored.keys():
        study.write("about", {**found, **stored})


def _refuse_memory(storage: str) -> MemControlError:
    return MemControlError(
        f"storage is {storage}, a database in memory, which is gone with its process; name a file: "
        "sqlite:///study.db"
    )


def is_searched(config: Config, folder: Path, study_file: Path) -> bool:
    """Whether the storage holds the study."""
    url = resolve_storage_url(config, folder, study_file)
    if is_sqlite(url) and not split_sqlite_url(url)[0].is_file():
        return False
    storage = _open_storage(url)
    try:
        return config.name in optuna.get_all_study_names(storage)
    finally:
        close_storage(storage)


def _open_storage(url: str) -> optuna.storages.RDBStorage:
    import sqlalchemy.exc

    try:
        if is_sqlite(url):
            make_database_file(url)
        return optuna.storages.RDBStorage(make_engine_url(url), engine_kwargs=make_engine_arguments(url))
    except (
        sqlalchemy.exc.SQLAlchemyError,
        optuna.exceptions.StorageInternalError,
        ImportError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:
        raise explain_open_error(url, error) from None


def _explain_no_study(config: Config, study_file: Path, folder: Path) -> MemControlError:
    if config.storage:
        return MemControlError(
            f"storage {hide_password(config.storage)} holds no study '{config.name}'; name the "
            f"database that was searched, or run: memcontrol search {study_file}"
        )
    return MemControlError(
        f"study '{config.name}' has not been searched yet; run: memcontrol search {study_file} "
        f"(there is no study.db in {folder})"
    )


def _read_stored_config(inner: optuna.Study) -> Config:
    stored = read_attributes(inner).get(f"{OWN}config")
    if stored is None:
        raise MemControlError(
            f"study '{inner.study_name}' in this storage was not made by memcontrol; choose another name"
        )
    return load_config(json.loads(stored))
