"""Owns the rewards of quality: pure functions of feature matrices [n, d], numpy or torch.

Every value is an Estimate, which knows its error or interval. Distances are Euclidean, sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from memcontrol.core.errors import MemControlError
from memcontrol.core.estimate import Estimate, estimate_from_contributions, estimate_share
from memcontrol.data.features import (
    blockwise_mean,
    check_matrix,
    nearest_others,
    pairwise_distances,
    refuse_unlike_widths,
    split_blocks,
    unit_rows,
)
from memcontrol.scoring.published import PRESETS


@dataclass(frozen=True)
class Gaussian:
    """Mean [d] and a factor R of the covariance R'R of a set of features: what fid needs of a reference, made
    once."""

    mean: np.ndarray
    factor: np.ndarray  # [min(n, d), d]

    @property
    def trace(self) -> float:
        return float(np.square(self.factor).sum())

    @cached_property
    def components(self) -> np.ndarray:
        """Principal directions, the first ones first: [d, d]."""
        return np.linalg.eigh(self.factor.T @ self.factor)[1][:, ::-1]


def fit_gaussian(features) -> Gaussian:
    """Of features [n, d], n >= 2, block by block: memory beyond them is that of one block. Raises
    MemControlError."""
    if isinstance(features, Gaussian):
        return features
    rows = check_matrix(features, "a feature set of fid", 2, dtype=None)
    mean, factor = blockwise_mean(rows), np.empty((0, rows.shape[1]))
    for block in split_blocks(rows):
        stacked = np.concatenate([factor, (block - mean) / math.sqrt(len(rows) - 1)])
        # numpy's stubs know no mode that gives R alone
        factor = np.linalg.qr(stacked, mode="r")  # type: ignore[assignment]
    return Gaussian(mean, factor)


def fid(real, generated) -> Estimate:
    """Frechet distance of features [N, d] and [M, d], or their Gaussians (Heusel et al. 2017, arXiv
    1706.08500, eq. 6).

    |mu - mu'|^2 + tr S + tr S' - 2 tr (S S')^(1/2), covariances with n - 1. The trace of the root is a
    nuclear norm of the factors' product: real whatever the ranks, so nothing imaginary appears where n <= d.
    Biased upward, the more the fewer images; the error is that of sampling, by the delta method, and leaves
    the bias out. It is known where `generated` is features.
    """
    x, rows = fit_gaussian(real), None
    if isinstance(generated, Gaussian):
        mean, factor = generated.mean, generated.factor
    else:
        rows = check_matrix(generated, "a feature set of fid", 2)
        mean = rows.mean(0)
        centred = rows - mean
        factor = centred / math.sqrt(len(rows) - 1)
    if len(x.mean) != len(mean):
        raise MemControlError(
            f"fid compares features of {len(x.mean)} and of {len(mean)} dimensions; use one "
            "extractor for both"
        )
    shift = mean - x.mean
    trace, diagonal = _root_trace(factor @ x.factor.T)
    value = max(float(np.square(shift).sum() + np.square(factor).sum()) + x.trace - 2 * trace, 0.0)
    if rows is None:
        return Estimate(value)
    # An image z from the mean adds |z|^2 - z'Tz + 2 (mu' - mu)z, T being the optimal transport onto the real
    # Gaussian.
    return estimate_from_contributions(
        value, np.square(centred).sum(1) - (len(rows) - 1) * diagonal + 2 * centred @ shift
    )


def _root_trace(product: np.ndarray) -> tuple[float, np.ndarray]:
    """Trace and diagonal [n] of (M M')^(1/2), for M = [n, m].

    By eigenvectors of the smaller Gram matrix, faster than singular values. Their roots are taken as lengths
    |M v|: the root of an eigenvalue that is zero but for rounding would be wrong by the eighth digit.
    """
    wide = product.shape[0] <= product.shape[1]
    _, vectors = np.linalg.eigh(product @ product.T if wide else product.T @ product)
    images = product.T @ vectors if wide else product @ vectors  # [m, n] or [n, m]
    roots = np.linalg.norm(images, axis=0)
    if wide:
        return float(roots.sum()), np.square(vectors) @ roots
    return float(roots.sum()), np.square(images) @ np.divide(
        1.0, roots, out=np.zeros_like(roots), where=roots > 0
    )


def fd_pca(real, generated, k: int = 64) -> Estimate:
    """Frechet distance on the first k principal components of the real features, or of their Gaussian: ranks
    with far fewer images than all d."""
    x = fit_gaussian(real)
    first = x.components[:, :k]
    return fid(Gaussian(x.mean @ first, x.factor @ first), check_matrix(generated, "generated", 2) @ first)


def kid(real, generated, scale: float = 1.0, real_groups: Sequence[str] | None = None) -> Estimate:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 over all rows, its error by the jackknife
    (Binkowski et al. 2018, arXiv 1801.01401), which leaves out one of the `real_groups` [N] at a time. Values
    a little below 0 are right. `scale` divides the features first: the kernel is not scale-free."""
    x, y = check_matrix(real, "real", 3) / scale, check_matrix(generated, "generated", 3) / scale
    refuse_unlike_widths(x, y)
    n, m = len(x), len(y)
    if real_groups is not None and len(real_groups) != n:
        raise MemControlError(
            f"real_groups are {len(real_groups)} names for {n} images; give one for each image"
        )
    xx, yy, xy, yx = (_kernel_sums(p, q) for p, q in ((x, x), (y, y), (x, y), (y, x)))
    for points, sums in ((x, xx), (y, yy)):
        sums -= _square_kernel(points)
    within_x, within_y, across = xx.sum() / (n * (n - 1)), yy.sum() / (m * (m - 1)), xy.sum() / (n * m)
    # what is left when one row, or one group, is left out, for each
    groups = _number_groups(n, real_groups)
    n_left = n - np.bincount(groups)
    without_xx = xx.sum() - 2 * np.bincount(groups, xx) + _sum_pairs_of_groups(x, groups)
    without_x = without_xx / (n_left * (n_left - 1)) - 2 * (xy.sum() - np.bincount(groups, xy)) / (n_left * m)
    without_y = (yy.sum() - 2 * yy) / ((m - 1) * (m - 2)) - 2 * (xy.sum() - yx) / (n * (m - 1))
    variance = (len(without_x) - 1) * without_x.var() + (m - 1) * without_y.var()
    value = float(within_x + within_y - 2 * across)
    contributions = value + (m - 1) * (without_y.mean() - without_y)  # [M]
    return Estimate(value, math.sqrt(variance), contributions=contributions)


def _square_kernel(x: np.ndarray) -> np.ndarray:
    """Of each image with itself: [N]."""
    return np.power(np.square(x).sum(1) / x.shape[1] + 1, 3)


def _number_groups(n: int, names: Sequence[str] | None) -> np.ndarray:
    """The number of each row's group [n]: each its own where there are no names, or where without one of them
    less than two rows would be left."""
    if names is None:
        return np.arange(n)
    groups = np.unique(list(names), return_inverse=True)[1]
    return groups if n - np.bincount(groups).max() > 1 else np.arange(n)


def _sum_pairs_of_groups(x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The kernel's sum over all ordered pairs of different rows of each group [G]."""
    sizes = np.bincount(groups)
    sums = np.zeros(len(sizes))
    for group in np.flatnonzero(sizes > 1):
        own = x[groups == group]
        sums[group] = _kernel_sums(own, own).sum() - _square_kernel(own).sum()
    return sums


def _kernel_sums(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of each row of x, the sum of (x.y / d + 1)^3 over all of y, in blocks: [N]."""
    sums = [np.power(block @ y.T / x.shape[1] + 1, 3).sum(1) for block in split_blocks(x, 256)]
    return np.concatenate(sums)


def prdc(real, generated, k: int = 5) -> dict[str, Estimate]:
    """Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem et al.
    2020, arXiv 2002.09797).

    A point's ball reaches to its k-th nearest other point of its own set; being inside means nearer than
    that.
    """
    if k < 1:
        raise MemControlError(f"prdc's k is {k}; give the number of neighbours, 1 or more")
    x, y = check_matrix(real, "real", k + 1), check_matrix(generated, "generated", k + 1)
    refuse_unlike_widths(x, y)
    radius_x, radius_y = (nearest_others(points, k)[:, -1] for points in (x, y))
    across = pairwise_distances(x, y)  # [N, M]
    inside = across < radius_x[:, None]
    return {
        "precision": estimate_share(np.any(inside, 0)),
        "recall": estimate_share(np.any(across < radius_y[None], 1)),
        "density": Estimate(float(inside.sum(0).mean() / k)),
        "coverage": estimate_share(across.min(1) < radius_x),
    }


def mifid(
    real,
    generated,
    direction: str = "kaggle",
    threshold: float = PRESETS["memcontrol2025"]["mifid_threshold"],
    frechet: float | None = None,
) -> Estimate:
    """FID divided by the mean least cosine distance d, where d lies below the threshold (Bai et al. 2021,
    arXiv 2106.03062).

    `kaggle`: the mean over generated images of the nearest real one; `torchmetrics`: over real ones of the
    nearest generated. For continuity only: a perfect copy has FID 0 and so the best score. `frechet` is the
    sets' FID, where it is known already.
    """
    if direction not in ("kaggle", "torchmetrics"):
        raise MemControlError(f"mifid's direction is '{direction}'; allowed: kaggle, torchmetrics")
    d = cosine_distance(real, generated, direction)
    value = float(fid(real, generated)) if frechet is None else frechet
    if direction == "torchmetrics" and value <= 1e-8:
        return Estimate(0.0)
    return Estimate(value / (d + 1e-14) if d < threshold else value)


def cosine_distance(real, generated, direction: str = "kaggle") -> float:
    """Mean over one set of the least 1 - |cos| to the other."""
    x, y = check_matrix(real, "real", dtype=None), unit_rows(check_matrix(generated, "generated"))
    refuse_unlike_widths(x, y)
    blocks = [1 - np.abs(y @ unit_rows(block.astype(np.float64)).T) for block in split_blocks(x, 1024)]
    if direction == "kaggle":
        least = np.min([block.min(1) for block in blocks], axis=0)  # [M], of generated images
    else:
        least = np.concatenate([block.min(0) for block in blocks])  # [N], of real ones
    return float(least.mean())


def clip_score(image_embeddings, text_embeddings) -> Estimate:
    """100 times the mean cosine of each image with its caption, at least 0 each (Hessel et al. 2021, arXiv
    2104.08718, without its factor of 2.5): embeddings [n, d] of one CLIP model, row by row."""
    x = unit_rows(check_matrix(image_embeddings, "image embeddings", 2))
    y = unit_rows(check_matrix(text_embeddings, "text embeddings", 2))
    if x.shape != y.shape:
        raise MemControlError(
            f"clip_score compares images and captions row by row and got {list(x.shape)} and {list(y.shape)}"
        )
    scores = 100 * np.maximum((x * y).sum(1), 0)
    return Estimate(float(scores.mean()), float(scores.std(ddof=1) / math.sqrt(len(scores))))
