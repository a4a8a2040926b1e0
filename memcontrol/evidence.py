"""Owns what a trial is scored on: the evidence of its images, and the figures made from it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from memcontrol.config import RewardsConfig
from memcontrol.copying import (
    FALSE_POSITIVES,
    Space,
    authpct,
    carlini_rate,
    chance_rate,
    clear_copies_in,
    copy_rate_in,
    extraction,
    memorization_in,
    mq,
    once,
    p_of_hits,
    tile_distances,
)
from memcontrol.errors import MemControlError
from memcontrol.estimate import Estimate, pooled
from memcontrol.features import unit
from memcontrol.figures import DIRECTIONS, MAXIMIZE, MINIMIZE, OBJECTIVES, direction_of
from memcontrol.rewards import Gaussian, clip_score, fd_pca, fid, gaussian, kid, mifid, prdc

N_BALL = 5  # neighbours of precision, recall, density and coverage
N_PAIRED = 200  # held-out images whose pairs calibrate the extraction attack


@dataclass(frozen=True)
class Views:
    """One set of images under the two descriptors: pixels [N, 3072], 32 x 32 in 0..1, and extractor features [N, D]."""

    pixels: np.ndarray
    features: np.ndarray

    @cached_property
    def gaussian(self) -> Gaussian:
        """Of the features: what fid needs of a reference."""
        return gaussian(self.features)

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
    images: np.ndarray | None = None  # uint8 [N, 3, H, W], the generated ones as they are
    captions: tuple[str, ...] = ()  # that they were generated from
    clip: tuple[np.ndarray, np.ndarray] | None = None  # a CLIP model's embeddings of images and captions, [N, D] each
    known: dict[str, dict] = field(default_factory=lambda: {"pixels": {}, "features": {}}, compare=False)  # of each space, what depends on references alone
    cache: dict = field(default_factory=dict, compare=False)

    def space(self, name: str) -> Space:
        if name not in self.cache:
            self.cache[name] = (pixel_space if name == "pixels" else feature_space)(self)
        return self.cache[name]


def pixel_space(evidence: Evidence) -> Space:
    generated, held = evidence.generated, evidence.holdout
    return Space(
        (generated.pixels, generated.mirrored), evidence.train.pixels, held.pixels, (held.pixels, held.mirrored), evidence.seed, evidence.known["pixels"]
    )  # fmt: skip


def feature_space(evidence: Evidence) -> Space:
    """Features centred on the mean of both references and scaled to unit length (cosine geometry)."""
    known, references = evidence.known["features"], (evidence.train.features, evidence.holdout.features)
    centre = once(known, "centre", lambda: (references[0].mean(0) + references[1].mean(0)) / 2)
    train, held = once(known, "on the sphere", lambda: [unit(rows - centre) for rows in references])
    return Space((unit(evidence.generated.features - centre),), train, held, (held,), evidence.seed, known)


def reward(direction: str = MINIMIZE):
    """Says which way a reward of a user's own is better: @reward(direction="maximize"). Without it, less is better."""
    if direction not in (MINIMIZE, MAXIMIZE):
        raise MemControlError(f"a reward's direction is '{direction}'; allowed: {MINIMIZE}, {MAXIMIZE}")

    def mark(function):
        function.direction = direction
        return function

    return mark


REWARDS: list[Callable[[Evidence], dict[str, float]]] = []


def measured(function):
    """Registers a function of the evidence that gives figures by name, most of them Estimates."""
    REWARDS.append(function)
    return function


