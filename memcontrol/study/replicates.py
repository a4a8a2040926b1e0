"""Owns what fine-tuning the same choice again says: which trials are, how far their figures lie apart, and
what is then believed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memcontrol.study.pareto import find_front
from memcontrol.study.record import Record, orient_values


def select_to_replicate(records: Sequence[Record], n: int) -> list[Record]:
    """What is to be fine-tuned again until it was n times: the front, and full fine-tuning."""
    complete = [record for record in records if record.finished]
    best = {complete[i].number for i in find_front([record.losses for record in complete])}
    return [
        record
        for record in complete
        if len(record.replicates) < n
        and record.anchor != "none"
        and (record.number in best or record.anchor == "full")
    ]


def collect_losses(record: Record) -> np.ndarray:
    """The losses of a finished trial's fine-tunings [1 + replicates, objectives], as the search measured
    them."""
    return np.array(
        [
            orient_values([rewards[name] for name in record.objectives], record.objectives.values())
            for rewards in (record.searched, *record.replicates)
        ]
    )


def estimate_spread(records: Sequence[Record]) -> np.ndarray | None:
    """The standard deviation [objectives] between fine-tunings of the same choice, pooled over all that were
    fine-tuned again. The noise of drawing samples is in it. None where none was."""
    again = [collect_losses(record) for record in records if record.finished and record.replicates]
    if not again:
        return None
    return np.sqrt(
        sum(len(losses) * losses.var(0) for losses in again) / sum(len(losses) - 1 for losses in again)
    )


def average_fine_tunings(record: Record) -> np.ndarray:
    """A finished trial's losses [objectives]: the mean over its fine-tunings, where there are several."""
    return collect_losses(record).mean(0) if record.replicates else np.array(record.losses)


def errors_by_luck(records: Sequence[Record], spread: np.ndarray | None) -> np.ndarray:
    """The standard errors [N, objectives] that fine-tuning by chance gives each trial's losses; 0 where that
    is not known."""
    if spread is None:
        return np.zeros((len(records), len(records[0].objectives)))
    return spread / np.sqrt([[1 + len(record.replicates)] for record in records])
