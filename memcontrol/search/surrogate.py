"""Owns what a search has learned: the evidence of its trials, and the choices that a model of it promises
most of."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from memcontrol.core.choice import Choice
from memcontrol.search.early_stopping import RungResult
from memcontrol.search.encoding import SpaceEncoding
from memcontrol.search.gaussian_process import expected_gain, fit_process
from memcontrol.study.pareto import Limit, find_front
from memcontrol.study.record import Record
from memcontrol.study.replicates import average_fine_tunings, errors_by_luck, estimate_spread
from memcontrol.study.store import compute_excesses

N_RANDOM, N_CLIMBS, N_BEST = 300, 4, 8  # of the choices that the model looks at
N_BEYOND = 3.0  # how far beyond the median a loss may lie, in distances of the best from it
N_SPREAD = 6  # sampled trials before anything is modelled
OUTSIDE = ("none", "full")  # anchors that no point of the space stands for


@dataclass(frozen=True)
class TrainingSet:
    """What a model learns from: the rows of N trials that ended, their losses, these losses' errors of
    measuring and those of fine-tuning by luck [N, 2]; by how much they exceed each limit [N, limits]; the
    rows of those that run."""

    rows: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    own_errors: np.ndarray
    excesses: np.ndarray
    pending: np.ndarray


def gather_training_set(
    records: Sequence[Record], points: SpaceEncoding, limits: Sequence[Limit]
) -> TrainingSet | None:
    """None before any trial ended well. A trial that was stopped early counts as what it promised, one that
    diverged as the worst that was seen."""
    own = [record for record in records if record.choice is not None and record.anchor not in OUTSIDE]
    ended = [record for record in own if record.finished]
    if not ended:
        return None
    stopped = [record for record in own if record.state == "PRUNED" and record.rungs]
    diverged = [record for record in own if record.state == "PRUNED" and not record.rungs]
    values, errors = (
        np.array([average_fine_tunings(record) for record in ended]),
        np.array([record.errors for record in ended]),
    )
    over = np.array([list(compute_excesses(record.rewards, limits).values()) for record in ended])
    promises = [extrapolate_losses(record, ended) for record in stopped]
    return TrainingSet(
        rows=np.array([points.row(record.chosen) for record in ended + stopped + diverged]),
        values=np.concatenate(
            [
                values,
                *(promised[None] for promised, _ in promises),
                np.repeat(values.max(0)[None], len(diverged), 0),
            ]
        ),
        errors=np.concatenate(
            [
                errors,
                *(error[None] for _, error in promises),
                np.repeat(errors.max(0)[None], len(diverged), 0),
            ]
        ),
        own_errors=errors_by_luck(ended + stopped + diverged, estimate_spread(records)),
        excesses=np.concatenate(
            [
                over,
                np.repeat(over.mean(0)[None], len(stopped), 0),
                np.repeat(over.max(0)[None], len(diverged), 0),
            ]
        ),
        pending=np.array([points.row(record.chosen) for record in own if record.state == "RUNNING"]),
    )


def extrapolate_losses(record: Record, ended: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """The losses that a trial would have reached, and their errors: those at its last rung, moved by as much
    as those moved from there to their end that did end."""
    rung, objectives = record.rungs[-1]["rung"], record.objectives
    own = RungResult.of(record.number, record.rungs[-1]["rewards"], objectives)
    moves = [
        np.subtract(other.losses, RungResult.of(other.number, one["rewards"], objectives).losses)
        for other in ended
        for one in other.rungs
        if one["rung"] == rung
    ]
    if not moves:
        return np.array(own.losses), np.array(own.errors)
    return np.add(own.losses, np.median(moves, axis=0)), np.hypot(own.errors, np.std(moves, axis=0))


def winsorize(values: np.ndarray) -> np.ndarray:
    """Losses [N, 2], the worst of them cut: what is far from the front need not be known in its distance, and
    would leave little of the model's scale to what is near."""
    best, median = values.min(0), np.median(values, axis=0)
    return np.minimum(values, median + N_BEYOND * (median - best))


def propose_choices(evidence: TrainingSet, points: SpaceEncoding, seed: int) -> Iterator[Choice]:
    """Choices by how much hypervolume they promise, those that should keep the limits: random ones and the
    neighbours of the front, then the neighbours of the best of these."""
    rng, pending = random.Random(seed), evidence.pending.reshape(-1, len(points.names) + 1)
    seen, awaited, none = points.seen(evidence.rows), points.seen(pending), np.zeros(len(evidence.rows))
    values = winsorize(evidence.values)
    processes = [
        fit_process(
            seen, values[:, i], evidence.errors[:, i], evidence.own_errors[:, i], awaited, points.owner
        )
        for i in (0, 1)
    ]
    guards = [
        fit_process(seen, column, none, none, awaited, points.owner)
        for column in evidence.excesses.T
        if np.ptp(column) > 0
    ]
    there = np.concatenate([seen, awaited])
    # what the values would be without their noise
    means = np.stack([process.predict(there)[0] for process in processes], 1)
    allowed = (
        np.all([guard.predict(there)[0] <= 0 for guard in guards], axis=0)
        if guards
        else np.full(len(there), True)
    )
    reference = means.max(0) + 0.1 * np.ptp(means, 0)
    best = means[allowed][find_front(means[allowed].tolist())] if allowed.any() else reference[None]

    def score(rows: np.ndarray) -> np.ndarray:
        chance = np.ones(len(rows))
        for mean, sd in (guard.predict(points.seen(rows)) for guard in guards):
            chance *= ndtr(-mean / sd)
        means, sds = zip(*(process.predict(points.seen(rows)) for process in processes))
        return expected_gain(means, sds, best, reference) * chance

    parents = np.concatenate([evidence.rows, pending])[find_front(means.tolist())]
    rows = points.canonical(
        np.concatenate([points.random(N_RANDOM, rng), *(points.neighbours(row) for row in parents)])
    )
    scores = score(rows)
    climbed: set[bytes] = set()
    for _ in range(N_CLIMBS):
        top = [
            row for row in rows[np.argsort(-scores, kind="stable")[:N_BEST]] if row.tobytes() not in climbed
        ]
        if not top:
            break
        climbed |= {row.tobytes() for row in top}
        new = points.canonical(np.concatenate([points.neighbours(row) for row in top]))
        rows, scores = np.concatenate([rows, new]), np.concatenate([scores, score(new)])
    for i in np.argsort(-scores, kind="stable"):
        yield points.choice(rows[i])
