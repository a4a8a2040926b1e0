"""Owns a study in words: a choice in a few, and the notes in Markdown that optuna-dashboard shows of each
trial and of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memcontrol.core.choice import EVERYTHING, Choice
from memcontrol.core.config import Config
from memcontrol.core.reward_table import CLIP, FALSE_POSITIVES, REWARDS, format_reward
from memcontrol.core.space import SearchSpace
from memcontrol.study.pick import select_front, select_ties
from memcontrol.study.record import Record


def format_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def write_verdict(rewards: dict[str, float], n: int) -> str:
    """One sentence with its error."""
    rate, low, high = (rewards[f"copy_rate{end}"] for end in ("", "_low", "_high"))
    line, chance = rewards["copy_rate_line"], rewards["copy_rate_p"]
    said = (
        f"{rate:.1%} of {n} images ({low:.1%} to {high:.1%}) are nearer to a training image than "
        f"{1 - FALSE_POSITIVES:.0%} of real images are, where "
        f"{line:.1%} is expected without copying, p {format_p(chance)}"
    )
    m, error, p = rewards["memorization"], rewards["memorization_error"], rewards["memorization_p"]
    beside = f"memorization distance {m:.3f} ± {error:.3f} of at most {CLIP:.2f}, p {format_p(p)}"
    clear = round(rewards["clear_copy_rate"] * n)
    if clear:
        return (
            f"Copying is visible: {clear} of {n} images are far nearer to a training image than any "
            f"real image would be; {said}; {beside}."
        )
    if chance < 0.01:
        return f"Copying is visible: {said}; {beside}."
    if p < 0.01:
        return f"The images lean towards the training set, without copies that stand out: {said}; {beside}."
    return f"No copying is visible at this sample size: {said}; {beside}."


YOURS = "\n\n---\n*What is written below this line is yours and is kept.*"
ANCHORS = {
    "none": "the base as it is, untrained",
    "all": "plain PEFT: every group is trained; the best of three learning rates",
    "full": "full fine-tuning, which every mask is compared with; the best of three learning rates",
}


def find_title(name: str) -> str:
    return REWARDS[name].title if name in REWARDS else name


def describe_choice(choice: Choice, n_groups: int) -> str:
    """The choice in a few words: "lora r4, lr 0.003, 5/7 groups"."""
    if choice.method == "none":
        return "no training"
    rank = f" r{choice.rank}" if choice.rank else ""
    groups = "" if EVERYTHING in choice.groups else f", {len(choice.groups)}/{n_groups} groups"
    return f"{'+'.join(choice.methods)}{rank}, lr {choice.learning_rate:g}{groups}"


def format_markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def write_trial_note(record: Record, space: SearchSpace) -> str:
    """What was trained, and every figure with its interval."""
    lines = [
        f"**{describe_choice(record.choice, len(space.groups))}**" if record.choice else "",
        ANCHORS.get(record.anchor or "", "a sampled mask"),
    ]
    if record.choice and record.choice.groups and record.anchor != "full":
        off = [name for name in space.groups if name not in record.choice.groups]
        lines.append(
            f"Trained groups: {', '.join(record.choice.groups)}"
            + (f"; frozen: {', '.join(off)}" if off else "")
        )
    if record.reason:
        lines.append(f"{'Stopped early' if record.state == 'PRUNED' else 'Failed'}: {record.reason}")
    if record.rewards:
        lines.append(write_rewards_table(record))
    if record.replicates:
        found = [
            ", ".join(f"{find_title(name)} {format_reward(name, rewards)}" for name in record.objectives)
            for rewards in record.replicates
        ]
        lines.append("Fine-tuned again from other seeds: " + "; ".join(found))
    return "\n\n".join(filter(None, lines))


def write_rewards_table(record: Record) -> str:
    """A row for each figure: what the search measured, and over fresh draws."""
    measured = [record.searched, *([record.confirmed] if record.confirmed else [])]
    names = [*record.objectives, *(name for name in REWARDS if name not in record.objectives)]
    rows = [
        [
            find_title(name),
            *(format_reward(name, rewards) for rewards in measured),
            REWARDS[name].direction if name in REWARDS else record.objectives[name],
        ]
        for name in names
        if any(name in rewards for rewards in measured)
    ]
    return format_markdown_table(
        ["figure", "as searched", *(["measured again"] if record.confirmed else []), "better"], rows
    )


def describe_objective(name: str) -> str:
    return f"{find_title(name)} ({REWARDS[name].direction})" if name in REWARDS else name


def write_study_note(
    config: Config,
    space: SearchSpace,
    records: Sequence[Record],
    data: Mapping[str, Any],
    picked: Record | None,
    over: bool = False,
) -> str:
    """What was searched, on what data, the anchors, the front and the pick. `data`: what `publish.data_of`
    tells of the images; `over`: no search goes on."""
    complete = [record for record in records if record.finished]
    states = {
        "COMPLETE": "complete",
        "RUNNING": "interrupted" if over else "running",
        "PRUNED": "stopped early",
        "FAIL": "failed",
    }
    said = ", ".join(
        f"{n} {word}"
        for state, word in states.items()
        if (n := sum(record.state == state for record in records))
    )
    inner, sizes = (
        config.inner,
        ", ".join(f"{part['images']} {name}" for name, part in data.get("parts", {}).items()),
    )
    lines = [
        f"# {config.name}",
        "Which parameters to fine-tune, so that quality stays and memorization goes.",
        f"- **Space**: {config.space}, {len(space.groups)} groups, {', '.join(space.methods)}",
        f"- **Base**: {config.base}",
        f"- **Images**: {config.data.path}" + (f", {data['resolution']} pixels; {sizes}" if sizes else ""),
        f"- **Each trial**: {inner.budget_images} images in {inner.budget_steps} steps of "
        f"{inner.batch_size}; scored on {config.rewards.n_samples} samples",
        f"- **Objectives**: {', '.join(map(describe_objective, config.rewards.names))}",
        f"- **Trials**: {said or 'none yet'}",
    ]
    parts = ["\n".join(lines)]
    if complete:
        parts += ["## Anchors and front", write_standings(complete, len(space.groups), picked)]
    if any(record.confirmed for record in complete):
        parts.append(
            "The front was measured again over fresh draws, since the best of many are partly "
            "lucky. This table, the plots and the report show that; the dashboard's own graphs and "
            "lists show values as the search measured them."
        )
    return "\n\n".join(parts)


def write_standings(complete: Sequence[Record], n_groups: int, picked: Record | None) -> str:
    """The anchors and what is on the front, or off it within error only."""
    front, ties = select_front(complete), select_ties(complete)
    shown = [record for record in complete if record.anchor or record in front or record in ties]
    rows = [
        [
            str(record.number),
            record.anchor or "sampled",
            describe_choice(record.chosen, n_groups),
            *(format_reward(name, record.rewards) for name in record.objectives),
            ", ".join(
                filter(
                    None,
                    (
                        "front" if record in front else "",
                        "within error" if record in ties else "",
                        "**the pick**" if record is picked else "",
                    ),
                )
            ),
        ]
        for record in sorted(shown, key=lambda record: tuple(record.losses))
    ]
    return format_markdown_table(
        ["trial", "", "choice", *(find_title(name) for name in complete[0].objectives), ""], rows
    )
