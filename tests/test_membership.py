"""Membership figures against scikit-learn, definitions written out and enumeration; losses against the plain
denoiser; and on models that have seen one side, the other, or neither."""

import json
import math

import numpy as np
import pytest
import torch
from commands import run
from scipy.stats import gmean, sem
from sklearn.metrics import roc_auc_score, roc_curve

from memcontrol.config.inner import InnerConfig
from memcontrol.config.load import load_config
from memcontrol.config.rewards import RewardsConfig
from memcontrol.core.files import read_json
from memcontrol.core.run_folder import RunFolder, locate_study_folder
from memcontrol.core.seeds import derive_seed
from memcontrol.data.split import load_parts
from memcontrol.scoring.membership import (
    average_groups,
    choose_false_positives,
    choose_guesses,
    count_right_guesses,
    epsilon_low,
    find_epsilon,
    measure_membership,
    membership_auc,
    membership_tpr,
    score_membership,
)
from memcontrol.training.losses import MOST_IMAGES, N_DRAWS, choose_attack_size, measure_losses

RNG = np.random.default_rng(7)
PAIRS = [
    (RNG.normal(0.7, 1, 35), RNG.normal(0, 1, 200)),
    (RNG.normal(0.3, 1, 150), RNG.normal(0, 2, 120)),
    (RNG.integers(0, 4, 40).astype(float), RNG.integers(0, 3, 60).astype(float)),  # many ties
    (np.zeros(20), np.zeros(30)),
]


@pytest.mark.parametrize("members, others", PAIRS)
def test_auc_is_scikit_learns(members, others):
    labels = np.repeat([1, 0], [len(members), len(others)])
    expected = roc_auc_score(labels, np.concatenate([members, others]))
    assert float(membership_auc(members, others)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("members, others", PAIRS[:3])
def test_auc_error_is_delongs_by_its_definition(members, others):
    """Structural components: of each member the share of others that it beats, and the other way round."""
    wins = [[1.0 if a > b else 0.5 if a == b else 0.0 for b in others] for a in members]
    of_members = [sum(row) / len(others) for row in wins]
    of_others = [sum(column) / len(members) for column in zip(*wins)]
    variance = np.var(of_members, ddof=1) / len(members) + np.var(of_others, ddof=1) / len(others)
    assert membership_auc(members, others).error == pytest.approx(math.sqrt(variance), rel=1e-9)


@pytest.mark.parametrize("members, others", PAIRS[:2])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
def test_tpr_is_the_highest_on_scikit_learns_curve(members, others, share):
    labels = np.repeat([1, 0], [len(members), len(others)])
    false, true, _ = roc_curve(labels, np.concatenate([members, others]), drop_intermediate=False)
    found = membership_tpr(members, others, share)
    assert float(found) == pytest.approx(true[false <= share + 1e-12].max(), abs=1e-12)
    assert found.low <= found.value <= found.high


def test_tpr_of_equal_scores_is_what_chance_tells():
    assert float(membership_tpr(np.zeros(50), np.zeros(200), 0.01)) == pytest.approx(0.01)
    # half of the members are above every other one, the rest like all others
    members = np.repeat([1.0, 0.0], 25)
    assert float(membership_tpr(members, np.zeros(200), 0.01)) == pytest.approx(0.5 + 0.5 * 0.01)


def test_false_alarms_are_as_few_as_so_many_others_show():
    assert [choose_false_positives(n) for n in (20, 99, 100, 800)] == [0.05, 0.05, 0.01, 0.01]


def enumerated_epsilon(right, guesses, level=0.05):
    """The largest epsilon at which so many right guesses or more would have a chance of no more than the
    level."""

    def chance(epsilon):
        p = 1 / (1 + math.exp(-epsilon))
        return sum(math.comb(guesses, v) * p**v * (1 - p) ** (guesses - v) for v in range(right, guesses + 1))

    low, high = 0.0, 20.0
    if chance(low) > level:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle) <= level else (low, middle)
    return low


@pytest.mark.parametrize("guesses", [2, 8, 24, 60])
def test_epsilon_is_what_enumeration_gives(guesses):
    for right in range(guesses + 1):
        assert find_epsilon(right, guesses) == pytest.approx(enumerated_epsilon(right, guesses), abs=1e-6)


