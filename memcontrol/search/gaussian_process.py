"""Owns the model that the search learns: a Gaussian process for each objective over masks and their settings,
and the expected gain in hypervolume.

Notations (Rasmussen and Williams 2006, chapters 2, 4 and 5)

X: Points of N trials, as the model sees them, [N, F]; X_new: points that are asked about, [M, F].
owner: Of each of the F columns, which of C coordinates it belongs to, [F].
w: Weights of the coordinates, [C]; a column is scaled by the root of its coordinate's, [F].
D: Squared distances of the points in each coordinate, [C, N, N]; r^2 = sum of w D over coordinates.
k, dk: Matern 5/2 of r, and its derivative by r^2, [N, N] both.
y: Values less their mean, in units of their standard deviation, [N].
v_known: Known variances of y, [N]: all trials have the same prompts and noise, and most of this error with
    them, so that only a share of it tells them apart.
v_own: Known variances of y that no two trials share, and which count whole, [N].
signal, noise, share: Variance of what is modelled, variance of a noise common to all, share of v_known.
K = signal k + diag(share v_known + v_own + noise): The covariance of y, [N, N]; L: its Cholesky factor.
alpha: K^-1 y, [N]; W: K^-1 - alpha alpha', [N, N].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtr

_SQRT5 = math.sqrt(5)
# Log-normal priors: mean and sd of the log. A weight of 0.3 lets two masks that differ in one group share
# most of what is known of them.
_PRIORS = {
    "weight": (math.log(0.3), 1.5),
    "signal": (0.0, 1.0),
    "noise": (math.log(1e-3), 2.0),
    "share": (math.log(0.1), 1.5),
}
_BOUNDS = (math.log(1e-6), math.log(1e3))
_COMMON = ("signal", "noise", "share")
_STARTS = (_PRIORS["weight"][0], _PRIORS["weight"][0] - 1.5)  # of the weights' logs
_JITTER = 1e-9


def _matern(r2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matern 5/2 at squared distances, and its derivative by them (Rasmussen and Williams 2006, eq. 4.17)."""
    r = np.sqrt(r2)
    decay = np.exp(-_SQRT5 * r)
    return (1 + _SQRT5 * r + 5 / 3 * r2) * decay, -5 / 6 * (1 + _SQRT5 * r) * decay


def squares_by_coordinate(a: np.ndarray, b: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Squared distances of points [N, F] and [M, F] in each coordinate: [C, N, M]. `owner` [F] says whose
    column it is."""
    squares = np.zeros((owner.max() + 1, len(a), len(b)))
    for column, coordinate in enumerate(owner):
        squares[coordinate] += (a[:, None, column] - b[None, :, column]) ** 2
    return squares


def _squared_distances(a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Squared distances [N, M] of points whose columns are scaled first."""
    a, b = a * scale, b * scale
    return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0.0)


