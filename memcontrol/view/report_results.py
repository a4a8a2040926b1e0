"""Owns the report's sections on what was found: the front, the figures on test images, the layers, what
drives what, and the images that come nearest to training images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from memcontrol.core.choice import EVERYTHING
from memcontrol.core.estimate import READ_95
from memcontrol.core.reward_table import format_reward
from memcontrol.core.run_folder import RunFolder
from memcontrol.search.importance import label_change
from memcontrol.search.surrogate import N_SPREAD
from memcontrol.view.front_data import (
    TrialData,
    describe_trial,
    list_finished,
    list_standings,
    make_front_data,
    name_places,
    name_standings,
)
from memcontrol.view.front_svg import draw_effect_bar, draw_front_svg, draw_legend
from memcontrol.view.html import (
    make_data_uri,
    render_list,
    render_paragraph,
    render_row,
    render_section,
    render_table,
)
from memcontrol.view.words import (
    describe_copied,
    describe_membership,
    describe_privacy,
    find_prose_title,
    find_title,
    name_groups,
    write_verdict,
)

ReportData = dict[str, Any]  # what report_data collects
_BESIDE_OBJECTIVES = (
    "copy_rate",
    "utility",
    "membership_auc",
    "epsilon",
    "trained_fraction",
)  # rewards that a table of trials always has
_PAIRS_TITLE = "Generated images and the training images nearest to them"


def add_names(names: Iterable[str], more: Iterable[str]) -> list[str]:
    """Both, each once."""
    return list(dict.fromkeys([*names, *more]))


def _choose_columns(objectives: Iterable[str], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rewards that a table of runs shows: without those that an older version did not measure."""
    names = add_names(objectives, _BESIDE_OBJECTIVES)
    return [name for name in names if name in objectives or any(name in run["rewards"] for run in runs)]


def describe_rewards(names: Sequence[str], rewards: dict[str, float]) -> str:
    return ", ".join(
        f"{find_prose_title(name)} {format_reward(name, rewards)}" for name in names if name in rewards
    )


def render_front(facts: ReportData) -> str:
    if len(facts["objectives"]) < 2:
        return ""
    trials = list_finished(facts["trials"], facts["objectives"])
    data = make_front_data(trials, facts["objectives"])
    chart = draw_front_svg(data)
    address = make_data_uri("image/svg+xml", chart.encode())
    link = f'<a download="{escape(facts["study"])}-front.svg" href="{address}">this figure as SVG</a>'
    about = (
        "Numbers are trials'. The line joins the front; bars are 95 % intervals of the front and the "
        "anchors; pale points are sampled masks that others beat. Point at one, or tap it, to read what "
        "it is."
    )
    if len(facts["objectives"]) > 2:
        first, second, *others = map(find_title, facts["objectives"])
        about += f" Drawn are {first} and {second}; {', '.join(others)} is in the tables."
    return render_section(
        "Quality and copying",
        f'<figure class="chart">{chart}</figure>',
        draw_legend(data),
        f'<p class="told" aria-live="polite">{escape(about)}</p>',
        f'<p class="screen">{link}</p>',
    )


def render_standings(facts: ReportData) -> str:
    trials = list_standings(facts["trials"], facts["objectives"])
    names = _choose_columns(facts["objectives"], trials)
    note = (
        "Figures with their standard errors, or 95 % intervals in brackets; (few): samples under "
        "four for each feature, which make FID too large. + measured again over fresh draws, since "
        "the best of many measured once is partly luck."
    )
    heads = ["trial", "", "choice", *map(find_title, names), ""]
    doubt = facts["doubt"]
    return render_section(
        name_standings(trials),
        render_table(heads, [_render_standing(trial, names) for trial in trials], "standings"),
        render_paragraph(note, "note"),
        *([render_paragraph(f"{doubt[0].upper()}{doubt[1:]}.")] if doubt else []),
    )


def _render_standing(trial: TrialData, names: Sequence[str]) -> str:
    places = name_places(trial)
    places += ["+"] if trial["confirmed"] else []
    places += ["<b>the pick</b>"] if trial["pick"] else []
    rewards = [format_reward(name, trial["rewards"]) for name in names]
    about = [escape(trial["origin"]), escape(trial["said"])]
    return render_row([str(trial["trial"]), *about, *rewards, ", ".join(places)], trial["trial"])


def render_retrained(facts: ReportData) -> str:
    """What to trust: trained anew from another seed on all training images, scored on test images."""
    if not facts["retrained"]:
        return ""
    names = _choose_columns(facts["objectives"], facts["retrained"])
    rows = [
        render_row([escape(run["said"]), *(format_reward(name, run["rewards"]) for name in names)])
        for run in facts["retrained"]
    ]
    verdicts = [
        render_paragraph(f"{run['said']}: {_judge_run(run)}")
        for run in facts["retrained"]
        if "copy_rate" in run["rewards"]
    ]
    about = (
        "Trained again from a new seed on all training images, and scored with new prompts and "
        "noise against test images, which the search never saw: the figures to trust. `memcontrol "
        "compare` tells differences in pairs."
    )
    return render_section(
        "Retrained, on test images",
        render_paragraph(about, "note"),
        render_table(["choice", *map(find_title, names)], rows),
        *verdicts,
    )


def _judge_run(run: dict[str, Any]) -> str:
    verdict = write_verdict(run["rewards"], run["n_samples"])
    parts = (verdict, describe_membership(run["rewards"]), describe_privacy(run["rewards"]))
    return " ".join(part for part in parts if part)


