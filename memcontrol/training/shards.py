"""Owns which shard has which images: how the training set is dealt, and how much-skipped images move on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memcontrol.core.config import RedistributionConfig
from memcontrol.core.seeds import derive_seed


def deal_images(split: str, n_shards: int, classes: Tensor, points: Tensor, seed: int) -> list[Tensor]:
    """Image numbers of each shard, disjoint, none left out, sizes as equal as can be.

    `random`; `contiguous` in the given order; `balanced` spreads each of `classes` [N] evenly; `similar`
    keeps like with like: halves along the first principal direction of `points` [N, D], again and again.
    """
    n = len(classes)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed(seed, "deal")))
    if n_shards == 1 or split == "contiguous":
        return list(torch.arange(n).tensor_split(n_shards))
    if split == "balanced":
        by_class = order[classes[order].argsort(stable=True)]
        return [by_class[shard::n_shards].sort().values for shard in range(n_shards)]
    if split == "similar":
        return _split_similar(torch.arange(n), points.double(), n_shards)
    return [rows.sort().values for rows in order.tensor_split(n_shards)]


def _split_similar(rows: Tensor, points: Tensor, n_shards: int) -> list[Tensor]:
    if n_shards == 1:
        return [rows.sort().values]
    centred = points[rows] - points[rows].mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    along = rows[(centred @ directions[0]).argsort(stable=True)]
    n_low = n_shards // 2
    cut = round(len(rows) * n_low / n_shards)
    return _split_similar(along[:cut], points, n_low) + _split_similar(along[cut:], points, n_shards - n_low)


def exchange_images(
    members: Sequence[Tensor], skips: Sequence[Tensor], rule: RedistributionConfig, seed: int
) -> list[Tensor]:
    """Image numbers of each shard after every shard's most skipped share has moved to the next one in the
    ring.

    IET-AGC+ (arXiv 2502.09434). `skips` [N] counts, for each shard, how often it skipped each image since the
    last exchange. Moves are simultaneous, so sizes that are equal stay equal, and ties are broken by lot, not
    by position.
    """
    k = len(members)
    ring = (
        torch.randperm(k, generator=torch.Generator().manual_seed(derive_seed(seed, "ring"))).tolist()
        if rule.order == "random"
        else list(range(k))
    )
    stay, leave = zip(
        *(
            _divide_rows(rows, counts, rule.share, derive_seed(seed, "ties", s))
            for s, (rows, counts) in enumerate(zip(members, skips))
        )
    )
    found = list(stay)
    for place, shard in enumerate(ring):
        following = ring[(place + 1) % k]
        found[following] = torch.cat([found[following], leave[shard]])
    return found


def _divide_rows(rows: Tensor, counts: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows that stay and rows that leave: the most skipped int(share n), at least one staying."""
    n_leave = min(int(len(rows) * share), len(rows) - 1)
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    leave = shuffled[counts[shuffled].argsort(descending=True, stable=True)[:n_leave]]
    return rows[~torch.isin(rows, leave)], leave
