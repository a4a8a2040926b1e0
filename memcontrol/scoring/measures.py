"""Owns what is measured on the evidence of a trial: each reward by its name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from memcontrol.core.estimate import Estimate, Measured, estimate_share
from memcontrol.core.reward_table import FALSE_POSITIVES
from memcontrol.data.features import pixel_features
from memcontrol.scoring.copying import (
    chance_rate,
    combine_rates,
    line_ratio,
    measure_copy_rate,
    measure_memorization,
    measure_swapped_rate,
)
from memcontrol.scoring.distances import DistanceSpace, remember_once
from memcontrol.scoring.evidence import COPY_RATES, WHOLE, Descriptors, Evidence
from memcontrol.scoring.published import authpct, carlini_rate, extraction, mq, tile_distances
from memcontrol.scoring.quality import clip_score, fd_pca, fid, kid, mifid, prdc

_N_BALL = 5  # neighbours of precision, recall, density and coverage
N_PAIRED = 200  # held-out images whose pairs calibrate the extraction attack

MEASURES: list[Callable[[Evidence], Measured]] = []


def _register_measure(function):
    """Registers a function of the evidence that gives rewards by name, most of them Estimates."""
    MEASURES.append(function)
    return function


@_register_measure
def _measure_frechet(evidence: Evidence) -> Measured:
    """FD also on as many principal components as a quarter of the smaller set, 64 at the most."""
    held, made = evidence.holdout.features, evidence.generated.features
    k = max(1, min(64, len(made) // 4, len(held) // 4, held.shape[1]))
    reference = evidence.holdout.gaussian
    return {
        "fid": fid(reference, made),
        "fid_samples_per_feature": len(made) / made.shape[1],
        "fd_pca": fd_pca(reference, made, k),
        "fd_pca_components": k,
    }


@_register_measure
def _measure_kernel_distance(evidence: Evidence) -> Measured:
    """Of features divided by the held-out ones' root mean square, since the kernel is not scale-free."""
    scale = math.sqrt(np.square(evidence.holdout.features, dtype=np.float64).mean())
    found = kid(evidence.holdout.features, evidence.generated.features, scale, evidence.holdout_groups)
    return {"kid": found, "kid_scale": scale}


@_register_measure
def _measure_neighbourhoods(evidence: Evidence) -> Measured:
    return dict(prdc(evidence.holdout.features, evidence.generated.features, _N_BALL))


@_register_measure
def _measure_text_fit(evidence: Evidence) -> Measured:
    return {"clip_score": clip_score(*evidence.clip)} if evidence.clip else {}


@_register_measure
def _measure_utility(evidence: Evidence) -> Measured:
    return evidence.utility.to_rewards() if evidence.utility else {}


@_register_measure
def measure_memorization_distance(evidence: Evidence) -> Measured:
    pixels, features = (measure_memorization(evidence.whole_space(name)) for name in WHOLE)
    return {
        "memorization_pixels": pixels,
        "memorization_features": features,
        "memorization": find_worst(pixels, features),
    }


def find_worst(*distances: Estimate) -> Estimate:
    """The reward `memorization`: the larger M, of pixels and features, and at least 0: below 0 is noise,
    never "better". Its p is that of the larger of both."""
    worst = max(distances, key=float)
    labels = np.max([one.labels for one in distances if one.labels is not None], axis=0)
    return Estimate(max(worst.value, 0.0), worst.error, contributions=worst.contributions, labels=labels)


@_register_measure
def measure_copies(evidence: Evidence) -> Measured:
    rates: Measured = {}
    for name, space in zip(COPY_RATES.values(), evidence.spaces):
        rates[name] = measure_copy_rate(space)
        rates[f"{name}_swapped"] = measure_swapped_rate(space)
    pixels = evidence.space("pixels")
    n_real = len(pixels.real_ratios)
    return rates | {
        "copying": combine_copy_rates(rates),
        "clear_copy_rate": estimate_share(evidence.suspects.is_clear),
        "copied_images": len(evidence.suspects.copied),
        "copied_groups": len(np.unique(pixels.groups[0][evidence.suspects.copied])),
        "copy_rate_line": chance_rate(n_real),
        "copy_rate_n_real": n_real,
    }


