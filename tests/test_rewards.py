"""Rewards against scipy, loops written from the formula, and images with a known share of copies."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from memcontrol.errors import MemControlError
from memcontrol.features import nearest
from memcontrol.rewards import (
    COSTS,
    OBJECTIVES, Evidence, Space, Views, check_rewards, copy_rate, frechet_distance, kernel_distance, memorization, mq, score, wilson,
)  # fmt: skip


def gaussian(n, d, seed, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).standard_normal((n, d)) * scale + shift


@pytest.mark.parametrize("n, m, d", [(300, 200, 8), (20, 200, 32), (12, 10, 32), (64, 64, 64)])
def test_frechet_distance_equals_scipys(n, m, d):
    mixing = gaussian(d, d, 9)
    x, y = gaussian(n, d, 0) @ mixing, gaussian(m, d, 1, 1.3, 0.2)
    s, t = np.cov(x.T), np.cov(y.T)
    roots = np.sqrt(np.maximum(scipy.linalg.eigvals(s @ t).real, 0)).sum()
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s) + np.trace(t) - 2 * roots
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    if n > d and m > d:
        by_root = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
        assert frechet_distance(x, y) == pytest.approx(by_root, rel=1e-6)


def test_frechet_distance_of_a_set_with_itself_and_of_one_image():
    x = gaussian(50, 8, 0)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    with pytest.raises(MemControlError, match="at least 2"):
        frechet_distance(x[:1], x)


def test_kernel_distance_equals_the_double_loop():
    x, y = gaussian(7, 5, 0), gaussian(9, 5, 1, 2.0, 0.5)
    scale = math.sqrt((y**2).mean())
    k = lambda a, b: (np.dot(a / scale, b / scale) / 5 + 1) ** 3
    xx = sum(k(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    yy = sum(k(y[i], y[j]) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    xy = sum(k(a, b) for a in x for b in y) / 63
    assert kernel_distance(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-10)


@pytest.mark.parametrize("share, n", [(0.0, 256), (0.02, 100), (0.5, 10), (1.0, 40)])
def test_wilson_equals_scipys(share, n):
    interval = scipy.stats.binomtest(round(share * n), n).proportion_ci(method="wilson")
    assert wilson(share, n) == pytest.approx((interval.low, interval.high), abs=1e-12)


@pytest.mark.parametrize("k, chunk", [(1, 256), (5, 7), (200, 256)])
def test_nearest_against_brute_force(k, chunk):
    queries, references = gaussian(40, 12, 0).astype(np.float32), gaussian(150, 12, 1).astype(np.float32)
    distances, indices = nearest(queries, references, k, chunk)
    exact = np.linalg.norm(queries[:, None].astype(float) - references[None].astype(float), axis=2)
    order = exact.argsort(axis=1, kind="stable")[:, :k]
    assert (indices == order).all()
    assert distances == pytest.approx(np.take_along_axis(exact, order, 1), rel=1e-12)


def test_nearest_keeps_its_digits_for_near_copies():
    references = gaussian(500, 64, 0, 1.0, 100.0).astype(np.float32)
    queries = references[:20].copy()
    queries[:, 0] += np.float32(2**-10)
    assert nearest(queries, references)[0][:, 0] == pytest.approx(2**-10, rel=1e-6)


def world(n_copies, n=300, d=24, n_train=80, n_holdout=200):
    """Generated points of which n_copies are training points with a little noise."""
    train, holdout, generated = gaussian(n_train, d, 1), gaussian(n_holdout, d, 2), gaussian(n, d, 3)
    generated[:n_copies] = train[np.arange(n_copies) % n_train] + 0.01 * gaussian(n_copies, d, 4)
    return Space((generated,), train, holdout, (holdout,), seed=0)


@pytest.mark.parametrize("n_copies", [0, 15, 60, 300])
def test_copy_rate_recovers_the_planted_share(n_copies):
    low, high = wilson(n_copies / 300, 300)
    assert low - 0.001 <= copy_rate(world(n_copies)) <= high + 0.02


def test_memorization_is_zero_without_copies_and_grows_with_them():
    values = [memorization(world(n)) for n in (0, 15, 60, 300)]
    assert abs(values[0][0]) < 3 * values[0][1] and values[0][2] > 0.01
    assert all(a[0] < b[0] for a, b in zip(values, values[1:]))
    assert values[-1][0] == pytest.approx(math.log(4), rel=0.02) and values[-1][2] < 0.01


def test_memorization_changes_sign_with_the_labels():
    space = world(60, n_holdout=80)
    swapped = Space(space.generated, space.holdout, space.train, (space.train,), seed=0)
    assert memorization(swapped)[0] == pytest.approx(-memorization(space)[0], abs=1e-9)


def test_noise_and_collapse_do_not_look_like_copying():
    space = world(0)
    for generated in (10 * gaussian(300, 24, 5), np.zeros((300, 24))):
        value, deviation, _ = memorization(Space((generated,), space.train, space.holdout, (space.holdout,), seed=0))
        assert abs(value) < 3 * deviation


def views(pixels, features):
    side = pixels.reshape(len(pixels), 3, 32, 32)
    return Views(pixels, side[..., ::-1].reshape(len(pixels), -1), features)


def images(n, seed):
    return np.random.default_rng(seed).random((n, 3072)).astype(np.float32)


def test_mirrored_copies_are_seen_in_pixels():
    train, holdout, generated = images(60, 1), images(60, 2), images(100, 3)
    generated[:50] = train[:50].reshape(50, 3, 32, 32)[..., ::-1].reshape(50, -1)
    evidence = Evidence(views(generated, generated[:, :16]), views(train, train[:, :16]), views(holdout, holdout[:, :16]))
    rewards = score(evidence)
    assert rewards["copy_rate"] == pytest.approx(0.5, abs=0.03)
    assert rewards["memorization"] > 0.5
    assert set(OBJECTIVES) - set(COSTS) <= set(rewards)


def test_rewards_that_cannot_mean_anything_are_refused():
    check_rewards(("fid", "memorization"), 256, 64)
    check_rewards(("kid", "memorization"), 50, 64)
    for objectives, n, words in [(("fid", "memorization"), 255, "at least 256"), (("fod",), 256, "unknown"), (("kid", "kid"), 256, "twice")]:
        with pytest.raises(MemControlError, match=words):
            check_rewards(objectives, n, 64)


def test_mq_is_the_published_loop():
    train, generated = gaussian(80, 12, 0), gaussian(40, 12, 1)
    generated[:5] = train[:5] + 0.01
    for threshold, k in ((0.5, 50), (0.9, 50), (0.5, 10)):
        count = 0
        for image in generated:
            squares = sorted(((image - other) ** 2).sum() for other in train)
            count += squares[0] / (sum(squares[:k]) / k) < threshold
        assert mq(generated, train, threshold, k) == count >= 5
    few = [((generated[0] - other) ** 2).sum() for other in train[:7]]
    assert mq(generated[:1], train[:7]) == (min(few) / np.mean(few) < 0.5)
