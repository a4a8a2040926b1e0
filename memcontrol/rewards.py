"""Owns the metrics of quality and of memorization: pure functions of feature matrices [n, d], numpy or torch.

Every value is an Estimate: a float that knows its error or interval. Distances are Euclidean, sums are float64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from memcontrol.errors import MemControlError
from memcontrol.estimate import Estimate, beta_binomial_p, of_contributions, percent, share_of
from memcontrol.features import blocks, mean_of, nearest
from memcontrol.seeds import seed_of

CLIP = math.log(4)
N_PERMUTATIONS = 400
N_NEIGHBOURS = 96
N_DRAWS = 5
FALSE_POSITIVES = 0.01

# Thresholds as published: MQ's of squared distances, Carlini's alpha, the extraction attack's tile distance (224 pixels, 0..1).
PRESETS: dict[str, dict[str, Any]] = {
    "iet-agc": {"mq": 0.5, "mq_neighbours": 50},
    "carlini2023": {"alpha": 0.5, "neighbours": 50},
    "memcontrol2025": {"tile_distance": 20.0, "component": 3, "mifid_threshold": 0.1},
}


def matrix(features, name: str, least: int = 1, dtype=np.float64) -> np.ndarray:
    """[n, d] of a numpy array, a torch tensor or lists; `dtype` None keeps float32 as it is, for large sets.

    Raises MemControlError: another shape, too few rows, not finite.
    """
    found = np.asarray(features.detach().cpu().to(wide(features.dtype)) if hasattr(features, "detach") else features)
    try:
        found = found.astype(dtype or (np.float32 if found.dtype == np.float32 else np.float64), copy=False)
    except (TypeError, ValueError):
        raise MemControlError(f"{name} holds {found.dtype}; give a matrix of numbers [n, d]") from None
    if found.ndim != 2:
        raise MemControlError(f"{name} has shape {list(found.shape)}; give a matrix of features [n, d]")
    if len(found) < least:
        raise MemControlError(f"{name} needs at least {least} images and has {len(found)}")
    if not np.isfinite(found).all():
        raise MemControlError(f"{name} holds values that are not finite; look for broken images or an extractor in half precision")
    return found


def wide(dtype):
    """A torch type that numpy knows: float32 in place of half precision."""
    import torch

    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def refuse_unlike(*sets: np.ndarray) -> None:
    """Raises MemControlError where feature matrices differ in width."""
    widths = [rows.shape[1] for rows in sets]
    if len(set(widths)) > 1:
        raise MemControlError(f"the feature sets have {', '.join(map(str, widths))} dimensions; use one extractor for all of them")


@dataclass(frozen=True)
class Gaussian:
    """Mean [d] and a factor R of the covariance R'R of a set of features: what fid needs of a reference, made once."""

    mean: np.ndarray
    factor: np.ndarray  # [min(n, d), d]

    @property
    def trace(self) -> float:
        return float(np.square(self.factor).sum())

    @cached_property
    def components(self) -> np.ndarray:
        """Principal directions, the first ones first: [d, d]."""
        return np.linalg.eigh(self.factor.T @ self.factor)[1][:, ::-1]


def gaussian(features) -> Gaussian:
    """Of features [n, d], n >= 2, block by block: memory beyond them is that of one block. Raises MemControlError."""
    if isinstance(features, Gaussian):
        return features
    rows = matrix(features, "a feature set of fid", 2, dtype=None)
    mean, factor = mean_of(rows), np.empty((0, rows.shape[1]))
    for block in blocks(rows):
        stacked = np.concatenate([factor, (block - mean) / math.sqrt(len(rows) - 1)])
        factor = np.linalg.qr(stacked, mode="r")  # type: ignore[assignment]  # numpy's stubs know no mode that gives R alone
    return Gaussian(mean, factor)


