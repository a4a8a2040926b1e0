"""Owns `memcontrol.importance`: which parts of a choice drive which reward."""

from __future__ import annotations

import contextlib
from pathlib import Path

from memcontrol.search.importance import Effect, measure_importance
from memcontrol.study.place import StudyPlace


def importance(study: str | Path) -> list[Effect]:
    """Which groups, methods, ranks and learning rates drive which objective, with error. Raises
    MemControlError where too few trials ended."""
    with contextlib.closing(StudyPlace.load(study).open()) as found:
        return measure_importance(found.records(), found.space)
