"""Images that are moved, and parts of images, compared by loops written from the definitions."""

import math

import numpy as np
import pytest
import torch

from memcontrol.core.errors import MemControlError
from memcontrol.scoring import local, moved
from memcontrol.scoring.copying import find_suspects, line_ratio, measure_copy_rate, measure_swapped_rate
from memcontrol.scoring.evidence import COPY_RATES, DESCRIPTORS, Descriptors, Evidence
from memcontrol.scoring.local import LocalSpace, average_cells
from memcontrol.scoring.measures import combine_copy_rates, measure_copies
from memcontrol.scoring.moved import MovedSpace, nearest_moved

LOCAL, CELLS = local._WINDOW, local._N_CELLS


def paint(n, seed):
    """Smooth random images, float32 [n, 3, 32, 32] in 0..1."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32] / 32
    waves = np.zeros((n, 3, 32, 32))
    for _ in range(8):
        a, b, phase = (rng.normal(0, 9, (n, 3, 1, 1)) for _ in range(3))
        waves += np.sin(a * x + b * y + phase)
    return ((waves / 8 + 1) / 2).clip(0, 1).astype(np.float32)


def flatten(images):
    return np.ascontiguousarray(images, np.float32).reshape(len(images), -1)


def make_evidence(generated, train, holdout, **more):
    return Evidence(
        *(Descriptors(flatten(part), flatten(part)[:, ::97]) for part in (generated, train, holdout)), **more
    )


def look_at_crop(image, top, left):
    """Means of cells of a crop [3, H, W], normalised, by loops."""
    side, cell = 32 - 2 * moved._EDGE, moved._MOVED_CELL
    crop = image[:, top : top + side, left : left + side].astype(float)
    n = side // cell
    cells = np.zeros((n, n))
    for row in range(n):
        for column in range(n):
            square = crop[:, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
            cells[row, column] = square.mean()
    cells -= cells.mean()
    return cells / max(cells.std(), moved._LEAST_SPREAD)


def test_moved_distances_are_those_of_all_versions_by_hand():
    queries, references = paint(5, 1), paint(7, 2)
    queries[0] = 0.5  # flat
    found, rows = nearest_moved(flatten(queries), flatten(references), 7)
    for i, query in enumerate(queries):
        apart = []
        for reference in references:
            centre = look_at_crop(reference, moved._EDGE, moved._EDGE)
            apart.append(
                min(
                    np.linalg.norm(np.rot90(version, turns) - centre)
                    for top in range(2 * moved._EDGE + 1)
                    for left in range(2 * moved._EDGE + 1)
                    for crop in [look_at_crop(query, top, left)]
                    for version in (crop, crop[:, ::-1])
                    for turns in range(4)
                )
            )
        assert found[i] == pytest.approx(np.sort(apart), rel=1e-4)
        assert np.array(apart)[rows[i]] == pytest.approx(np.sort(apart), rel=1e-4)


MOVES = {
    "shifted": lambda images: np.pad(images, ((0, 0), (0, 0), (2, 0), (0, 2)), "edge")[:, :, :32, 2:],
    "mirrored": lambda images: images[..., ::-1],
    "turned": lambda images: np.rot90(images, 1, (2, 3)),
    "upside down": lambda images: images[:, :, ::-1],
    "darker": lambda images: 0.6 * images,
    "flatter": lambda images: 0.5 * images + 0.3,
    "all of it": lambda images: 0.7 * np.rot90(MOVES["shifted"](images), 3, (2, 3))[..., ::-1] + 0.1,
}


@pytest.mark.parametrize("kind", MOVES)
def test_moved_copies_are_seen(kind):
    train, holdout, generated = paint(60, 1), paint(60, 2), paint(100, 3)
    generated[:20] = MOVES[kind](train[:20])
    evidence = make_evidence(generated, train, holdout)
    rewards = measure_copies(evidence)
    assert float(rewards["copy_rate_moved"]) == pytest.approx(0.2, abs=0.05)
    assert float(rewards["copy_rate_moved_swapped"]) < 0.1 and rewards["copying"].p < 0.01
    assert (evidence.space("moved").to_train[1][:20] == np.arange(20)).all()
    assert evidence.suspects.is_copy[:20].all()


def cut(cells, top, left):
    """A window of cells [768] less its mean colour."""
    window = cells.reshape(3, CELLS, CELLS)[:, top : top + LOCAL, left : left + LOCAL].astype(float)
    return window - window.mean((1, 2), keepdims=True)


def compare_windows(query, train, holdout):
    """d_T / d_H of each window, by loops."""
    floor = local._GREY_FLOOR * math.sqrt(3 * LOCAL**2)

    def nearest(references, top, left):
        own = cut(query, top, left)
        return max(floor, min(np.linalg.norm(own - cut(one, top, left)) for one in references))

    return np.array([nearest(train, *corner) / nearest(holdout, *corner) for corner in local.CORNERS])


def make_local(generated, train, holdout, *more):
    return LocalSpace(*((average_cells(flatten(part)),) for part in (generated, train, holdout)), *more)


def test_cells_are_means():
    images = paint(2, 1)
    edge = local._LOCAL_CELL
    means = images.reshape(2, 3, CELLS, edge, CELLS, edge).mean((3, 5))
    assert average_cells(flatten(images)) == pytest.approx(means.reshape(2, -1), abs=1e-6)


def test_local_ratios_are_the_least_of_all_windows_by_hand():
    space = make_local(paint(6, 1), paint(9, 2), paint(8, 3))
    for i in range(6):
        r = compare_windows(space.generated[0][i], space.train[0], space.holdout[0])
        assert space.ratios[i] == pytest.approx(r.min(), rel=1e-4)
        assert space.swapped_ratios[i] == pytest.approx((1 / r).min(), rel=1e-4)
        top, left = local.CORNERS[r.argmin()]
        where = np.array([left, top, left + LOCAL, top + LOCAL]) / CELLS
        assert space.regions[i] == pytest.approx(where)
        apart = [
            np.linalg.norm(cut(space.generated[0][i], top, left) - cut(one, top, left))
            for one in space.train[0]
        ]
        assert space.to_train[1][i] == np.argmin(apart)
        assert space.to_train[0][i] / space.to_holdout[0][i] == pytest.approx(space.ratios[i])


def test_local_ratios_of_real_images_leave_out_their_own_group():
    train, holdout = paint(12, 1), paint(9, 2)
    people = [f"t{i // 2}" for i in range(12)], [f"h{i // 3}" for i in range(9)]
    space = make_local(paint(2, 3), train, holdout, None, *people)
    for i in range(9):
        others = [j for j in range(9) if j // 3 != i // 3]
        r = compare_windows(space.holdout[0][i], space.train[0], space.holdout[0][others])
        assert space.real_ratios[i] == pytest.approx(r.min(), rel=1e-4)
    for row, found in zip(space.choose_swapped(), space.swapped_real_ratios):
        others = [j for j in range(12) if j // 2 != row // 2]
        r = compare_windows(space.train[0][row], space.train[0][others], space.holdout[0])
        assert found == pytest.approx((1 / r).min(), rel=1e-4)
    alone = make_local(paint(2, 3), train, holdout, None, None, ["h"] * 9)
    with pytest.raises(MemControlError, match="all 9 images of one side are of one group"):
        alone.real_ratios  # noqa: B018


def test_local_ratios_of_calibration_images():
    third = paint(8, 4)
    space = make_local(paint(2, 3), paint(12, 1), paint(9, 2), (average_cells(flatten(third)),))
    r = [compare_windows(one, space.train[0], space.holdout[0]) for one in space.calibration[0]]
    assert space.real_ratios == pytest.approx([one.min() for one in r], rel=1e-4)
    assert space.swapped_real_ratios == pytest.approx([(1 / one).min() for one in r], rel=1e-4)
    held, trained = next(space.iterate_relabelled_real())
    assert held == pytest.approx(space.real_ratios, rel=1e-4)
    assert trained == pytest.approx(space.swapped_real_ratios, rel=1e-4)


def test_the_local_statistic_under_permuted_labels_is_what_the_sets_themselves_give():
    generated, real = paint(30, 1), paint(44, 2)
    generated[:4, :, 8:24, 8:24] = real[:4, :, 8:24, 8:24]
    people = [f"p{i // 2}" for i in range(44)]
    space = make_local(generated, real[:20], real[20:], None, people[:20], people[20:])
    labels = measure_copy_rate(space).labels
    pool, groups = space.pool[0], space.labels.groups
    for number in (0, 3, 400):
        sides = space.labels.sides[number]
        made = [compare_windows(one, pool[sides], pool[~sides]) for one in space.generated[0]]
        real_r = [
            compare_windows(
                pool[i], pool[sides & (groups != groups[i])], pool[~sides & (groups != groups[i])]
            )
            for i in range(44)
        ]
        line = line_ratio(np.array([r.min() for r, is_train in zip(real_r, sides) if not is_train]))
        other = line_ratio(np.array([(1 / r).min() for r, is_train in zip(real_r, sides) if is_train]))
        hits = np.mean([r.min() < line for r in made]) - np.mean([(1 / r).min() < other for r in made])
        assert labels[number] == pytest.approx(hits, abs=1e-9)
    assert labels[0] == pytest.approx(
        float(measure_copy_rate(space)) - float(measure_swapped_rate(space)), abs=1e-9
    )


@pytest.mark.parametrize("k", [12, 60])
@pytest.mark.parametrize("n_trained", [3, 30, 56])
def test_ratios_under_labels_are_of_the_nearest_of_each_side_by_hand(n_trained, k):
    """With ties, and references of a query's own group; the k-th neighbour stands for a side that is farther.
    Whether the side with fewer is looked through as a whole or met on the way from neighbour to neighbour."""
    rng = np.random.default_rng(k)
    apart = torch.from_numpy(rng.integers(1, 40, (25, 60)).astype(np.float32))
    apart[rng.random(apart.shape) < 0.1] = torch.inf
    sides = np.array([rng.permutation(60) < n_trained for _ in range(20)])
    near = apart.topk(k, dim=1, largest=False)
    expected = np.empty((25, 20))
    for i, row in enumerate(apart.numpy()):
        last = near.values[i][torch.isfinite(near.values[i])].max()
        for j, side in enumerate(sides):
            to_train, to_holdout = (min(row[one].min(), last) for one in (side, ~side))
            expected[i, j] = to_train / to_holdout
    few = local.list_few(sides)
    for to_few in (None, local.find_least_among(apart, few)):
        found = local.split_labels(near.values.numpy(), near.indices.numpy(), sides.T, to_few)
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_side_that_is_empty_under_some_label_is_not_looked_through():
    assert local.list_few(np.array([[True, False, False], [False, False, False]])) is None
    assert [
        list(rows) for rows in local.list_few(np.array([[True, False, False], [False, False, True]]))
    ] == [[0], [2]]


def test_blocks_give_what_all_at_once_gives(monkeypatch):
    queries, references = flatten(paint(20, 1)), flatten(paint(30, 2))
    space = make_local(paint(20, 1), paint(30, 2), paint(25, 3))
    whole = nearest_moved(queries, references, 4), space.least_windows
    monkeypatch.setattr(moved, "_DISTANCES_AT_ONCE", 90)
    monkeypatch.setattr(local, "_MOST_DISTANCES", 90)
    parts = nearest_moved(queries, references, 4), make_local(paint(20, 1), paint(30, 2), paint(25, 3))
    assert parts[0][0] == pytest.approx(whole[0][0], rel=1e-4) and (parts[0][1] == whole[0][1]).all()
    assert parts[1].ratios == pytest.approx(whole[1].ratios, rel=1e-4)


@pytest.mark.parametrize("side", (16, 20))
def test_parts_on_a_new_background_are_seen_and_shown(side):
    train, holdout, generated = paint(60, 1), paint(60, 2), paint(100, 3)
    place = slice(7, 7 + side), slice(9, 9 + side)
    generated[:20, :, *place] = train[:20, :, *place]
    evidence = make_evidence(generated, train, holdout)
    rewards = measure_copies(evidence)
    assert float(rewards["local_copy_rate"]) == pytest.approx(0.2, abs=0.05)
    assert float(rewards["local_copy_rate_swapped"]) < 0.1 and rewards["copying"].p < 0.01
    found = evidence.suspects
    assert found.is_copy[:20].all() and (found.training[:20] == np.arange(20)).mean() > 0.9
    by_part = found.descriptors[:20] == DESCRIPTORS.index("local")
    left, top, right, bottom = (32 * found.regions[:20][by_part]).T
    assert by_part.mean() > 0.9
    assert (
        (left >= 7).all()
        and (right <= 9 + side + 2).all()
        and (top >= 5).all()
        and (bottom <= 9 + side).all()
    )


@pytest.mark.parametrize("value", (0.0, 1.0))
def test_borders_that_images_share_accuse_nobody(value):
    """Black borders and white paddings of some widths, as training and held-out images have them."""
    found = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        sets = [paint(n, 10 * seed + i) for i, n in enumerate((60, 60, 60))]
        for images in sets:
            for image in images:
                width = rng.integers(0, 4) * 3
                image[:, :, :width] = image[:, :, 32 - width :] = value
        found.append(measure_copies(make_evidence(*sets)))
    assert np.mean([one["copying"].p < 0.05 for one in found]) <= 0.2
    assert np.mean([float(one["local_copy_rate"]) for one in found]) < 0.06
    assert not any(float(one["clear_copy_rate"]) for one in found)


def test_flat_images_are_as_near_to_either_side():
    flat = np.full((30, 3, 32, 32), 0.4, np.float32)
    space = make_local(flat, flat, flat)
    assert (space.ratios == 1).all() and (space.real_ratios == 1).all()
    assert (MovedSpace(*((flatten(flat),) for _ in range(3))).ratios == 1).all()


def test_copying_is_the_largest_excess_of_all_descriptors():
    train, holdout, generated = paint(60, 1), paint(60, 2), paint(100, 3)
    generated[:30, :, 8:24, 8:24] = train[:30, :, 8:24, 8:24]
    rewards = measure_copies(make_evidence(generated, train, holdout))
    excess = {name: float(rewards[name]) - float(rewards[f"{name}_swapped"]) for name in COPY_RATES.values()}
    assert rewards["copying"].value == max(excess.values()) == excess["local_copy_rate"]
    assert combine_copy_rates(rewards).p == rewards["copying"].p


def test_suspects_of_whole_images_are_compared_as_wholes():
    space = MovedSpace(*((flatten(paint(n, n)),) for n in (20, 21, 22)))
    assert (find_suspects([space], 20).regions == [0, 0, 1, 1]).all()
