"""Owns the metrics of quality and of memorization: pure functions of feature matrices [n, d], numpy or torch.

Every value is an Estimate: a float that knows its error or interval. Distances are Euclidean, sums are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from memcontrol.errors import MemControlError
from memcontrol.features import nearest
from memcontrol.seeds import seed_of

CLIP = math.log(4)
N_PERMUTATIONS = 400
N_NEIGHBOURS = 96
N_DRAWS = 5
FALSE_POSITIVES = 0.01
NORMAL_95 = 1.959963984540054

# Thresholds as published: MQ's of squared distances, Carlini's alpha, the extraction attack's tile distance (224 pixels, 0..1).
PRESETS = {
    "iet-agc": {"mq": 0.5, "mq_neighbours": 50},
    "carlini2023": {"alpha": 0.5, "neighbours": 50},
    "memcontrol2025": {"tile_distance": 20.0, "component": 3, "mifid_threshold": 0.1},
}


class Estimate(float):
    """A value with its standard error, its 95 % interval, or the p-value of what it says, as far as they are known."""

    error: float | None
    low: float | None
    high: float | None
    p: float | None

    def __new__(cls, value: float, error: float | None = None, low: float | None = None, high: float | None = None, p: float | None = None):
        estimate = super().__new__(cls, value)
        estimate.error, estimate.p = error, p
        estimate.low = value - NORMAL_95 * error if low is None and error is not None else low
        estimate.high = value + NORMAL_95 * error if high is None and error is not None else high
        return estimate


def matrix(features, name: str, least: int = 1) -> np.ndarray:
    """float64 [n, d] of a numpy array, a torch tensor or lists. Raises MemControlError: another shape, too few rows, not finite."""
    found = np.asarray(features.detach().cpu() if hasattr(features, "detach") else features, np.float64)
    if found.ndim != 2:
        raise MemControlError(f"{name} has shape {list(found.shape)}; give a matrix of features [n, d]")
    if len(found) < least:
        raise MemControlError(f"{name} needs at least {least} images and has {len(found)}")
    if not np.isfinite(found).all():
        raise MemControlError(f"{name} holds values that are not finite; look for broken images or an extractor in half precision")
    return found


@dataclass(frozen=True)
class Gaussian:
    """Mean [d] and a factor R of the covariance R'R of a set of features: what fid needs of a reference, made once."""

    mean: np.ndarray
    factor: np.ndarray  # [min(n, d), d]

    @property
    def trace(self) -> float:
        return float(np.square(self.factor).sum())


def gaussian(features) -> Gaussian:
    """Of features [n, d], n >= 2. Raises MemControlError."""
    rows = features if isinstance(features, Gaussian) else matrix(features, "a feature set of fid", 2)
    if isinstance(rows, Gaussian):
        return rows
    mean = rows.mean(0)
    return Gaussian(mean, np.linalg.qr((rows - mean) / math.sqrt(len(rows) - 1), mode="r"))


def fid(real, generated) -> Estimate:
    """Frechet distance of features [N, d] and [M, d], or their Gaussians (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    |mu - mu'|^2 + tr S + tr S' - 2 tr (S S')^(1/2), covariances with n - 1. The trace of the root is a nuclear norm of the
    factors' product: real whatever the ranks, so nothing imaginary appears where n <= d. Biased upward, the more the fewer images.
    """
    x, y = gaussian(real), gaussian(generated)
    if len(x.mean) != len(y.mean):
        raise MemControlError(f"fid compares features of {len(x.mean)} and of {len(y.mean)} dimensions; use one extractor for both")
    root = np.linalg.norm(x.factor @ y.factor.T, "nuc")  # tr((R'R Q'Q)^(1/2)) = sum of the singular values of R Q'
    return Estimate(max(float(np.square(x.mean - y.mean).sum()) + x.trace + y.trace - 2 * float(root), 0.0))


