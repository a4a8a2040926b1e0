"""Owns the report: one HTML page about a study that needs no network, made from its data and the pictures in
its run folders: a first page for everybody, then what specialists ask; and its sections on how the study was
made."""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

import yaml

from memcontrol.config.base import read_base
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import write_text
from memcontrol.core.published import hide_paths, publish_config, publish_name
from memcontrol.core.reward_table import BLIND_SPOTS, REWARDS
from memcontrol.study.record import DROPPED
from memcontrol.view.front_data import TrialData
from memcontrol.view.glossary import gloss_sections
from memcontrol.view.html import (
    read_asset,
    render_code,
    render_definitions,
    render_document,
    render_list,
    render_paragraph,
    render_row,
    render_section,
    render_table,
)
from memcontrol.view.lay_page import render_lay_page
from memcontrol.view.report_results import (
    ReportData,
    add_names,
    describe_rewards,
    render_drivers,
    render_front,
    render_masks,
    render_no_pairs,
    render_pairs,
    render_retrained,
    render_standings,
)
from memcontrol.view.words import find_title

_USE_BY_PART = {  # of the parts of the data
    "train": "fine-tuned on",
    "holdout": "what the search's figures compare with",
    "test": "for `retrain` only",
    "calibration": "where 99 % of real images lie, from which the line of copies is drawn",
}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_report(facts: ReportData, path: Path, with_images: bool = True) -> None:
    """With images, training images among them, for its owner alone. Raises MemControlError where the path is
    no page's: a study file given in its place must not be lost."""
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise MemControlError(
            f"the report is one HTML page, and {path} is not named as one; give OUT.html (data goes "
            "to stdout: --csv, --json)"
        )
    write_text(path, render_page(facts, with_images), published=not with_images)


def render_page(facts: ReportData, with_images: bool) -> str:
    sections = (
        render_front,
        render_standings,
        render_retrained,
        render_masks,
        render_drivers,
        render_pairs if with_images else render_no_pairs,
        _render_fates,
        _render_images,
        _render_setting,
        _render_cost,
        _render_reproduction,
        _render_limits,
    )
    told = gloss_sections([_render_question(facts), *(section(facts) for section in sections)])
    body = (
        f"{render_lay_page(facts, with_images)}"
        f'<div class="special"><h1>{escape(facts["study"])}, for specialists</h1>{"".join(told)}</div>'
    )
    script = f"<script>\n{read_asset('report.js')}</script>"
    title = f"{facts['study']}: MemControl"
    return render_document(title, read_asset("report.css"), f"{body}\n{script}", _POLICY)


def _render_question(facts: ReportData) -> str:
    base = read_base(facts["config"]["base"]).without_paths()
    images = publish_name(facts["config"]["data"]["path"])
    asked = (
        f"Which parameters of {base} can be fine-tuned on {images} so that quality stays and copying of "
        "training images goes?"
    )
    finished = [trial for trial in facts["trials"] if trial["state"] == "COMPLETE"]
    picked = next((trial for trial in finished if trial["pick"]), None)
    full = next((trial for trial in finished if trial["anchor"] == "full"), None)
    answer = "No trial but the untrained base has finished yet."
    if picked:
        answer = _describe_answer(facts, picked, full)
    return render_section("Question and answer", render_paragraph(asked), render_paragraph(answer, "lead"))


def _describe_answer(facts: ReportData, picked: TrialData, full: TrialData | None) -> str:
    """The pick, beside full fine-tuning."""
    names = add_names(facts["objectives"], ["copy_rate"])
    against = ""
    if picked is full:
        against = (
            ". No mask on the front is as good in the first objective, within its error, so the pick is full "
            "fine-tuning itself: search on, or pick another"
        )
    elif full:
        against = f", against {describe_rewards(names, full['rewards'])} with full fine-tuning"
    again = "`memcontrol retrain` measures the pick again on test images"
    if facts["retrained"]:
        again = "those on test images stand below"
    return (
        f"Trial {picked['trial']} ({picked['said']}): {describe_rewards(names, picked['rewards'])}{against}. "
        f"These are figures of the search, on held-out images; {again}."
    )


