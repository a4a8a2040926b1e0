"""Owns `memcontrol.front`: the Pareto front of a study."""

from __future__ import annotations

from pathlib import Path

from memcontrol.commands.status import status
from memcontrol.study.pick import require_finished, select_front
from memcontrol.study.record import Record


def front(study: str | Path) -> list[Record]:
    """The trials that no other beats in every objective, best in the first one first. Raises
    MemControlError."""
    return select_front(require_finished(status(study)))
