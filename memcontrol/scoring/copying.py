"""Owns the rewards of memorization and copying: pure functions of feature matrices [n, d], numpy or torch.

Every value is an Estimate, which knows its error or interval. Distances are Euclidean, sums are float64.

Notations

N, T, H: Numbers of generated, training and held-out images; D: dimensions of their features.
d_1 .. d_k: Distances of one image to its k nearest training images, rising.
d_T, d_H: Distances of the generated images to the nearest training and to the nearest held-out one, [N].
r = d_T / d_H: What tells copies; far below 1 where an image is nearer to what was trained on.
real: The same of the held-out images, each left out of its own reference, [H].
line: The ratio that 99 % of real images exceed: of `real`, the one of rank 1 + int(0.01 (H - 1)).
M = mean log(d_H / d_T): The memorization distance, each term clipped to +-log 4.
m: Rows that are drawn of either reference for M, min(T, H).
K: Neighbours that are kept for the null of M, N_NEIGHBOURS.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from memcontrol.core.estimate import Estimate, beta_binomial_p, convert_to_percent, estimate_share
from memcontrol.core.reward_table import CLIP, FALSE_POSITIVES
from memcontrol.core.seeds import derive_seed
from memcontrol.data.features import (
    check_matrix,
    nearest,
    nearest_others,
    pairwise_distances,
    refuse_unlike_widths,
)

_N_PERMUTATIONS = 400
_N_NEIGHBOURS = 96
_N_REFERENCE_DRAWS = 5
_TRAIN, _HOLDOUT = 1, 2

# Thresholds as published: MQ's of squared distances, Carlini's alpha, the extraction attack's tile distance
# (224 pixels, 0..1).
PRESETS: dict[str, dict[str, Any]] = {
    "iet-agc": {"mq": 0.5, "mq_neighbours": 50},
    "carlini2023": {"alpha": 0.5, "neighbours": 50},
    "memcontrol2025": {"tile_distance": 20.0, "component": 3, "mifid_threshold": 0.1},
}


def authpct(generated, train) -> Estimate:
    """Per cent of generated points that are farther from their nearest training point than that one from its
    own nearest other (Alaa et al. 2022, arXiv 2102.08921). Real images reach some 70, not 100: read it beside
    the held-out images' value."""
    g, t = check_matrix(generated, "generated", dtype=None), check_matrix(train, "train", 2, dtype=None)
    refuse_unlike_widths(g, t)
    d, nearest_rows = _take_first(*nearest(g, t))  # [N] both
    rows, places = np.unique(nearest_rows, return_inverse=True)
    own = nearest_others(t, 1, rows)[places, 0]  # [N], of each image's nearest training point
    return convert_to_percent(estimate_share(own < d))


def mq(
    generated,
    train,
    threshold: float = PRESETS["iet-agc"]["mq"],
    k: int = PRESETS["iet-agc"]["mq_neighbours"],
) -> int:
    """IET-AGC's MQ: how many generated images have d1 / mean(d1 .. dk) below the threshold (arXiv
    2407.15328).

    d1 .. dk are squared distances of an image to its k nearest training images, the nearest included; in
    pixels of 0..1 as published. Squares make 0.5 an ordinary distance ratio of some 0.7.
    """
    squares = _measure_distances(generated, train, k) ** 2  # [N, k]
    ratios = squares[:, 0] / np.maximum(squares.mean(1), 1e-300)
    return int((ratios < threshold).sum())


def _measure_distances(generated, train, k: int) -> np.ndarray:
    """Of each generated image to its k nearest training images, or to all of them where there are fewer: [N,
    k]."""
    g, t = check_matrix(generated, "generated", dtype=None), check_matrix(train, "train", 2, dtype=None)
    refuse_unlike_widths(g, t)
    return nearest(g, t, k)[0]


def carlini_rate(
    generated,
    train,
    k: int = PRESETS["carlini2023"]["neighbours"],
    alpha: float = PRESETS["carlini2023"]["alpha"],
) -> Estimate:
    """The share of images with d1 < alpha mean(d1 .. dk), distances to the k nearest training images (Carlini
    et al. 2023, arXiv 2301.13188, section 5). Needs many more training images than k."""
    d = _measure_distances(generated, train, k)  # [N, k]
    return estimate_share(d[:, 0] < alpha * d.mean(1))


