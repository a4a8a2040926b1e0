"""Owns who searches a study's folder: one process at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from memcontrol.core.attempts import format_now
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import make_private_folder, read_json, write_json
from memcontrol.core.run_folder import StudyFolder
from memcontrol.study.database import find_lock_holder, is_postgresql, name_process


@contextlib.contextmanager
def hold_folder_lock(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    make_private_folder(folder)
    place = StudyFolder(folder)
    try:
        with FileLock(place.lock_file, timeout=0, mode=0o600):
            write_json(place.holder_file, {"holder": name_process(), "since": format_now()})
            yield
    except Timeout:
        held = (
            read_json(place.holder_file)
            if place.holder_file.is_file()
            else {"holder": "it has just begun", "since": "now"}
        )
        raise MemControlError(
            f"another search is running in {folder} ({held['holder']}, since {held['since']}); wait "
            "for it or stop it first"
        ) from None


def is_searching(folder: Path, url: str, name: str) -> bool:
    """Whether a search holds the folder, or on whatever machine the study's lock in PostgreSQL. Looks only:
    it leaves no name of a holder behind."""
    from filelock import FileLock, Timeout

    if is_postgresql(url) and find_lock_holder(url, name):
        return True
    if not folder.is_dir():  # with PostgreSQL, this machine may never have seen it
        return False
    try:
        with FileLock(StudyFolder(folder).lock_file, timeout=0, mode=0o600):
            return False
    except Timeout:
        return True
