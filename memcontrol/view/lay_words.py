"""Owns what a study found in words for who knows nothing of the field: whether the chosen model copies, what
an attacker could tell of who it was trained on, and what was not looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memcontrol.core.choice import Choice
from memcontrol.core.estimate import READ_95, Rewards
from memcontrol.view.words import (
    BEYOND_CHANCE,
    CLEAN,
    COPIES,
    LEANS,
    UNKNOWN,
    count_clear_copies,
    grade_copying,
    has_unlike_sets,
)

_MEASURES = {  # shares of images that come near to a training image, and in what
    "copy_rate": "",
    "copy_rate_moved": ", once it is moved, mirrored or made brighter",
    "copy_rate_features": ", in what an image-recognition network sees in it",
    "local_copy_rate": ", in a part of the picture",
}
_OPENINGS = {
    COPIES: "Yes, the chosen model copies training images",
    LEANS: "No single picture of the chosen model is shown to be a copy, but on average they lie a little "
    "nearer to its training images than to others, by more than chance explains",
    CLEAN: "No copying is seen in the chosen model",
}
_CERTAIN = "with 95 % certainty"
_USE = "; whether they are good enough for a use was not asked"


@dataclass(frozen=True)
class LayModel:
    """A model that the first page tells of: its choice in words, rewards, of how many images, and its run
    folder."""

    said: str
    rewards: dict[str, float]
    n_images: int
    run: str

    @property
    def grade(self) -> str:
        return grade_copying(self.rewards, self.n_images)


@dataclass(frozen=True)
class Subject:
    """What the first page is about: the pick, and full fine-tuning where there is one to compare with.
    `is_test`: both were retrained and measured on test images; `is_full`: the pick is full fine-tuning
    itself."""

    pick: LayModel | None = None
    full: LayModel | None = None
    is_test: bool = False
    is_full: bool = False

    @property
    def models(self) -> dict[str, LayModel]:
        """By what they are called; the pick once where it is full fine-tuning."""
        named = {"the chosen model": self.pick, "full fine-tuning": None if self.is_full else self.full}
        return {name: model for name, model in named.items() if model}


def find_subject(facts: Mapping[str, Any]) -> Subject:
    """The retrained pick where it was retrained, beside full fine-tuning if that was too; else both as the
    search measured them."""
    finished = [trial for trial in facts["trials"] if trial["state"] == "COMPLETE"]
    pick = next((trial for trial in finished if trial["pick"]), None)
    full = next((trial for trial in finished if trial["anchor"] == "full"), None)
    if pick is None:
        return Subject()
    again, full_again = (_find_retrained(facts, trial) for trial in (pick, full))
    if again:
        return Subject(again, full_again, is_test=True, is_full=pick is full)
    plan = facts["config"]["rewards"]
    beside = _take_trial(full, plan) if full else None
    return Subject(_take_trial(pick, plan), beside, is_full=pick is full)


def _find_retrained(facts: Mapping[str, Any], trial: Mapping[str, Any] | None) -> LayModel | None:
    if trial is None:
        return None
    for run in facts["retrained"]:
        if Choice.from_dict(run["choice"]) == Choice.from_dict(trial["choice"]):
            return LayModel(run["said"], run["rewards"], run["n_samples"], run["run"])
    return None


def _take_trial(trial: Mapping[str, Any], plan: Mapping[str, Any]) -> LayModel:
    """`plan`: the study's `rewards`. The front was measured again over fresh draws of images."""
    n_images = plan["n_samples"] * (plan["confirm"] if trial["confirmed"] else 1)
    return LayModel(trial["said"], trial["rewards"], n_images, trial["run"])


def write_lay_verdict(subject: Subject) -> str:
    """One sentence: does it copy, against chance and full fine-tuning."""
    if subject.pick is None:
        return "No fine-tuned model is finished yet, so nothing can be said about copying."
    if subject.pick.grade == UNKNOWN:
        return "Whether the chosen model copies its training images was not measured in this study."
    name = choose_measure(subject)
    near, beside = _count_near(subject.pick, name), _compare_with_full(subject, name)
    return f"{_OPENINGS[subject.pick.grade]}: {near}{beside}."


def choose_measure(subject: Subject) -> str:
    """By which measure both models are told of: that by which the chosen one looks worst, so that its page
    never has the kindest of several figures."""
    rewards = subject.pick.rewards if subject.pick else {}
    names = [name for name in _MEASURES if name in rewards]
    return max(names, key=lambda name: _measure_excess(rewards, name), default="copy_rate")


def _measure_excess(rewards: Mapping[str, float], name: str) -> float:
    return rewards[name] - rewards.get(f"{name}_swapped", rewards.get("copy_rate_line", 0.0))