def test_epsilon_of_what_was_measured_before():
    found = [round(find_epsilon(right, 24), 2) for right in (14, 16, 17, 22, 24)]
    assert found == [0, 0, 0.09, 1.15, 2.02]
    assert choose_guesses(35) == 24 and choose_guesses(10_000) == 200


def test_epsilon_of_randomised_response_is_hardly_ever_too_large():
    """Whether one is a member is told right with exactly the chance that its epsilon allows."""
    epsilon, too_large = 0.8, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        is_member = rng.random(300) < 0.5
        told = is_member ^ (rng.random(300) >= 1 / (1 + math.exp(-epsilon)))
        found = epsilon_low(told[is_member].astype(float), told[~is_member].astype(float), seed)
        too_large += found > epsilon
    assert too_large <= 10


def test_equal_scores_are_guessed_by_chance_and_not_by_their_order():
    found = [count_right_guesses(np.zeros(60), np.zeros(200), seed) for seed in range(200)]
    rights, guesses = np.array([right for right, _ in found]), found[0][1]
    assert guesses == 40
    assert abs(rights.mean() - 20) < 3 * math.sqrt(40 / 4 / 200) * 1.2
    assert rights.std() > 1


def test_score_is_the_mean_of_log_ratios_and_0_without_training():
    base, tuned = np.array([[0.5, 0.2], [0.3, 0.3]]), np.array([[0.25, 0.1], [0.3, 0.6]])
    found = score_membership(base, tuned)
    assert found == pytest.approx([math.log(2), -math.log(2) / 2])
    assert (score_membership(base, base) == 0).all()


def test_loss_on_unseen_images_is_scipys_geometric_mean_of_ratios():
    before, after = RNG.uniform(0.5, 2, (2, 30, 1))
    sides = (before[:10], before[10:]), (after[:10], after[10:])
    names = [f"m{i}" for i in range(10)], [f"o{i}" for i in range(20)]
    told = measure_membership(*sides, names, 0, is_drawn=False)["membership_holdout_loss"]
    ratios = (after / before)[10:, 0]
    assert told.value == pytest.approx(gmean(ratios), rel=1e-12)
    assert told.error == pytest.approx(told.value * sem(np.log(ratios)), rel=1e-12)


def test_group_counts_once_by_its_mean():
    scores, groups = np.array([1.0, 3.0, 10.0, 5.0]), ["p", "q", "p", "r"]
    assert average_groups(scores, groups).tolist() == [5.5, 3.0, 5.0]
    losses = np.exp(RNG.normal(size=(4, 3)))
    found = measure_membership(
        (losses, losses), (losses, losses), (groups, ["a", "b", "c", "d"]), 0, is_drawn=True
    )
    assert found["membership_members"] == 3 and found["membership_images"] == 4
    assert float(found["membership_auc"]) == 0.5 and found["membership_auc"].error == 0
    assert found["epsilon_low"] == 0


def test_epsilon_is_told_only_of_parts_that_chance_has_made():
    losses = np.exp(RNG.normal(size=(20, 3)))
    names = [str(i) for i in range(20)]
    found = measure_membership((losses, losses), (losses, losses), (names, names), 0, is_drawn=False)
    assert not any(name.startswith("epsilon") for name in found)


def test_losses_by_hand(base, material):
    """Of one image at one timestep, with the plain denoiser."""
    digests = [f"image {i}" for i in range(20)]
    found = measure_losses(base, material.data, digests, 11, N_DRAWS)
    row, k = 13, 5
    timestep = int(np.linspace(0.03, 0.75, 16)[k] * 1000)
    generator = torch.Generator().manual_seed(derive_seed(11, "membership", "image 13", k))
    clean = material.data.mean[row : row + 1]
    noise = torch.randn(clean.shape, generator=generator)
    kept = base.schedule.alphas_cumprod[timestep]
    with torch.no_grad():
        text = material.data.text["prompt_embeds"][material.data.caption_rows[row : row + 1]]
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        predicted = base.denoiser(noisy, torch.tensor([timestep]), text).sample
    assert found.shape == (20, 16)
    assert found[row, k] == pytest.approx(float(((predicted - noise) ** 2).mean()), rel=1e-5)


