"""Owns the answer to what data protection asks of a model that was trained on people's data: for each kind of
evidence that the European Data Protection Board's Opinion 28/2024 names, what of it is here and what is
not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from memcontrol.core.bound import NO_BOUND
from memcontrol.core.estimate import Rewards
from memcontrol.view.lay_words import Subject, choose_measure, say_count
from memcontrol.view.words import has_unlike_sets

PROTECTION_QUESTION = (
    "May the chosen model count as anonymous? The European Data Protection Board (Opinion 28/2024 of 17 "
    "December 2024) says: only if it is insignificantly likely, by all means reasonably likely to be "
    "used, that personal data of those it was trained on are extracted from it, or obtained by asking it, "
    "deliberately or not. Whether that holds is judged case by case, on evidence."
)
PROTECTION_ANSWER = (
    "This report does not show that the model is anonymous, and cannot: it holds part of that evidence, "
    "listed here, and the rest must come from elsewhere. It is no legal advice."
)
_ABSENT = "No evidence."
_MILDER_TRAINING = {  # keys of `inner` under which training was made to copy less, where they are set
    "skip": "images that are learned already are skipped",
    "redistribution": "much-skipped images change their shard",
    "augmentation": "images near to being learned are varied",
    "norm_threshold": "images with a large noise norm are dropped",
    "stop_gap": "training ends where it learns by heart",
    "embedding_noise": "noise on captions",
    "input_perturbation": "noise on inputs",
    "noise_offset": "noise added",
}


def list_protection_evidence(facts: Mapping[str, Any], subject: Subject) -> dict[str, tuple[str, str]]:
    """By the kind of evidence: what of it is here, with its figure, and what is not."""
    rewards = subject.pick.rewards if subject.pick else {}
    makers: dict[str, Callable[[], tuple[str, str]]] = {
        "Resistance to membership inference (was this person in it?)": lambda: _tell_membership(rewards),
        "Regurgitation (does it give back what it was trained on?)": lambda: _tell_regurgitation(subject),
        "Exfiltration (can training data be drawn out by asking?)": lambda: _tell_exfiltration(rewards),
        "Model inversion, attributes (can images or traits be rebuilt from the model?)": lambda: (
            _ABSENT,
            "No such attack was tried.",
        ),
        "Data minimisation": lambda: _tell_minimisation(facts, subject),
        "Methods that protect privacy": lambda: _tell_methods(facts, rewards),
        "Documentation": _tell_documentation,
    }
    return {kind: make() for kind, make in makers.items()}


def _tell_membership(rewards: Mapping[str, float]) -> tuple[str, str]:
    if "membership_auc" not in rewards:
        return _ABSENT, "It was not measured."
    if has_unlike_sets(rewards):
        return _ABSENT, "The images to compare with differ by themselves, so the attack says nothing."
    low, high = Rewards(rewards).interval("membership_tpr")
    here = (
        f"One attack, by someone who has the whole model: of every 100 training images it names "
        f"{100 * rewards['membership_tpr']:.0f} ({100 * low:.0f} to {100 * high:.0f}), and "
        f"{100 * rewards['membership_fpr']:.0f} of 100 others wrongly."
    )
    return here, "Stronger attacks; a figure for each person alone."


def _tell_regurgitation(subject: Subject) -> tuple[str, str]:
    if subject.pick is None or "copy_rate" not in subject.pick.rewards:
        return _ABSENT, "It was not measured."
    model, name = subject.pick, choose_measure(subject)
    near, high = say_count(model.rewards[name], model.n_images), Rewards(model.rewards).interval(name)[1]
    here = (
        f"Of {model.n_images:,} pictures asked for with training captions {near} as near to a training image "
        f"as a copy (of many more at most {100 * high:.1f} %)."
    )
    return here, "Changed copies, small parts, other requests; facts in words."


def _tell_exfiltration(rewards: Mapping[str, float]) -> tuple[str, str]:
    if "extraction_clique" not in rewards:
        return _ABSENT, "No attack was tried; `rewards.extraction: {}` in the study file adds one."
    low, high = Rewards(rewards).interval("extraction_clique")
    here = (
        "One attack, many pictures of one request: of the training captions that were asked for "
        f"{100 * rewards['extraction_clique']:.1f} % ({100 * low:.1f} to {100 * high:.1f} %) gave a training "
        "image back."
    )
    return here, "Requests that an attacker would make up; more pictures for each."


def _tell_minimisation(facts: Mapping[str, Any], subject: Subject) -> tuple[str, str]:
    train = facts["data"].get("parts", {}).get("train")
    used = _ABSENT
    if train:
        used = f"{train['images']:,} training images of {train['groups']:,} people or other groups."
        if train["groups"] == train["images"]:
            used = f"{train['images']:,} training images."
    share = subject.pick.rewards.get("trained_fraction") if subject.pick else None
    part = f" Of the model's numbers {100 * share:.3g} % were trained." if share else ""
    return f"{used}{part}", "Whether fewer images, or fewer details in them, would do."


def _tell_methods(facts: Mapping[str, Any], rewards: Mapping[str, float]) -> tuple[str, str]:
    """`epsilon_low` is a lower bound: it can show that a guarantee does not hold, and never that one does."""
    inner = facts["config"]["inner"]
    used = [words for key, words in _MILDER_TRAINING.items() if inner.get(key)]
    used += ["training in parts that are averaged"] * (inner["ensemble"]["shards"] > 1)
    here = f"Against copying: {', '.join(used)}." if used else "The choice of what is trained."
    missing = "No guarantee is proved here, such as that of differential privacy."
    bound = rewards.get("epsilon", NO_BOUND)
    if 0 < bound < NO_BOUND:
        here = f"Training under differential privacy: a guarantee with an epsilon of {bound:.3g}"
        if not rewards.get("privacy_secret", 1):
            here += ", void against whoever has the study file, by which its noise can be repeated"
        here += "."
        missing = "Whether that bound is small enough; what the choice among trials told."
    if rewards.get("epsilon_low", 0.0) > 0:
        missing += (
            " The attack rules out a guarantee with an epsilon (the smaller, the stronger) under "
            f"{rewards['epsilon_low']:.1f}."
        )
    return here, missing


def _tell_documentation() -> tuple[str, str]:
    return (
        "This report: how many images, with the fingerprints of their files; settings, versions, figures "
        "with their margins of error, and how to repeat them.",
        "Impact assessment, legal basis, consent, who may use the model and how.",
    )