def _count_near(model: LayModel, name: str) -> str:
    """Such as "of 256 pictures that it made, 1 (0.4 %) comes ..., where chance alone puts about 3 (1.0
    %)"."""
    n, rewards = model.n_images, model.rewards
    count, clear = say_count(rewards[name], n), count_clear_copies(rewards, n)
    come = "comes" if count == "none" or count.startswith("1 ") else "come"
    clearly = (
        f"{clear:,} so near to a training image that chance puts not even one there, and " if clear else ""
    )
    by_chance = rewards.get("copy_rate_line")
    chance = f", where chance alone puts about {say_count(by_chance, n)}" if by_chance else ""
    return (
        f"of {n:,} pictures that it made, {clearly}{count} {come} as near to a training image as a copy "
        f"would{_MEASURES[name]}{chance}"
    )


def say_count(share: float, n: int) -> str:
    """A share of n pictures: "none", "3 (1.2 %)"."""
    count = round(share * n)
    return f"{count:,} ({100 * share:.1f} %)" if count else "none"


def _compare_with_full(subject: Subject, name: str) -> str:
    full = subject.full
    if subject.is_full:
        return (
            "; it is full fine-tuning itself, which changes the whole model, for no more sparing way of "
            "training was found to be as good"
        )
    if full is None or name not in full.rewards:
        return "; there is no full fine-tuning to compare it with"
    count = say_count(full.rewards[name], full.n_images)
    too = " too" if subject.pick and subject.pick.grade == COPIES else ""
    grade = {COPIES: f" does copy{too}", LEANS: " leans towards them", CLEAN: " shows no copying"}
    said = grade.get(full.grade, "")
    return (
        f"; full fine-tuning, which changes the whole model,{said}: {count} of its {full.n_images:,} pictures"
    )


def write_lay_certainty(subject: Subject) -> str:
    """How sure the verdict is; empty where there is none."""
    pick = subject.pick
    if pick is None or pick.grade == UNKNOWN:
        return ""
    name = choose_measure(subject)
    low, high = Rewards(pick.rewards).interval(name)
    span = (
        f"Of many more pictures, between {_percent(low)} and {_percent(high)} would come so near ({_CERTAIN})"
    )
    if pick.grade == COPIES:
        return f"Of a hundred models that copy nothing, this test would call about one a copier. {span}."
    if pick.grade == LEANS:
        return (
            "That its pictures lie nearer on average is fairly sure: of two hundred models that copy "
            "nothing, about one would lie so near by chance. That single ones come as near as a copy is not "
            "shown: "
            f"{span[0].lower()}{span[1:]}, and chance alone gives about "
            f"{_percent(pick.rewards['copy_rate_line'])}."
        )
    rare = (
        f", so copying that is rarer than one picture in {1 / high:,.0f} may have been missed" if high else ""
    )
    return f"{span}{rare}."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def write_lay_membership(subject: Subject) -> str:
    """What an attacker who has the model could tell of who is in the training images."""
    pick = subject.pick
    if pick is None:
        return ""
    if "membership_auc" not in pick.rewards:
        return (
            "Not measured: so nothing is known of whether an attacker who has the model could tell which "
            "images, and so which people, it was trained on."
        )
    if has_unlike_sets(pick.rewards):
        return (
            "Not known: the training images differ from the images that they were compared with even before "
            "any training, so this comparison says nothing."
        )
    told = _describe_attack(pick.rewards)
    full = subject.models.get("full fine-tuning")
    beside = ""
    if full and "membership_auc" in full.rewards:
        beside = (
            " After full fine-tuning the same attacker points right in "
            f"{100 * full.rewards['membership_auc']:.0f} of 100 cases, and names "
            f"{_count_named(full.rewards)} of every 100."
        )
    return f"{told}{beside} Another attacker may tell more."


def _describe_attack(rewards: Mapping[str, float]) -> str:
    low, high = Rewards(rewards).interval("membership_tpr")
    wrong = f"{100 * rewards['membership_fpr']:.0f}"
    who = _name_units(rewards)
    return (
        f"{_grade_attack(rewards)} Shown a training image beside another image, an attacker who has the "
        "model, and the model that it was made from, points at the right one in "
        f"{100 * rewards['membership_auc']:.0f} of 100 cases ({_range_choices(rewards)}, {_CERTAIN}); "
        f"guessing does so in 50. Of every 100 {who} the attacker would name {_count_named(rewards)} rightly "
        f"as such ({100 * low:.0f} to {100 * high:.0f}), while wrongly naming {wrong} of 100 others; "
        f"guessing blindly names {wrong} of either."
    )