def combine_copy_rates(rates: Measured) -> Estimate:
    """The reward `copying`, from the copy rates of all descriptors."""
    pairs = ((rates[name], rates[f"{name}_swapped"]) for name in COPY_RATES.values())
    return combine_rates([(rate, swapped) for rate, swapped in pairs if isinstance(rate, Estimate)])


@_register_measure
def _measure_published(evidence: Evidence) -> Measured:
    """Rewards of other papers, for continuity: MQ and Carlini's rate in pixels, MIFID and AuthPct in
    features, the last also of held-out images, whose value is what a model that copies nothing reaches."""
    pixels, train_pixels = evidence.generated.pixels, evidence.train.pixels
    features, train_features = evidence.generated.features, evidence.train.features
    to_train = float(fid(evidence.train.gaussian, features))
    authpct_holdout = remember_once(
        evidence.known["features"],
        "authpct of held-out",
        lambda: authpct(evidence.holdout.features, train_features),
    )
    return {
        "mq": float(mq(pixels, train_pixels)),
        "carlini_rate": carlini_rate(pixels, train_pixels),
        "mifid": mifid(train_features, features, "kaggle", frechet=to_train),
        "mifid_torchmetrics": mifid(train_features, features, "torchmetrics", frechet=to_train),
        "authpct": authpct(features, train_features),
        "authpct_holdout": authpct_holdout,
    }


@_register_measure
def _measure_nearest_distances(evidence: Evidence) -> Measured:
    """Average minimum pixel distances, for the eye only: no objective, since noise has the largest."""
    space = evidence.whole_space("pixels")
    return {
        "amd_train": float(space.to_train[0].mean()),
        "amd_holdout": float(space.to_holdout[0].mean()),
        "amd_holdout_train": float(space.holdout_to_train.mean()),
    }


def measure_extraction(generations: np.ndarray, holdout: np.ndarray, references: DistanceSpace) -> Measured:
    """The extraction attack on prompts' generations, uint8 [P, m, 3, H, W]: which agree, the threshold being
    the distance that 1 % of pairs of held-out images, uint8 [N, 3, H, W], lie below; and which of these match
    a training image, as far as 99 % of real images do not, in a space of pixels."""
    apart = tile_distances(holdout / 255)
    threshold = float(np.quantile(apart[np.triu_indices(len(apart), 1)], FALSE_POSITIVES))
    matches = _match_training_images(generations, references)
    found: Measured = {}
    for kind, share in extraction(generations / 255, threshold, matches=matches).items():
        found[f"extraction_{kind}"] = share
    for kind, share in extraction(generations / 255, threshold).items():
        found[f"agreement_{kind}"] = share
    n_groups = len(holdout) // generations.shape[1]
    if n_groups:  # what images that have nothing to do with each other get
        groups = holdout[: n_groups * generations.shape[1]].reshape(n_groups, -1, *holdout.shape[1:])
        for kind, share in extraction(groups / 255, threshold).items():
            found[f"agreement_{kind}_holdout"] = share
    return found | {"extraction_threshold": threshold, "extraction_prompts": len(generations)}


def _match_training_images(generations: np.ndarray, references: DistanceSpace) -> np.ndarray:
    """Which of uint8 [P, m, 3, H, W] lie below the line of copies: [P, m]."""
    pixels = pixel_features(generations.reshape(-1, *generations.shape[2:]))
    space = replace(references, generated=Descriptors(pixels, pixels).versions)
    return (space.ratios < line_ratio(space.real_ratios)).reshape(generations.shape[:2])
