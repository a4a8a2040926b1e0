"""Owns the rewards of other papers, as published: AuthPct, MQ, Carlini's rate, and the extraction attack."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from memcontrol.core.estimate import Estimate, convert_to_percent, estimate_share
from memcontrol.data.features import (
    check_matrix,
    nearest,
    nearest_others,
    pairwise_distances,
    refuse_unlike_widths,
)

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
    d, nearest_rows = (column[:, 0] for column in nearest(g, t))  # [N] both
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
    generations,
    threshold: float,
    least: int = PRESETS["memcontrol2025"]["component"],
    matches=None,
) -> dict[str, Estimate]:
    """The share of prompts whose generations [P, m, C, H, W] agree: `component` by `least` images joined by
    pairs below the threshold (what MemControl's code counts), `clique` by `least` images that all lie below
    it pairwise (Carlini et al. 2023).

    Of `matches` [P, m], where given, only images that match a training image count: what agrees and matches
    was extracted; a model that makes one picture only agrees with itself. Calibrate the threshold, the 1 %
    quantile of `tile_distances` of held-out images: a fixed one passes half of all X-ray pairs.
    """
    import networkx

    hits: dict[str, list[bool]] = {"component": [], "clique": []}
    for i, images in enumerate(generations):
        joined = np.triu(tile_distances(images) < threshold, 1)
        if matches is not None:
            joined &= np.logical_and.outer(matches[i], matches[i])
        graph = networkx.from_numpy_array(joined)
        hits["component"].append(max(map(len, networkx.connected_components(graph))) >= least)
        hits["clique"].append(max(map(len, networkx.find_cliques(graph))) >= least)
    return {name: estimate_share(np.array(by_prompt)) for name, by_prompt in hits.items()}
