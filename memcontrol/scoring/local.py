"""Owns distances between parts of images: the descriptor `local`.

Notations, beside those of `distances`

window: A square part of an image, at the same place in all.
W: Windows of an image.
d_T, d_H: Here of a window to the nearest training and to the nearest held-out image's window there.
r = min d_T / d_H: Over an image's windows; far below 1 where one of them is nearer to what was trained on.
swapped r = min d_H / d_T: Not 1 / r, since it may be another window's.
L: Labellings of the references.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from memcontrol.core.errors import MemControlError
from memcontrol.data.features import PIXEL_SIDE, split_blocks, view_images
from memcontrol.scoring.distances import Space, Versions, describe_lone_group
from memcontrol.scoring.labels import Labels

_LOCAL_CELL = 2  # pixels of a cell's side, whose mean is taken
_WINDOW, _STEP = 6, 2  # cells of a window's side, and from one window to the next
_GREY_FLOOR = 0.006  # of a window's distance, by cell, in 0..1: flat windows are as near as any others
_MOST_DISTANCES = 2**22  # distances that are in memory at a time
_N_FOR_ALL = 5  # neighbours that are looked at for all images and labels; few are open then
_MOST_FEW = 64  # references of a side that are looked through as a whole
_N_CELLS = PIXEL_SIDE // _LOCAL_CELL
CORNERS = [
    (top, left)
    for top in range(0, _N_CELLS - _WINDOW + 1, _STEP)
    for left in range(0, _N_CELLS - _WINDOW + 1, _STEP)
]


def average_cells(pixels: np.ndarray) -> np.ndarray:
    """The cells [n, 768] of pixels [n, 3072]."""
    blocks = [nn.functional.avg_pool2d(view_images(block), _LOCAL_CELL) for block in split_blocks(pixels)]
    return torch.cat(blocks).flatten(1).numpy()


def cut_windows(cells: np.ndarray, corner: tuple[int, int]) -> Tensor:
    """The window [n, D] whose upper left cell is the corner, less its mean colour, of cells [n, 768]."""
    images = torch.from_numpy(cells).view(-1, 3, _N_CELLS, _N_CELLS)
    top, left = corner
    window = images[:, :, top : top + _WINDOW, left : left + _WINDOW]
    return (window - window.mean((2, 3), keepdim=True)).flatten(1)


@dataclass(frozen=True)
class LeastWindows:
    """Of each image [N] the window with the least d_T / d_H, and its nearest references."""

    ratios: np.ndarray
    swapped_ratios: np.ndarray
    windows: np.ndarray  # numbers of the CORNERS
    distances: np.ndarray  # d_T and d_H of that window [2, N]
    rows: np.ndarray  # of the training and the held-out image [2, N]


class LocalSpace(Space):
    """Of cells [n, 768], as the one version of each set."""

    is_whole = False
    most_swapped = 512

    @cached_property
    def least_windows(self) -> LeastWindows:
        return self._compare(self.generated, None)

    @property
    def to_train(self) -> tuple[np.ndarray, np.ndarray]:
        return self.least_windows.distances[0], self.least_windows.rows[0]

    @property
    def to_holdout(self) -> tuple[np.ndarray, np.ndarray]:
        return self.least_windows.distances[1], self.least_windows.rows[1]

    @property
    def ratios(self) -> np.ndarray:
        return self.least_windows.ratios

    @property
    def swapped_ratios(self) -> np.ndarray:
        return self.least_windows.swapped_ratios

    @property
    def regions(self) -> np.ndarray:
        """Where the least windows are."""
        corners = np.array(CORNERS)[self.least_windows.windows][:, ::-1]  # left, top
        return np.concatenate([corners, corners + _WINDOW], axis=1) / _N_CELLS

    @property
    def real_ratios(self) -> np.ndarray:
        return self.remember("real ratios", self._measure_real).ratios

    @property
    def swapped_real_ratios(self) -> np.ndarray:
        return self.remember("swapped real ratios", self._measure_swapped_real).swapped_ratios

    def _measure_real(self) -> LeastWindows:
        if self.calibration:
            return self._compare(self.calibration, None)
        return self._compare(self.holdout, self.groups[1])

    def _measure_swapped_real(self) -> LeastWindows:
        if self.calibration:
            return self.remember("real ratios", self._measure_real)
        rows = self.choose_swapped()
        return self._compare((self.train[0][rows],), self.groups[0][rows])

    def _compare(self, queries: Versions, own: np.ndarray | None) -> LeastWindows:
        references = np.concatenate([self.train[0], self.holdout[0]])
        groups = np.concatenate(self.groups)
        return find_least_windows(queries[0], own, references, groups, len(self.train[0]))

    def iterate_relabelled(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        found = relabel_windows(self.generated[0], None, self.pool[0], self.labels)
        return zip(*found)

    def iterate_relabelled_real(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        labels = self.labels
        if self.calibration:
            yield from zip(*relabel_windows(self.calibration[0], None, self.pool[0], labels))
            return
        found = relabel_windows(self.pool[0], labels.groups, self.pool[0], labels)
        for sides, r, swapped in zip(labels.sides, *found):
            yield r[~sides], swapped[sides]


def iterate_distances(
    queries: np.ndarray, own: np.ndarray | None, references: np.ndarray, groups: np.ndarray
) -> Iterator[tuple[slice, int, Tensor]]:
    """Block by block of the queries' cells [N, 768], and window by window: the block, the window, and its
    distances [n, P] to the references' [P, 768], infinite to those of a query's `own` group [N]."""
    size = max(1, _MOST_DISTANCES // len(references))
    floor = _GREY_FLOOR * (3 * _WINDOW**2) ** 0.5
    for start in range(0, len(queries), size):
        block = slice(start, start + size)
        is_own = None if own is None else torch.from_numpy(own[block, None] == groups[None])
        for number, corner in enumerate(CORNERS):
            left, right = (cut_windows(cells, corner) for cells in (queries[block], references))
            squares = torch.addmm(right.square().sum(1), left, right.T, alpha=-2)
            squares.add_(left.square().sum(1, keepdim=True)).clamp_(min=floor**2)
            yield (
                block,
                number,
                squares.sqrt_() if is_own is None else squares.sqrt_().masked_fill_(is_own, torch.inf),
            )


def find_least_windows(
    queries: np.ndarray, own: np.ndarray | None, references: np.ndarray, groups: np.ndarray, n_train: int
) -> LeastWindows:
    """Of queries' cells [N, 768] held against references', of which the first `n_train` are training images.
    Raises MemControlError where one side is all of a query's own group."""
    n = len(queries)
    least, swapped = np.full(n, np.inf), np.full(n, np.inf)
    windows, distances, rows = np.zeros(n, int), np.zeros((2, n)), np.zeros((2, n), int)
    for block, number, apart in iterate_distances(queries, own, references, groups):
        sides = [side.min(1) for side in (apart[:, :n_train], apart[:, n_train:])]
        near = np.array([side.values.double().numpy() for side in sides])  # [2, n]
        places = np.array([side.indices.numpy() for side in sides])
        if np.isinf(near).any():
            raise MemControlError(
                describe_lone_group(n_train if np.isinf(near[0]).any() else len(groups) - n_train)
            )
        r = near[0] / near[1]
        is_less = r < least[block]
        swapped[block] = np.minimum(swapped[block], 1 / r)
        least[block] = np.minimum(least[block], r)
        windows[block] = np.where(is_less, number, windows[block])
        distances[:, block] = np.where(is_less, near, distances[:, block])
        rows[:, block] = np.where(is_less, places, rows[:, block])
    return LeastWindows(least, swapped, windows, distances, rows)


