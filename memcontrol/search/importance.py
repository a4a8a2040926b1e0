"""Owns which parts of a choice drive which reward: the effect of each group, method, rank and of the learning
rate, with its error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memcontrol.core.choice import say_setting
from memcontrol.core.errors import MemControlError
from memcontrol.core.estimate import Estimate
from memcontrol.core.reward_table import list_objectives
from memcontrol.core.space import SearchSpace
from memcontrol.search.encoding import SpaceEncoding
from memcontrol.search.gaussian_process import Process, fit_process
from memcontrol.search.surrogate import N_SPREAD, TrainingSet, gather_training_set
from memcontrol.study.record import Record

_ROUNDING = 1e-9  # of the largest value, what the arithmetic leaves where there is no effect


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
    """A setting that is off, and one that is a mapping, of which a label holds the JSON."""
    if option is None or (isinstance(option, str) and option.startswith("{")):
        return say_setting(option and json.loads(option))
    return option


def measure_importance(
    records: Sequence[Record], space: SearchSpace, file: str = "STUDY.yaml"
) -> list[Effect]:
    """Each coordinate's effects under the Gaussian process that sampling fits, their errors those of its
    posterior: a contrast of its values at the trials' choices with the coordinate at one end and at the
    other. Only choices that the change leaves possible count, and of what no two trials differ in nothing is
    known (`list_untold`). What is nothing but rounding is 0.

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
    rounding = _ROUNDING * np.abs(known.values).max(0)  # [objectives]
    effects = []
    for contrast in _list_contrasts(encoding):
        pairs = _pair_rows(encoding, known.rows, contrast)
        if not len(pairs) or not np.ptp(known.rows[:, contrast.column]):
            continue
        there = encoding.seen(np.concatenate([pairs[:, 0], pairs[:, 1]]))  # [2 pairs, F]
        weights = np.repeat([-1 / len(pairs), 1 / len(pairs)], len(pairs))
        by_objective = {}
        for objective, process, least in zip(objectives, processes, rounding):
            value, error = (0.0 if abs(part) < least else part for part in process.contrast(there, weights))
            by_objective[objective.name] = Estimate(objective.to_loss(value) if value else 0.0, error)
        effects.append(Effect(contrast.name, *_name_ends(encoding, contrast), by_objective, len(pairs)))
    return effects


def list_untold(records: Sequence[Record], space: SearchSpace) -> list[str]:
    """The coordinates in which no two trials differ that have ended, though they might."""
    encoding = SpaceEncoding(space)
    known = gather_training_set(records, encoding, ())
    if known is None:
        return []
    untold = [one.name for one in _list_contrasts(encoding) if not np.ptp(known.rows[:, one.column])]
    return ["learning rate" if name == "rate" else name for name in dict.fromkeys(untold)]


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