def _name_units(rewards: Mapping[str, float]) -> str:
    several = rewards["membership_images"] > rewards["membership_members"]
    return "people (or sets of twin images) in the training images" if several else "training images"


def _grade_attack(rewards: Mapping[str, float]) -> str:
    auc, error = rewards["membership_auc"], Rewards(rewards).error("membership_auc")
    if auc - BEYOND_CHANCE * error > 0.5:
        sure = auc >= 0.9
        return "Yes, nearly always." if sure else "Something, more than by guessing."
    return "No more than by guessing, as far as this attack shows."


def _count_named(rewards: Mapping[str, float]) -> str:
    count = round(100 * rewards["membership_tpr"])
    return f"{count}" if count else "none"


def write_lay_quality(subject: Subject) -> str:
    """Whether the pick's pictures are as good as those of full fine-tuning; empty where both have no FID."""
    pick, full = subject.pick, subject.full
    if not (pick and full) or subject.is_full or not all("fid" in model.rewards for model in (pick, full)):
        return ""
    errors = [Rewards(model.rewards).error("fid") for model in (pick, full)]
    apart = pick.rewards["fid"] - full.rewards["fid"]
    reach = READ_95 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    if abs(apart) <= reach:
        return (
            f"Its pictures are as like real ones as those of full fine-tuning, as far as can be told{_USE}."
        )
    kind = "less" if apart > 0 else "more"
    return f"Its pictures are {kind} like real ones than those of full fine-tuning{_USE}."


def list_not_looked_at(facts: Mapping[str, Any], subject: Subject) -> list[str]:
    """What the verdict does not cover."""
    lines = [
        "Copies of parts smaller than a quarter of a picture, copies that are strongly changed (inverted, "
        "cropped, blended with another), the style of an artist, and facts about a person.",
        "Pictures that are asked for in other words than the training images' own captions.",
        "Other attacks than the one above: rebuilding training images from the model's numbers, learning "
        "single traits of a person, or attackers who know more.",
        "What the model that it was made from had learned before: that was not examined.",
    ]
    if facts["doubt"]:
        lines.append(
            "Copying as a person would see it: the network that compared the images here knows printed "
            "characters, and little of photographs."
        )
    if subject.pick and "membership_auc" not in subject.pick.rewards:
        lines[2] = lines[2].replace("Other attacks than the one above", "Attacks on the model")
    return lines


def list_lay_figures(subject: Subject) -> list[Sequence[str]]:
    """A row for each figure: what it is, then its value for each of the models."""
    models = list(subject.models.values())
    name = choose_measure(subject)
    rows: list[Sequence[str]] = []
    if any(name in model.rewards for model in models):
        rows.append(
            ["Pictures as near to a training image as a copy", *(_write_near(m, name) for m in models)]
        )
    if any("membership_auc" in model.rewards for model in models):
        wrong = next(100 * m.rewards["membership_fpr"] for m in models if "membership_fpr" in m.rewards)
        what = (
            f"Training images that an attacker names, of every 100 (and wrongly of 100 others: {wrong:.0f})"
        )
        rows.append([what, *map(_write_named, models)])
        what = "Right choices of 100 between a training image and another (guessing: 50)"
        rows.append([what, *map(_write_choices, models)])
    if any("fid" in model.rewards for model in models):
        what = "Distance from real pictures (Fréchet distance, FID: less is better)"
        rows.append([what, *(Rewards(model.rewards).written("fid", "{:.1f}") for model in models)])
    return rows


def _write_near(model: LayModel, name: str) -> str:
    if name not in model.rewards:
        return "not measured"
    low, high = Rewards(model.rewards).interval(name)
    count, share = round(model.rewards[name] * model.n_images), _percent(model.rewards[name])
    return f"{count:,} of {model.n_images:,}, {share} ({100 * low:.1f} to {100 * high:.1f})"


def _write_named(model: LayModel) -> str:
    if "membership_tpr" not in model.rewards:
        return "not measured"
    low, high = Rewards(model.rewards).interval("membership_tpr")
    return f"{_count_named(model.rewards)} ({100 * low:.0f} to {100 * high:.0f})"


def _write_choices(model: LayModel) -> str:
    if "membership_auc" not in model.rewards:
        return "not measured"
    return f"{100 * model.rewards['membership_auc']:.0f} ({_range_choices(model.rewards)})"


def _range_choices(rewards: Mapping[str, float]) -> str:
    low, high = Rewards(rewards).interval("membership_auc")
    return f"{100 * max(low, 0):.0f} to {100 * min(high, 1):.0f}"