def relabel_windows(
    queries: np.ndarray, own: np.ndarray | None, pool: np.ndarray, labels: Labels
) -> tuple[np.ndarray, np.ndarray]:
    """r and swapped r of queries' cells [N, 768] under each labelling of the pool: [L, N] both."""
    sides = np.ascontiguousarray(labels.sides.T)  # [P, L]
    few = list_few(labels.sides)
    least, swapped = (np.full((sides.shape[1], len(queries)), np.inf, np.float32) for _ in range(2))
    for block, _, apart in iterate_distances(queries, own, pool, labels.groups):
        near = apart.topk(labels.n_neighbours, dim=1, largest=False)
        to_few = None if few is None else find_least_among(apart, few)
        r = split_labels(near.values.numpy(), near.indices.numpy(), sides, to_few).T  # [L, n]
        np.minimum(least[:, block], r, out=least[:, block])
        np.minimum(swapped[:, block], 1 / r, out=swapped[:, block])
    return least, swapped


def list_few(sides: np.ndarray) -> list[np.ndarray] | None:
    """Rows of the side that has fewer references, under each labelling [L, P]. None where they are so many
    that the way from neighbour to neighbour is shorter, or none under one."""
    is_few = sides if 2 * sides[0].sum() < sides.shape[1] else ~sides
    n = is_few.sum(1)
    return [np.nonzero(one)[0] for one in is_few] if 0 < n.min() and n.max() <= _MOST_FEW else None


def find_least_among(apart: Tensor, few: list[np.ndarray]) -> np.ndarray:
    """Of distances [n, P] the least to the rows of each labelling: [n, L]."""
    columns = apart.T.contiguous()  # [P, n]
    return torch.stack([columns[torch.from_numpy(rows)].amin(0) for rows in few], dim=1).numpy()


def split_labels(
    distances: np.ndarray, rows: np.ndarray, sides: np.ndarray, to_few: np.ndarray | None
) -> np.ndarray:
    """d_T / d_H [n, L] of the nearest neighbours' distances and rows [n, k] under labels [P, L]; the last
    neighbour stands for a side that has none among them. `to_few` [n, L], where it is known, is the distance
    to the side that has fewer references."""
    nearest = sides[rows[:, 0]]  # [n, L] whether the nearest is a training image
    is_known = np.isfinite(distances)
    last = distances[np.arange(len(rows)), is_known.sum(1) - 1]
    other = np.repeat(last[:, None], sides.shape[1], axis=1)
    is_open = np.ones(nearest.shape, bool)
    if to_few is not None:
        is_open = to_few == distances[:, :1]  # the nearest is one of the few: the other side is dense
        np.minimum(other, to_few, out=other, where=~is_open)
    for j in range(1, min(_N_FOR_ALL, rows.shape[1])):
        found = is_open & (sides[rows[:, j]] != nearest) & is_known[:, j : j + 1]
        np.copyto(other, distances[:, j : j + 1], where=found)
        is_open ^= found
    images, labels = np.nonzero(is_open)
    for j in range(_N_FOR_ALL, rows.shape[1]):
        found = (sides[rows[images, j], labels] != nearest[images, labels]) & is_known[images, j]
        other[images[found], labels[found]] = distances[images[found], j]
        images, labels = images[~found], labels[~found]
    ratios = distances[:, :1] / other
    return np.where(nearest, ratios, 1 / ratios)