def fid(real, generated) -> Estimate:
    """Frechet distance of features [N, d] and [M, d], or their Gaussians (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    |mu - mu'|^2 + tr S + tr S' - 2 tr (S S')^(1/2), covariances with n - 1. The trace of the root is a nuclear norm of the
    factors' product: real whatever the ranks, so nothing imaginary appears where n <= d. Biased upward, the more the fewer
    images; the error is that of sampling, by the delta method, and leaves the bias out. It is known where `generated` is features.
    """
    x, rows = gaussian(real), None
    if isinstance(generated, Gaussian):
        mean, factor = generated.mean, generated.factor
    else:
        rows = matrix(generated, "a feature set of fid", 2)
        mean = rows.mean(0)
        centred = rows - mean
        factor = centred / math.sqrt(len(rows) - 1)
    if len(x.mean) != len(mean):
        raise MemControlError(f"fid compares features of {len(x.mean)} and of {len(mean)} dimensions; use one extractor for both")
    shift, (trace, diagonal) = mean - x.mean, root_of(factor @ x.factor.T)
    value = max(float(np.square(shift).sum() + np.square(factor).sum()) + x.trace - 2 * trace, 0.0)
    if rows is None:
        return Estimate(value)
    # An image z from the mean adds |z|^2 - z'Tz + 2 (mu' - mu)z, T being the optimal transport onto the real Gaussian.
    return of_contributions(value, np.square(centred).sum(1) - (len(rows) - 1) * diagonal + 2 * centred @ shift)


def root_of(product: np.ndarray) -> tuple[float, np.ndarray]:
    """Trace and diagonal [n] of (M M')^(1/2), for M = [n, m].

    By eigenvectors of the smaller Gram matrix, faster than singular values. Their roots are taken as lengths |M v|: the root of
    an eigenvalue that is zero but for rounding would be wrong by the eighth digit.
    """
    wide = product.shape[0] <= product.shape[1]
    _, vectors = np.linalg.eigh(product @ product.T if wide else product.T @ product)
    images = product.T @ vectors if wide else product @ vectors  # [m, n] or [n, m]
    roots = np.linalg.norm(images, axis=0)
    if wide:
        return float(roots.sum()), np.square(vectors) @ roots
    return float(roots.sum()), np.square(images) @ np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > 0)


def fd_pca(real, generated, k: int = 64) -> Estimate:
    """Frechet distance on the first k principal components of the real features, or of their Gaussian: ranks with far fewer
    images than all d."""
    x = gaussian(real)
    first = x.components[:, :k]
    return fid(Gaussian(x.mean @ first, x.factor @ first), matrix(generated, "generated", 2) @ first)


def kid(real, generated, scale: float = 1.0) -> Estimate:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 over all rows, its error by the jackknife (Binkowski et al. 2018,
    arXiv 1801.01401). Values a little below 0 are right. `scale` divides the features first: the kernel is not scale-free."""
    x, y = matrix(real, "real", 3) / scale, matrix(generated, "generated", 3) / scale
    refuse_unlike(x, y)
    n, m = len(x), len(y)
    xx, yy, xy, yx = (kernel_sums(p, q) for p, q in ((x, x), (y, y), (x, y), (y, x)))
    for points, sums in ((x, xx), (y, yy)):
        sums -= np.power(np.square(points).sum(1) / x.shape[1] + 1, 3)  # an image with itself
    within_x, within_y, across = xx.sum() / (n * (n - 1)), yy.sum() / (m * (m - 1)), xy.sum() / (n * m)
    # What is left when one row is left out, for each row.
    without_x = (xx.sum() - 2 * xx) / ((n - 1) * (n - 2)) - 2 * (xy.sum() - xy) / ((n - 1) * m)
    without_y = (yy.sum() - 2 * yy) / ((m - 1) * (m - 2)) - 2 * (xy.sum() - yx) / (n * (m - 1))
    variance, value = (n - 1) * without_x.var() + (m - 1) * without_y.var(), float(within_x + within_y - 2 * across)
    return Estimate(value, math.sqrt(variance), contributions=value + (m - 1) * (without_y.mean() - without_y))


def kernel_sums(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of each row of x, the sum of (x.y / d + 1)^3 over all of y, in blocks: [N]."""
    return np.concatenate([np.power(block @ y.T / x.shape[1] + 1, 3).sum(1) for block in blocks(x, 256)])