def fd_pca(real, generated, k: int = 64) -> Estimate:
    """Frechet distance on the first k principal components of the real features: ranks with far fewer images than all d."""
    x, y = matrix(real, "real", 2), matrix(generated, "generated", 2)
    centre = x.mean(0)
    _, _, directions = np.linalg.svd(x - centre, full_matrices=False)
    return fid((x - centre) @ directions[:k].T, (y - centre) @ directions[:k].T)


def kid(real, generated, scale: float = 1.0) -> Estimate:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 over all rows, its error by the jackknife (Binkowski et al. 2018,
    arXiv 1801.01401). Values a little below 0 are right. `scale` divides the features first: the kernel is not scale-free."""
    x, y = matrix(real, "real", 3) / scale, matrix(generated, "generated", 3) / scale
    xx, yy, xy = (np.power(p @ q.T / x.shape[1] + 1, 3) for p, q in ((x, x), (y, y), (x, y)))
    for kernel in (xx, yy):
        np.fill_diagonal(kernel, 0.0)
    n, m = xy.shape
    within_x, within_y, across = xx.sum() / (n * (n - 1)), yy.sum() / (m * (m - 1)), xy.mean()
    # What is left when one row is left out, for each row.
    without_x = (xx.sum() - 2 * xx.sum(1)) / ((n - 1) * (n - 2)) - 2 * (xy.sum() - xy.sum(1)) / ((n - 1) * m)
    without_y = (yy.sum() - 2 * yy.sum(1)) / ((m - 1) * (m - 2)) - 2 * (xy.sum() - xy.sum(0)) / (n * (m - 1))
    variance = (n - 1) * without_x.var() + (m - 1) * without_y.var()
    return Estimate(float(within_x + within_y - 2 * across), math.sqrt(variance))


def prdc(real, generated, k: int = 5) -> dict[str, Estimate]:
    """Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem et al. 2020, arXiv 2002.09797).

    A point's ball reaches to its k-th nearest other point of its own set; being inside means nearer than that.
    """
    x, y = matrix(real, "real", k + 1), matrix(generated, "generated", k + 1)
    radius_x, radius_y = (nearest_others(points, k)[:, -1] for points in (x, y))
    across = pairwise(x, y)  # [N, M]
    inside = across < radius_x[:, None]
    shares = {"precision": (inside.any(0), len(y)), "recall": ((across < radius_y[None]).any(1), len(x))}
    found = {name: share_of(hits) for name, (hits, _) in shares.items()}
    found["density"] = Estimate(float(inside.sum(0).mean() / k))
    return found | {"coverage": share_of(across.min(1) < radius_x)}


def share_of(hits: np.ndarray) -> Estimate:
    """The share of a boolean array, with its Wilson interval."""
    share = float(hits.mean())
    low, high = wilson(share, len(hits))
    return Estimate(share, low=low, high=high)


def pairwise(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """All distances [N, M]."""
    squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None] - 2 * x @ y.T
    return np.sqrt(np.maximum(squares, 0.0))


def nearest_others(points: np.ndarray, k: int) -> np.ndarray:
    """Distances of each point to its k nearest other points of the set: [N, k]."""
    distances, indices = nearest(points, points, k + 1)
    own = indices == np.arange(len(points))[:, None]
    own[~own.any(1), -1] = True  # among many equal points its own may not be listed: any of them stands for it
    return distances[~own].reshape(len(points), k)


def authpct(generated, train) -> Estimate:
    """Per cent of generated points that are farther from their nearest training point than that one from its own nearest other
    (Alaa et al. 2022, arXiv 2102.08921). Real images reach some 70, not 100: read it beside the held-out images' value."""
    g, t = matrix(generated, "generated"), matrix(train, "train", 2)
    distances, indices = nearest(g, t)
    return percent(share_of(nearest_others(t, 1)[indices[:, 0], 0] < distances[:, 0]))


def percent(share: Estimate) -> Estimate:
    return Estimate(100 * share, low=100 * share.low, high=100 * share.high)


