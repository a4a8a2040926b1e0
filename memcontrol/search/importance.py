"""Owns which parts of a choice drive which reward: the effect of each group, method, rank and of the learning
rate, with its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memcontrol.core.errors import MemControlError
from memcontrol.core.estimate import Estimate
from memcontrol.core.space import SearchSpace
from memcontrol.search.encoding import SpaceEncoding
from memcontrol.search.gaussian_process import fit_process
from memcontrol.search.surrogate import N_SPREAD, gather_training_set
from memcontrol.study.record import Record


@dataclass(frozen=True)
class Effect:
    """What changing one coordinate, and nothing else, adds to each objective (in its own units), on average
    over the trials' choices."""

    coordinate: str
    low: object
    high: object
    effects: dict[str, Estimate]
    n_choices: int

    @property
    def label(self) -> str:
        return label_change(self.coordinate, self.low, self.high)

    def as_dict(self) -> dict:
        effects = {
            name: {"value": float(effect), "error": effect.error} for name, effect in self.effects.items()
        }
        return {
            "coordinate": self.coordinate,
            "from": self.low,
            "to": self.high,
            "effects": effects,
            "n_choices": self.n_choices,
        }


def label_change(coordinate: str, low: object, high: object) -> str:
    """What changes, in words; the learning rate's ends are those of each method."""
    if high is True:
        return f"{coordinate} on"
    if coordinate == "rate":
        return "learning rate: lowest to highest"
    return f"{coordinate}: {low} to {high}"


def measure_importance(records: Sequence[Record], space: SearchSpace) -> list[Effect]:
    """Each coordinate's effects under the Gaussian process that sampling fits, their errors those of its
    posterior: a contrast of its values at the trials' choices with the coordinate at one end and at the
    other. Only choices that the change leaves possible count.

    Raises MemControlError where too few trials have ended to fit anything.
    """
    points = SpaceEncoding(space)
    evidence = gather_training_set(records, points, ())
    if evidence is None or len(evidence.rows) < N_SPREAD:
        n = 0 if evidence is None else len(evidence.rows)
        raise MemControlError(
            f"importance needs {N_SPREAD} ended trials, not counting the anchors none and full, "
            f"which no point of the space stands for; this study has {n}: search on, memcontrol "
            f"search STUDY.yaml --trials {N_SPREAD}"
        )
    seen, nothing = points.seen(evidence.rows), np.empty((0, len(points.owner)))
    objectives = next(record.objectives for record in records if record.finished)
    processes = {
        name: fit_process(
            seen,
            evidence.values[:, i],
            evidence.errors[:, i],
            evidence.own_errors[:, i],
            nothing,
            points.owner,
        )
        for i, name in enumerate(objectives)
    }
    signs = {name: -1.0 if direction == "maximize" else 1.0 for name, direction in objectives.items()}
    found = []
    for column, (name, low, high) in list_contrasts(points):
        lows, highs = (
            change_rows(points, evidence.rows, column, low),
            change_rows(points, evidence.rows, column, high),
        )
        pairs = [(a, b) for a, b in zip(lows, highs) if a is not None and b is not None]
        if not pairs:
            continue
        there = points.seen(np.concatenate([[a for a, _ in pairs], [b for _, b in pairs]]))
        weights = np.repeat([-1 / len(pairs), 1 / len(pairs)], len(pairs))
        effects = {}
        for objective, process in processes.items():
            value, error = process.contrast(there, weights)
            effects[objective] = Estimate(signs[objective] * value, error)
        first, last = (
            [points.options[name][int(end)] for end in (low, high)] if name in points.options else [low, high]
        )
        found.append(Effect(name, first, last, effects, len(pairs)))
    return found


def list_contrasts(points: SpaceEncoding) -> list[tuple[int, tuple[str, float, float]]]:
    """Each coordinate's column with its two ends; a method against the first one, in turn."""
    found: list[tuple[int, tuple[str, float, float]]] = []
    for i, (name, options) in enumerate(points.options.items()):
        if len(options) > 1:
            ordered = all(isinstance(option, (int, float)) for option in options)
            found += [
                (i, (name, 0, last)) for last in ([len(options) - 1] if ordered else range(1, len(options)))
            ]
    if points.rate_matters:
        found.append((len(points.options), ("rate", 0.0, 1.0)))
    return found


def change_rows(
    points: SpaceEncoding, rows: np.ndarray, column: int, value: float
) -> list[np.ndarray | None]:
    """Each row with that value there, where a choice can have it with all else unchanged."""
    found: list[np.ndarray | None] = []
    for row in rows:
        new = row.copy()
        new[column] = value
        found.append(new if np.array_equal(points.row(points.choice(new)).round(2), new.round(2)) else None)
    return found
