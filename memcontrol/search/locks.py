"""Owns who searches a study's folder: one process at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from memcontrol.core.errors import MemControlError
from memcontrol.core.files import make_private_folder, read_json, write_json
from memcontrol.core.run_folder import StudyFolder
from memcontrol.execution.attempts import format_now
from memcontrol.study.database import (
    find_lock_holder,
    is_file_locked,
    is_postgresql,
    is_sqlite,
    locate_lock,
    name_process,
)


@contextlib.contextmanager
def hold_folder_lock(folder: Path, **plan: Any) -> Iterator[None]:
    """With a file that says who holds it, since when, and what it plans. Raises MemControlError where another
    process does."""
    make_private_folder(folder)
    place = StudyFolder(folder)
    try:
        with FileLock(place.lock_file, timeout=0, mode=0o600):
            write_json(place.holder_file, {"holder": name_process(), "since": format_now(), **plan})
            yield
    except Timeout:
        raise _explain_holder(place) from None


def refuse_second_search(place: StudyFolder) -> None:
    """Before anything is begun or loaded for one; `hold_folder_lock` makes sure. Raises MemControlError."""
    if is_file_locked(place.lock_file):
        raise _explain_holder(place)


def _explain_holder(place: StudyFolder) -> MemControlError:
    held = read_holder(place) or {"holder": "it has just begun", "since": "now"}
    return MemControlError(
        f"another search is running in {place.path} ({held['holder']}, since {held['since']}); wait "
        "for it or stop it first"
    )


def read_holder(place: StudyFolder) -> dict[str, Any]:
    """Who last searched here, since when and with what plan; empty where nobody did."""
    return read_json(place.holder_file) if place.holder_file.is_file() else {}


def is_searching(folder: Path, url: str, name: str) -> bool:
    """Whether a search holds the folder, or on whatever machine the study's lock in the database. Looks only:
    it writes nothing and leaves no name of a holder behind."""
    if is_postgresql(url) and find_lock_holder(url, name):
        return True
    if is_sqlite(url) and is_file_locked(locate_lock(url, name)):
        return True
    return is_file_locked(StudyFolder(folder).lock_file)  # this machine may never have seen the folder
