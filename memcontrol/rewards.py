"""Owns the rewards: quality and memorization as pure functions of features; all are minimised."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Views:
    """One set of images under the two descriptors: pixels [N, 3072] with their mirror images, and extractor features [N, D]."""

    pixels: np.ndarray
    mirrored: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class Evidence:
    """All that rewards may look at: generated images, the training set, and as references images never trained on."""

    generated: Views
    train: Views
    holdout: Views
    seed: int = 0
    trained_fraction: float = 0.0
    cache: dict = field(default_factory=dict, compare=False)

    def space(self, name: str) -> Space:
        if name not in self.cache:
            self.cache[name] = (pixel_space if name == "pixels" else feature_space)(self)
        return self.cache[name]


@dataclass(frozen=True)
class Space:
    """Points to measure distances between: generated [N, D], train [T, D], holdout [H, D]; queries also as mirror images."""

    generated: tuple[np.ndarray, ...]
    train: np.ndarray
    holdout: np.ndarray
    held_queries: tuple[np.ndarray, ...]
    seed: int

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


def pixel_space(evidence: Evidence) -> Space:
    generated, held = evidence.generated, evidence.holdout
    return Space(
        (generated.pixels, generated.mirrored), evidence.train.pixels, held.pixels, (held.pixels, held.mirrored), evidence.seed
    )  # fmt: skip


def feature_space(evidence: Evidence) -> Space:
    """Features centred on the mean of both references and scaled to unit length (cosine geometry)."""
    centre = (evidence.train.features.mean(0) + evidence.holdout.features.mean(0)) / 2
    generated, train, held = (unit(x.features - centre) for x in (evidence.generated, evidence.train, evidence.holdout))
    return Space((generated,), train, held, (held,), evidence.seed)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def frechet_distance(generated: np.ndarray, reference: np.ndarray) -> float:
    """Frechet distance of two feature sets [N, D], [M, D] (Heusel et al. 2017, arXiv 1706.08500), float64.

    The trace of the root is a nuclear norm, real whatever the ranks, so nothing imaginary appears where N <= D.
    """
    x, y = (np.asarray(z, np.float64) for z in (generated, reference))
    if len(x) < 2 or len(y) < 2:
        raise MemControlError(f"fid needs at least 2 images on each side and got {len(x)} and {len(y)}")
    a, b = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y))
    shift = np.square(x.mean(0) - y.mean(0)).sum()
    factors = (np.linalg.qr(z, mode="r") for z in (a, b))  # A'A = R'R, at most [D, D]
    root = np.linalg.norm(next(factors) @ next(factors).T, "nuc")  # tr((A'A B'B)^(1/2)) = sum of singular values of A B'
    return float(max(shift + np.square(a).sum() + np.square(b).sum() - 2 * root, 0.0))


def kernel_distance(generated: np.ndarray, reference: np.ndarray) -> float:
    """KID: unbiased squared MMD with kernel (x.y/d + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401), over all rows.

    Features are first divided by the reference's root mean square, since the kernel is not scale-free.
    """
    scale = math.sqrt(np.square(reference, dtype=np.float64).mean())
    x, y = (np.asarray(z, np.float64) / scale for z in (generated, reference))
    xx, yy, xy = (np.power(p @ q.T / x.shape[1] + 1, 3) for p, q in ((x, x), (y, y), (x, y)))
    n, m = len(x), len(y)
    return float((xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * xy.mean())


def mq(generated: np.ndarray, train: np.ndarray, threshold: float = 0.5, k: int = 50) -> int:
    """IET-AGC's MQ: how many generated images have d1 / mean(d1 .. dk) below the threshold (arXiv 2407.15328, section 4.1).

    d1 .. dk are squared distances of an image [N, D] to its k nearest training images [T, D], the nearest included; in pixels
    of 0..1 as published. Squares make 0.5 an ordinary distance ratio of some 0.7.
    """
    squares = nearest(generated, train, min(k, len(train)))[0] ** 2
    return int((squares[:, 0] / np.maximum(squares.mean(1), 1e-300) < threshold).sum())


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n (Wilson 1927)."""
    centre = share + NORMAL_95**2 / (2 * n)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / n + NORMAL_95**2 / (4 * n * n))
    total = 1 + NORMAL_95**2 / n
    return max(0.0, (centre - half) / total), min(1.0, (centre + half) / total)