def _render_fates(facts: ReportData) -> str:
    """What became of the images in the inner loop."""
    if not facts["training"]:
        return ""
    names = {
        "seen": "drawn",
        "trained": "trained on",
        "skipped": "skipped",
        "dropped": "dropped for their noise norm",
        "queued": "queued for augmentation",
        "surplus": "surplus of refilled steps",
    }
    used = [name for name in names if any(counts[name] for counts in facts["training"])]
    about = "No image was to be skipped (inner.skip is not set)."
    if facts["config"]["inner"]["skip"]:
        about = "The study skips images by their loss."
    rows = [_render_counts(counts, used) for counts in facts["training"]]
    return render_section(
        "What became of the images in fine-tuning",
        render_paragraph(about, "note"),
        render_table(["trial", *(names[name] for name in used)], rows),
    )


def _render_counts(counts: dict[str, int], names: list[str]) -> str:
    drawn = max(counts["seen"], 1)
    cells = [f"{counts[name]:,} ({counts[name] / drawn:.0%})" for name in names]
    return render_row([str(counts["trial"]), *cells], counts["trial"])


def _render_images(facts: ReportData) -> str:
    data = facts["data"]
    if not data:
        return render_section("Images", render_paragraph("split.json is not on this machine.", "note"))
    rows = [
        render_row([name, *_render_part(part), render_code(_USE_BY_PART[name])])
        for name, part in data["parts"].items()
    ]
    about = (
        f"{publish_name(data['source'])}, {data['resolution']} x {data['resolution']} pixels; no image, "
        "by its exact pixels, and no group (a patient, say, where data.group names them; else each image) "
        "is in two parts. The hash is of the pixels and captions (SHA-256, 16 digits)."
    )
    table = render_table(["part", "images", "groups", "hash", "use"], rows)
    twins = [render_paragraph(_describe_twins(data))] if data["twins"] else []
    return render_section("Images", render_paragraph(about), table, *twins)


def _describe_twins(data: dict[str, Any]) -> str:
    pairs, dropped = data["twins"]["pairs"], data["twins"]["dropped"]
    left_out = f"; {dropped} images are left out, twins of images in another part" if dropped else ""
    return f"{pairs} pairs of images are nearly the same{left_out}."


def _render_part(part: dict[str, Any]) -> list[str]:
    groups = f"{part['groups']:,}" if "groups" in part else ""
    return [f"{part['images']:,}", groups, f"<code>{part['digest']}</code>"]


def _render_setting(facts: ReportData) -> str:
    space, objectives, limits = facts["space"], facts["objectives"], facts["limits"]
    ranges = space["learning_rate"].items()
    rows = {
        "space": f"{space['name']}: {space['description']}" if space["description"] else space["name"],
        "groups": ", ".join(space["groups"]),
        "methods": ", ".join(space["methods"]),
        "learning rates": "; ".join(f"{method} {low:g} to {high:g}" for method, (low, high) in ranges),
        "ranks": ", ".join(map(str, space["rank"])),
        **({"also decided": _list_settings(space["settings"])} if space["settings"] else {}),
        "each fine-tuning": _describe_fine_tuning(facts["config"]["inner"]),
        "scored on": _describe_scoring(facts["config"]["rewards"]),
        "objectives": ", ".join(f"{find_title(name)} ({way})" for name, way in objectives.items()),
        "limits": ", ".join(f"{name} {bound:g}" for name, bound in limits.items()) or "none",
        "trials": _describe_trials(facts["trials"], facts["config"]["search"]),
        "hypervolume": _describe_volume(facts["hypervolume"]),
    }
    return render_section("Space and budget", render_definitions(rows))


def _list_settings(settings: dict[str, str]) -> str:
    return "; ".join(f"{key}: {options}" for key, options in settings.items())


