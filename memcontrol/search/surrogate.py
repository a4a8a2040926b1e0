"""Owns what a search has learned: the training set that its trials are, and the choices that a model of it
promises most of.

Notations

rows: Choices as the encoding has them, [N, coordinates + 1]; X: the same as the model sees them, [N, F].
values: Losses of the N trials that ended, less is better, [N, 2]; means: the model's, without noise.
errors, own_errors: Standard errors of measuring, and of fine-tuning by luck, [N, 2] both.
excesses: By how much each limit is exceeded, at most 0 where it is kept, [N, limits].
pending: Rows of trials that run, [P, coordinates + 1]; the model believes its own mean of them.
front, reference: Points that no other dominates, [n, 2], and the point that hypervolumes are measured from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from memcontrol.core.choice import Choice
from memcontrol.search.early_stopping import RungResult
from memcontrol.search.encoding import SpaceEncoding
from memcontrol.search.gaussian_process import Process, expected_gain, fit_process
from memcontrol.study.pareto import Limit, find_front
from memcontrol.study.record import Record
from memcontrol.study.replicates import average_fine_tunings, errors_by_luck, estimate_spread
from memcontrol.study.trials import compute_excesses

_N_RANDOM, _N_CLIMBS, _N_BEST = 300, 4, 8  # of the choices that the model looks at
_N_BEYOND = 3.0  # how far beyond the median a loss may lie, in distances of the best from it
N_SPREAD = 6  # sampled trials before anything is modelled


@dataclass(frozen=True)
class TrainingSet:
    """What a model learns from; see the notations."""

    rows: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    own_errors: np.ndarray
    excesses: np.ndarray
    pending: np.ndarray


def gather_training_set(
    records: Sequence[Record], encoding: SpaceEncoding, limits: Sequence[Limit]
) -> TrainingSet | None:
    """None before any trial ended well. A trial that was stopped early counts as what it promised, one that
    diverged as the worst that was seen."""
    inside = [record for record in records if record.choice is not None and not record.is_outside]
    own = [record for record in inside if encoding.holds(record.chosen)]
    ended = [record for record in own if record.finished]
    if not ended:
        return None
    stopped = [record for record in own if record.state == "PRUNED" and record.rungs]
    diverged = [record for record in own if record.state == "PRUNED" and not record.rungs]
    running = [record for record in own if record.state == "RUNNING"]
    together, n_diverged = ended + stopped + diverged, len(diverged)
    losses = np.array([average_fine_tunings(record) for record in ended])
    errors = np.array([record.errors for record in ended])
    excesses = np.array([list(compute_excesses(record.rewards, limits).values()) for record in ended])
    promises = [extrapolate_losses(record, ended) for record in stopped]
    return TrainingSet(
        rows=_encode_records(together, encoding),
        values=np.vstack(
            [losses, *(promised for promised, _ in promises), _repeat_row(losses.max(0), n_diverged)]
        ),
        errors=np.vstack([errors, *(error for _, error in promises), _repeat_row(errors.max(0), n_diverged)]),
        own_errors=errors_by_luck(together, estimate_spread(records)),
        excesses=np.vstack(
            [
                excesses,
                _repeat_row(excesses.mean(0), len(stopped)),
                _repeat_row(excesses.max(0), n_diverged),
            ]
        ),
        pending=_encode_records(running, encoding),
    )


def _encode_records(records: Sequence[Record], encoding: SpaceEncoding) -> np.ndarray:
    return np.array([encoding.row(record.chosen) for record in records])


def _repeat_row(row: np.ndarray, n: int) -> np.ndarray:
    """The row [K] n times: [n, K]."""
    return np.repeat(row[None], n, 0)


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
    return np.minimum(values, median + _N_BEYOND * (median - best))


@dataclass(frozen=True)
class _Surrogate:
    """A process for each objective, and one for each limit that some trials keep and some exceed."""

    encoding: SpaceEncoding
    processes: list[Process]
    guards: list[Process]

    def means(self, X: np.ndarray) -> np.ndarray:
        """What the losses would be without their noise: [M, 2]."""
        return np.stack([process.predict(X)[0] for process in self.processes], 1)

    def allowed(self, X: np.ndarray) -> np.ndarray:
        """Which points should keep the limits: [M]."""
        allowed = np.full(len(X), True)
        for guard in self.guards:
            allowed &= guard.predict(X)[0] <= 0
        return allowed

    def score(self, rows: np.ndarray, front: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """The expected gain in hypervolume over a front, times the chance that the limits are kept: [M]."""
        X = self.encoding.seen(rows)
        chance = np.ones(len(rows))
        for mean, sd in (guard.predict(X) for guard in self.guards):
            chance *= ndtr(-mean / sd)
        means, sds = zip(*(process.predict(X) for process in self.processes))
        return expected_gain(means, sds, front, reference) * chance


def _fit_surrogate(known: TrainingSet, encoding: SpaceEncoding, pending: np.ndarray) -> _Surrogate:
    """`pending`: rows [P, coordinates + 1]."""
    X, awaited, none = encoding.seen(known.rows), encoding.seen(pending), np.zeros(len(known.rows))
    values, errors, own = winsorize(known.values), known.errors, known.own_errors
    processes = [
        fit_process(X, values[:, i], errors[:, i], own[:, i], awaited, encoding.owner) for i in (0, 1)
    ]
    guards = [
        fit_process(X, column, none, none, awaited, encoding.owner)
        for column in known.excesses.T
        if np.ptp(column) > 0
    ]
    return _Surrogate(encoding, processes, guards)


def propose_choices(
    known: TrainingSet, encoding: SpaceEncoding, seed: int, weigh_cost: bool = True
) -> Iterator[Choice]:
    """Choices by how much hypervolume they promise for what they cost (expected improvement per second:
    Snoek et al. 2012, arXiv 1206.2944), those that should keep the limits: random ones and the neighbours of
    the front, then the neighbours of the best of these."""
    pending = known.pending.reshape(-1, len(encoding.names) + 1)
    surrogate = _fit_surrogate(known, encoding, pending)
    there = np.concatenate([known.rows, pending])  # [N + P, coordinates + 1]
    X = encoding.seen(there)
    means, allowed = surrogate.means(X), surrogate.allowed(X)
    reference = means.max(0) + 0.1 * np.ptp(means, 0)
    front = means[allowed][find_front(means[allowed])] if allowed.any() else reference[None]

    def score(rows: np.ndarray) -> np.ndarray:
        """By the best of what each row's fine-tuning is measured at."""
        each = encoding.expand(rows)
        gains = surrogate.score(each.reshape(-1, each.shape[-1]), front, reference)
        best = gains.reshape(len(each), -1).max(0)
        return best / encoding.estimate_costs(rows) if weigh_cost else best

    randoms = encoding.random(_N_RANDOM, random.Random(seed))
    best = encoding.expand(there[find_front(means)])[0]  # as they are trained
    neighbours = [encoding.list_neighbours(row) for row in best]
    rows, scores = _climb(encoding.canonicalize(np.concatenate([randoms, *neighbours])), score, encoding)
    for i in np.argsort(-scores, kind="stable"):
        yield encoding.choice(rows[i])


def _climb(
    rows: np.ndarray, score: Callable[[np.ndarray], np.ndarray], encoding: SpaceEncoding
) -> tuple[np.ndarray, np.ndarray]:
    """The rows and, N_CLIMBS times, the neighbours of the best N_BEST that were not climbed from; with their
    scores."""
    scores = score(rows)
    climbed: set[bytes] = set()
    for _ in range(_N_CLIMBS):
        best = rows[np.argsort(-scores, kind="stable")[:_N_BEST]]
        top = [row for row in best if row.tobytes() not in climbed]
        if not top:
            break
        climbed |= {row.tobytes() for row in top}
        new = encoding.canonicalize(np.concatenate([encoding.list_neighbours(row) for row in top]))
        rows, scores = np.concatenate([rows, new]), np.concatenate([scores, score(new)])
    return rows, scores
