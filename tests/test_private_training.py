"""Private fine-tuning: the account against closed forms, gradients against autograd one image at a time,
clipping, draws and noise by hand, and what breaks the bound, refused."""

import json
import math
import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import run
from conftest import N_IMAGES, SMALL
from scipy.special import gammaln, logsumexp
from scipy.stats import binom, norm

from benchmarks.evidence.privacy import ARMS, write_config
from memcontrol.config.inner import InnerConfig
from memcontrol.config.load import load_config
from memcontrol.config.settings import configure_choice, load_study_space
from memcontrol.config.spec import Spec
from memcontrol.core.choice import Choice
from memcontrol.core.errors import Diverged, MemControlError
from memcontrol.core.estimate import Rewards
from memcontrol.core.reward_table import format_reward
from memcontrol.core.space_yaml import load_space
from memcontrol.model.adapter import inject_adapter
from memcontrol.scoring.membership import epsilon_low, score_membership
from memcontrol.training import rounds, unit_gradients
from memcontrol.training.losses import measure_losses
from memcontrol.training.privacy import count_epsilon, find_noise, open_account
from memcontrol.training.unit_gradients import PrivateSteps, list_units
from memcontrol.trial.bound import describe_bound, list_bound
from memcontrol.view.words import describe_privacy

EACH = [str(row) for row in range(N_IMAGES)]
SEEDED = {"privacy": {"seed": 5, "multiplicity": 1}}
QUICK = {"budget_images": 16, "batch_size": 4}


def sum_by_hand(noise, rate, steps, delta):
    """Renyi divergences of whole orders (Mironov et al. 2019, section 3.3) and their conversion (Balle et al.
    2020, theorem 21)."""
    found = []
    for order in range(2, 200):
        k = np.arange(order + 1)
        log_binom = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
        terms = log_binom + (order - k) * np.log1p(-rate) + k * np.log(rate) + (k * k - k) / (2 * noise**2)
        divergence = steps * logsumexp(terms) / (order - 1)
        found.append(divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return min(found)


@pytest.mark.parametrize("noise, rate, steps", [(1.1, 0.04, 230), (0.8, 0.02, 1000), (2.0, 0.5, 40)])
def test_epsilon_is_that_of_opacus_and_of_the_formula(noise, rate, steps):
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for _ in range(steps):
        accountant.step(noise_multiplier=noise, sample_rate=rate)
    found = count_epsilon(noise, rate, steps, 1e-4)
    assert found == pytest.approx(accountant.get_epsilon(1e-4), abs=1e-12)
    assert found <= sum_by_hand(noise, rate, steps, 1e-4) + 1e-9 < 1.02 * found


def delta_of_one_step(epsilon, noise, rate):
    """Of a sampled Gaussian in one dimension, the unit's gradient at 1, in both directions."""

    def differ(p, q):
        return np.maximum(p - math.exp(epsilon) * q, 0).sum() * 1e-3

    x = np.arange(-40, 40, 1e-3)
    without, with_it = (
        norm.pdf(x, 0, noise),
        (1 - rate) * norm.pdf(x, 0, noise) + rate * norm.pdf(x, 1, noise),
    )
    return max(differ(with_it, without), differ(without, with_it))


@pytest.mark.parametrize("noise, rate", [(0.5, 0.2), (1.0, 0.05), (2.0, 0.9)])
def test_the_bound_holds_for_one_step(noise, rate):
    assert delta_of_one_step(count_epsilon(noise, rate, 1, 1e-3), noise, rate) <= 1e-3


def test_the_bound_holds_for_steps_that_draw_everyone():
    """Their composition is one Gaussian (Balle and Wang 2018, theorem 8)."""
    epsilon, mean = count_epsilon(3.0, 1.0, 25, 1e-4), 5 / 3.0
    delta = norm.cdf(mean / 2 - epsilon / mean) - math.exp(epsilon) * norm.cdf(-mean / 2 - epsilon / mean)
    assert 1e-6 < delta <= 1e-4


@pytest.mark.parametrize("epsilon", [0.1, 2.0, 8.0, 100.0])
def test_noise_is_as_little_as_the_bound_allows(epsilon):
    noise = find_noise(epsilon, 1e-4, 0.04, 230)
    assert 0.985 * epsilon < count_epsilon(noise, 0.04, 230, 1e-4) <= epsilon


def test_fewer_steps_tell_less_and_none_nothing():
    account = open_account(InnerConfig(batch_size=8, budget_images=80, **SEEDED), EACH)
    spent = [account.find_epsilon(steps) for steps in range(11)]
    assert spent[0] == 0 and spent == sorted(spent) and spent[10] <= 8


def test_account_of_images_and_of_groups():
    inner = InnerConfig(batch_size=4, budget_images=40, **SEEDED)
    images, groups = open_account(inner, EACH), open_account(inner, [str(row // 2) for row in range(20)])
    assert (images.unit, images.n_units, images.rate, images.delta) == ("image", 20, 0.2, 1 / 200)
    assert (groups.unit, groups.n_units, groups.rate, groups.delta) == ("group", 10, 0.4, 1 / 100)
    assert groups.noise > images.noise and not images.is_secret
    assert open_account(InnerConfig(batch_size=4, privacy={}), EACH).is_secret


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"batch_size": 21}, "inner.batch_size is 21 and there are 20 training images.*lower it"),
        (
            {"batch_size": 4, "privacy": {"delta": 0.05}},
            "privacy.delta is 0.05.*give less than 0.05, or auto",
        ),
        (
            {"batch_size": 4, "privacy": {"epsilon": 0.01, "delta": 1e-300}},
            "privacy.epsilon is 0.01 with delta 1e-300.*raise epsilon",
        ),
    ],
)
def test_an_account_that_cannot_be_is_said_in_a_line(keys, said):
    with pytest.raises(MemControlError, match=said):
        open_account(InnerConfig(**{"privacy": {}, **keys}), EACH)


