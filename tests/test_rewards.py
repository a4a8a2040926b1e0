"""Rewards against scipy, loops written from the formula, and images with a known share of copies."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from memcontrol.config.rewards import RewardsConfig
from memcontrol.core.errors import MemControlError
from memcontrol.core.estimate import Estimate, wilson_interval
from memcontrol.core.reward_table import OBJECTIVES, REWARDS
from memcontrol.data.features import nearest
from memcontrol.scoring.copying import (
    copy_rate,
    find_suspects,
    measure_copy_rate,
    measure_memorization,
    memorization,
    tail_chances,
)
from memcontrol.scoring.distances import DistanceSpace
from memcontrol.scoring.evidence import Descriptors, Evidence
from memcontrol.scoring.own_rewards import check_rewards
from memcontrol.scoring.published import authpct, carlini_rate, extraction, mq, tile_distances
from memcontrol.scoring.quality import clip_score, fd_pca, fid, fit_gaussian, kid, mifid, prdc
from memcontrol.scoring.score import score_evidence


def normal(n, d, seed, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).standard_normal((n, d)) * scale + shift


@pytest.mark.parametrize("n, m, d", [(300, 200, 8), (20, 200, 32), (12, 10, 32), (64, 64, 64)])
def test_frechet_distance_equals_scipys(n, m, d):
    mixing = normal(d, d, 9)
    x, y = normal(n, d, 0) @ mixing, normal(m, d, 1, 1.3, 0.2)
    s, t = np.cov(x.T), np.cov(y.T)
    roots = np.sqrt(np.maximum(scipy.linalg.eigvals(s @ t).real, 0)).sum()
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s) + np.trace(t) - 2 * roots
    assert float(fid(x, y)) == pytest.approx(expected, rel=1e-6)
    if n > d and m > d:
        by_root = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(
            s + t - 2 * scipy.linalg.sqrtm(s @ t).real
        )
        assert float(fid(x, y)) == pytest.approx(by_root, rel=1e-6)


def test_frechet_distance_of_a_set_with_itself_and_of_one_image():
    x = normal(50, 8, 0)
    assert float(fid(x, x)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(MemControlError, match="needs at least 2 images and has 1"):
        fid(x[:1], x)


def kid_by_loops(x, y, scale=1.0):
    n, m, d = len(x), len(y), x.shape[1]
    k = lambda a, b: (np.dot(a / scale, b / scale) / d + 1) ** 3
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@pytest.mark.parametrize("scale", (1.0, 1.7))
def test_kid_and_its_error_equal_the_loops(scale):
    x, y = normal(7, 5, 0), normal(9, 5, 1, 2.0, 0.5)
    found = kid(x, y, scale)
    assert found.value == pytest.approx(kid_by_loops(x, y, scale), rel=1e-10)
    left_x = [kid_by_loops(np.delete(x, i, 0), y, scale) for i in range(7)]
    left_y = [kid_by_loops(x, np.delete(y, i, 0), scale) for i in range(9)]
    assert found.error == pytest.approx(math.sqrt(6 * np.var(left_x) + 8 * np.var(left_y)), rel=1e-9)


def test_kid_leaves_out_whole_groups():
    """By the loops: the error of held-out images comes from leaving out one person at a time."""
    x, y = normal(9, 4, 0), normal(8, 4, 1)
    names = list("aabbbcdde")
    left_x = [kid_by_loops(x[[name != out for name in names]], y) for out in "abcde"]
    left_y = [kid_by_loops(x, np.delete(y, i, 0)) for i in range(8)]
    variance = (5 - 1) * np.var(left_x) + (8 - 1) * np.var(left_y)
    found = kid(x, y, real_groups=names)
    assert found.error == pytest.approx(variance**0.5, rel=1e-8) and found.value == float(kid(x, y))
    assert kid(x, y, real_groups=["a"] * 9).error == kid(x, y).error


def test_kid_of_equal_distributions_is_near_zero_and_may_be_negative():
    found = [kid(normal(200, 8, seed), normal(150, 8, 100 + seed)) for seed in range(20)]
    assert all(abs(one.value) < 4 * one.error for one in found) and min(map(float, found)) < 0
    assert sum(abs(one.value) < 2 * one.error for one in found) >= 16


@pytest.mark.parametrize("share, n", [(0.0, 256), (0.02, 100), (0.5, 10), (1.0, 40)])
def test_wilson_equals_scipys(share, n):
    interval = scipy.stats.binomtest(round(share * n), n).proportion_ci(method="wilson")
    assert wilson_interval(share, n) == pytest.approx((interval.low, interval.high), abs=1e-12)


@pytest.mark.parametrize("k, chunk", [(1, 256), (5, 7), (200, 256)])
def test_nearest_against_brute_force(k, chunk):
    queries, references = normal(40, 12, 0).astype(np.float32), normal(150, 12, 1).astype(np.float32)
    distances, indices = nearest(queries, references, k, chunk)
    exact = np.linalg.norm(queries[:, None].astype(float) - references[None].astype(float), axis=2)
    order = exact.argsort(axis=1, kind="stable")[:, :k]
    assert (indices == order).all()
    assert distances == pytest.approx(np.take_along_axis(exact, order, 1), rel=1e-12)


def test_nearest_keeps_its_digits_for_near_copies():
    references = normal(500, 64, 0, 1.0, 100.0).astype(np.float32)
    queries = references[:20].copy()
    queries[:, 0] += np.float32(2**-10)
    assert nearest(queries, references)[0][:, 0] == pytest.approx(2**-10, rel=1e-6)


def world(n_copies, n=300, d=24, n_train=80, n_holdout=200):
    """Generated points of which n_copies are training points with a little noise."""
    train, holdout, generated = normal(n_train, d, 1), normal(n_holdout, d, 2), normal(n, d, 3)
    generated[:n_copies] = train[np.arange(n_copies) % n_train] + 0.01 * normal(n_copies, d, 4)
    return DistanceSpace((generated,), (train,), (holdout,))


@pytest.mark.parametrize("n_copies", [0, 15, 60, 300])
def test_copy_rate_recovers_the_planted_share(n_copies):
    low, high = wilson_interval(n_copies / 300, 300)
    assert low - 0.001 <= float(measure_copy_rate(world(n_copies))) <= high + 0.02


def test_memorization_is_zero_without_copies_and_grows_with_them():
    values = [measure_memorization(world(n)) for n in (0, 15, 60, 300)]
    assert abs(values[0].value) < 3 * values[0].error and values[0].p > 0.01
    assert all(a.value < b.value for a, b in zip(values, values[1:]))
    assert values[-1].value == pytest.approx(math.log(4), rel=0.02) and values[-1].p < 0.01


def test_memorization_changes_sign_with_the_labels():
    space = world(60, n_holdout=80)
    swapped = DistanceSpace(space.generated, space.holdout, space.train)
    forwards, backwards = float(measure_memorization(space)), float(measure_memorization(swapped))
    assert backwards == pytest.approx(-forwards, abs=1e-9)


def test_noise_and_collapse_do_not_look_like_copying():
    space = world(0)
    for generated in (10 * normal(300, 24, 5), np.zeros((300, 24))):
        value = memorization(generated, space.train[0], space.holdout[0])
        assert abs(value.value) < 3 * value.error


def views(pixels, features):
    return Descriptors(pixels, features)


def images(n, seed):
    return np.random.default_rng(seed).random((n, 3072)).astype(np.float32)


def test_mirrored_copies_are_seen_in_pixels():
    train, holdout, generated = images(60, 1), images(60, 2), images(100, 3)
    generated[:50] = train[:50].reshape(50, 3, 32, 32)[..., ::-1].reshape(50, -1)
    evidence = Evidence(
        views(generated, generated[:, :16]), views(train, train[:, :16]), views(holdout, holdout[:, :16])
    )
    rewards = score_evidence(evidence)
    assert float(rewards["copy_rate"]) == pytest.approx(0.5, abs=0.03)
    assert float(rewards["memorization"]) > 0.5
    of_samples = {"features of the samples", "nearest neighbours"}
    assert {name for name in OBJECTIVES if REWARDS[name].cost in of_samples} <= set(rewards)


def test_rewards_that_cannot_mean_anything_are_refused():
    check_rewards(RewardsConfig(), 64)
    check_rewards(RewardsConfig(objectives=("kid", "memorization"), n_samples=50), 64)
    check_rewards(RewardsConfig(n_samples=50, force=True), 64)
    for keys, words in [
        ({"n_samples": 255}, "at least 256 .*use kid or fd_pca"),
        ({"objectives": ("fod",)}, "unknown"),
        ({"objectives": ("kid", "kid")}, "twice"),
    ]:
        with pytest.raises(MemControlError, match=words):
            check_rewards(RewardsConfig(**keys), 64)


def test_mq_is_the_published_loop():
    train, generated = normal(80, 12, 0), normal(40, 12, 1)
    generated[:5] = train[:5] + 0.01
    for threshold, k in ((0.5, 50), (0.9, 50), (0.5, 10)):
        count = 0
        for image in generated:
            squares = sorted(((image - other) ** 2).sum() for other in train)
            count += squares[0] / (sum(squares[:k]) / k) < threshold
        assert mq(generated, train, threshold, k) == count >= 5
    few = [((generated[0] - other) ** 2).sum() for other in train[:7]]
    assert mq(generated[:1], train[:7]) == (min(few) / np.mean(few) < 0.5)


@pytest.mark.parametrize("n, d", [(300, 16), (20, 48)])
def test_fid_and_mifid_equal_torchmetrics(n, d):
    """Full-rank and rank-deficient; its extractor is replaced by one that takes features as they are."""
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance

    class AsTheyAre(torch.nn.Identity):
        num_features = d

    real, generated = normal(n, d, 0) @ normal(d, d, 9) + 0.5, normal(n + 7, d, 1) @ normal(d, d, 9) * 1.2
    for kind, ours in (
        (FrechetInceptionDistance, fid),
        (MemorizationInformedFrechetInceptionDistance, lambda x, y: mifid(x, y, "torchmetrics")),
    ):
        metric = kind(feature=AsTheyAre(), normalize=True).set_dtype(torch.float64)
        metric.update(torch.from_numpy(real), real=True)
        metric.update(torch.from_numpy(generated), real=False)
        assert float(ours(real, generated)) == pytest.approx(float(metric.compute()), rel=1e-6), kind


def test_fid_of_commuting_covariances_is_analytic():
    """|dmu|^2 + sum (sqrt a - sqrt b)^2 for diagonal covariances; a^2 FD under scaling; the same under
    rotation."""
    x = np.concatenate([np.eye(4) * [1, 2, 3, 4], -np.eye(4) * [1, 2, 3, 4]])
    y = 1.5 * x + 0.5
    spread = np.diag(np.cov(x.T))
    assert float(fid(x, y)) == pytest.approx(
        4 * 0.25 + np.sum((np.sqrt(spread) - 1.5 * np.sqrt(spread)) ** 2), rel=1e-9
    )
    turn = np.linalg.qr(normal(4, 4, 0))[0]
    assert float(fid(3 * x @ turn, 3 * y @ turn)) == pytest.approx(9 * float(fid(x, y)), rel=1e-9)


def test_a_references_gaussian_can_be_kept():
    import torch

    x, y = normal(90, 6, 0), normal(40, 6, 1, 1.2)
    assert fid(fit_gaussian(x), y) == fid(x, y) == fid(torch.from_numpy(x), torch.from_numpy(y))
    whole = float(fid(x, y))
    assert float(fd_pca(x, y, 6)) == pytest.approx(whole, rel=1e-9) and float(fd_pca(x, y, 2)) < whole


def balls(points, k):
    return [
        sorted(np.linalg.norm(points[i] - points[j]) for j in range(len(points)) if j != i)[k - 1]
        for i in range(len(points))
    ]


@pytest.mark.parametrize("k", (1, 5))
def test_prdc_equals_the_loops(k):
    x, y = normal(40, 3, 0), normal(30, 3, 1, 0.8, 0.4)
    rx, ry = balls(x, k), balls(y, k)
    d = [[np.linalg.norm(a - b) for b in y] for a in x]
    expected = {
        "precision": np.mean([any(d[i][j] < rx[i] for i in range(40)) for j in range(30)]),
        "recall": np.mean([any(d[i][j] < ry[j] for j in range(30)) for i in range(40)]),
        "density": sum(d[i][j] < rx[i] for i in range(40) for j in range(30)) / (k * 30),
        "coverage": np.mean([min(d[i]) < rx[i] for i in range(40)]),
    }
    found = prdc(x, y, k)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)
    assert found["recall"].low < found["recall"].value <= found["recall"].high + 1e-9


def test_authpct_equals_the_loop_and_takes_duplicates():
    train, generated = normal(50, 4, 0), normal(60, 4, 1)
    train[10:13] = train[9]
    count = 0
    for point in generated:
        nearest_one = min(range(50), key=lambda i: np.linalg.norm(point - train[i]))
        own = min(np.linalg.norm(train[nearest_one] - train[j]) for j in range(50) if j != nearest_one)
        count += own < np.linalg.norm(point - train[nearest_one])
    assert float(authpct(generated, train)) == pytest.approx(100 * count / 60)


def test_carlinis_rate_equals_the_loop():
    train, generated = normal(80, 6, 0), normal(40, 6, 1)
    generated[:7] = train[:7] + 0.01
    count = 0
    for point in generated:
        distances = sorted(np.linalg.norm(point - other) for other in train)[:50]
        count += distances[0] < 0.5 * np.mean(distances)
    assert float(carlini_rate(generated, train)) == pytest.approx(count / 40) and count >= 7


def test_mifid_in_both_directions():
    real, generated = normal(40, 5, 0) + 2, normal(30, 5, 1) + 2
    cosines = np.array(
        [[1 - abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) for b in real] for a in generated]
    )
    for direction, axis in (("kaggle", 1), ("torchmetrics", 0)):
        distance = cosines.min(axis).mean()
        frechet = float(fid(real, generated))
        assert float(mifid(real, generated, direction, threshold=1.0)) == pytest.approx(
            frechet / (distance + 1e-14), rel=1e-9
        )
        assert float(mifid(real, generated, direction, threshold=0.0)) == frechet
    assert float(mifid(real, real, "torchmetrics")) == 0
    with pytest.raises(MemControlError, match="allowed: kaggle, torchmetrics"):
        mifid(real, generated, "both")


@pytest.mark.parametrize("n_copies", [0, 15, 60, 300])
def test_copy_rate_with_calibration_images_of_their_own(n_copies):
    space, calibration = world(n_copies), normal(400, 24, 9)
    found = copy_rate(space.generated[0], space.train[0], space.holdout[0], calibration)
    to_train, to_holdout = (
        np.linalg.norm(calibration[:, None] - x[None], axis=2).min(1)
        for x in (space.train[0], space.holdout[0])
    )
    limit = np.quantile(to_train / to_holdout, 0.01, method="lower")
    own = [
        np.linalg.norm(space.generated[0][:, None] - x[None], axis=2).min(1)
        for x in (space.train[0], space.holdout[0])
    ]
    assert (
        found.value == pytest.approx((own[0] / own[1] < limit).mean())
        and found.low - 0.01 <= n_copies / 300 <= found.high + 1e-9
    )


def test_order_and_chunks_change_nothing():
    space = world(30)
    g, order = space.generated[0], np.random.default_rng(0).permutation(300)
    for metric in (
        lambda x: copy_rate(x, space.train[0], space.holdout[0]),
        lambda x: authpct(x, space.train[0]),
        lambda x: carlini_rate(x, space.train[0]),
    ):
        assert metric(g) == metric(g[order])
    assert float(memorization(g[order], space.train[0], space.holdout[0])) == pytest.approx(
        float(memorization(g, space.train[0], space.holdout[0])), abs=1e-12
    )
    one, other = nearest(g, space.train[0], 3, chunk=7), nearest(g, space.train[0], 3, chunk=1000)
    assert np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])


def test_an_estimate_is_a_number_that_knows_its_error():
    estimate = Estimate(2.0, 0.5)
    assert float(estimate) == estimate.value == 2.0 and f"{estimate:.1f}" == "2.0"
    assert (estimate.low, estimate.high) == (pytest.approx(1.02, abs=1e-3), pytest.approx(2.98, abs=1e-3))
    assert Estimate(0.1, low=0.0, high=0.2).error is None
    assert Estimate(2.0, 0.5, 1.5).low == 1.5


def test_an_estimate_neither_changes_nor_loses_its_error_in_a_sum():
    estimate = Estimate(2.0, 0.5)
    with pytest.raises(FrozenInstanceError):
        estimate.p = 0.5
    for operation in (lambda: estimate + 1, lambda: 2 * estimate, lambda: sum([estimate, estimate])):
        with pytest.raises(TypeError):
            operation()


@pytest.mark.parametrize(
    "bad, words",
    [(np.zeros(5), "has shape [5]"), (np.full((5, 2), np.nan), "not finite"), (np.zeros((1, 2)), "at least")],
)
def test_what_is_no_feature_matrix_is_named(bad, words):
    with pytest.raises(MemControlError) as caught:
        fid(bad, normal(5, 2, 0))
    assert words in str(caught.value)
    with pytest.raises(MemControlError, match="3 and of 2 dimensions"):
        fid(normal(5, 3, 0), normal(5, 2, 0))


def test_clip_score_is_the_mean_cosine():
    images, texts = normal(20, 8, 0), normal(20, 8, 1)
    cosines = [max(a @ b / np.linalg.norm(a) / np.linalg.norm(b), 0) for a, b in zip(images, texts)]
    found = clip_score(images, texts)
    assert found.value == pytest.approx(100 * np.mean(cosines)) and found.error == pytest.approx(
        100 * np.std(cosines, ddof=1) / math.sqrt(20)
    )
    with pytest.raises(MemControlError, match="row by row"):
        clip_score(images, texts[:5])


def test_tile_distances_by_hand():
    images = np.random.default_rng(0).random((3, 2, 8, 12))
    for i in range(3):
        for j in range(3):
            difference = images[i] - images[j]
            worst = max(
                np.sqrt(np.mean(difference[:, 2 * a : 2 * a + 2, 3 * b : 3 * b + 3] ** 2))
                for a in range(4)
                for b in range(4)
            )
            assert tile_distances(images)[i, j] == pytest.approx(worst, abs=1e-7)


def test_extraction_tells_chains_from_cliques():
    """Prompt 0: three alike. Prompt 1: a chain, its ends apart. Prompt 2: all different."""
    base = np.zeros((3, 8, 8))
    alike, chain = (
        np.stack([base, base + 0.01, base + 0.02, base + 0.9]),
        np.stack([base, base + 0.05, base + 0.1, base + 0.9]),
    )
    different = np.stack([base + i / 4 for i in range(4)])
    found = extraction(np.stack([alike, chain, different]), threshold=0.06)
    assert [found[name].value for name in ("component", "clique")] == pytest.approx([2 / 3, 1 / 3])
    assert found["clique"].low < 1 / 3 < found["clique"].high


def test_a_clean_model_is_rarely_told_to_copy_however_few_images_are_held_out():
    """p is below 0.05 about that often, also where Wilson's interval alone lies above 1 % in most runs."""
    found = [
        copy_rate(normal(200, 12, 3 * s), normal(150, 12, 3 * s + 1), normal(20, 12, 3 * s + 2))
        for s in range(100)
    ]
    assert (
        np.mean([one.low > 0.01 for one in found]) > 0.3 and np.mean([one.p < 0.05 for one in found]) <= 0.12
    )
    assert np.mean([one.value for one in found]) == pytest.approx(1 / 21, abs=0.02)


