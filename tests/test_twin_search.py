"""The search for twins against brute force and least squares, and what it takes for one: other shapes, people
seen again, plain images."""

from collections import Counter

import numpy as np
import torch
from PIL import Image
from test_twins import draw as draw_smooth
from test_twins import find

from memcontrol.data.neighbour_trees import Questions, find_neighbours
from memcontrol.data.registration import measure_unlikeness
from memcontrol.data.twins import choose_threshold


def make_field(seed, side=128):
    """A smooth random picture in 0..1, [side, side]."""
    random = np.random.default_rng(seed)
    layers = (
        weight
        * np.asarray(
            Image.fromarray(random.normal(size=(n, n)).astype("f4")).resize(
                (side, side), Image.Resampling.BICUBIC
            )
        )
        for n, weight in ((3, 1.0), (6, 0.7), (12, 0.5), (24, 0.3))
    )
    field = sum(layers)
    return (field - field.min()) / (field.max() - field.min())


def draw(levels):
    return Image.fromarray(np.round(255 * np.clip(levels, 0, 1)).astype(np.uint8)).convert("RGB")


def study(person, number):
    """One person's picture, moved, in other light, and with what changed since."""
    random = np.random.default_rng([person, number])
    dx, dy = random.integers(-5, 6, 2)
    seen = make_field(person, 160)[16 + dy : 144 + dy, 16 + dx : 144 + dx]
    changed = 0.08 * (make_field(90_000 + 100 * person + number) - 0.5)
    return draw(seen * (1 + 0.08 * random.normal()) + 0.04 * random.normal() + changed)


def crop(image):
    width, height = image.size
    return image.crop([round(v) for v in (0.03 * width, 0.01 * height, 0.97 * width, 0.95 * height)])


PICTURES = [draw_smooth(seed).convert("RGB") for seed in range(160)]


def test_a_changed_image_of_another_shape_is_found():
    wide = [
        Image.fromarray(np.pad(np.asarray(image), ((0, 0), (30, 30), (0, 0)), mode="reflect"))
        for image in PICTURES[:40]
    ]
    images = [
        *wide,
        *(image.resize((94, 64)) for image in wide[:6]),
        *(image.rotate(90, expand=True) for image in wide[6:9]),
    ]
    assert set(find(images).pairs) == {(i, 40 + i) for i in range(9)}


def test_strangers_and_siblings_are_no_twins():
    assert not find(PICTURES).pairs
    studies = [study(person, number) for person in range(40) for number in range(4)]
    assert not find(studies).pairs
    twin = crop(study(3, 1))
    (pair,) = find([*studies, twin]).pairs
    assert pair == (13, 160)


def test_plain_images_are_left_out_of_it():
    random = np.random.default_rng(0)
    black = [draw(np.abs(random.normal(size=(64, 64)) * 0.004)) for _ in range(30)]
    slopes = [draw(np.linspace(a, b, 64)[None] * np.ones((64, 1))) for a, b in random.uniform(0, 1, (30, 2))]
    found = find([*PICTURES[:60], *black, *slopes])
    assert not found.pairs and found.n_plain == 60 and found.n_compared == 60
    assert not find(black).pairs and not find(PICTURES[:1]).pairs


def test_the_trees_find_what_brute_force_finds():
    random = np.random.default_rng(0)
    points = random.normal(size=(3000, 20)).astype(np.float32)
    points[1500:1600] = points[:100] + 0.1 * random.normal(size=(100, 20)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    rows = torch.arange(3000)
    questions = Questions(torch.from_numpy(points), rows, torch.zeros(3000, dtype=torch.long), 1)
    owners, versions, others = find_neighbours(torch.from_numpy(points), questions, 3, 0.5, random)
    found = set(zip(owners.tolist(), others.tolist()))
    apart = np.sqrt(np.maximum(2 - 2 * points.astype(float) @ points.T.astype(float), 0))
    np.fill_diagonal(apart, 9)
    near = {(i, j) for i, j in zip(*np.nonzero(apart < 0.5)) if (apart[i] < apart[i, j]).sum() < 3}
    assert len(found & near) >= 0.97 * len(near) > 150
    assert all(apart[pair] <= 0.5 + 1e-3 for pair in found) and not versions.any()
    assert max(Counter(owners.tolist()).values()) <= 3


def test_the_measure_is_one_less_the_square_of_a_correlation_without_slopes():
    """By ordinary least squares on a picture that is not moved."""
    random = np.random.default_rng(0)
    left = random.uniform(0, 1, (32, 32))
    right = 0.6 * left + 0.2 + 0.3 * np.linspace(0, 1, 32) + 0.1 * random.uniform(0, 1, (32, 32))
    x = np.linspace(-1, 1, 32)
    slopes = np.stack([np.ones((32, 32)), x * np.ones((32, 1)), x[:, None] * np.ones(32)], -1).reshape(-1, 3)
    rests = [y.ravel() - slopes @ np.linalg.lstsq(slopes, y.ravel(), rcond=None)[0] for y in (left, right)]
    wanted = np.sqrt(1 - np.corrcoef(*rests)[0, 1] ** 2)
    pair = [torch.from_numpy(y).float().expand(1, 3, 32, 32) for y in (left, right)]
    assert wanted * 0.9 <= float(measure_unlikeness(*pair)) <= wanted + 1e-4


def test_the_threshold_lies_below_strangers_and_little_above_what_changes_reach():
    random = np.random.default_rng(0)
    twins = random.uniform(0, 0.1, 50)
    assert choose_threshold(twins, 0.1) == choose_threshold(np.append(twins, 0.5), 0.1) == 0.125
    strangers = 0.6 * random.uniform(0, 1, 2000) ** (1 / 10)  # as a ball of ten dimensions has them
    assert choose_threshold(np.append(twins, strangers), 0.1) == 0.125
    limit = choose_threshold(np.append(twins, strangers), 0.4)
    assert 0.1 < limit < 0.4 and (strangers <= limit).mean() < 0.005
    assert choose_threshold(np.empty(0), 0.2) == 0.25


def test_noise_is_no_twin_of_other_noise():
    """Of which nothing is left in common with itself once it is resized."""
    draws = (np.random.default_rng(i).integers(0, 255, (24, 24, 3), dtype=np.uint8) for i in range(40))
    assert not find([Image.fromarray(pixels) for pixels in draws]).pairs
