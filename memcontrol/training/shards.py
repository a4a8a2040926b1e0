"""Owns which shard has which images: how the training set is dealt, and how much-skipped images move on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memcontrol.config.methods import RedistributionConfig
from memcontrol.core.seeds import derive_seed


def deal_images(
    split: str, n_shards: int, classes: Tensor, points: Tensor, seed: int, groups: Tensor | None = None
) -> list[Tensor]:
    """Image numbers of each shard, disjoint, none left out, sizes as equal as can be. A group, of the group
    numbers [N], is never in two; there must be as many as shards.

    `random`; `contiguous` in the given order; `balanced` spreads each of `classes` [N] evenly; `similar`
    keeps like with like: halves along the first principal direction of `points` [N, D], again and again.
    """
    if groups is not None and n_shards > 1:
        return _deal_groups(split, n_shards, classes, points, seed, groups)
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


def _deal_groups(
    split: str, n_shards: int, classes: Tensor, points: Tensor, seed: int, groups: Tensor
) -> list[Tensor]:
    """As `deal_images`, where what is dealt are groups, each as large as it is."""
    _, numbers, sizes = groups.unique(return_inverse=True, return_counts=True)
    n = len(sizes)
    if split == "contiguous":
        place = torch.full((n,), len(groups)).scatter_reduce(0, numbers, torch.arange(len(groups)), "amin")
        dealt = _cut_in_order(place.argsort(), sizes, n_shards)
    elif split == "similar":
        sums = torch.zeros(n, points.shape[1], dtype=torch.double).index_add(0, numbers, points.double())
        dealt = _split_similar(torch.arange(n), sums / sizes[:, None], n_shards, sizes)
    else:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed(seed, "deal")))
        kinds = [0] * n
        if split == "balanced":
            of_groups = classes[numbers.argsort(stable=True)].split(sizes.tolist())
            kinds = [int(found.mode().values) for found in of_groups]
        dealt = _deal_largest_first(order, sizes, kinds, n_shards)
    return [torch.isin(numbers, chosen).nonzero().flatten() for chosen in dealt]


def _deal_largest_first(order: Tensor, sizes: Tensor, kinds: Sequence[int], n_shards: int) -> list[Tensor]:
    """Group after group, the largest first, to the shard with the fewest images of its kind, and of those the
    one with the fewest images."""
    dealt: list[list[int]] = [[] for _ in range(n_shards)]
    held, of_kind = [0] * n_shards, [dict.fromkeys(kinds, 0) for _ in range(n_shards)]
    for group in order[sizes[order].argsort(descending=True, stable=True)].tolist():
        # one that has none comes first: no shard stays empty
        ranks = [(held[s] > 0, of_kind[s][kinds[group]], held[s], s) for s in range(n_shards)]
        shard = min(ranks)[-1]
        dealt[shard].append(group)
        held[shard] += int(sizes[group])
        of_kind[shard][kinds[group]] += int(sizes[group])
    return [torch.tensor(chosen) for chosen in dealt]


def _cut_in_order(order: Tensor, sizes: Tensor, n_shards: int) -> list[Tensor]:
    """Runs of groups, cut where the images are most evenly divided."""
    if n_shards == 1:
        return [order]
    cut = _find_cut(sizes[order], 1, n_shards)
    return [order[:cut], *_cut_in_order(order[cut:], sizes, n_shards - 1)]


def _find_cut(sizes: Tensor, n_low: int, n_shards: int) -> int:
    """How many of the units, in order, come nearest to n_low of n_shards equal parts, with one unit at least
    for each part on either side."""
    wanted = round(int(sizes.sum()) * n_low / n_shards)
    nearest = int((sizes.cumsum(0) - wanted).abs().argmin()) + 1
    return min(max(nearest, n_low), len(sizes) - (n_shards - n_low))


def _split_similar(rows: Tensor, points: Tensor, n_shards: int, sizes: Tensor | None = None) -> list[Tensor]:
    """`sizes`: how many images each of the points [N, D] stands for; one where it is not given."""
    if n_shards == 1:
        return [rows.sort().values]
    sizes = torch.ones(len(points), dtype=torch.long) if sizes is None else sizes
    centred = points[rows] - points[rows].mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    along = rows[(centred @ directions[0]).argsort(stable=True)]
    n_low = n_shards // 2
    cut = _find_cut(sizes[along], n_low, n_shards)
    low, high = along[:cut], along[cut:]
    return _split_similar(low, points, n_low, sizes) + _split_similar(high, points, n_shards - n_low, sizes)


def exchange_images(
    members: Sequence[Tensor],
    skips: Sequence[Tensor],
    rule: RedistributionConfig,
    seed: int,
    groups: Tensor | None = None,
) -> list[Tensor]:
    """Image numbers of each shard after every shard's most skipped share has moved to the next one in the
    ring.

    IET-AGC+ (arXiv 2502.09434). `skips` [N] counts, for each shard, how often it skipped each image since the
    last exchange. Moves are simultaneous, so sizes that are equal stay equal, and ties are broken by lot, not
    by position. By group numbers [N], whole groups move, those whose images were skipped most often on the
    average, as many as fit into the share.
    """
    k = len(members)
    ring = (
        torch.randperm(k, generator=torch.Generator().manual_seed(derive_seed(seed, "ring"))).tolist()
        if rule.order == "random"
        else list(range(k))
    )
    stay, leave = zip(
        *(
            _divide_rows(rows, counts, rule.share, derive_seed(seed, "ties", s), groups)
            for s, (rows, counts) in enumerate(zip(members, skips))
        )
    )
    found = list(stay)
    for place, shard in enumerate(ring):
        following = ring[(place + 1) % k]
        found[following] = torch.cat([found[following], leave[shard]])
    return found


def _divide_rows(
    rows: Tensor, counts: Tensor, share: float, seed: int, groups: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows that stay and rows that leave: the most skipped int(share n), at least one staying."""
    n_leave = min(int(len(rows) * share), len(rows) - 1)
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    if groups is None:
        leave = shuffled[counts[shuffled].argsort(descending=True, stable=True)[:n_leave]]
    else:
        leave = _take_groups(shuffled, counts, n_leave, groups)
    return rows[~torch.isin(rows, leave)], leave


def _take_groups(rows: Tensor, counts: Tensor, n_most: int, groups: Tensor) -> Tensor:
    """The rows of the most skipped groups that are no more than `n_most` together; of equal ones those that
    come first in `rows`."""
    seen: dict[int, list[int]] = {}
    for row in rows.tolist():
        seen.setdefault(int(groups[row]), []).append(row)
    taken: list[int] = []
    for group in sorted(seen, key=lambda group: -float(counts[seen[group]].double().mean())):
        if len(taken) + len(seen[group]) <= n_most:
            taken += seen[group]
    return torch.tensor(taken, dtype=rows.dtype)