@measured
def frechet(evidence: Evidence) -> dict[str, float]:
    """FD also on as many principal components as a quarter of the smaller set, 64 at the most."""
    held, made = evidence.holdout.features, evidence.generated.features
    k = max(1, min(64, len(made) // 4, len(held) // 4, held.shape[1]))
    reference = evidence.holdout.gaussian
    return {
        "fid": fid(reference, made), "fid_samples_per_feature": len(made) / made.shape[1], "fd_pca": fd_pca(reference, made, k), "fd_pca_components": k
    }  # fmt: skip


@measured
def kernel_distance(evidence: Evidence) -> dict[str, float]:
    """Of features divided by the held-out ones' root mean square, since the kernel is not scale-free."""
    scale = math.sqrt(np.square(evidence.holdout.features, dtype=np.float64).mean())
    return {"kid": kid(evidence.holdout.features, evidence.generated.features, scale), "kid_scale": scale}


@measured
def neighbourhoods(evidence: Evidence) -> dict[str, float]:
    return dict(prdc(evidence.holdout.features, evidence.generated.features, N_BALL))


@measured
def text_fit(evidence: Evidence) -> dict[str, float]:
    return {"clip_score": clip_score(*evidence.clip)} if evidence.clip else {}


@measured
def memorization_distance(evidence: Evidence) -> dict[str, float]:
    return with_worst({f"memorization_{name}": memorization_in(evidence.space(name)) for name in ("pixels", "features")})


def with_worst(found: dict[str, Any]) -> dict[str, Any]:
    """Adds `memorization`, the larger M of pixels and features, and at least 0: below 0 is noise, never "better"."""
    worst = max((found["memorization_pixels"], found["memorization_features"]))
    return found | {"memorization": Estimate(max(worst, 0.0), worst.error, p=worst.p, contributions=worst.contributions)}


@measured
def copies(evidence: Evidence) -> dict[str, float]:
    found = {"copy_rate": copy_rate_in(evidence.space("pixels")), "copy_rate_features": copy_rate_in(evidence.space("features"))}
    found |= {"clear_copy_rate": max((clear_copies_in(evidence.space(name)) for name in ("pixels", "features")), key=float)}
    return found | {"copy_rate_line": chance_rate(len(evidence.holdout.pixels)), "copy_rate_n_real": len(evidence.holdout.pixels)}


@measured
def published(evidence: Evidence) -> dict[str, float]:
    """Figures of other papers, for continuity: MQ and Carlini's rate in pixels, MIFID and AuthPct in features, the last also of
    held-out images, whose value is what a model that copies nothing reaches."""
    pixels, features = (evidence.generated.pixels, evidence.train.pixels), (evidence.generated.features, evidence.train.features)
    to_train = fid(evidence.train.gaussian, features[0])
    both = {way: mifid(features[1], features[0], way, frechet=to_train) for way in ("kaggle", "torchmetrics")}
    return {
        "mq": float(mq(*pixels)), "carlini_rate": carlini_rate(*pixels), "mifid": both["kaggle"], "mifid_torchmetrics": both["torchmetrics"],
        "authpct": authpct(*features), "authpct_holdout": once(evidence.known["features"], "authpct of held-out", lambda: authpct(evidence.holdout.features, features[1])),
    }  # fmt: skip


@measured
def nearest_distance(evidence: Evidence) -> dict[str, float]:
    """Average minimum pixel distances, for the eye only: no objective, since noise has the largest."""
    space = evidence.space("pixels")
    return {
        "amd_train": float(space.to_train[0].mean()), "amd_holdout": float(space.to_holdout.mean()),
        "amd_holdout_train": float(space.held_to_train.mean()),
    }  # fmt: skip


def extraction_rewards(generations: np.ndarray, holdout: np.ndarray) -> dict[str, float]:
    """The extraction attack on prompts' generations, uint8 [P, m, 3, H, W], its threshold the distance that 1 % of pairs of
    held-out images, uint8 [N, 3, H, W], lie below."""
    apart = tile_distances(holdout / 255)
    threshold = float(np.quantile(apart[np.triu_indices(len(apart), 1)], FALSE_POSITIVES))
    found = {f"extraction_{name}": share for name, share in extraction(generations / 255, threshold).items()}
    n_groups = len(holdout) // generations.shape[1]
    if n_groups:  # what images that have nothing to do with each other get
        groups = holdout[: n_groups * generations.shape[1]].reshape(n_groups, -1, *holdout.shape[1:])
        found |= {f"extraction_{name}_holdout": share for name, share in extraction(groups / 255, threshold).items()}
    return found | {"extraction_threshold": threshold, "extraction_prompts": len(generations)}


def score(evidence: Evidence, functions: Mapping[str, str] = {}) -> dict[str, float]:
    """Every figure of one fine-tuned model, Estimates where they know an error, and a user's own by name from FILE.py:FUNCTION.

    Raises MemControlError.
    """
    found = {name: value for function in REWARDS for name, value in function(evidence).items()}
    return found | {name: own_reward(place, evidence) for name, place in functions.items()}


def flat(found: Mapping[str, float]) -> dict[str, float]:
    """Plain numbers: each value, and beside it NAME_error, or NAME_low and NAME_high, and NAME_p."""
    numbers: dict[str, float] = {}
    for name, value in found.items():
        error, low, high, p = (getattr(value, key, None) for key in ("error", "low", "high", "p"))
        ends = {f"{name}_error": error} if error is not None else {f"{name}_low": low, f"{name}_high": high}
        numbers |= {key: float(x) for key, x in ({name: value} | ends | {f"{name}_p": p}).items() if x is not None}
    return numbers


def contributions(found: Mapping[str, float]) -> dict[str, np.ndarray]:
    """What each generated image adds to a figure, where that is known: name to [N]."""
    return {name: value.contributions for name, value in found.items() if isinstance(value, Estimate) and value.contributions is not None}


def pooled_scores(draws: Sequence[dict[str, float]]) -> dict[str, float]:
    """The figures of one model over several draws of samples: means, with the errors that are left."""
    found: dict[str, Any] = {name: pooled_figure([draw[name] for draw in draws]) for name in draws[0]}
    found["authpct_holdout"] = draws[0]["authpct_holdout"]  # of the same held-out images each time: no draw adds to it
    for name in ("copy_rate", "copy_rate_features"):
        found[name].p = p_of_hits(found[name], int(found["copy_rate_n_real"]))
    return with_worst(found)


def pooled_figure(values: Sequence[float]) -> float:
    estimates = [value for value in values if isinstance(value, Estimate)]
    return pooled(estimates) if len(estimates) == len(values) else mean(values)


def broken_images(pixels: np.ndarray) -> str:
    """Why images of pixels [N, 3 S], in 0..1, cannot be judged: a model that makes flat ones is broken. Empty if they can."""
    flat_share = float((pixels.reshape(len(pixels), 3, -1).std(axis=2).max(axis=1) < 1e-3).mean())
    return f"{flat_share:.0%} of the generated images are one flat colour; the model is broken (NaN, wrong precision or scaling)" if flat_share > 0.5 else ""


def own_reward(place: str, evidence: Evidence) -> float:
    """An Estimate keeps its error."""
    function = load_function(place)
    try:
        value = function(evidence)
    except Exception as error:
        raise MemControlError(f"reward {place} failed: {type(error).__name__}: {error}") from error
    try:
        number = value if isinstance(value, Estimate) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise MemControlError(f"reward {place} gave {value!r}; it must give a finite number")
    return number


def load_function(place: str) -> Callable[[Evidence], float]:
    """The function of FILE.py:FUNCTION. Raises MemControlError where there is none, or the file breaks."""
    path, _, name = place.rpartition(":")
    if not Path(path).is_file():
        raise MemControlError(f"rewards.objectives: '{place}': no such file {path}; write FILE.py:FUNCTION, beside the study file")
    spec = importlib.util.spec_from_file_location(f"memcontrol_reward_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise MemControlError(f"rewards.objectives: '{place}': {path} is no Python file; write FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise MemControlError(f"rewards.objectives: {path} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise MemControlError(f"rewards.objectives: {path} has no function '{name}'")
    return getattr(module, name)


def directions_of(rewards: RewardsConfig) -> list[str]:
    """Which way each objective is better. Raises MemControlError where a user's function is not there."""
    return [
        getattr(load_function(objective), "direction", MINIMIZE) if ":" in objective else direction_of(objective)
        for objective in rewards.objectives
    ]


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
        if name.removesuffix("_low").removesuffix("_high") not in (*DIRECTIONS, *rewards.names):
            raise MemControlError(f"rewards.limits: '{name}' is unknown; allowed: {', '.join((*DIRECTIONS, *rewards.functions))}")
    for name in ("clip_score", "extraction_component", "extraction_clique"):
        key = name.split("_")[0]
        if name in (*rewards.objectives, *rewards.limits) and not getattr(rewards, key):
            raise MemControlError(f"'{name}' is measured only where rewards.{key} says how; see the README")
    if "fid" in rewards.objectives and rewards.n_samples < 4 * n_features and not rewards.force:
        raise MemControlError(
            f"rewards.n_samples is {rewards.n_samples}: fid over {n_features} features needs at least {4 * n_features} to rank by anything "
            "but chance; raise it, use kid or fd_pca, or set rewards.force=true"
        )
