"""Owns the table of rewards: what each is called, which way it is better, what it costs, its interval, and
what it says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from memcontrol.core.bound import NO_BOUND
from memcontrol.core.estimate import Rewards, strip_end

CLIP = math.log(4)
FALSE_POSITIVES = 0.01
CLEAR_BY_CHANCE = 0.005

MINIMIZE: Final = "minimize"
MAXIMIZE: Final = "maximize"
_BESIDE = "read beside others"


@dataclass(frozen=True)
class _RewardInfo:
    """`objective`: whether a search may optimise it. `form`: how its value is written."""

    title: str
    form: str
    direction: str
    objective: bool
    interval: str
    cost: str
    meaning: str


_WILSON, _DELTA, _NONE = "Wilson, 95 %", "standard error, delta method", "none"
_FEATURES, _NEIGHBOURS = "features of the samples", "nearest neighbours"
_DENOISER = "four passes of 64 images through the denoiser"
_LOSSES = "passes of some hundred images through the denoiser, a tenth of a trial at most"
_ATTACK = "samples of its own (rewards.extraction)"
_PROBE = "a logistic regression on features of the samples (with data.label)"
_NETWORK = "a small network on the samples, in `retrain` alone (with data.label)"
_TESTED = "standard error, bootstrap"
_FREE = "none: known before training"

REWARDS = {
    "fid": _RewardInfo(
        title="FID",
        form="{:.2f}",
        direction=MINIMIZE,
        objective=True,
        interval=_DELTA,
        cost=_FEATURES,
        meaning="Frechet distance to held-out images; biased upward at few samples: (few) where there are "
        "under four for each feature",
    ),
    "fd_pca": _RewardInfo(
        title="FD of components",
        form="{:.3f}",
        direction=MINIMIZE,
        objective=True,
        interval=_DELTA,
        cost=_FEATURES,
        meaning="the same on the held-out images' first principal components",
    ),
    "kid": _RewardInfo(
        title="KID",
        form="{:.3f}",
        direction=MINIMIZE,
        objective=True,
        interval="standard error, jackknife",
        cost=_FEATURES,
        meaning="kernel distance to held-out images; unbiased, may be below 0",
    ),
    "precision": _RewardInfo(
        title="precision",
        form="{:.3f}",
        direction=MAXIMIZE,
        objective=False,
        interval=_WILSON,
        cost=_NEIGHBOURS,
        meaning="share of samples among real images; blur raises it",
    ),
    "recall": _RewardInfo(
        title="recall",
        form="{:.3f}",
        direction=MAXIMIZE,
        objective=True,
        interval=_WILSON,
        cost=_NEIGHBOURS,
        meaning="share of held-out images among samples; grows with n alone",
    ),
    "density": _RewardInfo(
        title="density",
        form="{:.3f}",
        direction=MAXIMIZE,
        objective=False,
        interval=_NONE,
        cost=_NEIGHBOURS,
        meaning="real images' balls that a sample lies in; blur raises it",
    ),
    "coverage": _RewardInfo(
        title="coverage",
        form="{:.3f}",
        direction=MAXIMIZE,
        objective=True,
        interval=_WILSON,
        cost=_NEIGHBOURS,
        meaning="share of held-out images with a sample in their ball; grows with n alone",
    ),
    "clip_score": _RewardInfo(
        title="CLIP score",
        form="{:.2f}",
        direction=MAXIMIZE,
        objective=True,
        interval="standard error",
        cost="a CLIP model on the samples",
        meaning="how well samples fit their captions (with rewards.clip)",
    ),
    "utility": _RewardInfo(
        title="utility",
        form="{:.3f}",
        direction=MAXIMIZE,
        objective=True,
        interval=_TESTED,
        cost=_PROBE,
        meaning="how well a classifier that has seen samples alone tells the classes of held-out images: "
        "AUROC, mean over classes; 0.5 is chance",
    ),
    "utility_real": _RewardInfo(
        title="utility of real images",
        form="{:.3f}",
        direction=_BESIDE,
        objective=False,
        interval=_TESTED,
        cost=_PROBE,
        meaning="the same of one that has seen as many training images, or all where they are fewer",
    ),
    "utility_gap": _RewardInfo(
        title="utility, lost",
        form="{:.3f}",
        direction=MINIMIZE,
        objective=False,
        interval=_TESTED,
        cost=_PROBE,
        meaning="`utility_real` less `utility`, on the same draws of held-out images",
    ),
    "utility_network": _RewardInfo(
        title="utility, network",
        form="{:.3f}",
        direction=_BESIDE,
        objective=False,
        interval=_TESTED,
        cost=_NETWORK,
        meaning="`utility` of a small convolutional network on 32 x 32 pixels",
    ),
    "utility_network_real": _RewardInfo(
        title="utility of real images, network",
        form="{:.3f}",
        direction=_BESIDE,
        objective=False,
        interval=_TESTED,
        cost=_NETWORK,
        meaning="`utility_real` of such a network",
    ),
    "utility_network_gap": _RewardInfo(
        title="utility, lost, network",
        form="{:.3f}",
        direction=_BESIDE,
        objective=False,
        interval=_TESTED,
        cost=_NETWORK,
        meaning="the one less the other",
    ),
    "memorization": _RewardInfo(
        title="memorization",
        form="{:.3f}",
        direction=MINIMIZE,
        objective=True,
        interval="standard error and p, label permutation",
        cost=_NEIGHBOURS,
        meaning="M: log of distance to held-out over distance to training images, in pixels or in "
        "features, whichever is larger; at least 0",
    ),
    "memorization_pixels": _RewardInfo(
        title="M, pixels",
        form="{:.3f}",
        direction=MINIMIZE,
        objective=False,
        interval="standard error and p, label permutation",
        cost=_NEIGHBOURS,
        meaning="M in pixels, mirror images included; 0 without copying",
    ),
    "memorization_features": _RewardInfo(
        title="M, features",
        form="{:.3f}",
        direction=MINIMIZE,
        objective=False,
        interval="standard error and p, label permutation",
        cost=_NEIGHBOURS,
        meaning="M in the feature network",
    ),
    "copy_rate": _RewardInfo(
        title="copied (95 %)",
        form="{:.1%}",
        direction=MINIMIZE,
        objective=True,
        interval="Wilson, 95 %; p, label permutation",
        cost=_NEIGHBOURS,
        meaning="share nearer to a training image than 99 % of real images; about 1 % is chance, more "
        "where held-out images are few",
    ),
    "copy_rate_features": _RewardInfo(
        title="copied, features",
        form="{:.1%}",
        direction=MINIMIZE,
        objective=False,
        interval=_WILSON,
        cost=_NEIGHBOURS,
        meaning="`copy_rate` in the feature network",
    ),
    "copy_rate_swapped": _RewardInfo(
        title="copied, swapped",
        form="{:.1%}",
        direction=_BESIDE,
        objective=False,
        interval=_WILSON,
        cost=_NEIGHBOURS,
        meaning="`copy_rate` with training and held-out images in each other's place: its null",
    ),
    "copy_rate_features_swapped": _RewardInfo(
        title="copied, features, swapped",
        form="{:.1%}",
        direction=_BESIDE,
        objective=False,
        interval=_WILSON,
        cost=_NEIGHBOURS,
        meaning="`copy_rate_swapped` in the feature network",
    ),
    "copy_rate_moved": _RewardInfo(
        title="copied, moved",
        form="{:.1%}",
        direction=MINIMIZE,
        objective=False,
        interval="Wilson, 95 %; p, label permutation",
        cost=_NEIGHBOURS,
        meaning="`copy_rate` where images may be shifted, mirrored, turned by 90 degrees, brighter or "
        "flatter",
    ),
    "copy_rate_moved_swapped": _RewardInfo(
        title="copied, moved, swapped",
        form="{:.1%}",
        direction=_BESIDE,
        objective=False,
        interval=_WILSON,
        cost=_NEIGHBOURS,
        meaning="`copy_rate_swapped` of moved images",
    ),
    "local_copy_rate": _RewardInfo(
        title="copied, parts",
        form="{:.1%}",
        direction=MINIMIZE,
        objective=False,
        interval="Wilson, 95 %; p, label permutation",
        cost=_NEIGHBOURS,
        meaning="share with a part that is nearer to the same part of a training image than any part of "
        "99 % of real images is",
    ),
    "local_copy_rate_swapped": _RewardInfo(
        title="copied, parts, swapped",
        form="{:.1%}",
        direction=_BESIDE,
        objective=False,
        interval=_WILSON,
        cost=_NEIGHBOURS,
        meaning="`local_copy_rate` with training and held-out images in each other's place: its null",
    ),
    "copying": _RewardInfo(
        title="copied beyond swapped",
        form="{:.1%}",
        direction=MINIMIZE,
        objective=False,
        interval="p, label permutation",
        cost=_NEIGHBOURS,
        meaning="the largest excess of a copy rate over its swapped one, of all four; the verdict goes by "
        "its p",
    ),
    "clear_copy_rate": _RewardInfo(
        title="clear copies",
        form="{:.1%}",
        direction=MINIMIZE,
        objective=False,
        interval=_WILSON,
        cost=_NEIGHBOURS,
        meaning="share so near to a training image, in any descriptor, that one such among all has a "
        "chance of 0.5 % without copying",
    ),
    "copied_images": _RewardInfo(
        title="training images copied",
        form="{:.0f}",
        direction=_BESIDE,
        objective=False,
        interval=_NONE,
        cost=_NEIGHBOURS,
        meaning="how many training images those are that copies, by any rule, are of",
    ),
    "copied_groups": _RewardInfo(
        title="groups copied",
        form="{:.0f}",
        direction=_BESIDE,
        objective=False,
        interval=_NONE,
        cost=_NEIGHBOURS,
        meaning="of how many people or other groups these are, as `data.group` names them",
    ),
    "loss_gap": _RewardInfo(
        title="loss gap",
        form="{:.3f}",
        direction=MINIMIZE,
        objective=True,
        interval="standard error over images",
        cost=_DENOISER,
        meaning="how much lower the loss is on training than on held-out images; needs no sampling",
    ),
    "noise_norm_mean": _RewardInfo(
        title="noise norm",
        form="{:.3f}",
        direction=MINIMIZE,
        objective=True,
        interval=_NONE,
        cost=_DENOISER,
        meaning="MemControl's reward: how far a training caption moves the prediction",
    ),
    "noise_norm_max": _RewardInfo(
        title="noise norm, largest",
        form="{:.3f}",
        direction=MINIMIZE,
        objective=True,
        interval=_NONE,
        cost=_DENOISER,
        meaning="of the training images, the largest",
    ),
    "noise_norm_ratio": _RewardInfo(
        title="noise norm, ratio",
        form="{:.3f}",
        direction=MINIMIZE,
        objective=True,
        interval=_NONE,
        cost=_DENOISER,
        meaning="to held-out images, without which it means little",
    ),
    "membership_auc": _RewardInfo(
        title="membership AUC",
        form="{:.3f}",
        direction=MINIMIZE,
        objective=True,
        interval="standard error, DeLong",
        cost=_LOSSES,
        meaning="chance that an attacker who has the model takes a training image for one rather than an "
        "unseen image; 0.5: nothing is told",
    ),
    "membership_tpr": _RewardInfo(
        title="training images told",
        form="{:.1%}",
        direction=MINIMIZE,
        objective=True,
        interval="Clopper-Pearson, 95 %",
        cost=_LOSSES,
        meaning="share of training images that this attacker tells at 1 % false alarms; at 5 % where there "
        "are under 100 unseen images",
    ),
    "membership_base_auc": _RewardInfo(
        title="membership AUC, base",
        form="{:.3f}",
        direction=_BESIDE,
        objective=False,
        interval="standard error, DeLong",
        cost=_LOSSES,
        meaning="the same by the untrained base; away from 0.5, both sets differ by themselves, and the "
        "others mean nothing",
    ),
    "membership_holdout_loss": _RewardInfo(
        title="loss on unseen images",
        form="{:.3f}",
        direction=MINIMIZE,
        objective=True,
        interval="standard error over images",
        cost=_LOSSES,
        meaning="the loss on unseen images over the untrained base's, their geometric mean; a training that "
        "goes on while it rises learns by heart",
    ),
    "epsilon_low": _RewardInfo(
        title="epsilon, at least",
        form="{:.2f}",
        direction=MINIMIZE,
        objective=True,
        interval="95 %, one-sided",
        cost=_LOSSES,
        meaning="the least epsilon of differential privacy that the model can have; only where MemControl "
        "drew the parts",
    ),
    "epsilon_most": _RewardInfo(
        title="epsilon that could be shown",
        form="{:.2f}",
        direction=_BESIDE,
        objective=False,
        interval=_NONE,
        cost=_LOSSES,
        meaning="what `epsilon_low` is at the most with so few images, if every guess is right",
    ),
    "epsilon": _RewardInfo(
        title="epsilon",
        form="{:.2f}",
        direction=MINIMIZE,
        objective=True,
        interval="exact",
        cost=_FREE,
        meaning="the bound of differential privacy that training kept to (inner.privacy); 0 for the "
        "untrained base, 1000 stands for no bound",
    ),
    "extraction_component": _RewardInfo(
        title="extracted, components",
        form="{:.1%}",
        direction=MINIMIZE,
        objective=True,
        interval=_WILSON,
        cost=_ATTACK,
        meaning="prompts whose samples match a training image and agree, chained by pairs (MemControl's "
        "code)",
    ),
    "extraction_clique": _RewardInfo(
        title="extracted, cliques",
        form="{:.1%}",
        direction=MINIMIZE,
        objective=True,
        interval=_WILSON,
        cost=_ATTACK,
        meaning="prompts whose samples match a training image and all agree with each other (Carlini)",
    ),
    "agreement_component": _RewardInfo(
        title="agreeing, components",
        form="{:.1%}",
        direction=_BESIDE,
        objective=False,
        interval=_WILSON,
        cost=_ATTACK,
        meaning="prompts whose samples agree, whether or not they match a training image",
    ),
    "agreement_clique": _RewardInfo(
        title="agreeing, cliques",
        form="{:.1%}",
        direction=_BESIDE,
        objective=False,
        interval=_WILSON,
        cost=_ATTACK,
        meaning="the same by cliques",
    ),
    "agreement_component_holdout": _RewardInfo(
        title="agreeing, held out",
        form="{:.1%}",
        direction=_BESIDE,
        objective=False,
        interval=_WILSON,
        cost=_ATTACK,
        meaning="of groups of held-out images: what agrees without a model",
    ),
    "agreement_clique_holdout": _RewardInfo(
        title="cliques, held out",
        form="{:.1%}",
        direction=_BESIDE,
        objective=False,
        interval=_WILSON,
        cost=_ATTACK,
        meaning="the same by cliques",
    ),
    "mq": _RewardInfo(
        title="MQ",
        form="{:.0f}",
        direction=MINIMIZE,
        objective=False,
        interval=_NONE,
        cost=_NEIGHBOURS,
        meaning="IET-AGC's count below 0.5; homogeneous data raise it without copying",
    ),
    "carlini_rate": _RewardInfo(
        title="Carlini's rate",
        form="{:.1%}",
        direction=MINIMIZE,
        objective=False,
        interval=_WILSON,
        cost=_NEIGHBOURS,
        meaning="nearest distance below half the mean of the 50 nearest",
    ),
    "mifid": _RewardInfo(
        title="MIFID",
        form="{:.2f}",
        direction=MINIMIZE,
        objective=False,
        interval=_NONE,
        cost=_FEATURES,
        meaning="Kaggle's direction; for continuity: a perfect copy scores best",
    ),
    "mifid_torchmetrics": _RewardInfo(
        title="MIFID, torchmetrics",
        form="{:.2f}",
        direction=MINIMIZE,
        objective=False,
        interval=_NONE,
        cost=_FEATURES,
        meaning="the other direction of its nearest neighbours",
    ),
    "authpct": _RewardInfo(
        title="AuthPct",
        form="{:.1f}",
        direction=MAXIMIZE,
        objective=False,
        interval=_WILSON,
        cost=_NEIGHBOURS,
        meaning="low: copying; compare with the held-out images' value",
    ),
    "authpct_holdout": _RewardInfo(
        title="AuthPct, held out",
        form="{:.1f}",
        direction=_BESIDE,
        objective=False,
        interval=_WILSON,
        cost=_NEIGHBOURS,
        meaning="what copying nothing gives",
    ),
    "amd_train": _RewardInfo(
        title="to train",
        form="{:.2f}",
        direction=_BESIDE,
        objective=False,
        interval=_NONE,
        cost=_NEIGHBOURS,
        meaning="mean distance to the nearest training image: noise has the largest",
    ),
    "amd_holdout": _RewardInfo(
        title="to held out",
        form="{:.2f}",
        direction=_BESIDE,
        objective=False,
        interval=_NONE,
        cost=_NEIGHBOURS,
        meaning="mean distance to the nearest held-out image",
    ),
    "amd_holdout_train": _RewardInfo(
        title="held out to train",
        form="{:.2f}",
        direction=_BESIDE,
        objective=False,
        interval=_NONE,
        cost=_NEIGHBOURS,
        meaning="what real images have",
    ),
    "trained_fraction": _RewardInfo(
        title="trained",
        form="{:.2%}",
        direction=MINIMIZE,
        objective=True,
        interval="exact",
        cost=_FREE,
        meaning="share of the denoiser's parameters that are trained",
    ),
    "step_gflops": _RewardInfo(
        title="GFLOP a step",
        form="{:.3g}",
        direction=MINIMIZE,
        objective=True,
        interval="exact",
        cost=_FREE,
        meaning="of one image's training step",
    ),
    "memory_mib": _RewardInfo(
        title="MiB a step",
        form="{:.3g}",
        direction=MINIMIZE,
        objective=True,
        interval="exact",
        cost=_FREE,
        meaning="of one training step",
    ),
}

BLIND_SPOTS = (  # what no reward sees
    "Copies of whole images, moved a little or turned, and of parts from a quarter of an image on, at their "
    "own place, are all that is seen: not smaller parts, not style, not facts about a person.",
    "No figure but epsilon, of a model trained with inner.privacy, is a privacy guarantee: a model that "
    "shows no copies can still reveal who was in the training set, and where membership is "
    "measured, it is by one attack; others may tell more.",
    # as `benchmarks copies` found; a test holds this to its table
    "Changed copies may be missed. Hardly any is found that is inverted, that is a part of a sixteenth of "
    "the image, or that lies elsewhere in it; of those blended half and half with another image or cropped "
    "to 75 %, a third to a half are found on photographs and hardly any on digits and X-rays, of those "
    "shifted by an eighth of the side two thirds and hardly any.",
)

_ENOUGH_SAMPLES = 4  # samples for each feature, below which a FID ranks by chance

MEMBERSHIP = ("membership", "epsilon_")  # how the names of its figures begin
EPSILON = "epsilon"  # of the accountant, and no figure of an attack
OF_DENOISER = ("loss_gap", "noise_norm", *MEMBERSHIP)  # the same of what the denoiser itself is asked
UTILITIES = tuple(name for name in REWARDS if name.startswith("utility"))
COSTS = ("trained_fraction", "step_gflops", "memory_mib")
OF_MODEL = (*OF_DENOISER, *COSTS, EPSILON, "privacy_")  # and not of its samples: no fresh draw changes them
OBJECTIVES = tuple(name for name, reward in REWARDS.items() if reward.objective)
DIRECTIONS = {name: reward.direction for name, reward in REWARDS.items() if reward.direction != _BESIDE}


@dataclass(frozen=True)
class Objective:
    """A reward that a search optimises, and which way it is better."""

    name: str
    direction: str

    @property
    def sign(self) -> int:
        """Of its losses, of which less is better: -1 where it is maximised."""
        return -1 if self.direction == MAXIMIZE else 1

    def to_loss(self, value: float) -> float:
        """The value as a loss; of a loss, the value."""
        return self.sign * value


def list_objectives(directions: Mapping[str, str]) -> list[Objective]:
    """From names and directions, as studies, records and reports hold them."""
    return [Objective(name, direction) for name, direction in directions.items()]


def list_losses(rewards: Mapping[str, float], directions: Mapping[str, str]) -> list[float]:
    """The objectives among the rewards, as losses."""
    return [objective.to_loss(rewards[objective.name]) for objective in list_objectives(directions)]


def list_errors(rewards: Mapping[str, float], names: Iterable[str]) -> list[float]:
    """The standard errors of these rewards, 0 where nothing is known of one."""
    return [Rewards(rewards).error(name) for name in names]


def find_direction(name: str) -> str:
    """Of a reward, or of an end of its interval."""
    return DIRECTIONS.get(name) or DIRECTIONS.get(strip_end(name), MINIMIZE)


def read_interval(name: str, rewards: Mapping[str, float]) -> tuple[float, float]:
    """The 95 % interval of a reward among `rewards`; the value twice where nothing is known of its error."""
    return Rewards(rewards).interval(name)


def format_reward(name: str, rewards: Mapping[str, float]) -> str:
    """The value with its interval: "22.6 ± 0.8", "1.2% (0.4%-2.8%)"; empty where it was not measured."""
    if name == EPSILON and rewards.get(name, 0.0) >= NO_BOUND:
        return "no bound"
    form = REWARDS[name].form if name in REWARDS else "{:.3f}"
    few = name == "fid" and rewards.get("fid_samples_per_feature", _ENOUGH_SAMPLES) < _ENOUGH_SAMPLES
    return Rewards(rewards).written(name, form, " (few)" if few else "")
