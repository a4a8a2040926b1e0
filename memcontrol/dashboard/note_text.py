"""Owns what the notes say that optuna-dashboard shows of each trial and of the study, in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from memcontrol.config.study import Config
from memcontrol.core.published import hide_paths, list_own_places, publish_name
from memcontrol.core.reward_table import REWARDS, format_reward
from memcontrol.core.space import SearchSpace
from memcontrol.study.record import DROPPED, Record
from memcontrol.view.front_data import TrialData, list_standings, name_places, name_standings
from memcontrol.view.words import (
    describe_choice,
    describe_membership,
    describe_privacy,
    find_title,
    format_markdown_table,
)

YOURS = "\n\n---\n*What is written below this line is yours and is kept.*"
_ORIGINS = {
    "none": "the base as it is, untrained",
    "all": "plain PEFT: every group is trained; the best of three learning rates",
    "full": "full fine-tuning, which every mask is compared with; the best of three learning rates",
    "enqueued": "a mask that somebody asked for",
}
_STATES = {
    "COMPLETE": "complete",
    "RUNNING": "running",
    "PRUNED": "stopped early",
    "FAIL": "failed",
    DROPPED: "dropped",
}
_MEASURED_AGAIN = (
    "The front was measured again over fresh draws, since the best of many are partly lucky. This table, the "
    "plots and the report show that; the dashboard's own graphs and lists show values as the search measured "
    "them."
)


def write_trial_note(record: Record, space: SearchSpace, images: str) -> str:
    """What was trained, and every reward with its interval. `images`: where they lie, which no note names."""
    parts = [
        f"**{describe_choice(record.choice, len(space.groups))}**" if record.choice else "",
        _ORIGINS.get(record.origin, "a sampled mask"),
        _describe_groups(record, space),
        _describe_end(record, images),
        describe_membership(record.rewards) if record.rewards else "",
        describe_privacy(record.rewards) if record.rewards else "",
        _write_rewards_table(record) if record.rewards else "",
        _describe_replicates(record),
    ]
    return "\n\n".join(filter(None, parts))


def _describe_groups(record: Record, space: SearchSpace) -> str:
    """Which are trained, and which are not; empty where no mask tells them apart."""
    if not record.choice or not record.choice.groups or record.anchor == "full":
        return ""
    off = [name for name in space.groups if name not in record.choice.groups]
    frozen = f"; frozen: {', '.join(off)}" if off else ""
    return f"Trained groups: {', '.join(record.choice.groups)}{frozen}"


def _describe_end(record: Record, images: str) -> str:
    """Why it ended without a result, where that is known, or counts for nothing."""
    places = list_own_places(record.folder, images)
    if record.dropped:
        return f"Dropped, and counts for nothing: {hide_paths(record.dropped, *places)}"
    if not record.reason:
        return ""
    why = hide_paths(record.reason, *places)
    return f"{'Stopped early' if record.state == 'PRUNED' else 'Failed'}: {why}"


def _describe_replicates(record: Record) -> str:
    if not record.replicates:
        return ""
    runs = [
        ", ".join(f"{find_title(name)} {format_reward(name, rewards)}" for name in record.objectives)
        for rewards in record.replicates
    ]
    return f"Fine-tuned again from other seeds: {'; '.join(runs)}"


def _write_rewards_table(record: Record) -> str:
    """A row for each reward: what the search measured, and over fresh draws."""
    measured = {"as searched": record.searched}
    if record.confirmed:
        measured["measured again"] = record.confirmed
    names = [*record.objectives, *(name for name in REWARDS if name not in record.objectives)]
    rows = [
        [
            find_title(name),
            *(format_reward(name, rewards) for rewards in measured.values()),
            REWARDS[name].direction if name in REWARDS else record.objectives[name],
        ]
        for name in names
        if any(name in rewards for rewards in measured.values())
    ]
    return format_markdown_table(["reward", *measured, "better"], rows)


def write_study_note(
    config: Config,
    space: SearchSpace,
    trials: Sequence[TrialData],
    objectives: Mapping[str, str],
    data: Mapping[str, Any],
    over: bool = False,
) -> str:
    """What was searched, on what data, the anchors, the front and the pick. `trials`: what `mark_trials`
    gives; `data`: what `summarize_data` tells of the images; `over`: no search goes on."""
    inner = config.inner
    lines = {
        "Space": f"{publish_name(config.space)}, {len(space.groups)} groups, {', '.join(space.methods)}",
        "Base": str(config.base.without_paths()),
        "Images": _describe_image_parts(config, data),
        "Each trial": f"{inner.budget_images} images in {inner.budget_steps} steps of {inner.batch_size}; "
        f"scored on {config.rewards.n_samples} samples",
        "Objectives": ", ".join(map(_describe_objective, config.rewards.names)),
        "Trials": _count_states(trials, over) or "none yet",
    }
    parts = [
        f"# {config.name}\nWhich parameters to fine-tune, so that quality stays and memorization goes.\n"
        + "\n".join(f"- **{name}**: {text}" for name, text in lines.items())
    ]
    complete = [trial for trial in trials if trial["state"] == "COMPLETE"]
    if complete:
        parts += [f"## {name_standings(complete)}", write_standings(complete, objectives)]
    if any(trial["confirmed"] for trial in complete):
        parts.append(_MEASURED_AGAIN)
    return "\n\n".join(parts)


def _describe_image_parts(config: Config, data: Mapping[str, Any]) -> str:
    if not data.get("parts"):
        return publish_name(config.data.path)
    sizes = ", ".join(f"{part['images']} {name}" for name, part in data["parts"].items())
    return f"{publish_name(config.data.path)}, {data['resolution']} pixels; {sizes}"


def _describe_objective(name: str) -> str:
    return f"{find_title(name)} ({REWARDS[name].direction})" if name in REWARDS else name


def _count_states(trials: Sequence[TrialData], over: bool) -> str:
    """Such as "7 complete, 1 running"."""
    words = _STATES | ({"RUNNING": "interrupted"} if over else {})
    counts = Counter(trial["state"] for trial in trials)
    return ", ".join(f"{counts[state]} {word}" for state, word in words.items() if counts[state])


def _list_marks(trial: TrialData) -> list[str]:
    """The four that tables of the terminal have as signs."""
    again = ["measured again"] if trial["confirmed"] else []
    return [*name_places(trial), *again, *(["**the pick**"] if trial["pick"] else [])]


def write_standings(complete: Sequence[TrialData], objectives: Mapping[str, str]) -> str:
    rows = [
        [
            str(trial["trial"]),
            trial["origin"],
            trial["said"],
            *(format_reward(name, trial["rewards"]) for name in objectives),
            ", ".join(_list_marks(trial)),
        ]
        for trial in list_standings(complete, objectives)
    ]
    return format_markdown_table(["trial", "", "choice", *map(find_title, objectives), ""], rows)
