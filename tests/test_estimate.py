"""Numbers that know their error, against scipy, exact cases, and Monte Carlo."""

import json
import math

import numpy as np
import pytest
import scipy.stats

from memcontrol.core.errors import MemControlError
from memcontrol.core.estimate import (
    Estimate,
    Rewards,
    estimate_share,
    paired_difference,
    pool_estimates,
    spearman,
)
from memcontrol.core.reward_table import REWARDS, format_reward, list_errors, list_losses, list_objectives
from memcontrol.scoring.copying import copy_rate, memorization
from memcontrol.scoring.own_rewards import reward
from memcontrol.scoring.quality import fid, kid

D = 16
MIX = np.random.default_rng(99).standard_normal((D, D)) / 4


def drawn(n, seed, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).standard_normal((n, D)) @ MIX * scale + shift


REAL = drawn(4000, 0)


@pytest.mark.slow
@pytest.mark.parametrize("metric, tolerance", [(fid, 0.35), (kid, 0.25)])
def test_errors_are_the_spread_of_fresh_samples(metric, tolerance):
    found = [metric(REAL, drawn(400, seed, 1.3, 0.2)) for seed in range(1, 61)]
    assert np.mean([one.error for one in found]) == pytest.approx(
        np.std([float(one) for one in found]), rel=tolerance
    )


@pytest.mark.parametrize("metric", [fid, kid])
def test_contributions_are_what_single_images_change(metric):
    """Against leaving each image out, the jackknife's influence."""
    real, generated = REAL[:1000], drawn(120, 5, 1.2, 0.1)
    found, n = metric(real, generated), len(generated)
    without = np.array([float(metric(real, np.delete(generated, i, 0))) for i in range(n)])
    assert found.contributions.mean() == pytest.approx(float(found))
    assert np.corrcoef(found.contributions, (n - 1) * (without.mean() - without))[0, 1] > 0.99


def test_means_of_images_have_their_own_contributions():
    train, holdout, generated = drawn(80, 1), drawn(80, 2), drawn(50, 3)
    generated[:10] = train[:10]
    for value in (memorization(generated, train, holdout), copy_rate(generated, train, holdout)):
        assert value.contributions.shape == (50,) and value.contributions.mean() == pytest.approx(
            float(value)
        )
    assert copy_rate(generated, train, holdout).contributions[:10].all()


def test_pairs_cancel_what_models_share():
    """Two models that differ by a constant on every image differ by it exactly, however much images
    differ."""
    values = np.random.default_rng(0).standard_normal(200)
    a, b = (
        Estimate(values.mean() + 0.1, contributions=values + 0.1),
        Estimate(values.mean(), contributions=values),
    )
    apart = paired_difference(a, b)
    assert (
        apart.value == pytest.approx(0.1)
        and apart.error == pytest.approx(0.0, abs=1e-12)
        and apart.low == pytest.approx(0.1)
    )


def test_pairs_have_the_error_of_the_mean_difference():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal(400), rng.standard_normal(400)
    apart = paired_difference(
        *(Estimate(values.mean(), contributions=values) for values in (x, y)), n_draws=4000
    )
    assert apart.value == pytest.approx(x.mean() - y.mean())
    assert apart.error == pytest.approx((x - y).std(ddof=1) / 20, rel=0.05)
    assert apart.low == pytest.approx(apart.value - 1.96 * apart.error, abs=0.02)


def test_images_of_one_prompt_are_drawn_together():
    """Twenty copies of ten values say no more than the ten."""
    values = np.random.default_rng(2).standard_normal(10)
    a, b = (Estimate(x.mean(), contributions=x.repeat(20)) for x in (values, np.zeros(10)))
    apart = paired_difference(a, b, prompts=np.arange(10).repeat(20), n_draws=4000)
    assert apart.error == pytest.approx(values.std() / math.sqrt(10), rel=0.1)
    assert paired_difference(a, b).error < apart.error / 3


def test_what_cannot_be_paired_is_named():
    with pytest.raises(MemControlError, match="contribution of each image"):
        paired_difference(Estimate(1.0), Estimate(2.0))
    with pytest.raises(MemControlError, match="same prompts and noise"):
        paired_difference(Estimate(1.0, contributions=np.ones(3)), Estimate(2.0, contributions=np.ones(4)))


