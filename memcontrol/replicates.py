"""Owns what fine-tuning the same choice again says: which trials are, how far their figures lie apart, and what is then believed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from memcontrol.figures import error_of
from memcontrol.pareto import front
from memcontrol.study import Record, oriented


def to_replicate(records: Sequence[Record], n: int) -> list[Record]:
    """What is to be fine-tuned again until it was n times: the front, and full fine-tuning."""
    complete = [record for record in records if record.finished]
    best = {complete[i].number for i in front([record.losses for record in complete])}
    return [record for record in complete if len(record.replicates) < n and record.anchor != "none" and (record.number in best or record.anchor == "full")]


def losses_again(record: Record) -> np.ndarray:
    """The losses of a finished trial's fine-tunings [1 + replicates, objectives], as the search measured them."""
    return np.array([oriented([rewards[name] for name in record.objectives], record.objectives.values()) for rewards in (record.searched, *record.replicates)])


def spread_of(records: Sequence[Record]) -> np.ndarray | None:
    """The standard deviation [objectives] between fine-tunings of the same choice, pooled over all that were fine-tuned again. The noise
    of drawing samples is in it. None where none was."""
    again = [losses_again(record) for record in records if record.finished and record.replicates]
    if not again:
        return None
    return np.sqrt(sum(len(losses) * losses.var(0) for losses in again) / sum(len(losses) - 1 for losses in again))


def believed(record: Record, spread: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """A finished trial's losses and their standard errors [objectives]: where choices were fine-tuned again, the mean over these, and
    no error below what the spread between fine-tunings says."""
    errors = np.array([error_of(name, record.rewards) for name in record.objectives])
    if spread is None:
        return np.array(record.losses), errors
    if not record.replicates:
        return np.array(record.losses), np.maximum(errors, spread)
    return losses_again(record).mean(0), spread / math.sqrt(1 + len(record.replicates))
