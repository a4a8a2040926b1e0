"""Owns what fine-tuning the same choice again says: which trials are, how far their rewards lie apart, and
what is then believed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memcontrol.core.reward_table import list_losses
from memcontrol.study.pareto import find_front
from memcontrol.study.record import Record


def select_to_replicate(records: Sequence[Record], n: int) -> list[Record]:
    """What is to be fine-tuned again until it was n times: the front, and full fine-tuning."""
    complete = [record for record in records if record.finished]
    best = {complete[i].number for i in find_front([record.losses for record in complete])}
    best |= {record.number for record in complete if record.anchor == "full"}
    trained = [record for record in complete if record.anchor != "none"]
    return [record for record in trained if record.number in best and len(record.replicates) < n]


def _collect_losses(record: Record) -> np.ndarray:
    """The losses of a finished trial's fine-tunings [1 + replicates, objectives], as the search measured
    them."""
    fine_tunings = (record.searched, *record.replicates)
    return np.array([list_losses(rewards, record.objectives) for rewards in fine_tunings])


def estimate_spread(records: Sequence[Record]) -> np.ndarray | None:
    """The standard deviation [objectives] between fine-tunings of the same choice, pooled over all that were
    fine-tuned again. The noise of drawing samples is in it. None where none was."""
    again = [_collect_losses(record) for record in records if record.finished and record.replicates]
    if not again:
        return None
    squares = sum(len(losses) * losses.var(0) for losses in again)  # [objectives]
    n_free = sum(len(losses) - 1 for losses in again)
    return np.sqrt(squares / n_free)


def average_fine_tunings(record: Record) -> np.ndarray:
    """A finished trial's losses [objectives]: the mean over its fine-tunings, where there are several."""
    return _collect_losses(record).mean(0) if record.replicates else np.array(record.losses)


def errors_by_luck(records: Sequence[Record], spread: np.ndarray | None) -> np.ndarray:
    """The standard errors [N, objectives] that fine-tuning by chance gives each trial's losses; 0 where that
    is not known."""
    if spread is None:
        return np.zeros((len(records), len(records[0].objectives)))
    counts = np.array([1 + len(record.replicates) for record in records])
    return spread / np.sqrt(counts)[:, None]