@pytest.mark.parametrize("seed", range(4))
def test_rank_correlation_equals_scipys_with_ties(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, 20).tolist(), rng.integers(0, 6, 20).tolist()
    found = spearman(x, y)
    assert found.value == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert found.low < found.value < found.high and float(spearman([1] * 5, range(5))) == 0.0


def test_intervals_of_shares_in_per_cent_are_pooled_too():
    """By MOVER; Newcombe's hybrid interval, the same rule for a difference, is the reference: of a and -b,
    halved."""
    a, b = (
        Estimate(value, low=low, high=high) for value, low, high in ((90.0, 80.0, 95.0), (70.0, 60.0, 78.0))
    )
    found = pool_estimates([a, b])
    assert (found.value, found.low, found.high) == pytest.approx(
        (80, 80 - np.hypot(10, 10) / 2, 80 + np.hypot(5, 8) / 2)
    )


def test_draws_of_one_size_are_pooled_into_a_mean_with_a_smaller_error():
    draws = [fid(REAL, drawn(100, seed, 1.2)) for seed in range(1, 5)]
    found = pool_estimates(draws)
    assert found.value == pytest.approx(np.mean([one.value for one in draws]))
    assert found.error == pytest.approx(math.sqrt(sum(one.error**2 for one in draws)) / 4)
    shares = [estimate_share(np.arange(50) < n) for n in (5, 10)]
    both, exact = pool_estimates(shares), scipy.stats.binomtest(15, 100).proportion_ci(method="wilson")
    assert (float(both), both.low, both.high) == pytest.approx((0.15, exact.low, exact.high))
    assert len(both.contributions) == 100


def test_rewards_are_written_with_their_error():
    rewards = {
        "fid": 22.6,
        "fid_error": 0.8,
        "copy_rate": 0.012,
        "copy_rate_low": 0.004,
        "copy_rate_high": 0.028,
        "amd_train": 2.0,
    }
    assert [format_reward(name, rewards) for name in ("fid", "copy_rate", "amd_train", "kid")] == [
        "22.60 ± 0.80",
        "1.2% (0.4%-2.8%)",
        "2.00",
        "",
    ]
    errors = list_errors(rewards, ("fid", "copy_rate", "amd_train"))
    assert errors == pytest.approx([0.8, 0.024 / 3.92, 0])
    assert all(reward.interval and reward.cost and reward.meaning for reward in REWARDS.values())


def test_the_plain_form_has_what_is_known_beside_each_value():
    """As result.json and the database of every study have it."""
    measured = {
        "fid": Estimate(22.6, 0.8),
        "copy_rate": Estimate(0.012, low=0.004, high=0.028, p=0.3),
        "memorization": Estimate(0.1, 0.05, p=0.02, contributions=np.ones(3)),
        "density": Estimate(1.5),
        "copy_rate_n_real": 70,
    }
    rewards = Rewards.from_estimates(measured)
    assert json.dumps(rewards.to_plain()) == json.dumps(
        {
            "fid": 22.6,
            "fid_error": 0.8,
            "copy_rate": 0.012,
            "copy_rate_low": 0.004,
            "copy_rate_high": 0.028,
            "copy_rate_p": 0.3,
            "memorization": 0.1,
            "memorization_error": 0.05,
            "memorization_p": 0.02,
            "density": 1.5,
            "copy_rate_n_real": 70.0,
        }
    )
    assert rewards.interval("copy_rate") == (0.004, 0.028) and rewards.interval("density") == (1.5, 1.5)
    assert rewards.interval("fid") == pytest.approx((22.6 - 1.96 * 0.8, 22.6 + 1.96 * 0.8))
    assert rewards.p("memorization") == 0.02 and rewards.written("copy_rate", "{:.1%}") == "1.2% (0.4%-2.8%)"


def test_a_maximised_objective_is_negated_as_a_loss():
    directions = {"fid": "minimize", "recall": "maximize"}
    assert list_losses({"recall": 0.7, "kid": 1.0, "fid": 9.0}, directions) == [9.0, -0.7]
    for objective in list_objectives(directions):
        assert objective.to_loss(objective.to_loss(2.0)) == 2.0


def test_a_direction_is_one_of_two():
    assert reward(direction="maximize")(lambda evidence: 0.0).direction == "maximize"
    assert reward(lambda evidence: 0.0).direction == "minimize"  # as @reward alone
    with pytest.raises(MemControlError, match="direction is 'up'; allowed: minimize, maximize"):
        reward(direction="up")