def copy_rate(space: Space) -> float:
    """The share of generated images nearer to a training image, relative to held-out ones, than 99 % of real images are.

    The threshold is the 1 % quantile of d(train)/d(holdout) for real held-out images, each left out of its own reference.
    """
    threshold = np.quantile(ratio(space.held_to_train, space.held_to_others), FALSE_POSITIVES, method="lower")
    return float((ratio(space.to_train[0], space.to_holdout) < threshold).mean())


def ratio(to_train: np.ndarray, to_holdout: np.ndarray) -> np.ndarray:
    return to_train / np.maximum(to_holdout, 1e-12)


def memorization(space: Space) -> tuple[float, float, float]:
    """M, its standard deviation under permuted labels, and the p-value of M > 0.

    M is the mean over generated images of log(d(holdout) / d(train)), clipped to +-log 4, with references of equal size:
    the larger one is drawn down, five times. 0 where training images are no nearer than held-out ones, positive for
    copying. The null keeps the pooled reference and permutes which half is called train.
    """
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
    return value, float(np.std(null)), (1 + sum(x >= value for x in null)) / (1 + len(null))


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


REWARDS: dict[str, Callable[[Evidence], dict[str, float]]] = {}


def reward(name: str):
    """Registers a function of the evidence; it gives its own value under its name, and what belongs beside it."""

    def register(function):
        REWARDS[name] = function
        return function

    return register


@reward("fid")
def fid(evidence: Evidence) -> dict[str, float]:
    return {"fid": frechet_distance(evidence.generated.features, evidence.holdout.features)}


@reward("kid")
def kid(evidence: Evidence) -> dict[str, float]:
    return {"kid": kernel_distance(evidence.generated.features, evidence.holdout.features)}


@reward("memorization")
def memorization_reward(evidence: Evidence) -> dict[str, float]:
    """The larger of M in pixels and M in features, and at least 0: below 0 is noise, never "better"."""
    found = {name: memorization(evidence.space(name)) for name in ("pixels", "features")}
    worst = max(found, key=lambda name: found[name][0])
    value, deviation, p = found[worst]
    parts = {f"memorization_{name}": result[0] for name, result in found.items()}
    return {"memorization": max(value, 0.0), "memorization_sd": deviation, "memorization_p": p, **parts}


@reward("copy_rate")
def copy_rate_reward(evidence: Evidence) -> dict[str, float]:
    share = copy_rate(evidence.space("pixels"))
    low, high = wilson(share, len(evidence.generated.pixels))
    beside = {"copy_rate_features": copy_rate(evidence.space("features")), "copy_rate_line": FALSE_POSITIVES}
    return {"copy_rate": share, "copy_rate_low": low, "copy_rate_high": high, **beside}


@reward("nearest_distance")
def nearest_distance(evidence: Evidence) -> dict[str, float]:
    """Average minimum pixel distances, for the eye only: no objective, since noise has the largest."""
    space = evidence.space("pixels")
    return {
        "amd_train": float(space.to_train[0].mean()),
        "amd_holdout": float(space.to_holdout.mean()),
        "amd_holdout_train": float(space.held_to_train.mean()),
    }


@reward("trained_fraction")
def trained_fraction(evidence: Evidence) -> dict[str, float]:
    return {"trained_fraction": evidence.trained_fraction}


COSTS = ("step_gflops", "memory_mib")  # known before training, by memcontrol.cost
OBJECTIVES = ("fid", "kid", "memorization", "copy_rate", "trained_fraction", *COSTS)


def score(evidence: Evidence) -> dict[str, float]:
    """Every registered reward of one fine-tuned model."""
    return {name: value for function in REWARDS.values() for name, value in function(evidence).items()}


def check_rewards(objectives: tuple[str, ...], n_samples: int, n_features: int) -> None:
    """Raises MemControlError for an unknown objective or too few samples for the FID to rank by anything but chance."""
    for name in objectives:
        if name not in OBJECTIVES:
            raise MemControlError(f"rewards.objectives: '{name}' is unknown; allowed: {', '.join(OBJECTIVES)}")
    if len(set(objectives)) < len(objectives):
        raise MemControlError(f"rewards.objectives: {', '.join(objectives)} names one twice")
    if "fid" in objectives and n_samples < 4 * n_features:
        raise MemControlError(
            f"rewards.n_samples is {n_samples}: fid over {n_features} features needs at least {4 * n_features}; raise it, or use kid"
        )