def test_the_chance_of_hits_equals_scipys_beta_binomial():
    from memcontrol.core.estimate import beta_binomial_p

    for hits, n, rank, n_real in ((5, 200, 2, 150), (0, 20, 1, 20), (9, 256, 9, 881)):
        assert beta_binomial_p(hits, n, rank, n_real) == pytest.approx(
            scipy.stats.betabinom(n, rank, n_real + 1 - rank).sf(hits - 1)
        )


@pytest.mark.parametrize(
    "metric", [fid, kid, prdc, authpct, mq, carlini_rate, mifid, memorization, copy_rate]
)
def test_sets_of_different_width_are_named(metric):
    sets = [normal(60, 8, 1), normal(60, 9, 2), normal(60, 8, 3)][
        : 3 if metric in (memorization, copy_rate) else 2
    ]
    with pytest.raises(MemControlError, match="8.*9|9.*8"):
        metric(*sets)


@pytest.mark.parametrize("n_train, n_holdout", [(150, 150), (150, 20), (35, 881)])
def test_clear_copies_are_found_with_few_held_out_images_and_rarely_without_copying(n_train, n_holdout):
    false_alarms, found = 0, []
    for seed in range(40):
        generated, train, holdout = (
            normal(n, 30, 3 * seed + i) for i, n in enumerate((200, n_train, n_holdout))
        )
        clean = find_suspects([DistanceSpace((generated,), (train,), (holdout,))], 200).is_clear
        false_alarms += clean.any()
        generated[:7] = train[:7] + 0.05 * normal(7, 30, seed + 1000)
        copied = find_suspects([DistanceSpace((generated,), (train,), (holdout,))], 200).is_clear
        found.append(copied[:7].mean() - copied[7:].mean())
    assert false_alarms <= 2 and np.mean(found) > 0.95


