"""Owns `memcontrol.pick`: one trial of a study."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from memcontrol.study.pick import choose_record
from memcontrol.study.place import StudyPlace
from memcontrol.study.record import Record


def pick(
    study: str | Path, rule: str | None = None, *, trial: int | None = None, limits: Sequence[str] = ()
) -> Record:
    """One trial: by rule (knee, quality or memorization) under limits such as "copy_rate<=0.02", or by its
    number. Raises MemControlError."""
    with contextlib.closing(StudyPlace.load(study).open()) as found:
        return choose_record(found, trial, rule, limits)