def prdc(real, generated, k: int = 5) -> dict[str, Estimate]:
    """Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem et al. 2020, arXiv 2002.09797).

    A point's ball reaches to its k-th nearest other point of its own set; being inside means nearer than that.
    """
    if k < 1:
        raise MemControlError(f"prdc's k is {k}; give the number of neighbours, 1 or more")
    x, y = matrix(real, "real", k + 1), matrix(generated, "generated", k + 1)
    refuse_unlike(x, y)
    radius_x, radius_y = (nearest_others(points, k)[:, -1] for points in (x, y))
    across = pairwise(x, y)  # [N, M]
    inside = across < radius_x[:, None]
    return {
        "precision": share_of(np.any(inside, 0)), "recall": share_of(np.any(across < radius_y[None], 1)),
        "density": Estimate(float(inside.sum(0).mean() / k)), "coverage": share_of(across.min(1) < radius_x),
    }  # fmt: skip


def pairwise(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """All distances [N, M]."""
    squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None] - 2 * x @ y.T
    return np.sqrt(np.maximum(squares, 0.0))


def nearest_others(points: np.ndarray, k: int, rows: np.ndarray | None = None) -> np.ndarray:
    """Distances of each point, or of those in `rows`, to its k nearest other points of the set: [N, k]."""
    rows = np.arange(len(points)) if rows is None else rows
    distances, indices = nearest(points[rows], points, k + 1)
    own = indices == rows[:, None]
    own[~own.any(1), -1] = True  # among many equal points its own may not be listed: any of them stands for it
    return distances[~own].reshape(len(rows), k)


def authpct(generated, train) -> Estimate:
    """Per cent of generated points that are farther from their nearest training point than that one from its own nearest other
    (Alaa et al. 2022, arXiv 2102.08921). Real images reach some 70, not 100: read it beside the held-out images' value."""
    g, t = matrix(generated, "generated", dtype=None), matrix(train, "train", 2, dtype=None)
    refuse_unlike(g, t)
    distances, indices = nearest(g, t)
    rows, places = np.unique(indices[:, 0], return_inverse=True)
    return percent(share_of(nearest_others(t, 1, rows)[places, 0] < distances[:, 0]))


def mq(generated, train, threshold: float = PRESETS["iet-agc"]["mq"], k: int = PRESETS["iet-agc"]["mq_neighbours"]) -> int:
    """IET-AGC's MQ: how many generated images have d1 / mean(d1 .. dk) below the threshold (arXiv 2407.15328).

    d1 .. dk are squared distances of an image to its k nearest training images, the nearest included; in pixels of 0..1 as
    published. Squares make 0.5 an ordinary distance ratio of some 0.7.
    """
    squares = distances_to(generated, train, k) ** 2
    return int((squares[:, 0] / np.maximum(squares.mean(1), 1e-300) < threshold).sum())


def distances_to(generated, train, k: int) -> np.ndarray:
    """Of each generated image to its k nearest training images, or to all of them where there are fewer: [N, k]."""
    g, t = matrix(generated, "generated", dtype=None), matrix(train, "train", 2, dtype=None)
    refuse_unlike(g, t)
    return nearest(g, t, k)[0]


def carlini_rate(generated, train, k: int = PRESETS["carlini2023"]["neighbours"], alpha: float = PRESETS["carlini2023"]["alpha"]) -> Estimate:
    """The share of images with d1 < alpha mean(d1 .. dk), distances to the k nearest training images (Carlini et al. 2023,
    arXiv 2301.13188, section 5). Needs many more training images than k."""
    distances = distances_to(generated, train, k)
    return share_of(distances[:, 0] < alpha * distances.mean(1))


def mifid(
    real, generated, direction: str = "kaggle", threshold: float = PRESETS["memcontrol2025"]["mifid_threshold"], frechet: float | None = None
) -> Estimate:
    """FID divided by the mean least cosine distance d, where d lies below the threshold (Bai et al. 2021, arXiv 2106.03062).

    `kaggle`: the mean over generated images of the nearest real one; `torchmetrics`: over real ones of the nearest generated.
    For continuity only: a perfect copy has FID 0 and so the best score. `frechet` is the sets' FID, where it is known already.
    """
    if direction not in ("kaggle", "torchmetrics"):
        raise MemControlError(f"mifid's direction is '{direction}'; allowed: kaggle, torchmetrics")
    distance, value = cosine_distance(real, generated, direction), fid(real, generated) if frechet is None else frechet
    if direction == "torchmetrics" and value <= 1e-8:
        return Estimate(0.0)
    return Estimate(value / (distance + 1e-14) if distance < threshold else float(value))