ALLOWED = {  # of every other key of inner, what a private fine-tuning may ask for
    "budget_images": 5000,
    "batch_size": 8,
    "micro_batch_size": 4,
    "rounds": 3,
    "checkpoint_minutes": 1.0,
    "checkpoint_gb": 1.0,
    "optimizer": "adafactor",
    "weight_decay": 0.1,
    "warmup": 0.1,
    "schedule": "constant",
    "max_grad_norm": 0.5,
    "precision": "bfloat16",
    "gradient_checkpointing": True,
    "ema": 0.9,
    "from_scratch": True,
    "norm_shift_rate": 1e-5,
    "caption_dropout": 0.2,
    "captions": {"replace": 0.1},
    "embedding_noise": 0.1,
    "noise_offset": 0.1,
    "input_perturbation": 0.1,
    "min_snr": 5.0,
    "ensemble": {"split": "balanced", "average": "refactored", "moments": "kept", "split_groups": True},
}
SKIP = {"skip": {}}
REFUSED = {  # and what it is refused, by the key that is named
    "precision": {"precision": "float16"},
    "low_memory_full": {"low_memory_full": True},
    "norm_threshold": {"norm_threshold": 1.0},
    "stop_gap": {"stop_gap": 0.1},
    "ensemble": {"ensemble": {"shards": 2}},
    "skip": SKIP,
    "redistribution": {**SKIP, "ensemble": {"shards": 2}, "redistribution": {}},
    "augmentation": {**SKIP, "augmentation": {}},
}


def test_every_key_of_the_inner_loop_is_decided():
    assert {*ALLOWED, *REFUSED} == set(InnerConfig.model_fields) - {"privacy"}


@pytest.mark.parametrize("key", ALLOWED)
def test_what_leaves_the_bound_as_it_is_goes_with_it(key):
    assert load_config({"name": "a", "data": "digits", "inner": {"privacy": {}, key: ALLOWED[key]}})


@pytest.mark.parametrize("key", REFUSED)
def test_what_breaks_the_bound_is_refused_by_name(key):
    named = "inner.skip" if "skip" in REFUSED[key] else f"inner.{key}"
    with pytest.raises(MemControlError, match=f"{re.escape(named)}.* inner.privacy could not bound"):
        load_config({"name": "a", "data": "digits", "inner": {"privacy": {}, **REFUSED[key]}})


