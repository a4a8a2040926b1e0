"""Owns distances between generated images and the references of both sides, under one descriptor.

Notations

N, T, H, C: Numbers of generated, training, held-out and calibration images; D: dimensions of a descriptor.
versions: An image as it is and, in pixels, mirrored; a distance is the least over one side's versions.
group: Who is in an image; an image's own group never is its reference.
d_T, d_H: Distances of an image to the nearest training and to the nearest held-out one.
r = d_T / d_H: What tells copies; far below 1 where an image is nearer to what was trained on.
floor: Distances below it are one with it, so that r is defined where both are 0.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from memcontrol.core.errors import MemControlError
from memcontrol.data.features import check_matrix, nearest, refuse_unlike_widths
from memcontrol.scoring.labels import Labels, Neighbours, draw_labels

Versions = tuple[np.ndarray, ...]  # [n, D] each
_FEWEST_CALIBRATION = 8


@dataclass(frozen=True)
class Space(ABC):
    """Images that are compared under one descriptor, each set in its versions: `generated`, and the
    references `train` and `holdout`, whose first version is what others are compared with; `calibration`,
    real images of neither. `train_groups` [T] and `holdout_groups` [H] name who is in an image; None: each
    another."""

    generated: Versions
    train: Versions
    holdout: Versions
    calibration: Versions | None = None
    train_groups: Sequence[str] | None = None
    holdout_groups: Sequence[str] | None = None
    seed: int = 0
    # what follows from the references alone, whatever is generated
    known: dict[str, Any] = field(default_factory=dict, compare=False)
    # of the references, where several spaces have them in common
    drawn: Labels | None = field(default=None, compare=False)
    is_whole: ClassVar[bool]  # whether whole images are compared
    most_swapped: ClassVar[int] = 2048  # training images that are looked at as if they were held out

    def remember(self, name: str, make: Callable[[], Any]) -> Any:
        return remember_once(self.known, name, make)

    @property
    @abstractmethod
    def to_train(self) -> tuple[np.ndarray, np.ndarray]:
        """Each generated image's distance to its nearest training image, and which it is: [N], [N]."""

    @property
    @abstractmethod
    def to_holdout(self) -> tuple[np.ndarray, np.ndarray]:
        """The same for held-out images."""

    @property
    @abstractmethod
    def ratios(self) -> np.ndarray:
        """r of the generated images [N]."""

    @property
    @abstractmethod
    def swapped_ratios(self) -> np.ndarray:
        """r of the generated images [N], as if train and held-out had changed places."""

    @property
    @abstractmethod
    def real_ratios(self) -> np.ndarray:
        """r of real images: of the calibration's [C]; without them of the held-out ones, each without its own
        group as reference [H]."""

    @property
    @abstractmethod
    def swapped_real_ratios(self) -> np.ndarray:
        """r of real images, as if train and held-out had changed places: of the calibration's, or of training
        images, as many as `most_swapped` at most."""

    @property
    @abstractmethod
    def regions(self) -> np.ndarray:
        """Where each generated image is compared: left, top, right and bottom as shares of a side [N, 4]."""

    @abstractmethod
    def iterate_relabelled(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """r and swapped r of the generated images [N] under each labelling of the pool, first the true
        one."""

    @abstractmethod
    def iterate_relabelled_real(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Under each labelling, r of those real images that are held out, and swapped r of those that are
        trained on: of the calibration's both times."""

    @property
    def groups(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the groups of training and held-out images [T], [H]."""
        return self.remember("groups", self._number_groups)

    def _number_groups(self) -> tuple[np.ndarray, np.ndarray]:
        n = len(self.train[0])
        names = [f"train {i}" for i in range(n)] if self.train_groups is None else list(self.train_groups)
        names += (
            [f"held out {i}" for i in range(len(self.holdout[0]))]
            if self.holdout_groups is None
            else list(self.holdout_groups)
        )
        if shared := set(names[:n]) & set(names[n:]):
            raise MemControlError(
                f"group '{min(shared)}' is in train and in holdout; a group belongs to one of them, since "
                "copying could not be told from chance"
            )
        numbers = np.unique(names, return_inverse=True)[1]
        return numbers[:n], numbers[n:]

    @property
    def orders(self) -> tuple[np.ndarray, np.ndarray]:
        """Canonical orders of the training and held-out rows."""
        return self.remember("orders", lambda: (order_rows(self.train[0]), order_rows(self.holdout[0])))

    def choose_swapped(self) -> np.ndarray:
        """Rows of the training images that are looked at as if they were held out."""
        return self.orders[0][: self.most_swapped]

    @property
    def labels(self) -> Labels:
        """Which reference is a training image: as it is, and with labels permuted by group."""
        return self.drawn or self.remember("labels", lambda: draw_labels(self.orders, self.groups))

    @property
    def pool(self) -> Versions:
        """The references whose labels are permuted, in their versions, [P, D] each."""
        labels = self.labels
        return tuple(
            np.concatenate([train[labels.train], held[labels.holdout]])
            for train, held in zip(self.train, self.holdout)
        )


class DistanceSpace(Space):
    """Of whole images."""

    is_whole = True
    floor_share: ClassVar[float] = (
        1e-3  # of the median distance between held-out images and their nearest training image
    )

    def find_nearest(
        self, queries: Versions, references: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest references of each query, each counted once: distances and rows, [N, k] both."""
        return nearest_versions(queries, references, k)

    @cached_property
    def to_train(self) -> tuple[np.ndarray, np.ndarray]:
        return take_first(*self.find_nearest(self.generated, self.train[0], 1))

    @cached_property
    def to_holdout(self) -> tuple[np.ndarray, np.ndarray]:
        return take_first(*self.find_nearest(self.generated, self.holdout[0], 1))

    @property
    def ratios(self) -> np.ndarray:
        return self.divide(self.to_train[0], self.to_holdout[0])

    @property
    def swapped_ratios(self) -> np.ndarray:
        return 1 / self.ratios

    @property
    def regions(self) -> np.ndarray:
        return np.tile([0.0, 0.0, 1.0, 1.0], (len(self.generated[0]), 1))

    def divide(self, distances: np.ndarray, others: np.ndarray) -> np.ndarray:
        return np.maximum(distances, self.floor) / np.maximum(others, self.floor)

    @property
    def floor(self) -> float:
        return self.remember("floor", self._find_floor)

    def _find_floor(self) -> float:
        """At least what float32 can tell apart, where most held-out images lie on training images."""
        scale = float(np.abs(self.train[0]).max()) * np.sqrt(self.train[0].shape[1])
        return max(self.floor_share * float(np.median(self.holdout_to_train)), 1e-6 * scale, 1e-12)

    @property
    def holdout_to_train(self) -> np.ndarray:
        """[H]."""
        return self.remember(
            "held to train", lambda: take_first(*self.find_nearest(self.holdout, self.train[0], 1))[0]
        )

    @property
    def real_ratios(self) -> np.ndarray:
        return self.remember("real ratios", self._measure_real_ratios)

    def _measure_real_ratios(self) -> np.ndarray:
        if self.calibration:
            to_train, to_holdout = (
                take_first(*self.find_nearest(self.calibration, one[0], 1))[0]
                for one in (self.train, self.holdout)
            )
            return self.divide(to_train, to_holdout)
        groups = self.groups[1]
        return self.divide(
            self.holdout_to_train, self._find_others(self.holdout, groups, self.holdout[0], groups)
        )

    @property
    def swapped_real_ratios(self) -> np.ndarray:
        return self.remember("swapped real ratios", self._measure_swapped_real_ratios)

    def _measure_swapped_real_ratios(self) -> np.ndarray:
        if self.calibration:
            return 1 / self.real_ratios
        rows = self.choose_swapped()
        some = tuple(version[rows] for version in self.train)
        to_holdout = take_first(*self.find_nearest(some, self.holdout[0], 1))[0]
        return self.divide(
            to_holdout, self._find_others(some, self.groups[0][rows], self.train[0], self.groups[0])
        )

    @cached_property
    def relabelled_ratios(self) -> list[np.ndarray]:
        """r of the generated images [N] under each labelling of the pool, first the true one."""
        found = Neighbours(*self.find_nearest(self.generated, self.pool[0], self.labels.n_neighbours))
        return [self.divide(*found.split(sides)) for sides in self.labels.sides]

    def iterate_relabelled(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for r in self.relabelled_ratios:
            yield r, 1 / r

    def iterate_relabelled_real(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        found = self._find_real_neighbours()
        for sides in self.labels.sides:
            r = self.divide(*found.split(sides))
            yield (r, 1 / r) if self.calibration else (r[~sides], 1 / r[sides])

    def _find_real_neighbours(self) -> Neighbours:
        """Of the calibration images; without them of the pooled ones, each without its own group."""
        pool, k, groups = self.pool, self.labels.n_neighbours, self.labels.groups
        if self.calibration:
            return Neighbours(*self.find_nearest(self.calibration, pool[0], k))
        return Neighbours(*self._find_foreign(pool, groups, pool[0], groups, k))

    def _find_foreign(
        self, queries: Versions, own: np.ndarray, references: np.ndarray, groups: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest references [P, D] of other `groups` [P] than a query's `own` [N]: distances and rows,
        [N, k] both, infinite and -1 where there are fewer."""
        most = int(np.bincount(groups).max())  # that one query may have to pass over
        distances, indices = self.find_nearest(queries, references, min(k + most, len(references)))
        is_own = groups[indices] == own[:, None]
        order = is_own.argsort(axis=1, kind="stable")[:, :k]  # others first, in their order
        distances = np.where(is_own, np.inf, distances)
        return np.take_along_axis(distances, order, 1), np.where(
            np.take_along_axis(is_own, order, 1), -1, np.take_along_axis(indices, order, 1)
        )

    def _find_others(
        self, queries: Versions, own: np.ndarray, references: np.ndarray, groups: np.ndarray
    ) -> np.ndarray:
        """Of each query, whose group is `own` [N], to the nearest reference of another of the `groups` [P]:
        [N]. Raises MemControlError where there is one group alone."""
        found = self._find_foreign(queries, own, references, groups, 1)[0][:, 0]
        if np.isinf(found).any():
            raise MemControlError(describe_lone_group(len(groups)))
        return found


def describe_lone_group(n: int) -> str:
    return (
        f"all {n} images of one side are of one group (a person, or twins of each other), so that none of "
        "them has a reference; copying is judged against images of at least two groups"
    )


def make_space(
    generated,
    train,
    holdout,
    calibration=None,
    groups: tuple[Sequence[str] | None, Sequence[str] | None] = (None, None),
    seed: int = 0,
) -> DistanceSpace:
    """Of feature matrices [n, D], numpy or torch. Raises MemControlError."""
    if len(groups) != 2:
        raise MemControlError(
            f"groups has {len(groups)} items; give a pair: the names of training and of held-out images' "
            "groups"
        )
    g = check_matrix(generated, "generated", dtype=None)
    t = check_matrix(train, "train", 2, dtype=None)
    h = check_matrix(holdout, "holdout", 2, dtype=None)
    c = None if calibration is None else (check_matrix(calibration, "calibration", dtype=None),)
    refuse_unlike_widths(g, t, h, *(c or ()))
    for name, own, n in (("train", groups[0], len(t)), ("holdout", groups[1], len(h))):
        _check_groups(name, own, n)
    if c:
        _check_calibration(c[0], t, h)
    return DistanceSpace((g,), (t,), (h,), c, groups[0], groups[1], seed)


def _check_groups(name: str, groups: Sequence[str] | None, n: int) -> None:
    """Raises MemControlError."""
    if groups is not None and (len(groups) != n or any(one is None for one in groups)):
        raise MemControlError(
            f"groups of {name} are {len(groups)} names for {n} images; give a name for each image, as a "
            "pair: of training and of held-out images"
        )


def _check_calibration(rows: np.ndarray, train: np.ndarray, holdout: np.ndarray) -> None:
    """Raises MemControlError."""
    if len(rows) < _FEWEST_CALIBRATION:
        raise MemControlError(
            f"calibration has {len(rows)} images; give {_FEWEST_CALIBRATION} or more, real ones that are "
            "neither trained on nor held out"
        )
    own = {row.tobytes() for row in rows}
    references = (row for side in (train, holdout) for row in side.astype(rows.dtype, copy=False))
    n_shared = sum(row.tobytes() in own for row in references)
    if n_shared:
        raise MemControlError(
            f"{n_shared} training and held-out images are among the {len(rows)} calibration images; give "
            "others of their kind"
        )


def remember_once(known: dict[str, Any], name: str, make: Callable[[], Any]) -> Any:
    if name not in known:
        known[name] = make()
    return known[name]


def order_rows(rows: np.ndarray) -> np.ndarray:
    """An order of the rows by their content, so that draws do not depend on how a folder was listed: [N]."""
    digests = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
    return np.array(sorted(range(len(rows)), key=digests.__getitem__))


def take_first(distances: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return distances[:, 0], indices[:, 0]


def nearest_versions(queries: Versions, references: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Nearest references over all versions of each query: each reference counted once, at its nearer one.
    Distances and rows, [N, k] both."""
    by_version = [nearest(version, references, k) for version in queries]
    if len(by_version) == 1:
        return by_version[0]
    distances, indices = (np.concatenate(parts, axis=1) for parts in zip(*by_version))
    distances, indices = _sort_neighbours(distances, indices)  # [N, versions k], a reference once a version
    k = min(k, len(references))
    kept = _find_again(indices).argsort(axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, kept, 1), np.take_along_axis(indices, kept, 1)


def _sort_neighbours(distances: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours [N, K] by their distances, the first of equal ones first."""
    order = distances.argsort(axis=1, kind="stable")
    return np.take_along_axis(distances, order, 1), np.take_along_axis(indices, order, 1)


def _find_again(indices: np.ndarray) -> np.ndarray:
    """Which of the indices [N, K] stand in their row before already."""
    order = indices.argsort(axis=1, kind="stable")
    rising = np.take_along_axis(indices, order, 1)
    again = np.zeros(indices.shape, bool)
    np.put_along_axis(again, order[:, 1:], rising[:, 1:] == rising[:, :-1], 1)
    return again
