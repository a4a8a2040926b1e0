"""Owns `memcontrol.status`: all trials of a study."""

from __future__ import annotations

import contextlib
from pathlib import Path

from memcontrol.study.place import StudyPlace
from memcontrol.study.record import Record


def status(study: str | Path) -> list[Record]:
    """All trials of a study, as they are now. Raises MemControlError where it was not searched."""
    with contextlib.closing(StudyPlace.load(study).open()) as found:
        return found.records()