@pytest.mark.parametrize(
    "keys",
    [{"base_precision": "float16"}, {"base_offload": "all"}, {"search": {"gpus_per_trial": 2}}],
    ids=str,
)
def test_ways_to_hold_a_base_that_break_the_bound_are_refused(keys):
    with pytest.raises(MemControlError, match="inner.privacy could not bound"):
        load_config({"name": "a", "data": "digits", "inner": {"privacy": {}}, **keys})


def study(**keys):
    return load_config({"name": "a", "data": "digits", "space": "digits", **keys})


def test_epsilon_is_searched_over_and_asked_for_only_where_anything_has_one():
    over = {"inner.privacy": [None, {}], "inner.privacy.epsilon": [2, 8, 32]}
    asked = {"rewards": ["fid", "memorization", "epsilon"]}
    space = load_study_space(study(search={"over": over}, **asked))
    assert set(space.over) == set(over)
    assert load_study_space(study(inner={"privacy": {}}, rewards={"limits": {"epsilon": 8.0}}))
    with pytest.raises(MemControlError, match="no fine-tuning has one; set inner.privacy"):
        load_study_space(study(**asked))
    with pytest.raises(MemControlError, match="inner.skip leaves images out"):
        load_study_space(study(inner={"skip": {}}, search={"over": {"inner.privacy": [None, {}]}}))


def test_the_audits_epsilon_is_no_end_of_the_accounts():
    rewards = {"epsilon": 8.0, "epsilon_low": 0.5, "epsilon_most": 2.0}
    assert format_reward("epsilon", rewards) == "8.00" and Rewards(rewards).interval("epsilon") == (8.0, 8.0)
    assert format_reward("epsilon", {"epsilon": 1000.0}) == "no bound"
    told = describe_privacy(
        {"epsilon": 7.99, "privacy_delta": 1e-3, "privacy_units": 50, "privacy_images": 90}
    )
    assert "epsilon 7.99 at delta 1.0e-03 for each of 50 groups of the 90 training images" in told
    assert describe_privacy(rewards) == ""


def choose(method, base):
    space = load_space("digits")
    if method == "full":
        return Choice(("*",), "full", 1e-3)
    return Choice(tuple(space.groups), method, 1e-3, 2 if method in ("lora", "lokr") else None)


@pytest.fixture
def private(base):
    """Private steps over a method's parameters, some of which were moved from where they begin."""

    @contextmanager
    def make(method="lora", units=EACH, **inner):
        adapter = inject_adapter(base.denoiser, load_space("digits"), choose(method, base), 3)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        settings = InnerConfig(**{"batch_size": 5, "budget_images": 50, **SEEDED, **inner})
        try:
            yield PrivateSteps(base, adapter, settings, units, 7)
        finally:
            adapter.remove()

    return make


def noise_images(base, material, rows):
    text = base.cast(material.data.texts(material.data.caption_rows[rows]))
    generator = torch.Generator().manual_seed(1)
    return base.add_noise(material.data.mean[rows].float(), generator), text


def find_gradient(steps, noised, text, rows):
    """By plain autograd, of the mean loss of some rows."""
    loss, _ = steps.base.denoise_alone(noised.part(rows), {name: each[rows] for name, each in text.items()})
    found = torch.autograd.grad(loss.mean(), steps.parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, steps.parameters)]


def measure(gradient):
    return math.sqrt(sum(float(each.double().square().sum()) for each in gradient))


@pytest.mark.parametrize("method", ["lora", "full", "difffit", "svdiff"])
def test_gradients_of_units_are_autograds_one_at_a_time(base, material, private, method):
    """Unclipped and of one unit, the other's losses weighing nothing: all in one pass, and one by one."""
    noised, text = noise_images(base, material, torch.tensor([3, 3, 8, 8]))
    weights = torch.tensor([0.0, 0.0, 1.0, 1.0])
    with private(method, privacy={"seed": 5, "clip": 1e6, "multiplicity": 2}) as steps:
        expected = find_gradient(steps, noised, text, slice(2, 4))
        for together in (True, False):
            steps.is_together = together
            steps.begin()
            assert len(steps.add(noised, text, weights, 8)) == 4 and steps.is_together == together
            apart = max(float((a - b).abs().max()) for a, b in zip(steps.sums, expected))
            assert apart <= 1e-6 < measure(expected)
        again = find_gradient(steps, noised, text, slice(2, 4))
        assert all(torch.equal(a, b) for a, b in zip(expected, again))  # the denoiser is as it was