def _describe_fine_tuning(inner: dict[str, Any]) -> str:
    n_shards = inner["ensemble"]["shards"]
    shards = f", {n_shards} shards" if n_shards > 1 else ""
    rule = inner.get("privacy")
    bound = f", under differential privacy of epsilon {rule['epsilon']:g}" if rule else ""
    return (
        f"{inner['budget_images']:,} images, batches of {inner['batch_size']}, {inner['rounds']} rounds, "
        f"{inner['optimizer']}{shards}{bound}"
    )


def _describe_scoring(rewards: dict[str, Any]) -> str:
    return (
        f"{rewards['n_samples']} samples, {rewards['sampling_steps']} steps at guidance "
        f"{rewards['guidance']:g}, features of {rewards['extractor']}; the front again over "
        f"{rewards['confirm']} fresh draws"
    )


def _describe_trials(trials: list[TrialData], search: dict[str, Any]) -> str:
    counts = Counter(trial["state"] for trial in trials)
    states = [state for state in ("COMPLETE", "PRUNED", "FAIL", "RUNNING", DROPPED) if counts[state]]
    said = ", ".join(f"{counts[state]} {state.lower()}" for state in states)
    dropped = "".join(
        f"; trial {trial['trial']} is dropped: {hide_paths(trial['dropped'])}"
        for trial in trials
        if trial["dropped"]
    )
    return f"{said}{dropped}; {search['sampler']} sampler, seed {search['seed']}"


def _describe_volume(volume: dict[str, Any] | None) -> str:
    if not volume:
        return "not known before the anchors (without two of them, six sampled trials) have ended"
    reference = [f"{find_title(name)} {value:.4g}" for name, value in volume["reference"].items()]
    return f"{volume['value']:.4g} ± {volume['error']:.2g}, from {', '.join(reference)}"


def _render_cost(facts: ReportData) -> str:
    spent, made = facts["cost"], facts["made_with"]
    about = (
        f"{spent['runs']} fine-tunings with their scoring took {spent['hours']:.2f} hours of a "
        f"worker, {spent['median_seconds']:.0f} seconds in the median."
    )
    versions = ", ".join(f"{name} {version}" for name, version in made.items() if name != "device")
    rows = {
        "device": made.get("device", "not recorded"),
        "versions": versions or "not recorded",
        "report": f"written {facts['written']} by memcontrol {facts['reported_by']}",
    }
    return render_section("Cost and versions", render_paragraph(about), render_definitions(rows))


def _render_reproduction(facts: ReportData) -> str:
    name = facts["study"]
    given, whole = (_format_study_file(facts[key], facts["config"]) for key in ("given", "config"))
    commands = (
        f"memcontrol search {name}.yaml --workers 1\n"
        f"memcontrol pick {name}.yaml\n"
        f"memcontrol retrain {name}.yaml"
    )
    about = (
        "The study file, less what is at its default. The same config, seed, images (compare the hashes) "
        "and CPU give the same numbers with one worker; on GPUs they agree within the errors above."
    )
    return render_section(
        "How to reproduce it",
        render_paragraph(about),
        f"<pre>{escape(commands)}</pre><pre># {escape(name)}.yaml\n{escape(given)}</pre>",
        f"<details><summary>with all defaults</summary><pre>{escape(whole)}</pre></details>",
    )


def _format_study_file(keys: dict[str, Any], config: dict[str, Any]) -> str:
    """As YAML, the base and the images by name only."""
    data = {**keys["data"], "path": config["data"]["path"]}
    shown = publish_config({**keys, "base": config["base"], "data": data})
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def _render_limits(facts: ReportData) -> str:
    names = add_names(facts["objectives"], ["memorization", "copy_rate", "fid"])
    meanings = {find_title(name): REWARDS[name].meaning for name in names if name in REWARDS}
    return render_section(
        "What the figures mean, and what they cannot see",
        render_definitions(meanings),
        render_list(BLIND_SPOTS),
    )