def test_the_tail_is_never_lighter_than_the_law_and_no_heavier_than_it_must_be():
    """For ratios with P(ratio < r) = r^5, of whose tail a Lomax of index 10 and the same scale is known."""
    rng = np.random.default_rng(0)
    for r in (0.9, 0.6, 0.5, 0.3, 0.2):
        found = [tail_chances(rng.random(2000) ** (1 / 5), np.array([r]))[0] for _ in range(50)]
        above = np.log(0.1) / 5 - np.log(r)  # how far below the tenth
        lomax = 0.1 * (1 + above * 5 / 10) ** -10 if above > 0 else r**5
        assert np.exp(np.mean(np.log(found))) == pytest.approx(lomax, rel=0.3) and lomax >= 0.99 * r**5


def test_a_statistic_under_permuted_labels_is_what_the_sets_themselves_give():
    """By brute force, for some labellings: copy rate less swapped copy rate, and M of all references."""
    generated, real = normal(60, 6, 1), normal(90, 6, 2)
    generated[:9] = real[:9] + 0.01
    space = DistanceSpace((generated,), (real[:40],), (real[40:],))
    rates, distances = measure_copy_rate(space).labels, measure_memorization(space).labels
    pool = np.concatenate([real[:40][space.labels.train], real[40:][space.labels.holdout]])
    apart = np.linalg.norm(pool[:, None] - pool[None], axis=2) + np.diag(np.full(90, np.inf))
    for number in (0, 1, 7, 400):
        sides = space.labels.sides[number]
        to = np.linalg.norm(generated[:, None] - pool[None], axis=2)
        r = to[:, sides].min(1) / to[:, ~sides].min(1)
        real_r = apart[:, sides].min(1) / apart[:, ~sides].min(1)
        hits = (r < real_r[~sides].min()).mean() - (1 / r < (1 / real_r[sides]).min()).mean()
        assert rates[number] == pytest.approx(hits, abs=1e-12) and sides.sum() == 40
        m = np.clip(np.log(1 / r), -math.log(4), math.log(4)).mean()
        assert distances[number] == pytest.approx(m, rel=1e-9)


