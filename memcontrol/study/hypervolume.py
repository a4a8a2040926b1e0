"""Owns how far a search has come: the hypervolume of its front against a fixed reference point, its noise,
and whether it still grows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memcontrol.core.estimate import Estimate
from memcontrol.core.reward_table import read_error
from memcontrol.study.pareto import find_front, hypervolume
from memcontrol.study.record import Record, orient_values

N_REDRAWS = 200
N_WALKS = 40  # redrawn searches, for the error at every trial
N_PLACES = 200  # of a history
MARGIN = 0.1


def find_reference_point(records: Sequence[Record]) -> list[float] | None:
    """The point that hypervolumes are measured from: the worst of the anchors in each objective, and a tenth
    of their range beyond it, so that the worst of them count too. As losses; None before every anchor has
    ended, or where fewer than two ended well."""
    anchors = [record for record in records if record.anchor is not None]
    losses = np.array([record.losses for record in anchors if record.finished])
    if len(losses) < 2 or any(record.state == "RUNNING" for record in anchors):
        return None
    return [float(value) for value in losses.max(0) + MARGIN * np.ptp(losses, 0)]


def collect_measured(records: Sequence[Record]) -> tuple[list[list[float]], np.ndarray]:
    """What the search measured (not what was measured again, which only the front is): losses, and their
    standard errors [N, M]."""
    losses = [
        orient_values([record.searched[name] for name in record.objectives], record.objectives.values())
        for record in records
    ]
    return losses, np.array(
        [[read_error(name, record.searched) for name in record.objectives] for record in records]
    ).reshape(len(losses), -1)


def estimate_hypervolume(records: Sequence[Record], reference: Sequence[float], seed: int = 0) -> Estimate:
    """The hypervolume of what the search measured, with its standard error by redrawing every value from its
    own error."""
    losses, errors = collect_measured([record for record in records if record.finished])
    rng = np.random.default_rng(seed)
    draws = (
        [hypervolume(rng.normal(losses, errors), reference) for _ in range(N_REDRAWS)]
        if losses and errors.any()
        else [0.0]
    )
    return Estimate(hypervolume(losses, reference), float(np.std(draws)))


def trace_hypervolume(
    records: Sequence[Record], reference: Sequence[float], seed: int = 0
) -> dict[int, Estimate]:
    """The hypervolume by the number of trials that had ended well, in the order of their ends, with its
    standard error: after each of them, or after some N_PLACES numbers of them where there are more."""
    losses, errors = collect_measured(
        sorted(
            (record for record in records if record.finished),
            key=lambda record: (record.ended, record.number),
        )
    )
    places, rng = (
        np.unique(np.linspace(1, len(losses), min(len(losses), N_PLACES), dtype=int)).tolist(),
        np.random.default_rng(seed),
    )
    draws = zip(*(accumulate_volumes(rng.normal(losses, errors), places, reference) for _ in range(N_WALKS)))
    found = accumulate_volumes(np.asarray(losses), places, reference)
    return {
        place: Estimate(volume, float(np.std(drawn))) for place, volume, drawn in zip(places, found, draws)
    }


def accumulate_volumes(losses: np.ndarray, places: Sequence[int], reference: Sequence[float]) -> list[float]:
    """The hypervolume of the first points, by how many."""
    kept, found = losses[:0], []
    for first, last in zip([0, *places], places):
        kept = np.concatenate([kept, losses[first:last]])
        kept = kept[find_front(kept)]
        found.append(hypervolume(kept, reference))
    return found


def is_flat(records: Sequence[Record], reference: Sequence[float], n: int) -> bool:
    """Whether the last n sampled trials to end have raised the hypervolume by no more than its noise."""
    sampled = sorted(
        (record for record in records if record.anchor is None and record.state in ("COMPLETE", "PRUNED")),
        key=lambda record: (record.ended, record.number),
    )
    if len(sampled) < n:
        return False
    last = {record.number for record in sampled[-n:]}
    now, before = (
        estimate_hypervolume(records, reference),
        estimate_hypervolume([record for record in records if record.number not in last], reference),
    )
    return now - before <= (now.error or 0)