def mq(generated, train, threshold: float = PRESETS["iet-agc"]["mq"], k: int = PRESETS["iet-agc"]["mq_neighbours"]) -> int:
    """IET-AGC's MQ: how many generated images have d1 / mean(d1 .. dk) below the threshold (arXiv 2407.15328).

    d1 .. dk are squared distances of an image to its k nearest training images, the nearest included; in pixels of 0..1 as
    published. Squares make 0.5 an ordinary distance ratio of some 0.7.
    """
    squares = nearest(matrix(generated, "generated"), matrix(train, "train"), k)[0] ** 2
    return int((squares[:, 0] / np.maximum(squares.mean(1), 1e-300) < threshold).sum())


def carlini_rate(generated, train, k: int = PRESETS["carlini2023"]["neighbours"], alpha: float = PRESETS["carlini2023"]["alpha"]) -> Estimate:
    """The share of images with d1 < alpha mean(d1 .. dk), distances to the k nearest training images (Carlini et al. 2023,
    arXiv 2301.13188, section 5). Needs many more training images than k."""
    distances = nearest(matrix(generated, "generated"), matrix(train, "train"), k)[0]
    return share_of(distances[:, 0] < alpha * distances.mean(1))


def mifid(real, generated, direction: str = "kaggle", threshold: float = PRESETS["memcontrol2025"]["mifid_threshold"]) -> Estimate:
    """FID divided by the mean least cosine distance d, where d lies below the threshold (Bai et al. 2021, arXiv 2106.03062).

    `kaggle`: the mean over generated images of the nearest real one; `torchmetrics`: over real ones of the nearest generated.
    For continuity only: a perfect copy has FID 0 and so the best score.
    """
    if direction not in ("kaggle", "torchmetrics"):
        raise MemControlError(f"mifid's direction is '{direction}'; allowed: kaggle, torchmetrics")
    distance, value = cosine_distance(real, generated, direction), fid(real, generated)
    if direction == "torchmetrics" and value <= 1e-8:
        return Estimate(0.0)
    return Estimate(value / (distance + 1e-14) if distance < threshold else float(value))


def cosine_distance(real, generated, direction: str = "kaggle") -> float:
    """Mean over one set of the least 1 - |cos| to the other."""
    x, y = unit(matrix(real, "real")), unit(matrix(generated, "generated"))
    return float((1 - np.abs(y @ x.T)).min(1 if direction == "kaggle" else 0).mean())


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

    found = {"component": [], "clique": []}
    for images in generations:
        graph = networkx.from_numpy_array(np.triu(tile_distances(images) < threshold, 1))
        found["component"].append(max(map(len, networkx.connected_components(graph))) >= least)
        found["clique"].append(max(map(len, networkx.find_cliques(graph))) >= least)
    return {name: share_of(np.array(hits)) for name, hits in found.items()}


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n (Wilson 1927)."""
    centre = share + NORMAL_95**2 / (2 * n)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / n + NORMAL_95**2 / (4 * n * n))
    total = 1 + NORMAL_95**2 / n
    return max(0.0, (centre - half) / total), min(1.0, (centre + half) / total)


@dataclass(frozen=True)
class Space:
    """Points to measure distances between: generated [N, D], train [T, D], holdout [H, D]; queries also as mirror images."""

    generated: tuple[np.ndarray, ...]
    train: np.ndarray
    holdout: np.ndarray
    held_queries: tuple[np.ndarray, ...]
    seed: int = 0

    @cached_property
    def to_train(self) -> tuple[np.ndarray, np.ndarray]:
        """Each generated image's distance to its nearest training image, and which it is: [N], [N]."""
        return first(*nearest_of(self.generated, self.train, 1))

    @cached_property
    def to_holdout(self) -> np.ndarray:
        return first(*nearest_of(self.generated, self.holdout, 1))[0]

    @cached_property
    def held_to_train(self) -> np.ndarray:
        return first(*nearest_of(self.held_queries, self.train, 1))[0]

    @cached_property
    def held_to_others(self) -> np.ndarray:
        """Each held-out image's distance to its nearest other held-out image: [H]."""
        distances, indices = nearest_of(self.held_queries, self.holdout, 2)
        own = indices == np.arange(len(indices))[:, None]
        return np.where(own[:, 0], distances[:, -1], distances[:, 0])


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
    for the held-out images, each left out of its own reference. A model that copies nothing has about 0.01.
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