def test_labels_are_permuted_by_group_and_no_image_is_its_siblings_reference():
    real = normal(60, 4, 1)
    people = [f"p{i // 3}" for i in range(60)]
    space = DistanceSpace((normal(20, 4, 2),), (real[:30],), (real[30:],), None, people[:30], people[30:])
    for sides in space.labels.sides:
        for group in range(20):
            assert len(set(sides[space.labels.groups == group])) == 1
        assert sides.sum() == 30
    held = real[30:]
    for i, found in enumerate(space.real_ratios):
        others = [j for j in range(30) if j // 3 != i // 3]
        to_train = np.linalg.norm(held[i] - real[:30], axis=1).min()
        assert found == pytest.approx(to_train / np.linalg.norm(held[i] - held[others], axis=1).min())


@pytest.mark.parametrize("soft", (1.0, 0.4))
def test_people_and_flat_images_are_not_accused(soft):
    """Four pictures of a person each, and images that are nearer to everything than real ones are: p is below
    0.05 about that often."""
    found = []
    for seed in range(60):
        faces, noise = normal(70, 12, seed), 0.2 * normal(280, 12, 1000 + seed)
        real = np.repeat(faces, 4, axis=0) + noise
        people = [f"p{i // 4}" for i in range(280)]
        generated = soft * normal(100, 12, 5000 + seed)
        space = DistanceSpace((generated,), (real[:140],), (real[140:],), None, people[:140], people[140:])
        found.append(measure_copy_rate(space))
    assert np.mean([one.p < 0.05 for one in found]) <= 0.12
    assert soft < 1 or np.mean([float(one) for one in found]) < 0.05