def test_a_step_adds_up_clipped_means_of_each_units_draws(base, material, private):
    """Brute force: mean over the draws first, then the norm, then the sum."""
    noised, text = noise_images(base, material, torch.tensor([0, 0, 1, 1, 2, 2]))
    with private(privacy={"seed": 5, "multiplicity": 2}) as steps:
        own = [find_gradient(steps, noised, text, slice(start, start + 2)) for start in (0, 2, 4)]
        norms = sorted(map(measure, own))
        clip = sum(norms[:2]) / 2  # of three units some are clipped
        steps.account = replace(steps.account, clip=clip, noise=0.0)
        for steps.is_together in (True, False):
            steps.begin()
            losses = steps.add(noised, text, 1.0, 3 if steps.is_together else 1)
            steps.finish(0)
            for i, parameter in enumerate(steps.parameters):
                expected = sum(min(1.0, clip / measure(g)) * g[i] for g in own) / 5
                assert torch.allclose(parameter.grad, expected, rtol=0, atol=1e-6)
            assert torch.allclose(losses, base.denoise_alone(noised, text)[0], rtol=1e-5)


def test_a_denoiser_without_vmap_is_asked_one_by_one(base, material, private, monkeypatch):
    noised, text = noise_images(base, material, torch.tensor([0, 1]))
    with private() as steps:
        monkeypatch.setattr(steps, "add_together", raiser(torch.OutOfMemoryError("too many")))
        with pytest.raises(torch.OutOfMemoryError):
            steps.add(noised, text, 1.0, 2)
        monkeypatch.setattr(steps, "add_together", raiser(NotImplementedError("no rule for it")))
        assert len(steps.add(noised, text, 1.0, 2)) == 2
        assert not steps.is_together and measure(steps.sums) > 0


def raiser(error):
    def fail(*given):
        raise error

    return fail


def test_a_gradient_that_is_not_finite_counts_as_nothing(base, material, private):
    noised, text = noise_images(base, material, torch.tensor([0, 1]))
    broken = replace(noised, target=noised.target.clone())
    broken.target[0] = torch.nan
    sums = []
    for together in (True, False):
        with private(privacy={"seed": 5, "multiplicity": 1}) as steps:
            steps.is_together = together
            steps.add(broken, text, 1.0, 2)
            sums.append([each.clone() for each in steps.sums])
            expected = find_gradient(steps, noised, text, slice(1, 2))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(*sums))
    share = min(1.0, 1.0 / measure(expected))
    assert all(torch.allclose(a, share * b, rtol=0, atol=1e-6) for a, b in zip(sums[0], expected))


def test_units_are_drawn_each_by_its_own_lot(private):
    with private() as steps:
        drawn = np.zeros((2000, N_IMAGES), bool)
        for number, row in enumerate(drawn):
            row[[int(unit) for unit in steps.draw_units(number)]] = True
        assert [unit.tolist() for unit in steps.draw_units(3)] == [
            unit.tolist() for unit in steps.draw_units(3)
        ]
    n, low, high = drawn.sum(0), *binom.ppf((1e-5, 1 - 1e-5), 2000, 0.25)
    assert (n >= low).all() and (n <= high).all()
    sizes = drawn.sum(1)  # binomial: mean 5, variance 3.75, and 0.3 % of the steps draw nobody
    assert abs(sizes.mean() - 5) < 0.2 and abs(sizes.var() - 3.75) < 0.5 and (sizes == 0).any()
    apart = np.corrcoef(drawn.T.astype(float)) - np.eye(N_IMAGES)
    assert np.abs(apart).max() < 5 / math.sqrt(2000)


