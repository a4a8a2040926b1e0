"""Owns a search space as arrays: its choices as rows, what a model sees of them, random ones and
neighbours."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np

from memcontrol.core.choice import BUDGET_KEY, SAME_RATE, Choice
from memcontrol.core.space import SearchSpace

_UNTRAINED = 0.25  # what sampling and scoring cost beside training
_STEPS = (-0.3, -0.1, 0.1, 0.3)  # of the learning rate's place in its range, to its neighbours


def _drop_repeated(rows: np.ndarray) -> np.ndarray:
    """Each row once, in the order of their first places."""
    return np.array(list({row.tobytes(): row for row in rows}.values()))


class SpaceEncoding:
    """A row holds the option's index for each of the space's coordinates, those that need no training
    (`space.free`) after the others, and at its end the learning rate's place in 0..1."""

    def __init__(self, space: SearchSpace):
        self.space, sampled = space, space.list_coordinates()
        self.n_sampled = len(sampled)
        self.options = sampled | {name: one.options for name, one in space.free.items()}
        self.names = list(self.options)
        self.rate_matters = any(
            math.log(high / low) > SAME_RATE for low, high in space.learning_rate.values()
        )
        self.columns, owners, coordinate = [], [], 0
        for i, options in enumerate(self.options.values()):
            if len(options) > 1:
                column = self.column(options)
                self.columns.append((i, column))
                owners += [coordinate] * column.shape[1]
                coordinate += 1
        if self.rate_matters:
            owners.append(coordinate)
        self.owner = np.array(owners)

    @staticmethod
    def column(options: Sequence) -> np.ndarray:
        """What a model sees of each option: [options, columns]. Numbers lie on a line by their order, names
        each in their own direction."""
        if all(isinstance(option, (int, float)) for option in options):
            return np.linspace(0, 1, len(options))[:, None]
        return np.eye(len(options)) / math.sqrt(2)

    def row(self, choice: Choice) -> np.ndarray:
        own = dict(choice.settings)
        free = {name: own.get(name, one.usual) for name, one in self.space.free.items()}
        point = self.space.find_point(choice) | free
        return np.array(
            [*(self.options[name].index(point[name]) for name in self.names), point["rate"]], dtype=float
        )

    def choice(self, row: np.ndarray) -> Choice:
        params = {name: options[int(i)] for (name, options), i in zip(self.options.items(), row)}
        free = {name: params[name] for name, one in self.space.free.items() if params[name] != one.usual}
        return self.space.make_choice_at({**params, "rate": float(row[-1])}).with_settings(free)

    def holds(self, choice: Choice) -> bool:
        """Whether a row can stand for it; others are of settings that are searched no more."""
        own, free = dict(choice.settings), self.space.free
        unknown = [name for name in own if name not in self.space.over]
        return all(name in free and own[name] in free[name].options for name in unknown)

    def expand(self, rows: np.ndarray) -> np.ndarray:
        """Each row [N] at all that its fine-tuning is measured at, those at the same after each other:
        [variants, N, C + 1]."""
        free = (range(len(one.options)) for one in self.space.free.values())
        found = []
        for places in itertools.product(*free):
            found.append(rows.copy())
            found[-1][:, self.n_sampled : -1] = places
        return np.array(found)

    def canonicalize(self, rows: np.ndarray) -> np.ndarray:
        """Each row as that of its own choice, once: what a method cannot train is off, what a choice leaves
        open is at its first option."""
        return (
            _drop_repeated(np.array([self.row(self.choice(row)) for row in _drop_repeated(rows)]))
            if len(rows)
            else rows
        )

    def seen(self, rows: np.ndarray) -> np.ndarray:
        """What a model sees of rows [N, C + 1]: [N, F]."""
        seen = [column[rows[:, i].astype(int)] for i, column in self.columns]
        if self.rate_matters:
            seen.append(rows[:, -1:])
        return np.concatenate(seen, axis=1)

    def estimate_costs(self, rows: np.ndarray) -> np.ndarray:
        """What each row's fine-tuning costs, as a share of one at the config's own budget: [N]. All the same
        where budgets are not searched over."""
        coordinate = self.space.over.get(BUDGET_KEY)
        if coordinate is None:
            return np.ones(len(rows))
        budgets = np.array(coordinate.options, dtype=float)
        usual = coordinate.usual if isinstance(coordinate.usual, int) else budgets.max()
        own = budgets[rows[:, self.names.index(BUDGET_KEY)].astype(int)]
        return (own / usual + _UNTRAINED) / (1 + _UNTRAINED)

    def list_sampled(self) -> list[tuple]:
        """The options of each coordinate that is sampled."""
        return list(self.options.values())[: self.n_sampled]

    def random(self, n: int, rng: random.Random) -> np.ndarray:
        return np.array(
            [
                [
                    *(rng.randrange(len(options)) for options in self.list_sampled()),
                    *([0] * len(self.space.free)),  # the config's own values
                    rng.random(),
                ]
                for _ in range(n)
            ],
            dtype=float,
        )

    def list_neighbours(self, row: np.ndarray) -> np.ndarray:
        """All rows that differ in one coordinate that is sampled."""
        found = []
        for i, options in enumerate(self.list_sampled()):
            for other in range(len(options)):
                if other != row[i]:
                    found.append(row.copy())
                    found[-1][i] = other
        for step in _STEPS if self.rate_matters else ():
            found.append(row.copy())
            found[-1][-1] = min(max(row[-1] + step, 0.0), 1.0)
        return np.array(found)
