"""Owns what a trial is scored on: the evidence of its images, and the registered rewards, all minimised, made from it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from memcontrol.config import RewardsConfig
from memcontrol.errors import MemControlError
from memcontrol.rewards import (
    FALSE_POSITIVES, Space, authpct, carlini_rate, copy_rate_in, fd_pca, fid, kid, memorization_in, mifid, mq, prdc, unit,
)  # fmt: skip

N_BALL = 5  # neighbours of precision, recall, density and coverage


@dataclass(frozen=True)
class Views:
    """One set of images under the two descriptors: pixels [N, 3072], 32 x 32 in 0..1, and extractor features [N, D]."""

    pixels: np.ndarray
    features: np.ndarray

    @property
    def mirrored(self) -> np.ndarray:
        """The pixels of the mirror images [N, 3072]."""
        return self.pixels.reshape(-1, 3, 32, 32)[..., ::-1].reshape(len(self.pixels), -1)


@dataclass(frozen=True)
class Evidence:
    """All that rewards may look at: generated images, the training set, and as references images never trained on."""

    generated: Views
    train: Views
    holdout: Views
    seed: int = 0
    trained_fraction: float = 0.0
    cache: dict = field(default_factory=dict, compare=False)

    def space(self, name: str) -> Space:
        if name not in self.cache:
            self.cache[name] = (pixel_space if name == "pixels" else feature_space)(self)
        return self.cache[name]


def pixel_space(evidence: Evidence) -> Space:
    generated, held = evidence.generated, evidence.holdout
    return Space(
        (generated.pixels, generated.mirrored), evidence.train.pixels, held.pixels, (held.pixels, held.mirrored), evidence.seed
    )  # fmt: skip


def feature_space(evidence: Evidence) -> Space:
    """Features centred on the mean of both references and scaled to unit length (cosine geometry)."""
    centre = (evidence.train.features.mean(0) + evidence.holdout.features.mean(0)) / 2
    generated, train, held = (unit(x.features - centre) for x in (evidence.generated, evidence.train, evidence.holdout))
    return Space((generated,), train, held, (held,), evidence.seed)


REWARDS: dict[str, Callable[[Evidence], dict[str, float]]] = {}


def reward(name: str):
    """Registers a function of the evidence; it gives its own value under its name, and what belongs beside it."""

    def register(function):
        REWARDS[name] = function
        return function

    return register


@reward("fid")
def fid_reward(evidence: Evidence) -> dict[str, float]:
    return {"fid": fid(evidence.holdout.features, evidence.generated.features)}


@reward("fd_pca")
def fd_pca_reward(evidence: Evidence) -> dict[str, float]:
    """On as many principal components as a quarter of the smaller set, 64 at the most."""
    k = min(64, len(evidence.generated.features) // 4, len(evidence.holdout.features) // 4, evidence.holdout.features.shape[1])
    return {"fd_pca": fd_pca(evidence.holdout.features, evidence.generated.features, max(k, 1)), "fd_pca_components": max(k, 1)}


@reward("kid")
def kid_reward(evidence: Evidence) -> dict[str, float]:
    """Of features divided by the held-out ones' root mean square, since the kernel is not scale-free."""
    scale = math.sqrt(np.square(evidence.holdout.features, dtype=np.float64).mean())
    found = kid(evidence.holdout.features, evidence.generated.features, scale)
    return {"kid": found, "kid_error": found.error, "kid_scale": scale}


@reward("prdc")
def prdc_reward(evidence: Evidence) -> dict[str, float]:
    """For reports: blur raises precision and density, and coverage grows with n alone."""
    return dict(prdc(evidence.holdout.features, evidence.generated.features, N_BALL))


@reward("memorization")
def memorization_reward(evidence: Evidence) -> dict[str, float]:
    """The larger of M in pixels and M in features, and at least 0: below 0 is noise, never "better"."""
    found = {name: memorization_in(evidence.space(name)) for name in ("pixels", "features")}
    worst = max(found.values())
    parts = {f"memorization_{name}": float(value) for name, value in found.items()}
    return {"memorization": max(worst, 0.0), "memorization_sd": worst.error, "memorization_p": worst.p, **parts}


@reward("copy_rate")
def copy_rate_reward(evidence: Evidence) -> dict[str, float]:
    share = copy_rate_in(evidence.space("pixels"))
    beside = {"copy_rate_features": copy_rate_in(evidence.space("features")), "copy_rate_line": FALSE_POSITIVES}
    return {"copy_rate": share, "copy_rate_low": share.low, "copy_rate_high": share.high, **beside}