def test_draws_of_a_group_are_spread_over_its_images(private):
    groups = ["a", "b", "a", "a", "b", "c"]
    assert [unit.tolist() for unit in list_units(groups)] == [[0, 2, 3], [1, 4], [5]]
    with private(units=groups, batch_size=2, privacy={"seed": 5, "multiplicity": 4}) as steps:
        drawn = steps.draw_rows(steps.units, torch.Generator().manual_seed(0)).reshape(3, 4).tolist()
    assert sorted(set(drawn[0])) == [0, 2, 3] and sorted(drawn[1]) == [1, 1, 4, 4] and drawn[2] == [5] * 4


def test_noise_has_the_size_that_the_account_knows_and_is_a_steps_own(private):
    with private("full", privacy={"seed": 5, "clip": 0.5, "epsilon": 4}) as steps:

        def draw(number):
            steps.begin()
            steps.finish(number)
            return torch.cat([parameter.grad.flatten() for parameter in steps.parameters])

        first, other, again = draw(0), draw(1), draw(0)
        size = steps.account.noise * 0.5 / 5
    assert torch.equal(first, again)
    assert float(first.std()) == pytest.approx(size, rel=0.01) == pytest.approx(float(other.std()), rel=0.01)
    assert abs(float(torch.corrcoef(torch.stack([first, other]))[0, 1])) < 0.01


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_with_a_seed_all_numbers_are_the_same_and_without_one_none(trained, tmp_path):
    settings = QUICK
    (log, first), (_, again) = (
        trained(folder="a", **settings, **SEEDED),
        trained(folder="b", **settings, **SEEDED),
    )
    (_, secret), (_, other) = (trained(folder=name, **settings, privacy={"multiplicity": 1}) for name in "cd")
    assert same(first, again) and not same(secret, other) and log.n_steps == 4
    kept = tmp_path / "c" / "noise.json"
    assert json.loads(kept.read_text()) != json.loads((tmp_path / "d" / "noise.json").read_text())
    assert kept.stat().st_mode & 0o077 == 0 and not (tmp_path / "a" / "noise.json").exists()


