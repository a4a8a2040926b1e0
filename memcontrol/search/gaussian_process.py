"""Owns the model that the search learns: a Gaussian process for each objective over masks and their settings,
and the expected gain in hypervolume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtr

SQRT5 = math.sqrt(5)
# Log-normal priors (mean and sd of the log) in units of the objective's own spread: weights of the
# coordinates, signal, noise. A
# weight of 0.3 lets two masks that differ in one group share most of what is known of them.
# The share is that of the known errors' variance which tells trials apart: all have the same prompts and
# noise, and most of the error
# with them.
PRIORS = {
    "weight": (math.log(0.3), 1.5),
    "signal": (0.0, 1.0),
    "noise": (math.log(1e-3), 2.0),
    "share": (math.log(0.1), 1.5),
}
BOUNDS = (math.log(1e-6), math.log(1e3))
COMMON = ("signal", "noise", "share")
STARTS = (PRIORS["weight"][0], PRIORS["weight"][0] - 1.5)  # of the weights' logs
JITTER = 1e-9


def matern(squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matern 5/2 at squared distances, and its derivative by them (Rasmussen and Williams 2006, eq. 4.17)."""
    r = np.sqrt(squares)
    decay = np.exp(-SQRT5 * r)
    return (1 + SQRT5 * r + 5 / 3 * squares) * decay, -5 / 6 * (1 + SQRT5 * r) * decay


def squares_by_coordinate(a: np.ndarray, b: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Squared distances of points [N, F] and [M, F] in each coordinate: [C, N, M]. `owner` [F] says whose
    column it is."""
    squares = np.zeros((owner.max() + 1, len(a), len(b)))
    for column, coordinate in enumerate(owner):
        squares[coordinate] += (a[:, None, column] - b[None, :, column]) ** 2
    return squares


def squared_distances(a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Squared distances [N, M] of points whose columns are scaled first."""
    a, b = a * scale, b * scale
    return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0.0)