@dataclass(frozen=True)
class Process:
    """A Gaussian process that was conditioned on its points X. `scale` [F] is that of their columns, `factor`
    is L; `centre` and `spread` are the mean and standard deviation of the values."""

    points: np.ndarray
    scale: np.ndarray
    signal: float
    factor: tuple
    alpha: np.ndarray
    centre: float
    spread: float

    def predict(self, X_new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [M] of the objective itself, without the noise of measuring it (eq.
        2.25 and 2.26)."""
        k_new = self.signal * self.correlate(X_new, self.points)  # [M, N]
        v = solve_triangular(self.factor[0], k_new.T, lower=True)  # [N, M]
        variance = np.maximum(self.signal - (v**2).sum(0), 1e-12)
        return self.centre + self.spread * (k_new @ self.alpha), self.spread * np.sqrt(variance)

    def contrast(self, X_new: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
        """Mean and standard deviation of a weighted sum of the objective's values at points [M, F], whose
        weights [M] add to 0."""
        k_new = self.signal * self.correlate(X_new, self.points)  # [M, N]
        v = solve_triangular(self.factor[0], k_new.T @ weights, lower=True)  # [N]
        prior = self.signal * weights @ self.correlate(X_new, X_new) @ weights
        variance = max(prior - v @ v, 0.0)
        return self.spread * float(weights @ k_new @ self.alpha), self.spread * math.sqrt(variance)

    def correlate(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Correlations of the objective at points [M, F] and [N, F]: [M, N]."""
        return _matern(_squared_distances(a, b, self.scale))[0]


def negative_log_posterior(
    logs: np.ndarray, y: np.ndarray, v_known: np.ndarray, v_own: np.ndarray, D: np.ndarray
) -> tuple[float, np.ndarray]:
    """Of hyperparameters, the logs [C + 3] of w, signal, noise and share, given y; and its gradient
    (Rasmussen and Williams 2006, eq. 5.8 and 5.9)."""
    w, (signal, noise, share) = np.exp(logs[: -len(_COMMON)]), np.exp(logs[-len(_COMMON) :])
    k, dk = _matern(np.tensordot(w, D, 1))  # [N, N] both
    try:
        L = cho_factor(signal * k + np.diag(share * v_known + v_own + noise + _JITTER), lower=True)
    except np.linalg.LinAlgError:
        return 1e25, np.zeros_like(logs)
    alpha = cho_solve(L, y)
    W = cho_solve(L, np.eye(len(y))) - np.outer(alpha, alpha)
    gradient = np.array(  # [C + 3]
        [
            *(0.5 * signal * w * np.tensordot(D, W * dk, 2)),
            0.5 * signal * (W * k).sum(),
            0.5 * noise * np.trace(W),
            0.5 * share * np.diag(W) @ v_known,
        ]
    )
    means, sds = np.array([_PRIORS["weight"]] * len(D) + [_PRIORS[name] for name in _COMMON]).T
    z = (logs - means) / sds
    value = 0.5 * y @ alpha + np.log(np.diag(L[0])).sum() + 0.5 * (z**2).sum()
    return value, gradient + z / sds


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
    y, v_known, v_own = (values - centre) / spread, (errors / spread) ** 2, (own_errors / spread) ** 2
    mode = _find_mode(y, v_known, v_own, squares_by_coordinate(points, points, owner))
    *w, signal, noise, share = np.exp(mode)
    variances = share * v_known + v_own + noise
    process = condition_process(points, y, variances, np.sqrt(np.array(w)[owner]), signal, centre, spread)
    if not len(pending):
        return process
    believed = (process.predict(pending)[0] - centre) / spread
    return condition_process(
        np.concatenate([points, pending]),
        np.concatenate([y, believed]),
        np.concatenate([variances, np.full(len(pending), noise)]),
        process.scale,
        signal,
        centre,
        spread,
    )


def _find_mode(y: np.ndarray, v_known: np.ndarray, v_own: np.ndarray, D: np.ndarray) -> np.ndarray:
    """The most probable hyperparameters' logs [C + 3], from two starts."""
    common = [_PRIORS[name][0] for name in _COMMON]
    bounds = [_BOUNDS] * (len(D) + 2) + [(_BOUNDS[0], 0.0)]
    ends = [
        minimize(
            negative_log_posterior,
            np.array([weight] * len(D) + common),
            (y, v_known, v_own, D),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
        )
        for weight in _STARTS
    ]
    return min(ends, key=lambda end: end.fun).x


def condition_process(
    points: np.ndarray,
    y: np.ndarray,
    noise: np.ndarray,
    scale: np.ndarray,
    signal: float,
    centre: float,
    spread: float,
) -> Process:
    """Of y and the variances of its noise, [N] both."""
    K = signal * _matern(_squared_distances(points, points, scale))[0] + np.diag(noise + _JITTER)
    L = cho_factor(K, lower=True)
    return Process(points, scale, signal, L, cho_solve(L, y), centre, spread)


def expected_gain(
    means: Sequence[np.ndarray], sds: Sequence[np.ndarray], front: np.ndarray, reference: np.ndarray
) -> np.ndarray:
    """Expected hypervolume improvement [M] of two minimised objectives over a front [N, 2] that lies below
    the reference [2]: exact for independent normal posteriors (Emmerich, Deutz and Klinkenberg 2011)."""
    front = front[np.argsort(front[:, 0])]
    # strips of the first objective between the front's points, and the height below which each gains: [N + 1]
    lower, upper = np.concatenate([[-np.inf], front[:, 0]]), np.concatenate([front[:, 0], [reference[0]]])
    height = np.concatenate([[reference[1]], front[:, 1]])

    def below(bound: np.ndarray, i: int) -> np.ndarray:
        """The mean of how far objective i lies below each bound: [M, strips]."""
        mean, sd = means[i][:, None], sds[i][:, None]
        z = (bound[None] - mean) / sd
        with np.errstate(invalid="ignore"):  # at the bound that is not finite
            gap = sd * (z * ndtr(z) + np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi))
        return np.where(np.isneginf(bound)[None], 0.0, gap)

    return ((below(upper, 0) - below(lower, 0)) * below(height, 1)).sum(1)