def tile_distances(images, n_tiles: int = 4) -> np.ndarray:
    """For images [m, C, H, W] in 0..1, the largest root mean square difference of a tile, of n_tiles x
    n_tiles: [m, m].

    Carlini et al. 2023 (arXiv 2301.13188, section 4.2), in root mean squares so that a threshold holds at any
    size.
    """
    pixels = np.asarray(images, np.float64)
    m, channels, height, width = pixels.shape
    high, wide = height // n_tiles, width // n_tiles
    tiles = pixels[:, :, : high * n_tiles, : wide * n_tiles].reshape(
        m, channels, n_tiles, high, n_tiles, wide
    )
    rows = tiles.transpose(2, 4, 0, 1, 3, 5).reshape(n_tiles**2, m, -1)
    return np.max([pairwise_distances(tile, tile) for tile in rows], axis=0) / math.sqrt(rows.shape[2])


def extraction(
    generations, threshold: float, least: int = PRESETS["memcontrol2025"]["component"]
) -> dict[str, Estimate]:
    """The share of prompts whose generations [P, m, C, H, W] agree: `component` by `least` images joined by
    pairs below the threshold (what MemControl's code counts), `clique` by `least` images that all lie below
    it pairwise (Carlini et al. 2023).

    Calibrate the threshold, the 1 % quantile of `tile_distances` of held-out images: a fixed one passes half
    of all X-ray pairs.
    """
    import networkx

    hits: dict[str, list[bool]] = {"component": [], "clique": []}
    for images in generations:
        graph = networkx.from_numpy_array(np.triu(tile_distances(images) < threshold, 1))
        hits["component"].append(max(map(len, networkx.connected_components(graph))) >= least)
        hits["clique"].append(max(map(len, networkx.find_cliques(graph))) >= least)
    return {name: estimate_share(np.array(by_prompt)) for name, by_prompt in hits.items()}


