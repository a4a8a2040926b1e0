"""How images are dealt to shards, and how much-skipped ones move on."""

import pytest
import torch

from memcontrol.config.methods import RedistributionConfig
from memcontrol.training.shards import deal_images, exchange_images

CLASSES = torch.arange(103) % 10


@pytest.mark.parametrize("split", ("random", "balanced", "contiguous", "similar"))
@pytest.mark.parametrize("n_shards", (1, 2, 5, 10))
def test_every_image_has_one_shard_and_sizes_are_even(split, n_shards):
    points = torch.randn(103, 6, generator=torch.Generator().manual_seed(0))
    shards = deal_images(split, n_shards, CLASSES, points, 7)
    assert len(shards) == n_shards and sorted(torch.cat(shards).tolist()) == list(range(103))
    assert max(map(len, shards)) - min(map(len, shards)) <= (1 if split != "similar" else 2)
    again = deal_images(split, n_shards, CLASSES, points, 7)
    assert all(torch.equal(one, other) for one, other in zip(shards, again))


def test_balanced_shards_have_each_class_alike():
    for rows in deal_images("balanced", 4, CLASSES, torch.zeros(103, 1), 0):
        counts = CLASSES[rows].bincount(minlength=10)
        assert counts.max() - counts.min() <= 1


def test_contiguous_shards_are_runs():
    assert [rows.tolist() for rows in deal_images("contiguous", 3, torch.zeros(7), torch.zeros(7, 1), 0)] == [
        [0, 1, 2],
        [3, 4],
        [5, 6],
    ]


def test_similar_shards_are_the_clusters():
    centres = torch.tensor([[0.0, 0.0], [0.0, 9.0], [50.0, 0.0], [50.0, 9.0]])
    cluster = torch.arange(80) % 4
    points = centres[cluster] + torch.randn(80, 2, generator=torch.Generator().manual_seed(0))
    assert all(len(cluster[rows].unique()) == 1 for rows in deal_images("similar", 4, cluster, points, 0))


def test_the_most_skipped_move_to_the_next_shard():
    members = [torch.arange(0, 4), torch.arange(4, 8), torch.arange(8, 12)]
    skips = [torch.zeros(12, dtype=torch.long) for _ in members]
    skips[0][[2, 1]], skips[1][[5, 6]], skips[2][[8, 11]] = (
        torch.tensor([5, 3]),
        torch.tensor([9, 1]),
        torch.tensor([2, 4]),
    )
    found = exchange_images(members, skips, RedistributionConfig(share=0.5), 0)
    assert [set(rows.tolist()) for rows in found] == [{0, 3, 8, 11}, {4, 7, 1, 2}, {9, 10, 5, 6}]
    quarter = exchange_images(members, skips, RedistributionConfig(share=0.25), 0)
    assert [set(rows.tolist()) for rows in quarter] == [{0, 1, 3, 11}, {4, 6, 7, 2}, {8, 9, 10, 5}]


def test_ties_are_broken_by_lot():
    members, skips = [torch.arange(20), torch.arange(20, 40)], [torch.zeros(40, dtype=torch.long)] * 2
    moved = {
        tuple(
            sorted(
                set(exchange_images(members, skips, RedistributionConfig(), seed)[1].tolist())
                - set(range(20, 40))
            )
        )
        for seed in range(20)
    }
    assert len(moved) > 15 and all(len(rows) == 5 for rows in moved)
    assert len({row for rows in moved for row in rows}) == 20


def test_a_random_ring_sends_each_shards_images_to_one_other():
    members, skips = (
        [torch.arange(4 * i, 4 * i + 4) for i in range(5)],
        [torch.zeros(20, dtype=torch.long)] * 5,
    )
    targets = set()
    for seed in range(20):
        found = exchange_images(members, skips, RedistributionConfig(order="random"), seed)
        came_from = [
            [row // 4 for row in rows.tolist() if row // 4 != shard] for shard, rows in enumerate(found)
        ]
        assert all(len(rows) == 4 for rows in found) and sorted(sum(came_from, [])) == [0, 1, 2, 3, 4]
        targets.add(tuple(map(tuple, came_from)))
    assert len(targets) > 5


def test_a_shard_never_gives_its_last_image_away():
    found = exchange_images(
        [torch.tensor([0]), torch.tensor([1, 2])],
        [torch.tensor([1, 0, 0])] * 2,
        RedistributionConfig(share=1.0),
        0,
    )
    assert sorted(map(len, found)) == [1, 2]