@reward("published")
def published_rewards(evidence: Evidence) -> dict[str, float]:
    """Figures of other papers, for continuity: MQ and Carlini's rate in pixels, MIFID and AuthPct in features, the last also of
    held-out images, whose value is what a model that copies nothing reaches."""
    pixels, features = (evidence.generated.pixels, evidence.train.pixels), (evidence.generated.features, evidence.train.features)
    return {
        "mq": float(mq(*pixels)), "carlini_rate": carlini_rate(*pixels), "mifid": mifid(features[1], features[0]),
        "authpct": authpct(*features), "authpct_holdout": authpct(evidence.holdout.features, features[1]),
    }  # fmt: skip


@reward("nearest_distance")
def nearest_distance(evidence: Evidence) -> dict[str, float]:
    """Average minimum pixel distances, for the eye only: no objective, since noise has the largest."""
    space = evidence.space("pixels")
    return {
        "amd_train": float(space.to_train[0].mean()),
        "amd_holdout": float(space.to_holdout.mean()),
        "amd_holdout_train": float(space.held_to_train.mean()),
    }


@reward("trained_fraction")
def trained_fraction(evidence: Evidence) -> dict[str, float]:
    return {"trained_fraction": evidence.trained_fraction}


COSTS = ("step_gflops", "memory_mib")  # known before training, by memcontrol.cost
PROBES = ("loss_gap", "noise_norm_mean", "noise_norm_max", "noise_norm_ratio")  # of the denoiser itself, by memcontrol.probe
OBJECTIVES = ("fid", "fd_pca", "kid", "memorization", "copy_rate", "trained_fraction", *PROBES, *COSTS)
LIMITABLE = (*OBJECTIVES, "copy_rate_high", "copy_rate_features", "memorization_pixels", "memorization_features", "mq", "carlini_rate", "mifid")


def score(evidence: Evidence, functions: dict[str, str] = {}) -> dict[str, float]:
    """Every registered reward of one fine-tuned model, and a user's own by name from FILE.py:FUNCTION. Raises MemControlError."""
    found = {name: float(value) for function in REWARDS.values() for name, value in function(evidence).items()}
    return found | {name: own_reward(place, evidence) for name, place in functions.items()}


def own_reward(place: str, evidence: Evidence) -> float:
    value = load_function(place)(evidence)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise MemControlError(f"reward {place} gave {value!r}; it must give a finite number, less is better")
    return number


def load_function(place: str) -> Callable[[Evidence], float]:
    """The function of FILE.py:FUNCTION. Raises MemControlError where there is none, or the file breaks."""
    path, _, name = place.rpartition(":")
    if not Path(path).is_file():
        raise MemControlError(f"rewards.objectives: '{place}': no such file {path}; write FILE.py:FUNCTION, beside the study file")
    spec = importlib.util.spec_from_file_location(f"memcontrol_reward_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise MemControlError(f"rewards.objectives: {path} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise MemControlError(f"rewards.objectives: {path} has no function '{name}'")
    return getattr(module, name)


def check_rewards(rewards: RewardsConfig, n_features: int) -> None:
    """Raises MemControlError for an unknown objective or limit, or too few samples for the FID to rank by anything but chance."""
    for name, objective in zip(rewards.names, rewards.objectives):
        if ":" in objective:
            load_function(objective)
        elif name not in OBJECTIVES:
            raise MemControlError(f"rewards.objectives: '{name}' is unknown; allowed: {', '.join(OBJECTIVES)}, or FILE.py:FUNCTION")
    if len(set(rewards.names)) < len(rewards.names):
        raise MemControlError(f"rewards.objectives: {', '.join(rewards.names)} names one twice")
    for name in rewards.limits:
        if name not in (*LIMITABLE, *rewards.names):
            raise MemControlError(f"rewards.limits: '{name}' is unknown; allowed: {', '.join((*LIMITABLE, *rewards.functions))}")
    if "fid" in rewards.objectives and rewards.n_samples < 4 * n_features and not rewards.force:
        raise MemControlError(
            f"rewards.n_samples is {rewards.n_samples}: fid over {n_features} features needs at least {4 * n_features} to rank by anything "
            "but chance; raise it, use kid or fd_pca, or set rewards.force=true"
        )
