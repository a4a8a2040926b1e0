"""Owns which parts of a choice drive which reward: the effect of each group, method, rank and of the learning
rate, with its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memcontrol.core.errors import MemControlError
from memcontrol.core.estimate import Estimate
from memcontrol.core.reward_table import list_objectives
from memcontrol.core.space import SearchSpace
from memcontrol.search.encoding import SpaceEncoding
from memcontrol.search.gaussian_process import Process, fit_process
from memcontrol.search.surrogate import N_SPREAD, TrainingSet, gather_training_set
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
    return f"{coordinate}: {_say_option(low)} to {_say_option(high)}"


def _say_option(option: object) -> object:
    """A setting that is off, and one that is on with its defaults."""
    return "off" if option is None else "on" if option == "{}" else option


def measure_importance(
    records: Sequence[Record], space: SearchSpace, file: str = "STUDY.yaml"
) -> list[Effect]:
    """Each coordinate's effects under the Gaussian process that sampling fits, their errors those of its
    posterior: a contrast of its values at the trials' choices with the coordinate at one end and at the
    other. Only choices that the change leaves possible count.

    Raises MemControlError where too few trials have ended to fit anything, with the command that has as many
    of the study `file`.
    """
    encoding = SpaceEncoding(space)
    known = gather_training_set(records, encoding, ())
    if known is None or len(known.rows) < N_SPREAD:
        n = 0 if known is None else len(known.rows)
        n_wanted = sum(record.fills_place for record in records) + N_SPREAD - n
        raise MemControlError(
            f"importance needs {N_SPREAD} ended trials, not counting the anchors none and full, which no "
            f"point of the space stands for; this study has {n}, {N_SPREAD - n} too few: "
            f"memcontrol search {file} --trials {n_wanted}"
        )
    objectives = list_objectives(next(record.objectives for record in records if record.finished))
    processes = _fit_objectives(known, encoding, len(objectives))
    effects = []
    for contrast in _list_contrasts(encoding):
        pairs = _pair_rows(encoding, known.rows, contrast)
        if not len(pairs):
            continue
        there = encoding.seen(np.concatenate([pairs[:, 0], pairs[:, 1]]))  # [2 pairs, F]
        weights = np.repeat([-1 / len(pairs), 1 / len(pairs)], len(pairs))
        by_objective = {}
        for objective, process in zip(objectives, processes):
            value, error = process.contrast(there, weights)
            by_objective[objective.name] = Estimate(objective.to_loss(value), error)
        effects.append(Effect(contrast.name, *_name_ends(encoding, contrast), by_objective, len(pairs)))
    return effects


def _fit_objectives(known: TrainingSet, encoding: SpaceEncoding, n_objectives: int) -> list[Process]:
    """A process of each objective's losses, nothing pending."""
    seen, nothing = encoding.seen(known.rows), np.empty((0, len(encoding.owner)))
    return [
        fit_process(
            seen, known.values[:, i], known.errors[:, i], known.own_errors[:, i], nothing, encoding.owner
        )
        for i in range(n_objectives)
    ]


@dataclass(frozen=True)
class _Contrast:
    """The two ends of a coordinate: what its column in a row holds at either."""

    column: int
    name: str
    low: float
    high: float


def _list_contrasts(encoding: SpaceEncoding) -> list[_Contrast]:
    """Each coordinate's lowest against its highest option; a method against the first one, in turn."""
    contrasts = []
    for column, (name, options) in enumerate(encoding.options.items()):
        ordered = all(isinstance(option, (int, float)) for option in options)
        first = max(len(options) - 1, 1) if ordered else 1
        contrasts += [_Contrast(column, name, 0, last) for last in range(first, len(options))]
    if encoding.rate_matters:
        contrasts.append(_Contrast(len(encoding.options), "rate", 0.0, 1.0))
    return contrasts


def _name_ends(encoding: SpaceEncoding, contrast: _Contrast) -> tuple[object, object]:
    """The options at both ends; of the learning rate, its places."""
    if contrast.name not in encoding.options:
        return contrast.low, contrast.high
    options = encoding.options[contrast.name]
    return options[int(contrast.low)], options[int(contrast.high)]


def _pair_rows(encoding: SpaceEncoding, rows: np.ndarray, contrast: _Contrast) -> np.ndarray:
    """Rows at the contrast's low and high end [pairs, 2, columns]: those with which a choice can have either,
    all else unchanged."""
    pairs = []
    for row in rows:
        pair = np.stack([row, row])
        pair[:, contrast.column] = contrast.low, contrast.high
        if all(_is_possible(encoding, end) for end in pair):
            pairs.append(pair)
    return np.array(pairs)


def _is_possible(encoding: SpaceEncoding, row: np.ndarray) -> bool:
    """Whether it is the row of its own choice."""
    return np.array_equal(encoding.row(encoding.choice(row)).round(2), row.round(2))