@dataclass(frozen=True)
class Process:
    """A Gaussian process that was conditioned on its points [N, F]; the weights are those of the columns."""

    points: np.ndarray
    scale: np.ndarray
    signal: float
    factor: tuple
    alpha: np.ndarray
    centre: float
    spread: float

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [M] of the objective itself, without the noise of measuring it."""
        k = self.signal * matern(squared_distances(points, self.points, self.scale))[0]  # [M, N]
        left = solve_triangular(self.factor[0], k.T, lower=True)
        variance = np.maximum(self.signal - (left**2).sum(0), 1e-12)
        return self.centre + self.spread * (k @ self.alpha), self.spread * np.sqrt(variance)

    def contrast(self, points: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
        """Mean and standard deviation of a weighted sum of the objective's values at points [M, F], whose
        weights [M] add to 0."""
        k = self.signal * matern(squared_distances(points, self.points, self.scale))[0]
        left = solve_triangular(self.factor[0], k.T @ weights, lower=True)
        prior = self.signal * weights @ matern(squared_distances(points, points, self.scale))[0] @ weights
        return self.spread * float(weights @ k @ self.alpha), self.spread * math.sqrt(
            max(prior - left @ left, 0.0)
        )


def negative_log_posterior(
    logs: np.ndarray, y: np.ndarray, known: np.ndarray, own: np.ndarray, squares: np.ndarray
) -> tuple[float, np.ndarray]:
    """Of hyperparameters (the logs of C weights, of signal, noise and share) given values [N] whose known
    variances are `known`, and `own` those that no two trials share, and its gradient (Rasmussen and Williams
    2006, eq. 5.8 and 5.9)."""
    means, sds = (
        np.array([PRIORS["weight"][i]] * len(squares) + [PRIORS[name][i] for name in COMMON]) for i in (0, 1)
    )
    weights, (signal, noise, share), identity = (
        np.exp(logs[: -len(COMMON)]),
        np.exp(logs[-len(COMMON) :]),
        np.eye(len(y)),
    )
    k, slope = matern(np.tensordot(weights, squares, 1))
    try:
        factor = cho_factor(signal * k + np.diag(share * known + own + noise + JITTER), lower=True)
    except np.linalg.LinAlgError:
        return 1e25, np.zeros_like(logs)
    alpha = cho_solve(factor, y)
    outer = cho_solve(factor, identity) - np.outer(alpha, alpha)
    by_weight = 0.5 * signal * weights * np.tensordot(squares, outer * slope, 2)
    gradient = np.array(
        [
            *by_weight,
            0.5 * signal * (outer * k).sum(),
            0.5 * noise * np.trace(outer),
            0.5 * share * np.diag(outer) @ known,
        ]
    )
    off = (logs - means) / sds
    return 0.5 * y @ alpha + np.log(np.diag(factor[0])).sum() + 0.5 * (off**2).sum(), gradient + off / sds


def fit_process(
    points: np.ndarray,
    values: np.ndarray,
    errors: np.ndarray,
    own_errors: np.ndarray,
    pending: np.ndarray,
    owner: np.ndarray,
) -> Process:
    """The process of values [N] with known standard errors [N], of which a share is learned, and errors of
    their own [N], which count whole (both 0 where unknown; a common noise is learned beside them), its
    hyperparameters at the posterior's mode. It believes its own mean at the points that are pending [P, F],
    so that the next draw goes elsewhere (the kriging believer of Ginsbourger et al. 2010)."""
    centre, spread = float(np.mean(values)), float(np.std(values)) or 1.0
    y, known, own, squares = (
        (values - centre) / spread,
        (errors / spread) ** 2,
        (own_errors / spread) ** 2,
        squares_by_coordinate(points, points, owner),
    )
    starts = [np.array([weight] * len(squares) + [PRIORS[name][0] for name in COMMON]) for weight in STARTS]
    bounds = [BOUNDS] * (len(squares) + 2) + [(BOUNDS[0], 0.0)]
    ends = [
        minimize(
            negative_log_posterior,
            start,
            (y, known, own, squares),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
        )
        for start in starts
    ]
    *weights, signal, noise, share = np.exp(min(ends, key=lambda end: end.fun).x)
    variances = share * known + own + noise
    found = condition_process(points, y, variances, np.sqrt(np.array(weights)[owner]), signal, centre, spread)
    if not len(pending):
        return found
    believed = (found.predict(pending)[0] - centre) / spread
    together = np.concatenate([variances, np.full(len(pending), noise)])
    return condition_process(
        np.concatenate([points, pending]),
        np.concatenate([y, believed]),
        together,
        found.scale,
        signal,
        centre,
        spread,
    )


def condition_process(
    points: np.ndarray,
    y: np.ndarray,
    noise: np.ndarray,
    scale: np.ndarray,
    signal: float,
    centre: float,
    spread: float,
) -> Process:
    covariance = signal * matern(squared_distances(points, points, scale))[0] + np.diag(noise + JITTER)
    factor = cho_factor(covariance, lower=True)
    return Process(points, scale, signal, factor, cho_solve(factor, y), centre, spread)


def expected_gain(
    means: Sequence[np.ndarray], sds: Sequence[np.ndarray], front: np.ndarray, reference: np.ndarray
) -> np.ndarray:
    """Expected hypervolume improvement [M] of two minimised objectives over a front [N, 2] that lies below
    the reference [2]: exact for independent normal posteriors (Emmerich, Deutz and Klinkenberg 2011)."""
    front = front[np.argsort(front[:, 0])]
    # strips of the first objective
    lower, upper = np.concatenate([[-np.inf], front[:, 0]]), np.concatenate([front[:, 0], [reference[0]]])
    height = np.concatenate([[reference[1]], front[:, 1]])

    def below(bound: np.ndarray, i: int) -> np.ndarray:
        """The mean of how far objective i lies below each bound: [M, strips]."""
        mean, sd = means[i][:, None], sds[i][:, None]
        z = (bound[None] - mean) / sd
        with np.errstate(invalid="ignore"):
            found = sd * (z * ndtr(z) + np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi))
        return np.where(np.isneginf(bound)[None], 0.0, found)

    return ((below(upper, 0) - below(lower, 0)) * below(height, 1)).sum(1)
