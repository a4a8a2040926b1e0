"""Owns the null of every figure of copying: which reference counts as a training image, as it is, and with
these labels permuted by group.

Without copying, what a model generates knows nothing of the labels. So a figure under the true labels is a
draw like those under permuted ones, whatever the images look like: soft or flat images, which come near to
the same few references (hubs) on whichever side these lie, get the same there. Exact for any statistic, as
far as groups of both sides are drawn alike (Pitman 1937; Phipson and Smyth 2010 for the p-value).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from memcontrol.core.seeds import derive_seed

N_PERMUTATIONS = 400
_MOST_POOLED = 2048  # references of either side
_MOST_NEIGHBOURS = 1024
_ALIKE = 1.25  # of mean sizes of groups, whose labels are permuted


@dataclass(frozen=True)
class Labels:
    """The pooled references, and their labels.

    Groups of different sizes are not alike, so where those of one side are larger, none has more of its
    images in the pool than makes them alike.
    """

    train: np.ndarray  # rows of training images in the pool [P_T]
    holdout: np.ndarray  # rows of held-out images [P_H]; the pool has the training images first
    groups: np.ndarray  # [P]
    n_permutations: int = N_PERMUTATIONS

    @property
    def n(self) -> int:
        return len(self.groups)

    @cached_property
    def sides(self) -> np.ndarray:
        """Whether a reference counts as a training image: [1 + n_permutations, P], first as it is."""
        true = np.arange(self.n) < len(self.train)
        rng = np.random.default_rng(derive_seed("labels"))
        sizes = np.bincount(self.groups)
        drawn = [true]
        for _ in range(self.n_permutations):
            order = rng.permutation(len(sizes))
            # groups in this order are training images until there are as many of these as there were
            n_before = np.concatenate([[0], np.cumsum(sizes[order])[:-1]])
            is_train = np.empty(len(sizes), bool)
            is_train[order] = n_before + sizes[order] / 2 <= len(self.train)
            drawn.append(is_train[self.groups])
        return np.array(drawn)

    @property
    def n_neighbours(self) -> int:
        """So many that both sides are among them but once in a million (1 - q)^(14 / q), where q is the share
        of the smaller side."""
        smaller = min(len(self.train), len(self.holdout)) / self.n
        return min(self.n, int(14 / smaller), _MOST_NEIGHBOURS)


def draw_labels(orders: tuple[np.ndarray, np.ndarray], groups: tuple[np.ndarray, np.ndarray]) -> Labels:
    """Of training and held-out images, whose rows come in a canonical order [T], [H] and are of groups [T],
    [H]."""
    train, holdout = (_cut_at_groups(rows, own) for rows, own in zip(trim_groups(orders, groups), groups))
    pooled = np.concatenate([groups[0][train], groups[1][holdout]])
    return Labels(train, holdout, np.unique(pooled, return_inverse=True)[1])


def trim_groups(
    orders: tuple[np.ndarray, np.ndarray], groups: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Of the rows of both sides, in their order, those that are among the first of their group: as many of
    each as leave groups of nearly the same size, on average, on either side."""
    sizes = [np.unique(own, return_counts=True)[1] for own in groups]
    most = next(n for n in range(min(int(own.max()) for own in sizes), 0, -1) if _are_alike(sizes, n))
    train, holdout = (_take_first_of_groups(order, own, most) for order, own in zip(orders, groups))
    return train, holdout


def _are_alike(sizes: Sequence[np.ndarray], most: int) -> bool:
    """Whether groups, of which no more than `most` images count, are of one mean size on both sides."""
    mine, theirs = (np.minimum(own, most).mean() for own in sizes)
    return max(mine, theirs) <= _ALIKE * min(mine, theirs)


def _take_first_of_groups(order: np.ndarray, groups: np.ndarray, most: int) -> np.ndarray:
    taken: dict[int, int] = {}
    rows = []
    for row in order:
        n = taken[groups[row]] = taken.get(groups[row], 0) + 1
        if n <= most:
            rows.append(row)
    return np.array(rows)


def _cut_at_groups(rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The rows of as many whole groups as may be pooled."""
    if len(rows) <= _MOST_POOLED:
        return rows
    members: dict[int, list[int]] = {}
    for row in rows:
        members.setdefault(groups[row], []).append(row)
    n_before = np.cumsum([len(own) for own in members.values()])
    return np.concatenate([own for own, n in zip(members.values(), n_before) if n <= _MOST_POOLED])


@dataclass(frozen=True)
class Neighbours:
    """Of some images, their nearest pooled references, nearest first."""

    distances: np.ndarray  # [n, K]
    rows: np.ndarray  # [n, K] in the pool; -1: none, infinitely far

    def split(self, is_train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances to the nearest of either side [n], [n], under labels [P]; to the last neighbour where a
        side has none among them."""
        known = self.rows >= 0
        chosen = is_train[self.rows] & known
        last = known.sum(1) - 1
        return self._find_first(chosen, last), self._find_first(known & ~chosen, last)

    def _find_first(self, chosen: np.ndarray, last: np.ndarray) -> np.ndarray:
        column = np.where(chosen.any(1), chosen.argmax(1), last)
        return self.distances[np.arange(len(column)), column]