def threshold_of(real: np.ndarray) -> float:
    """The ratio that 99 % of real images exceed."""
    return float(np.quantile(real, FALSE_POSITIVES, method="lower"))


def below_real(space: Space, real: np.ndarray) -> Estimate:
    return share_of(ratio(space.to_train[0], space.to_holdout) < threshold_of(real))


def space_of(generated, train, holdout, seed: int = 0) -> Space:
    held = matrix(holdout, "holdout", 2)
    return Space((matrix(generated, "generated"),), matrix(train, "train"), held, (held,), seed)


def memorization(generated, train, holdout, seed: int = 0) -> Estimate:
    """M, its standard deviation under permuted labels, and the p-value of M > 0.

    M is the mean over generated images of log(d(holdout) / d(train)), clipped to +-log 4, with references of equal size:
    the larger one is drawn down, five times. 0 where training images are no nearer than held-out ones, positive for
    copying. The null keeps the pooled reference and permutes which half is called train.
    """
    return memorization_in(space_of(generated, train, holdout, seed))


def memorization_in(space: Space) -> Estimate:
    n_train, n_holdout = len(space.train), len(space.holdout)
    m, pooled = min(n_train, n_holdout), np.concatenate([space.train, space.holdout])
    # Wide enough that each half of a draw has a neighbour in the list: 96 on average.
    distances, indices = nearest_of(space.generated, pooled, N_NEIGHBOURS * len(pooled) // (2 * m))
    distances = np.maximum(distances, 1e-3 * float(np.median(space.held_to_train)))
    n_draws = 1 if n_train == n_holdout else N_DRAWS
    values, null = [], []
    for draw in range(n_draws):
        rng = np.random.default_rng(seed_of(space.seed, "memorization", draw))
        rows = np.concatenate([rng.permutation(n_train)[:m], n_train + rng.permutation(n_holdout)[:m]])
        values.append(log_ratio(distances, labels(len(pooled), rows[:m], rows[m:])[indices]))
        for _ in range(N_PERMUTATIONS // n_draws):
            mixed = rng.permutation(rows)
            null.append(log_ratio(distances, labels(len(pooled), mixed[:m], mixed[m:])[indices]))
    value = float(np.mean(values))
    return Estimate(value, float(np.std(null)), p=(1 + sum(x >= value for x in null)) / (1 + len(null)))


TRAIN, HOLDOUT = 1, 2


def labels(n: int, train_rows: np.ndarray, holdout_rows: np.ndarray) -> np.ndarray:
    """Which half of a draw each pooled reference belongs to; 0 for those left out. int8 [n]."""
    found = np.zeros(n, np.int8)
    found[train_rows], found[holdout_rows] = TRAIN, HOLDOUT
    return found


def log_ratio(distances: np.ndarray, sides: np.ndarray) -> float:
    """Mean clipped log ratio, from each image's sorted neighbours [N, K] and the side that each is on [N, K]."""
    to_train, to_holdout = (first_distance(distances, sides == side) for side in (TRAIN, HOLDOUT))
    return float(np.clip(np.log(to_holdout / to_train), -CLIP, CLIP).mean())


def first_distance(distances: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The distance of the first chosen neighbour of each row, or of the last neighbour where none is chosen: [N]."""
    column = np.where(chosen.any(1), chosen.argmax(1), -1)
    return distances[np.arange(len(distances)), column]
