"""Owns how far a search has come: the hypervolume of its front against a fixed reference point, its noise,
and whether it still grows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from memcontrol.core.estimate import Estimate
from memcontrol.core.reward_table import list_errors, list_losses
from memcontrol.study.pareto import find_front, hypervolume
from memcontrol.study.record import Record

_N_REDRAWS = 200
_N_WALKS = 40  # redrawn searches, for the error at every trial
N_PLACES = 200  # of a history
_MARGIN = 0.1
_N_FIRST = 6  # sampled trials that stand in for anchors


def find_reference_point(records: Sequence[Record]) -> list[float] | None:
    """The point that hypervolumes are measured from: the worst of the anchors in each objective, and a tenth
    of their range beyond it, so that the worst of them count too. As losses; None before every anchor has
    ended. Where fewer than two of them ended well, the first sampled trials that did count with them: None
    before there are six."""
    anchors = [record for record in records if record.anchor is not None]
    if any(record.state == "RUNNING" for record in anchors):
        return None
    known = [record for record in anchors if record.finished]
    if len(known) < 2:
        sampled = (record for record in records if record.is_sampled and record.finished)
        first = _sort_by_end(sampled)[:_N_FIRST]
        known = [*known, *first] if len(first) == _N_FIRST else []
    if not known:
        return None
    losses = np.array([record.losses for record in known])
    return [float(value) for value in losses.max(0) + _MARGIN * np.ptp(losses, 0)]


def _collect_measured(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """What the search measured (not what was measured again, which only the front is): losses, and their
    standard errors, [N, M] both."""
    losses = [list_losses(record.searched, record.objectives) for record in records]
    errors = [list_errors(record.searched, record.objectives) for record in records]
    return np.array(losses), np.array(errors)


def estimate_hypervolume(records: Sequence[Record], reference: Sequence[float], seed: int = 0) -> Estimate:
    """The hypervolume of what the search measured, with its standard error by redrawing every value from its
    own error."""
    losses, errors = _collect_measured([record for record in records if record.finished])
    rng, draws = np.random.default_rng(seed), [0.0]
    if errors.any():
        draws = [hypervolume(rng.normal(losses, errors), reference) for _ in range(_N_REDRAWS)]
    return Estimate(hypervolume(losses, reference), float(np.std(draws)))


def trace_hypervolume(
    records: Sequence[Record], reference: Sequence[float], seed: int = 0
) -> dict[int, Estimate]:
    """The hypervolume by the number of trials that had ended well, in the order of their ends, with its
    standard error: after each of them, or after some N_PLACES numbers of them where there are more."""
    losses, errors = _collect_measured(_sort_by_end(record for record in records if record.finished))
    n, rng = len(losses), np.random.default_rng(seed)
    places = np.unique(np.linspace(1, n, min(n, N_PLACES), dtype=int)).tolist()
    volumes = _accumulate_volumes(losses, places, reference)
    walks = [_accumulate_volumes(rng.normal(losses, errors), places, reference) for _ in range(_N_WALKS)]
    sds = [float(np.std(by_walk)) for by_walk in zip(*walks)]
    return {place: Estimate(volume, sd) for place, volume, sd in zip(places, volumes, sds)}


def _sort_by_end(records: Iterable[Record]) -> list[Record]:
    """In the order of their ends."""
    return sorted(records, key=lambda record: (record.ended, record.number))


def _accumulate_volumes(losses: np.ndarray, places: Sequence[int], reference: Sequence[float]) -> list[float]:
    """The hypervolume of the first points, by how many."""
    front, volumes = losses[:0], []
    for first, last in zip([0, *places], places):
        front = np.concatenate([front, losses[first:last]])
        front = front[find_front(front)]
        volumes.append(hypervolume(front, reference))
    return volumes


def is_flat(records: Sequence[Record], reference: Sequence[float], n: int) -> bool:
    """Whether the last n sampled trials to end have raised the hypervolume by no more than its noise."""
    sampled = [record for record in records if record.is_sampled]
    ended = _sort_by_end(record for record in sampled if record.state in ("COMPLETE", "PRUNED"))
    if len(ended) < n:
        return False
    last, choices = ({getattr(record, name) for record in ended[-n:]} for name in ("number", "choice"))
    last |= {one.number for one in records if one.is_variant and one.candidates[0].trained in choices}
    now = estimate_hypervolume(records, reference)
    before = estimate_hypervolume([record for record in records if record.number not in last], reference)
    return now.value - before.value <= (now.error or 0)