def cosine_distance(real, generated, direction: str = "kaggle") -> float:
    """Mean over one set of the least 1 - |cos| to the other."""
    x, y = matrix(real, "real", dtype=None), unit(matrix(generated, "generated"))
    refuse_unlike(x, y)
    apart = [1 - np.abs(y @ unit(block.astype(np.float64)).T) for block in blocks(x, 1024)]
    least = np.min([block.min(1) for block in apart], axis=0) if direction == "kaggle" else np.concatenate([block.min(0) for block in apart])
    return float(least.mean())


def clip_score(image_embeddings, text_embeddings) -> Estimate:
    """100 times the mean cosine of each image with its caption, at least 0 each (Hessel et al. 2021, arXiv 2104.08718, without its
    factor of 2.5): embeddings [n, d] of one CLIP model, row by row."""
    x, y = unit(matrix(image_embeddings, "image embeddings", 2)), unit(matrix(text_embeddings, "text embeddings", 2))
    if x.shape != y.shape:
        raise MemControlError(f"clip_score compares images and captions row by row and got {list(x.shape)} and {list(y.shape)}")
    scores = 100 * np.maximum((x * y).sum(1), 0)
    return Estimate(float(scores.mean()), float(scores.std(ddof=1) / math.sqrt(len(scores))))


def tile_distances(images, n_tiles: int = 4) -> np.ndarray:
    """For images [m, C, H, W] in 0..1, the largest root mean square difference of a tile, of n_tiles x n_tiles: [m, m].

    Carlini et al. 2023 (arXiv 2301.13188, section 4.2), in root mean squares so that a threshold holds at any size.
    """
    pixels = np.asarray(images, np.float64)
    m, channels, height, width = pixels.shape
    high, wide = height // n_tiles, width // n_tiles
    tiles = pixels[:, :, : high * n_tiles, : wide * n_tiles].reshape(m, channels, n_tiles, high, n_tiles, wide)
    rows = tiles.transpose(2, 4, 0, 1, 3, 5).reshape(n_tiles**2, m, -1)
    return np.max([pairwise(tile, tile) for tile in rows], axis=0) / math.sqrt(rows.shape[2])


def extraction(generations, threshold: float, least: int = PRESETS["memcontrol2025"]["component"]) -> dict[str, Estimate]:
    """The share of prompts whose generations [P, m, C, H, W] agree: `component` by `least` images joined by pairs below the
    threshold (what MemControl's code counts), `clique` by `least` images that all lie below it pairwise (Carlini et al. 2023).

    Calibrate the threshold, the 1 % quantile of `tile_distances` of held-out images: a fixed one passes half of all X-ray pairs.
    """
    import networkx

    found: dict[str, list[bool]] = {"component": [], "clique": []}
    for images in generations:
        graph = networkx.from_numpy_array(np.triu(tile_distances(images) < threshold, 1))
        found["component"].append(max(map(len, networkx.connected_components(graph))) >= least)
        found["clique"].append(max(map(len, networkx.find_cliques(graph))) >= least)
    return {name: share_of(np.array(hits)) for name, hits in found.items()}


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class Space:
    """Points to measure distances between: generated [N, D], train [T, D], holdout [H, D]; queries also as mirror images."""

    generated: tuple[np.ndarray, ...]
    train: np.ndarray
    holdout: np.ndarray
    held_queries: tuple[np.ndarray, ...]
    seed: int = 0
    known: dict[str, np.ndarray] = field(default_factory=dict, compare=False)  # distances between references, the same for all that is generated

    @cached_property
    def to_train(self) -> tuple[np.ndarray, np.ndarray]:
        """Each generated image's distance to its nearest training image, and which it is: [N], [N]."""
        return first(*nearest_of(self.generated, self.train, 1))

    @cached_property
    def nearest_held(self) -> tuple[np.ndarray, np.ndarray]:
        """The same for held-out images."""
        return first(*nearest_of(self.generated, self.holdout, 1))

    @property
    def to_holdout(self) -> np.ndarray:
        return self.nearest_held[0]

    @property
    def held_to_train(self) -> np.ndarray:
        if "train" not in self.known:
            self.known["train"] = first(*nearest_of(self.held_queries, self.train, 1))[0]
        return self.known["train"]

    @property
    def held_to_others(self) -> np.ndarray:
        """Each held-out image's distance to its nearest other held-out image: [H]."""
        if "others" not in self.known:
            distances, indices = nearest_of(self.held_queries, self.holdout, 2)
            own = indices == np.arange(len(indices))[:, None]
            self.known["others"] = np.where(own[:, 0], distances[:, -1], distances[:, 0])
        return self.known["others"]


