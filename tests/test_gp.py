"""The model of the rewards against its definition: dense formulas, finite differences, Monte Carlo."""

import math

import numpy as np
import pytest
from scipy.optimize import check_grad
from scipy.stats import multivariate_normal

from memcontrol.search.gaussian_process import (
    condition_process,
    expected_gain,
    fit_process,
    negative_log_posterior,
    squares_by_coordinate,
)

OWNER = np.array([0, 1, 2, 2, 3])  # three coordinates of one column, and one of two


def points(n, seed=0):
    return np.random.default_rng(seed).random((n, len(OWNER)))


def kernel(a, b, scale, signal):
    """Matern 5/2 by its definition, pair by pair."""
    r = np.array([[math.sqrt(sum(((x - y) * scale) ** 2)) for y in b] for x in a])
    return signal * (1 + math.sqrt(5) * r + 5 * r**2 / 3) * np.exp(-math.sqrt(5) * r)


def test_predictions_are_the_conditional_normal_distribution():
    """Of the joint distribution of what was seen and what is asked, by its covariance's blocks."""
    seen, asked, rng = points(9), points(4, 1), np.random.default_rng(2)
    y, noise, scale, signal = rng.normal(size=9), rng.random(9) / 5, rng.random(len(OWNER)) + 0.3, 1.7
    mean, sd = condition_process(seen, y, noise, scale, signal, 3.0, 2.0).predict(asked)
    inverse, cross = (
        np.linalg.inv(kernel(seen, seen, scale, signal) + np.diag(noise)),
        kernel(asked, seen, scale, signal),
    )
    assert np.allclose(mean, 3 + 2 * cross @ inverse @ y, atol=1e-6)
    assert np.allclose(
        sd, 2 * np.sqrt(np.diag(kernel(asked, asked, scale, signal) - cross @ inverse @ cross.T)), atol=1e-6
    )


def test_the_posterior_and_its_gradient():
    seen, rng = points(8), np.random.default_rng(1)
    y, known, own, logs = rng.normal(size=8), rng.random(8) / 10, rng.random(8) / 5, rng.normal(size=7) - 1
    squares = squares_by_coordinate(seen, seen, OWNER)
    covariance = kernel(seen, seen, np.exp(logs[:-3])[OWNER] ** 0.5, math.exp(logs[-3])) + np.diag(
        math.exp(logs[-1]) * known + own + math.exp(logs[-2])
    )
    likelihood = multivariate_normal(np.zeros(8), covariance).logpdf(y)
    centred = (logs - [*[math.log(0.3)] * 4, 0, math.log(1e-3), math.log(0.1)]) / [*[1.5] * 4, 1, 2, 1.5]
    expected = -likelihood - 4 * math.log(2 * math.pi) + (centred**2).sum() / 2
    assert negative_log_posterior(logs, y, known, own, squares)[0] == pytest.approx(expected, rel=1e-6)
    error = check_grad(
        lambda x: negative_log_posterior(x, y, known, own, squares)[0],
        lambda x: negative_log_posterior(x, y, known, own, squares)[1],
        logs,
    )
    assert error < 1e-4


def test_what_matters_is_learned_and_noise_is_not():
    """Of five columns only the first bears on the values; one value has a large known error, and is not
    believed."""
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 2, (40, len(OWNER))).astype(float)
    values, errors = 3 * seen[:, 0] + rng.normal(0, 0.05, 40), np.full(40, 0.05)
    values[0], errors[0] = values[0] + 30, 30
    process = fit_process(seen, values, errors, np.zeros(40), np.empty((0, len(OWNER))), OWNER)
    mean, _ = process.predict(np.array([[0, 1, 0, 1, 0], [1, 0, 1, 0, 1.0]]))
    assert abs(mean[0]) < 0.3 and abs(mean[1] - 3) < 0.3
    assert process.scale[0] > 2 * process.scale[1:].max()


def test_errors_of_their_own_count_whole():
    """A value that lies far off by an error of its own is not believed; the known errors that all share say
    nothing of it."""
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 2, (40, len(OWNER))).astype(float)
    values, own = 3 * seen[:, 0] + rng.normal(0, 0.05, 40), np.full(40, 0.05)
    values[0] += 30
    own[0] = 30
    there = seen[:1]
    near = fit_process(seen, values, np.zeros(40), own, np.empty((0, len(OWNER))), OWNER).predict(there)[0][0]
    assert abs(near - 3 * seen[0, 0]) < 0.3


def test_a_pending_point_is_believed_and_no_longer_uncertain():
    seen, values = points(10), np.random.default_rng(1).normal(size=10)
    pending, none = points(1, 5), np.empty((0, len(OWNER)))
    before, after = (
        fit_process(seen, values, np.zeros(10), np.zeros(10), none, OWNER),
        fit_process(seen, values, np.zeros(10), np.zeros(10), pending, OWNER),
    )
    assert np.allclose(before.predict(pending)[0], after.predict(pending)[0], atol=1e-3)
    assert after.predict(pending)[1] < 0.5 * before.predict(pending)[1]


def dominated_area(front, reference):
    """On a fine grid, cell by cell."""
    grid = (np.arange(400) + 0.5) / 400
    x, y = reference[0] * grid[:, None], reference[1] * grid[None, :]
    inside = np.zeros((400, 400), bool)
    for a, b in front:
        inside |= (x >= a) & (y >= b)
    return inside.mean() * reference[0] * reference[1]


def test_expected_gain_is_the_mean_gain_of_draws():
    front, reference, rng = np.array([[0.5, 0.2], [0.2, 0.7]]), np.array([1.0, 1.0]), np.random.default_rng(0)
    for mean, sd in (((0.3, 0.3), (0.1, 0.2)), ((0.8, 0.8), (0.2, 0.05)), ((0.6, 0.4), (0.3, 0.3))):
        # the grid ends at 0; so does what these draws can gain, but for a little
        draws = np.maximum(rng.normal(mean, sd, (1500, 2)), 0)
        gains = [
            dominated_area([*front, draw], reference) - dominated_area(front, reference) for draw in draws
        ]
        found = expected_gain(
            ([mean[0]] * np.ones(1), [mean[1]] * np.ones(1)),
            ([sd[0]] * np.ones(1), [sd[1]] * np.ones(1)),
            front,
            reference,
        )
        assert found[0] == pytest.approx(np.mean(gains), abs=3 * np.std(gains) / len(gains) ** 0.5 + 0.01)
    assert (
        expected_gain((np.ones(1) * 2, np.ones(1) * 2), (np.ones(1) * 1e-6,) * 2, front, reference)[0] < 1e-9
    )
