"""Owns an approximate search for near neighbours that grows as n log n: trees of random cuts, each through
the medians of what it divides, so that all leaves are of one size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

N_TREES = 16
_LEAF = 48  # points
_N_IN_LEAF = 2  # neighbours that a question keeps of each leaf


@dataclass(frozen=True)
class Questions:
    """Points [m, d] whose neighbours are looked for: whose each is, a row of the points searched or none of
    them, and which of its versions."""

    points: Tensor
    owners: Tensor  # [m]
    versions: Tensor  # [m]
    n_versions: int


def find_neighbours(
    points: Tensor, questions: Questions, k: int, reach: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each owner no more than k neighbours of any of its versions, no further than `reach`: owners,
    versions, rows of `points` [n, d]. All are of length 1, and nothing is its own neighbour."""
    n = len(points)
    depth = max(0, int(np.ceil(np.log2(max(n / _LEAF, 1)))))
    keys, products = np.empty(0, np.int64), np.empty(0, np.float32)
    for _ in range(N_TREES):
        cuts = torch.from_numpy(random.normal(size=(points.shape[1], depth)).astype(np.float32))
        leaves, asked = _divide(points @ cuts, questions.points @ cuts)
        found = list(_search_leaves(points, leaves, questions, asked, 1 - reach**2 / 2))
        keys = np.concatenate([keys, *(one for one, _ in found)])
        products = np.concatenate([products, *(one for _, one in found)])
        keys, products = _keep_nearest(keys, products, k, questions.n_versions * n)
    owners, rest = np.divmod(keys, questions.n_versions * n)
    return owners, *np.divmod(rest, n)


def _divide(here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """The leaf of each point and of each question, whose projections [n, depth] and [m, depth] are cut one
    after the other."""
    leaves, asked = (torch.zeros(len(rows), dtype=torch.long) for rows in (here, there))
    for level in range(here.shape[1]):
        values = here[:, level].contiguous()
        order = np.lexsort((values.numpy(), leaves.numpy()))
        sizes = torch.bincount(leaves, minlength=2**level)
        medians = values[order][(sizes.cumsum(0) - sizes + sizes // 2).clamp(max=len(values) - 1)]
        leaves = 2 * leaves + (values >= medians[leaves])
        asked = 2 * asked + (there[:, level] >= medians[asked])
    return leaves, asked


def _search_leaves(
    points: Tensor, leaves: Tensor, questions: Questions, asked: Tensor, least: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each leaf the pairs whose product is `least` or more, a question's nearest ones: keys, products."""
    n, n_leaves = len(points), int(leaves.max()) + 1
    order, order_asked = leaves.argsort(), asked.argsort()
    spans, spans_asked = (_find_spans(rows, n_leaves) for rows in (leaves, asked))
    for (begin, end), (first, last) in zip(spans, spans_asked):
        if begin == end or first == last:
            continue
        rows, askers = order[begin:end], order_asked[first:last]
        owners = questions.owners[askers]
        products = questions.points[askers] @ points[rows].T
        products[owners[:, None] == rows] = -2.0
        values, places = products.topk(min(_N_IN_LEAF, end - begin), dim=1)
        near = values >= least
        keys = (owners * questions.n_versions + questions.versions[askers])[:, None] * n + rows[places]
        yield keys[near].numpy(), values[near].numpy()


def _find_spans(rows: Tensor, n_leaves: int) -> list[tuple[int, int]]:
    sizes = torch.bincount(rows, minlength=n_leaves)
    ends = sizes.cumsum(0)
    return list(zip((ends - sizes).tolist(), ends.tolist()))


def _keep_nearest(
    keys: np.ndarray, products: np.ndarray, k: int, per_owner: int
) -> tuple[np.ndarray, np.ndarray]:
    """No pair twice, and the k with the greatest products of each owner."""
    keys, first = np.unique(keys, return_index=True)
    products = products[first]
    owners = keys // per_owner
    order = np.lexsort((-products, owners))
    ranked = owners[order]
    places = np.arange(len(order)) - np.searchsorted(ranked, ranked)
    kept = np.sort(order[places < k])
    return keys[kept], products[kept]