@dataclass(frozen=True)
class DistanceSpace:
    """Points to measure distances between: generated [N, D], train [T, D], holdout [H, D]; queries also as
    mirror images."""

    generated: tuple[np.ndarray, ...]
    train: np.ndarray
    holdout: np.ndarray
    held_queries: tuple[np.ndarray, ...]
    seed: int = 0
    # what follows from the references alone, whatever is generated
    known: dict[str, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def to_train(self) -> tuple[np.ndarray, np.ndarray]:
        """Each generated image's distance to its nearest training image, and which it is: [N], [N]."""
        return _take_first(*_nearest_versions(self.generated, self.train, 1))

    @cached_property
    def nearest_held(self) -> tuple[np.ndarray, np.ndarray]:
        """The same for held-out images."""
        return _take_first(*_nearest_versions(self.generated, self.holdout, 1))

    @property
    def to_holdout(self) -> np.ndarray:
        return self.nearest_held[0]

    @property
    def held_to_train(self) -> np.ndarray:
        return remember_once(
            self.known,
            "held to train",
            lambda: _take_first(*_nearest_versions(self.held_queries, self.train, 1))[0],
        )

    @property
    def held_to_others(self) -> np.ndarray:
        """Each held-out image's distance to its nearest other held-out image: [H]."""
        return remember_once(
            self.known, "held to others", lambda: _distances_to_others(self.held_queries, self.holdout)
        )

    @property
    def orders(self) -> tuple[np.ndarray, np.ndarray]:
        """Canonical orders of the training and held-out rows."""
        return remember_once(
            self.known, "orders", lambda: (_canonical_order(self.train), _canonical_order(self.holdout))
        )


def remember_once(known: dict[str, Any], name: str, make: Callable[[], Any]) -> Any:
    if name not in known:
        known[name] = make()
    return known[name]


def _distances_to_others(queries: tuple[np.ndarray, ...], points: np.ndarray) -> np.ndarray:
    """Of each point, of which queries are versions, to the nearest other point: [H]."""
    distances, indices = _nearest_versions(queries, points, 2)
    own = indices == np.arange(len(indices))[:, None]
    return np.where(own[:, 0], distances[:, -1], distances[:, 0])


def _take_first(distances: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return distances[:, 0], indices[:, 0]


def _nearest_versions(
    queries: tuple[np.ndarray, ...], references: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest references over all versions of each query (as it is, mirrored): each reference counted once,
    at its nearer one. Distances and rows, [N, k] both."""
    by_version = [nearest(version, references, k) for version in queries]
    if len(by_version) == 1:
        return by_version[0]
    distances, indices = (np.concatenate(parts, axis=1) for parts in zip(*by_version))
    distances, indices = _sort_neighbours(distances, indices)  # [N, versions k], a reference once a version
    k = min(k, len(references))
    kept = np.array([_unique_first(row, k) for row in indices])
    return np.take_along_axis(distances, kept, 1), np.take_along_axis(indices, kept, 1)


def _sort_neighbours(distances: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours [N, K] by their distances, the first of equal ones first."""
    order = distances.argsort(axis=1, kind="stable")
    return np.take_along_axis(distances, order, 1), np.take_along_axis(indices, order, 1)


def _unique_first(row: np.ndarray, k: int) -> np.ndarray:
    return np.sort(np.unique(row, return_index=True)[1])[:k]


def ratio(to_train: np.ndarray, to_holdout: np.ndarray) -> np.ndarray:
    return to_train / np.maximum(to_holdout, 1e-12)


def copy_rate(generated, train, holdout, calibration=None) -> Estimate:
    """The share of generated images nearer to a training image, relative to held-out ones, than 99 % of real
    images are.

    The threshold is the 1 % quantile of d(train) / d(holdout) for `calibration`, real images of neither set;
    without them, for the held-out images, each left out of its own reference. A model that copies nothing has
    about 0.01, or `chance_rate` of the number of real images where they are few. The interval is Wilson's, of
    the share below this line; `p` is the chance of as many hits without copying, which knows that the line
    itself errs.
    """
    space = _make_space(generated, train, holdout)
    if calibration is None:
        return measure_copy_rate(space)
    real = _make_space(check_matrix(calibration, "calibration"), train, holdout)
    return _share_below_line(space, ratio(real.to_train[0], real.to_holdout))


def measure_copy_rate(space: DistanceSpace) -> Estimate:
    return _share_below_line(space, real_ratios(space))


def real_ratios(space: DistanceSpace) -> np.ndarray:
    """d(train) / d(holdout) of the held-out images, each left out of its own reference: [H]."""
    return ratio(space.held_to_train, space.held_to_others)


def _line_rank(n_real: int) -> int:
    """Which of the real images' ratios, the smallest being the first, is the line."""
    return 1 + int(FALSE_POSITIVES * (n_real - 1))


def chance_rate(n_real: int) -> float:
    """What a model that copies nothing has on average, the line drawn from n_real images."""
    return _line_rank(n_real) / (n_real + 1)


def line_ratio(real: np.ndarray) -> float:
    """The ratio that 99 % of real images exceed."""
    return float(np.sort(real)[_line_rank(len(real)) - 1])


def _share_below_line(space: DistanceSpace, real: np.ndarray) -> Estimate:
    r = ratio(space.to_train[0], space.to_holdout)
    share = estimate_share(r < line_ratio(real))
    return replace(share, p=hits_p_value(share, len(real)))


def measure_clear_copies(space: DistanceSpace) -> Estimate:
    """The share of images so near to a training image, relative to held-out ones, that without copying one
    such among all of them has a chance of 1 %. Few held-out images suffice for it, since it goes by how far
    below the line an image lies."""
    r = ratio(space.to_train[0], space.to_holdout)
    return estimate_share(tail_chances(real_ratios(space), r) * len(r) < 0.01)


def tail_chances(real: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Of each ratio [N], the chance that a real image's is as low.

    Near 0, P(ratio < r) goes as r to the power of the data's dimension, so the logarithm has an exponential
    lower tail. Its scale s is the mean excess e of the k real ratios that are lowest, a tenth of them (Hill
    1975); that this is an estimate makes the tail a Lomax, k / (H + 1) (1 + e / (k s))^-k.
    """
    logs = np.sort(np.log(np.maximum(real, 1e-12)))  # [H]
    n_real = len(logs)
    k = min(max(5, n_real // 10), n_real - 1)
    s = max(float((logs[k] - logs[:k]).mean()), 1e-6)
    e = np.maximum(logs[k] - np.log(np.maximum(r, 1e-12)), 0)  # [N]
    return np.where(e > 0, k / (n_real + 1) * (1 + e / (k * s)) ** -k, 1.0)


def hits_p_value(share: Estimate, n_real: int) -> float:
    """The chance of as large a share without copying, its line drawn from n_real images."""
    assert share.contributions is not None
    n = len(share.contributions)
    return beta_binomial_p(round(share.value * n), n, _line_rank(n_real), n_real)


def _make_space(generated, train, holdout, seed: int = 0) -> DistanceSpace:
    g = check_matrix(generated, "generated", dtype=None)
    t = check_matrix(train, "train", dtype=None)
    h = check_matrix(holdout, "holdout", 2, dtype=None)
    refuse_unlike_widths(g, t, h)
    return DistanceSpace((g,), t, h, (h,), seed)


def memorization(generated, train, holdout, seed: int = 0) -> Estimate:
    """M, its standard deviation under permuted labels, and the p-value of M > 0.

    M is the mean over generated images of log(d(holdout) / d(train)), clipped to +-log 4, with references of
    equal size: the larger one is drawn down, five times. 0 where training images are no nearer than held-out
    ones, positive for copying. The null keeps the pooled reference and permutes which half is called train.
    """
    return measure_memorization(_make_space(generated, train, holdout, seed))


def measure_memorization(space: DistanceSpace) -> Estimate:
    floor = 1e-3 * float(np.median(space.held_to_train))
    references = list(zip((space.train, space.holdout), space.orders))
    m = min(len(space.train), len(space.holdout))
    n_draws = 1 if len(space.train) == len(space.holdout) else _N_REFERENCE_DRAWS
    # a reference of m rows is the same in every draw
    whole = [
        _nearest_versions(space.generated, rows[order], _N_NEIGHBOURS) if len(rows) == m else None
        for rows, order in references
    ]
    sides = np.repeat(np.array([_TRAIN, _HOLDOUT], np.int8), m)  # [2 m]
    terms, null = [], []
    for draw in range(n_draws):
        rng = np.random.default_rng(derive_seed(space.seed, "memorization", draw))
        neighbours = [
            known or _nearest_versions(space.generated, _draw_rows(rows, order, m, rng), _N_NEIGHBOURS)
            for known, (rows, order) in zip(whole, references)
        ]
        d, indices = _merge_neighbours(neighbours, m)  # [N, 2 K] both
        d = np.maximum(d, floor)
        terms.append(_log_ratios(d, sides[indices]))
        for _ in range(_N_PERMUTATIONS // n_draws):
            null.append(float(_log_ratios(d, rng.permutation(sides)[indices]).mean()))
    contributions = np.mean(terms, axis=0)  # [N]
    value = float(contributions.mean())
    p = (1 + sum(other >= value for other in null)) / (1 + len(null))
    return Estimate(value, float(np.std(null)), p=p, contributions=contributions)


def _draw_rows(rows: np.ndarray, order: np.ndarray, m: int, rng: np.random.Generator) -> np.ndarray:
    """m rows at random, without replacement: [m, D]."""
    return rows[order[rng.permutation(len(rows))[:m]]]


def _canonical_order(rows: np.ndarray) -> np.ndarray:
    """An order of the rows by their content, so that draws do not depend on how a folder was listed: [N]."""
    digests = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
    return np.array(sorted(range(len(rows)), key=digests.__getitem__))


def _merge_neighbours(
    by_set: Sequence[tuple[np.ndarray, np.ndarray]], m: int
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours in several sets of m rows, as one sorted list: distances, and rows in the sets laid end to
    end. [N, sets K] both."""
    distances = np.concatenate([distances for distances, _ in by_set], axis=1)
    indices = np.concatenate([indices + i * m for i, (_, indices) in enumerate(by_set)], axis=1)
    return _sort_neighbours(distances, indices)


def _log_ratios(distances: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """The terms of M, clipped log(d_H / d_T) [N], from each image's sorted neighbours [N, K] and the side
    that each is on [N, K]."""
    d_train, d_holdout = (_first_distance(distances, sides == side) for side in (_TRAIN, _HOLDOUT))
    return np.clip(np.log(d_holdout / d_train), -CLIP, CLIP)


def _first_distance(distances: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The distance of the first chosen neighbour of each row, or of the last neighbour where none is chosen:
    [N]."""
    column = np.where(chosen.any(1), chosen.argmax(1), -1)
    return distances[np.arange(len(distances)), column]