def render_masks(facts: ReportData) -> str:
    """For each trial on the front, which share of each block of the network lies in trained modules; of each
    group where the blocks are not known."""
    finished = list_finished(facts["trials"], facts["objectives"])
    trials = [trial for trial in finished if trial["front"] and trial["anchor"] != "none"]
    blocks, groups = facts["blocks"], facts["space"]["groups"]
    about = "Each row is a trial on the front, each column a group of layers."
    if blocks:
        about = (
            "Each row is a trial on the front (an anchor by its name), each column a block of the "
            "network from input to output; the number is the share of its parameters, in per cent, "
            "that lie in trained modules."
        )
        rows = [_render_mask(trial, blocks, trial["blocks"]) for trial in trials]
    else:
        rows = [_render_mask(trial, groups, _find_trained(trial, groups)) for trial in trials]
    lines = [_describe_mask(trial) for trial in trials]
    return render_section(
        "Which layers",
        render_paragraph(about, "note"),
        render_table(["trial", *(blocks or groups)], rows, "heat"),
        render_list(lines, "note"),
    )


def _find_trained(trial: TrialData, groups: Sequence[str]) -> list[float]:
    """1 for each group that the trial trains, 0 for the others."""
    on = trial["choice"]["groups"]
    return [float(name in on or EVERYTHING in on) for name in groups]


def _render_mask(trial: TrialData, columns: Sequence[str], shares: Sequence[float]) -> str:
    number, groups = trial["trial"], ", ".join(trial["choice"]["groups"])
    head = f"{number} {trial['anchor'] or ''}{' (the pick)' if trial['pick'] else ''}"
    cells = "".join(_render_share(name, share) for name, share in zip(columns, shares))
    return f'<tr data-trial="{number}" title="{escape(groups)}"><th>{head}</th>{cells}</tr>'


def _render_share(name: str, share: float) -> str:
    """A cell, the darker the larger the share."""
    colour, title = f"rgba(var(--on), {0.07 + 0.78 * share:.2f})", f"{escape(name)}: {share:.0%}"
    text = f"{100 * share:.0f}" if share else ""
    ink = "; color: var(--paper)" if share > 0.5 else ""
    return f'<td style="background: {colour}{ink}" title="{title}">{text}</td>'


def _describe_mask(trial: TrialData) -> str:
    groups = name_groups(trial["choice"]["groups"], "only what is always trained")
    return f"trial {trial['trial']}, {trial['said']}: {groups}"


def render_drivers(facts: ReportData) -> str:
    title, objectives = "What drives what", list(facts["objectives"])
    if not facts["importance"]:
        about = (
            f"Too few trials have ended to tell: it takes {N_SPREAD}, beside no training and full "
            "fine-tuning."
        )
        return render_section(title, render_paragraph(about, "note"))
    most = {name: _find_largest_effect(facts["importance"], name) for name in objectives}
    rows = [_render_effect(effect, most) for effect in facts["importance"]]
    about = (
        "What each objective changes by, in its own units, when one thing changes and all else "
        "stays, by the model that the search has learned, with standard errors (bars: 95 %). Pale: "
        "cannot be told from nothing."
    )
    heads = ["change"]
    for name in objectives:
        heads += [find_title(name), ""]
    return render_section(title, render_paragraph(about, "note"), render_table(heads, rows))


def _find_largest_effect(effects: Sequence[dict[str, Any]], name: str) -> float:
    """The far end of the largest bar."""
    found = [effect["effects"][name] for effect in effects]
    return max(abs(one["value"]) + READ_95 * one["error"] for one in found)


def _render_effect(effect: dict[str, Any], most: dict[str, float]) -> str:
    """`most`: by objective, what fills half a bar."""
    cells, is_sure = [escape(label_change(effect["coordinate"], effect["from"], effect["to"]))], False
    for name, largest in most.items():
        value, error = effect["effects"][name]["value"], effect["effects"][name]["error"]
        cells += [draw_effect_bar(value, error, largest), f"{value:+.3g} ± {error:.2g}"]
        is_sure |= abs(value) > 2 * error
    return render_row(cells, kind="" if is_sure else "dim")


def render_pairs(facts: ReportData) -> str:
    """Of full fine-tuning and of the pick, as far as their run folders are on this machine."""
    finished = list_finished(facts["trials"], facts["objectives"])
    trials = [trial for trial in finished if trial["anchor"] == "full" or trial["pick"]]
    found = [trial for trial in trials if RunFolder(Path(trial["run"])).pairs_picture.is_file()]
    if not found:
        about = "The run folders with the images are not on this machine."
        return render_section(_PAIRS_TITLE, render_paragraph(about, "note"))
    figures = [_render_pair_figure(trial) for trial in sorted(found, key=lambda trial: trial["pick"])]
    about = (
        "The generated images that come nearest to a training image, relative to held-out ones, "
        "most suspicious first; below each its distance in the descriptor in which it stands out most, and "
        "that as a share of the distance to the nearest held-out image: what is usual differs by descriptor. "
        "This part shows training images."
    )
    return render_section(_PAIRS_TITLE, render_paragraph(about, "note"), *figures)


def render_no_pairs(facts: ReportData) -> str:
    return render_section(_PAIRS_TITLE, render_paragraph("Left out of this report on request.", "note"))


def _render_pair_figure(trial: TrialData) -> str:
    address = make_data_uri("image/png", RunFolder(Path(trial["run"])).pairs_picture.read_bytes())
    rates = describe_rewards(["copy_rate"], trial["rewards"])
    said = escape(f"{describe_trial(trial)}; {rates}. {describe_copied(trial['rewards'])}".strip())
    image = f'<img alt="{said}" src="{address}">'
    return f'<figure><figcaption>{said}</figcaption><div class="wide">{image}</div></figure>'