def first(distances: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return distances[:, 0], indices[:, 0]


def nearest_of(queries: tuple[np.ndarray, ...], references: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Nearest references over all versions of each query (as it is, mirrored): each reference counted once, at its nearer one."""
    found = [nearest(version, references, k) for version in queries]
    if len(found) == 1:
        return found[0]
    distances, indices = (np.concatenate(parts, axis=1) for parts in zip(*found))
    order = distances.argsort(axis=1, kind="stable")
    distances, indices = np.take_along_axis(distances, order, 1), np.take_along_axis(indices, order, 1)
    k = min(k, len(references))
    kept = [unique_first(row, k) for row in indices]
    return np.take_along_axis(distances, np.array(kept), 1), np.take_along_axis(indices, np.array(kept), 1)


def unique_first(row: np.ndarray, k: int) -> np.ndarray:
    return np.sort(np.unique(row, return_index=True)[1])[:k]


def ratio(to_train: np.ndarray, to_holdout: np.ndarray) -> np.ndarray:
    return to_train / np.maximum(to_holdout, 1e-12)


def copy_rate(generated, train, holdout, calibration=None) -> Estimate:
    """The share of generated images nearer to a training image, relative to held-out ones, than 99 % of real images are.

    The threshold is the 1 % quantile of d(train) / d(holdout) for `calibration`, real images of neither set; without them,
    for the held-out images, each left out of its own reference. A model that copies nothing has about 0.01, or `chance_rate` of
    the number of real images where they are few. The interval is Wilson's, of the share below this line; `p` is the chance of as
    many hits without copying, which knows that the line itself errs.
    """
    space = space_of(generated, train, holdout)
    if calibration is None:
        return copy_rate_in(space)
    known = space_of(matrix(calibration, "calibration"), train, holdout)
    return below_real(space, ratio(known.to_train[0], known.to_holdout))


def copy_rate_in(space: Space) -> Estimate:
    return below_real(space, real_ratios(space))


def real_ratios(space: Space) -> np.ndarray:
    """d(train) / d(holdout) of the held-out images, each left out of its own reference: [H]."""
    return ratio(space.held_to_train, space.held_to_others)


def rank_of_line(n_real: int) -> int:
    """Which of the real images' ratios, the smallest being the first, is the line."""
    return 1 + int(FALSE_POSITIVES * (n_real - 1))


def chance_rate(n_real: int) -> float:
    """What a model that copies nothing has on average, the line drawn from n_real images."""
    return rank_of_line(n_real) / (n_real + 1)


def threshold_of(real: np.ndarray) -> float:
    """The ratio that 99 % of real images exceed."""
    return float(np.sort(real)[rank_of_line(len(real)) - 1])


def below_real(space: Space, real: np.ndarray) -> Estimate:
    share = share_of(ratio(space.to_train[0], space.to_holdout) < threshold_of(real))
    share.p = p_of_hits(share, len(real))
    return share


def clear_copies_in(space: Space) -> Estimate:
    """The share of images so near to a training image, relative to held-out ones, that without copying one such among all of them has
    a chance of 1 %. Few held-out images suffice for it, since it goes by how far below the line an image lies."""
    made = ratio(space.to_train[0], space.to_holdout)
    return share_of(tail_chances(real_ratios(space), made) * len(made) < 0.01)


def tail_chances(real: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Of each ratio in `made` [N], the chance that a real image's is as low.

    Near 0, P(ratio < r) goes as r to the power of the data's dimension, so the logarithm has an exponential lower tail. Its rate is
    the mean excess of the tenth of the real ratios that is lowest (Hill 1975); that this is an estimate makes the tail a Lomax.
    """
    logs = np.sort(np.log(np.maximum(real, 1e-12)))
    k = min(max(5, len(logs) // 10), len(logs) - 1)
    start, scale = logs[k], max(float((logs[k] - logs[:k]).mean()), 1e-6)
    beyond = np.maximum(start - np.log(np.maximum(made, 1e-12)), 0)
    return np.where(beyond > 0, k / (len(logs) + 1) * (1 + beyond / (k * scale)) ** -k, 1.0)


def p_of_hits(share: Estimate, n_real: int) -> float:
    """The chance of as large a share without copying, its line drawn from n_real images."""
    assert share.contributions is not None
    n = len(share.contributions)
    return beta_binomial_p(round(share * n), n, rank_of_line(n_real), n_real)


def space_of(generated, train, holdout, seed: int = 0) -> Space:
    made, known, held = matrix(generated, "generated", dtype=None), matrix(train, "train", dtype=None), matrix(holdout, "holdout", 2, dtype=None)
    refuse_unlike(made, known, held)
    return Space((made,), known, held, (held,), seed)


def memorization(generated, train, holdout, seed: int = 0) -> Estimate:
    """M, its standard deviation under permuted labels, and the p-value of M > 0.

    M is the mean over generated images of log(d(holdout) / d(train)), clipped to +-log 4, with references of equal size:
    the larger one is drawn down, five times. 0 where training images are no nearer than held-out ones, positive for
    copying. The null keeps the pooled reference and permutes which half is called train.
    """
    return memorization_in(space_of(generated, train, holdout, seed))


def memorization_in(space: Space) -> Estimate:
    floor = 1e-3 * float(np.median(space.held_to_train))
    sets = [(rows, canonical(rows)) for rows in (space.train, space.holdout)]
    m = min(len(space.train), len(space.holdout))
    n_draws = 1 if len(space.train) == len(space.holdout) else N_DRAWS
    whole = [nearest_of(space.generated, rows[order], N_NEIGHBOURS) if len(rows) == m else None for rows, order in sets]
    ratios, null = [], []
    for draw in range(n_draws):
        rng = np.random.default_rng(seed_of(space.seed, "memorization", draw))
        found = [known or nearest_of(space.generated, rows[order[rng.permutation(len(rows))[:m]]], N_NEIGHBOURS) for known, (rows, order) in zip(whole, sets)]
        distances, indices = pooled(found, m)
        distances = np.maximum(distances, floor)
        sides = np.repeat(np.array([TRAIN, HOLDOUT], np.int8), m)
        ratios.append(log_ratios(distances, sides[indices]))
        for _ in range(N_PERMUTATIONS // n_draws):
            null.append(float(log_ratios(distances, rng.permutation(sides)[indices]).mean()))
    contributions = np.mean(ratios, axis=0)
    value = float(contributions.mean())
    return Estimate(value, float(np.std(null)), p=(1 + sum(x >= value for x in null)) / (1 + len(null)), contributions=contributions)


TRAIN, HOLDOUT = 1, 2


def canonical(rows: np.ndarray) -> np.ndarray:
    """An order of the rows by their content, so that draws do not depend on how a folder was listed: [N]."""
    return np.array(sorted(range(len(rows)), key=lambda row: hashlib.blake2b(rows[row].tobytes(), digest_size=16).digest()))


def pooled(found: Sequence[tuple[np.ndarray, np.ndarray]], m: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours in several sets of m rows, as one sorted list: distances, and rows in the sets laid end to end. [N, K] both."""
    distances = np.concatenate([distances for distances, _ in found], axis=1)
    indices = np.concatenate([indices + i * m for i, (_, indices) in enumerate(found)], axis=1)
    order = distances.argsort(axis=1, kind="stable")
    return np.take_along_axis(distances, order, 1), np.take_along_axis(indices, order, 1)


def log_ratios(distances: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Clipped log ratios [N], from each image's sorted neighbours [N, K] and the side that each is on [N, K]."""
    to_train, to_holdout = (first_distance(distances, sides == side) for side in (TRAIN, HOLDOUT))
    return np.clip(np.log(to_holdout / to_train), -CLIP, CLIP)


def first_distance(distances: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The distance of the first chosen neighbour of each row, or of the last neighbour where none is chosen: [N]."""
    column = np.where(chosen.any(1), chosen.argmax(1), -1)
    return distances[np.arange(len(distances)), column]
