"""Maps of where two models differ: on denoisers that differ in a known place, and over pairs in pictures."""

import numpy as np
import pytest
import torch

from memcontrol.config.inner import InnerConfig
from memcontrol.config.rewards import RewardsConfig
from memcontrol.training.maps import (
    compare_predictions,
    count_map_passes,
    find_regions,
    frame_regions,
    list_shifts,
    may_map,
    predict_shifted,
)
from memcontrol.trial.pictures import tint_images


@pytest.fixture
def pictures():
    cells = np.random.default_rng(0).integers(0, 256, (3, 3, 4, 4), dtype=np.uint8)
    return np.kron(cells, np.ones((1, 1, 8, 8), np.uint8))  # [3, 3, 32, 32]


def test_a_region_is_found_where_predictions_differ(base):
    """Of latents of 4 pixels, moved by half a latent down and right: what differs moves with the image."""
    before = torch.zeros(len(list_shifts(base)), 4, 2, 4, 8, 8)
    after = before.clone()
    for s, (down, right) in enumerate(list_shifts(base)):
        # pixels 8 to 20 from above and 12 to 24 from the left, and moved
        for y in range(8):
            for x in range(8):
                inside = min(4 * y + 4, 20 + down) - max(4 * y, 8 + down)
                across = min(4 * x + 4, 24 + right) - max(4 * x, 12 + right)
                after[s, :, 1, :, y, x] = (max(inside, 0) * max(across, 0) / 16) ** 0.5
    maps = compare_predictions(base, before, after, 32)
    assert maps.shape == (2, 32, 32) and (maps[0] == 0).all()
    expected = np.zeros((32, 32), bool)
    expected[8:20, 12:24] = True
    region = find_regions(maps)[1]
    assert (region & expected).sum() / (region | expected).sum() > 0.8
    assert np.abs(np.array(frame_regions(maps)[1]) - [12 / 32, 8 / 32, 24 / 32, 20 / 32]).max() < 0.05
    assert frame_regions(maps)[0] == [0, 0, 1, 1]  # nothing differs


def test_predictions_are_the_denoisers_on_moved_images(base, pictures):
    text = base.encode_captions(["a digit"] * 3)
    found = predict_shifted(base, pictures, text, 5)
    assert list_shifts(base) == [(0, 0), (0, 2), (2, 0), (2, 2)]
    assert found.shape == (4, 4, 3, 4, 8, 8)
    assert torch.equal(found, predict_shifted(base, pictures, text, 5))
    moved = np.pad(pictures, ((0, 0), (0, 0), (2, 0), (2, 0)), "edge")[..., :32, :32]
    assert torch.equal(found[3], predict_shifted(base, moved, text, 5)[0])
    assert not torch.equal(found[3], found[0])


def test_maps_are_a_small_part_of_a_trial_or_left_out(base):
    assert count_map_passes(base, 12) == 2 * 12 * 4 * 4
    rewards = RewardsConfig(n_samples=256, sampling_steps=8, guidance=2.0)
    assert may_map(base, InnerConfig(budget_images=7360), rewards, 12)
    assert not may_map(base, InnerConfig(budget_images=3200), rewards, 12)


def test_images_are_tinted_where_the_map_is_large(pictures):
    maps = np.zeros((3, 16, 16), np.float32)  # half the images' side
    maps[1, 4:8, 4:8] = 2.0
    tinted = tint_images(pictures, maps)
    greys = pictures.mean(axis=1).round().astype(np.uint8)
    assert np.abs(tinted[0].astype(int) - greys[0]).max() <= 1
    inner = tinted[1][:, 10:14, 10:14].astype(int)
    assert (inner[0] - inner[1]).min() > 100