def test_noise_of_an_image_is_the_same_in_any_set(base, material):
    digests = [f"image {i}" for i in range(20)]
    rows = [7, 3, 18]
    some = measure_losses(base, material.data.take(rows), [digests[i] for i in rows], 11, 4)
    assert some == pytest.approx(measure_losses(base, material.data, digests, 11, 4)[rows], rel=1e-4)


def test_model_tuned_on_one_side_is_told_and_on_the_other_below_a_half(base, material, memorized):
    config = load_config({"name": "a", "data": {"path": "digits", "train": 20, "holdout": 20, "test": 20}})
    digests = {
        part: [record.digest for record in images.records]
        for part, images in load_parts(config.data, 32, 0).parts.items()
    }
    sides = material.data, material.holdout()

    def measure():
        return tuple(
            measure_losses(base, data, digests[part], 0, N_DRAWS)
            for data, part in zip(sides, ("train", "holdout"))
        )

    before = measure()
    with memorized():
        after = measure()
    names = tuple(digests.values())[:2]
    told = measure_membership(before, after, names, 0, is_drawn=True)
    assert float(told["membership_auc"]) > 0.95 and told["epsilon_low"] > 0.5
    swapped = measure_membership(before[::-1], after[::-1], names[::-1], 0, is_drawn=True)
    assert float(swapped["membership_auc"]) == pytest.approx(1 - float(told["membership_auc"]), abs=1e-9)
    base_auc = told["membership_base_auc"]
    assert abs(float(base_auc) - 0.5) < 3 * base_auc.error


@pytest.mark.parametrize("budget", [32, 1000, 7360, 100_000])
@pytest.mark.parametrize("members, others", [(35, 881), (4000, 400), (12, 12)])
def test_attack_takes_a_tenth_of_a_trial_at_most(budget, members, others):
    inner, rewards = InnerConfig(budget_images=budget), RewardsConfig()
    size = choose_attack_size(inner, rewards, members, others)
    passes = 3 * budget + rewards.n_samples * rewards.sampling_steps
    if size is None:
        assert budget < 1000
        return
    assert (size.members + size.others) * size.draws <= 0.1 * passes
    assert 0 < size.members <= min(members, MOST_IMAGES) and 0 < size.others <= min(others, MOST_IMAGES)
    asked = choose_attack_size(inner, RewardsConfig(objectives=("fid", "membership_auc")), members, others)
    assert (asked.members, asked.others, asked.draws) == (min(members, 512), min(others, 512), 16)


def test_study_of_two_objectives_is_stopped_by_them_at_rungs(study_file):
    """Early stopping judges by every objective, those that need no samples too."""
    study = study_file(
        inner={"budget_images": 64, "batch_size": 16, "rounds": 4},
        rewards={
            "objectives": ["fid", "membership_auc"],
            "n_samples": 64,
            "force": True,
            "sampling_steps": 1,
            "confirm": 1,
        },
        search={
            "trials": 1,
            "workers": 1,
            "executor": "inline",
            "early_stopping": {"rungs": [0.5], "n_samples": 64},
        },
    )
    run("search", study, check=True)
    results = read_results(study)
    rungs = [rung["rewards"] for result in results for rung in result["rungs"]]
    assert rungs and all(0 <= rewards["membership_auc"] <= 1 for rewards in rungs)
    front = json.loads(run("front", study, "--json", check=True).stdout)
    assert front and all({"fid", "membership_auc"} <= trial["rewards"].keys() for trial in front)
    for folder in locate_study_folder(study, "small").glob("*/confirmed.json"):
        again, before = (
            read_json(place)["rewards"] for place in (folder, RunFolder(folder.parent).result_file)
        )
        assert again["membership_auc"] == before["membership_auc"]


def test_study_of_three_objectives_runs_to_the_end(study_file):
    objectives = ["fid", "memorization", "membership_auc"]
    study = study_file(
        rewards={"objectives": objectives, "n_samples": 64, "force": True, "sampling_steps": 1, "confirm": 0}
    )
    run("search", study, check=True)
    untrained = [result for result in read_results(study) if result["choice"]["method"] == "none"]
    assert [result["rewards"]["membership_auc"] for result in untrained] == [0.5]
    assert untrained[0]["rewards"]["epsilon_low"] == 0


def read_results(study):
    return [read_json(path) for path in locate_study_folder(study, "small").glob("*/result.json")]
