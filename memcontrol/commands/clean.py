"""Owns `memcontrol.clean`: what a search left on the disk is removed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from memcontrol.core.errors import MemControlError
from memcontrol.core.files import write_json
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.search.locks import hold_folder_lock, is_searching
from memcontrol.study.artifacts import name_artifact
from memcontrol.study.contents import (
    list_beside_front,
    list_contents,
    list_others,
    remove_paths,
    sum_sizes,
)
from memcontrol.study.database import hide_password
from memcontrol.study.keeping import select_beaten
from memcontrol.study.place import StudyPlace

Keep = Literal["front"]


@dataclass(frozen=True)
class Cleaning:
    """What is removed of a study's folder, how many bytes that is, and what stays, in sentences. `dropped`:
    run folders that lose their weights, with the numbers of their trials."""

    folder: StudyFolder
    paths: tuple[Path, ...]
    n_bytes: int
    stays: tuple[str, ...] = ()
    dropped: dict[Path, int] = field(default_factory=dict)


def clean(study: str | Path, *, keep: Keep | None = None) -> int:
    """Removes what a search left in the study's folder; with `keep="front"` all but the study, its results
    and the models on its front. Returns how many bytes that were. Raises MemControlError, also while a search
    runs."""
    plan = plan_cleaning(StudyPlace.load(study), keep)
    run_cleaning(plan)
    return plan.n_bytes


def plan_cleaning(place: StudyPlace, keep: Keep | None) -> Cleaning:
    """Raises MemControlError where there is nothing, or a search runs."""
    folder = place.folder
    if not list_contents(folder):
        raise MemControlError(
            f"{folder.path} holds nothing of study '{place.config.name}'; there is nothing to remove"
        )
    if is_being_searched(place):
        raise MemControlError(f"a search is running in {folder.path}; wait for it or stop it first")
    if keep:
        return _plan_beside_front(place)
    paths, others = list_contents(folder), list_others(folder)
    stays = [f"{folder.path} holds {len(others)} more that no search made"] if others else []
    if place.config.storage:
        stays.append(
            f"the database {hide_password(place.config.storage)} keeps the study's figures: "
            f"optuna delete-study --study-name {place.config.name} --storage URL"
        )
    whole = [folder.path] if not (place.is_beside_file or others) else paths
    return Cleaning(folder, tuple(whole), sum_sizes(paths), tuple(stays))


def is_being_searched(place: StudyPlace) -> bool:
    """As far as it is known: a database that is gone for good keeps nobody's images here."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return is_searching(place.folder.path, place.url, place.config.name)
    except (SQLAlchemyError, ImportError):
        return False


def _plan_beside_front(place: StudyPlace) -> Cleaning:
    folder = place.folder
    with contextlib.closing(place.open()) as study:
        records, beaten = study.records(), select_beaten(study.records(), study.limits)
    gone = {record.number for record in beaten}
    front = [RunFolder(record.run) for record in records if record.finished and record.number not in gone]
    numbers = {folder.run(choice).path: record.number for record in records for choice in record.candidates}
    artifacts = {
        name_artifact(folder.path, run, picture)
        for run in front
        for picture in (run.samples_picture, run.pairs_picture)
    }
    runs = [run.path for run in front]
    paths = tuple(list_beside_front(folder, runs, artifacts))
    dropped = {
        path.parent: numbers[path.parent]
        for path in paths
        if path.parent in numbers and path.parent not in runs
    }
    stays = (f"the study, its results, split.json (captions), and {len(runs)} models with their pictures",)
    return Cleaning(folder, paths, sum_sizes(paths), stays, dropped)


def run_cleaning(plan: Cleaning) -> None:
    """Raises MemControlError where a search has begun meanwhile."""
    with hold_folder_lock(plan.folder.path):
        for run, number in plan.dropped.items():
            large = [
                path for path in (RunFolder(run).adapter_file, RunFolder(run).samples_file) if path.is_file()
            ]
            if large:  # first, so that whoever misses a file learns why
                names = [path.name for path in large]
                write_json(RunFolder(run).dropped_file, {"trial": number, "files": names})
        remove_paths(plan.paths)
