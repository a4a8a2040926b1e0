"""Owns distances between images of which one may be shifted, mirrored, turned by 90 degrees, brighter or
flatter than the other: the descriptor `moved`.

Notations, beside those of `distances`

crop: A square that leaves out EDGE pixels of 32 beside each edge, or twice that beside one and none beside
    the other; a query is looked at in all, a reference in its central one.
cell: MOVED_CELL x MOVED_CELL pixels of a crop, of which the mean grey is taken.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from memcontrol.data.features import PIXEL_SIDE, split_blocks, view_images
from memcontrol.scoring.distances import DistanceSpace, Versions

_EDGE, _MOVED_CELL = 2, 4
_LEAST_SPREAD = 0.02  # of a crop's cells, in 0..1: flatter ones are not made livelier than they are
_QUERY_BLOCK, _DISTANCES_AT_ONCE = 256, 2**22  # queries, and distances, in memory
_FLOOR_SHARE = 1e-2  # of the median distance: float32 products tell no less apart


class MovedSpace(DistanceSpace):
    """Of pixels [n, 3072] of 32 x 32, in 0..1, as the one version of each set."""

    floor_share = _FLOOR_SHARE
    most_swapped = 512

    def find_nearest(
        self, queries: Versions, references: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        return nearest_moved(queries[0], references, k)


def nearest_moved(queries: np.ndarray, references: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest references [P, 3072] of each query [N, 3072], at the query's nearest version: distances
    and rows, [N, k] both. Memory does not grow with the number of versions."""
    k = min(k, len(references))
    right = _crop_centre(references)  # [P, D]
    squares = right.square().sum(1)
    size = max(1, min(_QUERY_BLOCK, _DISTANCES_AT_ONCE // len(references)))
    found = []
    for start in range(0, len(queries), size):
        best = torch.full((len(queries[start : start + size]), len(references)), torch.inf)
        for left in iterate_versions(queries[start : start + size]):
            apart = torch.addmm(squares, left, right.T, alpha=-2).add_(left.square().sum(1, keepdim=True))
            torch.minimum(best, apart, out=best)
        found.append(take_least(best, k))
    distances, rows = (np.concatenate(parts) for parts in zip(*found))
    return np.sqrt(distances), rows


def take_least(values: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k least of each row [N, P], at least 0, and their columns: [N, k] both."""
    least, columns = values.topk(k, dim=1, largest=False, sorted=True)
    return least.clamp_(min=0).double().numpy(), columns.numpy()


def _crop_centre(pixels: np.ndarray) -> Tensor:
    """[n, D] of pixels [n, 3072]."""
    blocks = split_blocks(pixels, _QUERY_BLOCK)
    return torch.cat([_crop(_average_cells(block), _EDGE, _EDGE).flatten(1) for block in blocks])


def iterate_versions(pixels: np.ndarray) -> Iterator[Tensor]:
    """Each crop in its eight orientations, [n, D] each, of pixels [n, 3072]."""
    means = _average_cells(pixels)
    for top in range(2 * _EDGE + 1):
        for left in range(2 * _EDGE + 1):
            crop = _crop(means, top, left)
            for mirrored in (crop, crop.flip(2)):
                for n_turns in range(4):
                    yield mirrored.rot90(n_turns, (1, 2)).flatten(1)


def _average_cells(pixels: np.ndarray) -> Tensor:
    """The mean grey of every MOVED_CELL x MOVED_CELL square, wherever it begins: [n, 29, 29]."""
    return nn.functional.avg_pool2d(view_images(pixels).mean(1), _MOVED_CELL, 1)


def _crop(means: Tensor, top: int, left: int) -> Tensor:
    """A crop's cells, less their mean, over their deviation: [n, cells, cells]."""
    side = PIXEL_SIDE - 2 * _EDGE - _MOVED_CELL + 1
    cells = means[:, top : top + side : _MOVED_CELL, left : left + side : _MOVED_CELL]
    cells = cells - cells.mean((1, 2), keepdim=True)
    spread = cells.square().mean((1, 2), keepdim=True).sqrt()
    return cells / spread.clamp(min=_LEAST_SPREAD)