def test_a_fine_tuning_that_goes_on_has_the_noise_that_it_would_have_had(trained, tmp_path, monkeypatch):
    """Killed after its first round, with the secret in its folder: to the same bits."""
    monkeypatch.setattr("secrets.randbits", lambda bits: 11)
    settings = {**QUICK, "rounds": 2, "ema": 0.5, "privacy": {"multiplicity": 1}}
    _, whole = trained(folder="whole", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(rounds.Rounds, "keep", keep_first := make_killing(rounds.Rounds.keep))
        with pytest.raises(KeyboardInterrupt):
            trained(folder="killed", **settings)
    assert keep_first.calls == 2
    monkeypatch.setattr("secrets.randbits", lambda bits: pytest.fail("the secret was drawn again"))
    _, resumed = trained(folder="killed", **settings)
    assert same(whole, resumed)


def make_killing(keep):
    def keep_one(self, number, loop, records):
        keep_one.calls += 1
        if number == 1:
            raise KeyboardInterrupt
        keep(self, number, loop, records)

    keep_one.calls = 0
    return keep_one


def test_steps_that_draw_nobody_are_steps_all_the_same(trained, monkeypatch):
    monkeypatch.setattr(PrivateSteps, "draw_units", lambda self, number: [])
    log, state = trained(**QUICK, **SEEDED)
    assert (log.n_steps, log.images_seen) == (4, 0) and math.isnan(log.last_loss)
    assert any(each.abs().max() > 0 for name, each in state.items() if "lora_B" in name)


def test_only_weights_tell_that_a_fine_tuning_diverged(trained, monkeypatch):
    plain = unit_gradients.PrivateSteps.add
    monkeypatch.setattr(PrivateSteps, "add", lambda self, *given: plain(self, *given) * torch.inf)
    log, _ = trained(**QUICK, **SEEDED)
    assert log.n_steps == 4 and log.last_loss == math.inf
    with pytest.raises(Diverged, match="weights are not finite.*learning rate 1e\\+38"):
        trained(Choice(("*",), "full", 1e38), folder="b", warmup=0.0, **QUICK, **SEEDED)


def test_what_a_trial_says_of_its_bound(material, tmp_path):
    def list_rewards(config, method, steps=5):
        space = load_study_space(config)
        choice = Choice(("*",) if method == "full" else (), method, 1e-3)
        spec = Spec(configure_choice(config, choice), space, choice, tmp_path, "search", "holdout", N_IMAGES)
        return list_bound(spec, material, steps), describe_bound(spec, material, steps)

    private = study(inner={"budget_images": 40, "batch_size": 4, "privacy": {}})
    rewards, said = list_rewards(private, "full")
    assert (
        rewards["epsilon"]
        == said["privacy"]["epsilon"]
        < list_rewards(private, "full", 10)[0]["epsilon"]
        <= 8
    )
    assert (said["privacy"]["steps"], said["privacy"]["secret"], rewards["privacy_units"]) == (
        5,
        True,
        N_IMAGES,
    )
    assert list_rewards(private, "none") == ({"epsilon": 0.0}, {})
    searched = study(search={"over": {"inner.privacy": [None, {}]}})
    assert list_rewards(searched, "full") == ({"epsilon": 1000.0}, {})
    assert list_rewards(study(), "full") == ({}, {})


def test_a_search_over_epsilon_says_what_bounds_each_model(study_file):
    path = study_file(
        inner={"budget_images": 32, "batch_size": 8, "rounds": 2},
        rewards={**SMALL["rewards"], "objectives": ["fid", "memorization", "epsilon"], "confirm": 1},
        search={**SMALL["search"], "anchors": ["none"]}
        | {"over": {"inner.privacy": [{"epsilon": 4, "multiplicity": 1}]}},
    )
    run("search", path, check=True)
    results = [json.loads(one.read_text()) for one in path.parent.rglob("result.json")]
    private = next(result for result in results if "privacy" in result)
    account, rewards = private["privacy"], private["rewards"]
    assert rewards["epsilon"] == account["epsilon"] == count_epsilon(account["noise"], 0.25, 4, 1 / 320) <= 4
    assert (account["unit"], account["units"], account["steps"], account["secret"]) == ("image", 32, 4, True)
    assert not list(path.parent.rglob("noise.json"))
    confirmed = [json.loads(one.read_text())["rewards"] for one in path.parent.rglob("confirmed.json")]
    assert {0.0, rewards["epsilon"]} >= {found["epsilon"] for found in confirmed} != set()


@pytest.mark.parametrize("arm", ARMS)
def test_arms_of_the_evidence_are_studies(arm):
    assert (write_config(arm, 0).inner.privacy is None) == (ARMS[arm] is None)


def audit(base, material, folder):
    """epsilon_low of full fine-tuning under an epsilon of 0.5, of members against as many others."""
    sides, digests = (material.data, material.holdout()), [str(row) for row in range(N_IMAGES)]
    adapter = inject_adapter(base.denoiser, load_space("digits"), Choice(("*",), "full", 2e-3), 0)
    rule = {"epsilon": 0.5, "multiplicity": 1, "seed": 1}
    inner = InnerConfig(budget_images=2000, batch_size=N_IMAGES, privacy=rule)
    try:
        rounds.train_rounds(
            base, adapter, material, inner, seed=0, folder=folder, progress=lambda *_, **said: None
        )
        tuned = [measure_losses(base, side, digests, 0, 16) for side in sides]
    finally:
        adapter.remove()
    untrained = [measure_losses(base, side, digests, 0, 16) for side in sides]
    return epsilon_low(*(score_membership(*pair) for pair in zip(untrained, tuned)))


def test_what_an_audit_shows_exceeds_the_bound_only_where_the_noise_is_gone(
    base, material, tmp_path, monkeypatch
):
    assert audit(base, material, tmp_path / "private") <= 0.5
    bare = lambda *given: replace(open_account(*given), noise=0.0)  # noqa: E731
    monkeypatch.setattr(unit_gradients, "open_account", bare)
    assert audit(base, material, tmp_path / "bare") > 0.5
