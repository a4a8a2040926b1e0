"""Owns the report: one HTML page about a study that needs no network, made from its facts and the pictures in
its run folders."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from memcontrol.core.errors import MemControlError
from memcontrol.core.files import replace_file
from memcontrol.core.reward_table import BLIND_SPOTS, REWARDS, format_reward, list_objectives
from memcontrol.core.run_folder import PAIRS_PICTURE
from memcontrol.search.surrogate import N_SPREAD
from memcontrol.view.front_svg import describe_point, draw_effect_bar, draw_front_svg, draw_legend
from memcontrol.view.words import find_title

ReportData = dict[str, Any]
ALWAYS = ("copy_rate", "trained_fraction")  # figures of the front's table beside the objectives

REPORT_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2126; --faint: #c9ced4; --soft: #f3f5f7; --on: 0,114,178;
  --sampled: #0072B2; --none: #7f7f7f; --all: #c98500; --full: #D55E00; --pick: #00875f; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181c; --ink: #e6e9ec; --faint: #454c54; --soft: #1e242a; --on: 86,180,233;
  --sampled: #56B4E9; --none: #a0a0a0; --all: #E69F00; --full: #ff8a4c; --pick: #3fcf9f; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
.lead { font-size: 1.1rem; border-left: 4px solid var(--pick); padding-left: .8rem; }
.note, caption, figcaption, .told { font-size: .87rem; opacity: .85; text-align: left; }
.wide { overflow-x: auto; } @media screen { .wide:has(table) { /* a shadow where a table goes on */
  background: linear-gradient(90deg, var(--paper) 35%, transparent) 0 / 3rem 100% no-repeat local, linear-gradient(270deg, var(--paper) 35%, transparent) 100% / 3rem 100% no-repeat local,
    linear-gradient(90deg, var(--faint), transparent) 0 / .8rem 100% no-repeat scroll, linear-gradient(270deg, var(--faint), transparent) 100% / .8rem 100% no-repeat scroll; } }
table { border-collapse: collapse; font-size: .87rem; } td, th { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--faint); }
td.n { white-space: nowrap; } tr.on, .heat tr.on th { background: rgba(var(--on), .16); } tr[data-trial] { cursor: default; }
figure { margin: 0 0 1rem; } figure img { background: #fff; } @media screen { .wide img { max-width: none; } }
.chart { max-width: 38rem; } .chart svg { width: 100%; height: auto; } .point { cursor: pointer; } .point:focus, .point.on { outline: none; stroke: var(--ink); stroke-width: 2; opacity: 1; }
.legend span { margin-right: 1.1rem; white-space: nowrap; } .key { width: .95rem; height: .95rem; vertical-align: -.12rem; overflow: visible; }
.sampled { fill: var(--sampled); } .none { fill: var(--none); } .all { fill: var(--all); } .full { fill: var(--full); } .key .pick { fill: none; stroke: var(--pick); stroke-width: 2.5; } .key .front { fill: none; stroke: var(--ink); }
.heat td, .heat th { border: 2px solid var(--paper); padding: .2rem .3rem; } .heat td { min-width: 1.3rem; text-align: center; font-size: .72rem; } .heat thead th { writing-mode: vertical-rl; transform: rotate(180deg); vertical-align: bottom; font-weight: normal; font-size: .75rem; }
.heat thead th:first-child { writing-mode: horizontal-tb; transform: none; } .heat tbody th { font-weight: normal; white-space: nowrap; border-bottom: 0; }
.bar { width: 7rem; height: .8rem; } .bar .up { fill: var(--full); } .bar .down { fill: var(--sampled); } .bar .axis, .bar .error { stroke: var(--ink); stroke-width: .8; vector-effect: non-scaling-stroke; } tr.dim { opacity: .6; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .8rem; } code { font-size: .9em; } dt { font-weight: 600; } dd { margin: 0 0 .5rem; } a { color: inherit; }
@media print { :root { --paper: #fff; --ink: #000; --faint: #bbb; --soft: #fff; --on: 0,114,178; --sampled: #0072B2; --all: #c98500; --full: #D55E00; --pick: #00875f; }
  figure, tr, .heat { break-inside: avoid; } h2 { break-after: avoid; } .screen { display: none; } body { font-size: 10.5pt; max-width: none; padding: 0; } .wide { overflow: visible; } table { font-size: 8pt; }
  td, th { padding-right: .35rem; } td.n { white-space: normal; } .wide img { max-width: 100%; } * { print-color-adjust: exact; } }
"""

REPORT_SCRIPT = """
const line = document.querySelector('.told'), of = n => document.querySelectorAll(`[data-trial="${n}"]`);
function show(n) { document.querySelectorAll('.on').forEach(e => e.classList.remove('on')); of(n).forEach(e => e.classList.add('on'));
  const point = document.querySelector(`.point[data-trial="${n}"] title`); if (point) line.textContent = point.textContent; }
document.querySelectorAll('[data-trial]').forEach(e => ['mouseenter', 'focus', 'click'].forEach(kind => e.addEventListener(kind, () => show(e.dataset.trial))));
"""


def write_report(facts: ReportData, path: Path, with_images: bool = True) -> None:
    """Raises MemControlError where the path is no page's: a study file given in its place must not be
    lost."""
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise MemControlError(
            f"the report is one HTML page, and {path} is not named as one; give OUT.html (data goes "
            "to stdout: --csv, --json)"
        )
    with replace_file(path) as part:
        part.write_text(render_page(facts, with_images), encoding="utf-8")


def render_page(facts: ReportData, with_images: bool) -> str:
    sections = (
        render_front,
        render_standings,
        render_retrained,
        render_masks,
        render_drivers,
        render_pairs if with_images else render_no_pairs,
        render_fates,
        render_images,
        render_setting,
        render_cost,
        render_reproduction,
        render_limits,
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(facts["study"])}: MemControl</title><style>{REPORT_STYLE}</style></head><body>
{render_question(facts)}{"".join(section(facts) for section in sections)}
<script>{REPORT_SCRIPT}</script></body></html>
"""


def render_section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def render_paragraph(text: str, kind: str = "") -> str:
    """Of plain text, in which `...` is code."""
    return f"<p{f' class={kind}' if kind else ''}>{render_code(text)}</p>"


def render_code(text: str) -> str:
    return re.sub("`(.+?)`", r"<code>\1</code>", escape(text))


def render_table(heads: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return (
        '<div class="wide"><table '
        f'class="{kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def render_row(cells: Sequence[str], trial: int | None = None, kind: str = "") -> str:
    marks = f' data-trial="{trial}"' if trial is not None else ""
    return (
        "<tr "
        f'class="{kind}"{marks}>{"".join(f"<td class=n>{cell}</td>" if i else f"<td>{cell}</td>" for i, cell in enumerate(cells))}</tr>'
    )


def list_finished(facts: ReportData) -> list[dict[str, Any]]:
    first = list_objectives(facts["objectives"])[0]
    finished = [t for t in facts["trials"] if t["state"] == "COMPLETE"]
    return sorted(finished, key=lambda t: first.to_loss(t["values"][first.name]))


def find_anchor(facts: ReportData, anchor: str) -> dict[str, Any] | None:
    return next((t for t in list_finished(facts) if t["anchor"] == anchor), None)


def find_picked(facts: ReportData) -> dict[str, Any] | None:
    return next((t for t in list_finished(facts) if t["pick"]), None)


def render_question(facts: ReportData) -> str:
    config, chosen, full = facts["config"], find_picked(facts), find_anchor(facts, "full")
    asked = (
        f"Which parameters of {take_last_part(config['base'])} can be fine-tuned on "
        f"{take_last_part(config['data']['path'])} so that quality stays and copying of training "
        "images goes?"
    )
    answer = "No trial but the untrained base has finished yet."
    if chosen:
        names = [*facts["objectives"], *(name for name in ALWAYS[:1] if name not in facts["objectives"])]
        against = (
            f", against {describe_comparison(names, full['rewards'])} with full fine-tuning"
            if full and full is not chosen
            else ""
        )
        if full is chosen:
            against = (
                ". No mask on the front comes within 5 % of it in the first objective, so the pick "
                "is full fine-tuning itself: search on, or pick another"
            )
        again = (
            "those on test images stand below"
            if facts["retrained"]
            else "`memcontrol retrain` measures the pick again on test images"
        )
        answer = (
            f"Trial {chosen['trial']} ({chosen['said']}): "
            f"{describe_comparison(names, chosen['rewards'])}{against}. These are figures of the "
            f"search, on held-out images; {again}."
        )
    return f"<h1>{escape(facts['study'])}</h1>{render_paragraph(asked)}{render_paragraph(answer, 'lead')}"


def take_last_part(path: str) -> str:
    """A name, or the last part of a path: where files lie on a machine is not for a page that is passed
    on."""
    return Path(path).name if Path(path).is_absolute() else path


def render_retrained(facts: ReportData) -> str:
    """What to trust: trained anew from another seed on all training images, scored on test images."""
    if not facts["retrained"]:
        return ""
    names = [*facts["objectives"], *(name for name in ALWAYS if name not in facts["objectives"])]
    rows = [
        render_row([escape(run["said"]), *(format_reward(name, run["rewards"]) for name in names)])
        for run in facts["retrained"]
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
    )


def describe_comparison(names: Sequence[str], rewards: dict[str, float]) -> str:
    return ", ".join(
        f"{find_title(name)} {format_reward(name, rewards)}" for name in names if name in rewards
    )


def render_front(facts: ReportData) -> str:
    if len(facts["objectives"]) < 2:
        return ""
    chart = draw_front_svg(list_finished(facts), facts["objectives"])
    link = (
        f'<p class="screen"><a download="{escape(facts["study"])}-front.svg" '
        f'href="data:image/svg+xml;base64,{base64.b64encode(chart.encode()).decode()}">this figure '
        "as SVG</a></p>"
    )
    about = (
        "The line joins the front; bars are 95 % intervals of the front and the anchors; pale "
        "points are sampled masks that others beat. Point at one, or tap it, to read what it is."
    )
    return render_section(
        "Quality and copying",
        f'<figure class="chart">{chart}</figure>',
        draw_legend(),
        f'<p class="told" aria-live="polite">{escape(about)}</p>',
        link,
    )


def render_standings(facts: ReportData) -> str:
    """The anchors, the front, and what is off it within error only."""
    names = [*facts["objectives"], *(name for name in ALWAYS if name not in facts["objectives"])]
    shown = [t for t in list_finished(facts) if t["front"] or t["tie"] or t["anchor"]]
    rows = [
        render_row(
            [
                str(t["trial"]),
                escape(t["anchor"] or "sampled"),
                escape(t["said"]),
                *(format_reward(n, t["rewards"]) for n in names),
                name_place(t),
            ],
            t["trial"],
        )
        for t in shown
    ]
    note = (
        "Figures with their standard errors, or 95 % intervals in brackets; (few): samples under "
        "four for each feature, which make FID too large. + measured again over fresh draws, since "
        "the best of many measured once is partly luck."
    )
    return render_section(
        "Front and anchors",
        render_table(["trial", "", "choice", *map(find_title, names), ""], rows),
        render_paragraph(note, "note"),
    )


def name_place(trial: dict[str, Any]) -> str:
    words = {"front": "front", "tie": "within error", "confirmed": "+", "pick": "<b>the pick</b>"}
    return ", ".join(said for key, said in words.items() if trial[key])


def render_masks(facts: ReportData) -> str:
    """For each trial on the front, which share of each block of the network lies in trained modules."""
    columns = facts["blocks"] or facts["space"]["groups"]
    shown = [t for t in list_finished(facts) if t["front"] and t["anchor"] != "none"]
    rows = []
    for t in shown:
        on = (t["choice"] or {}).get("groups", ())
        shares = t["blocks"] if facts["blocks"] else [float(name in on or "*" in on) for name in columns]
        cells = "".join(render_cell(name, share) for name, share in zip(columns, shares))
        rows.append(
            f'<tr data-trial="{t["trial"]}" title="{escape(", ".join(on))}"><th>{t["trial"]} '
            f"{t['anchor'] or ''}{' (the pick)' if t['pick'] else ''}</th>{cells}</tr>"
        )
    about = (
        "Each row is a trial on the front (an anchor by its name), each column a block of the "
        "network from input to output; the number is the share of its parameters, in per cent, "
        "that lie in trained modules."
    )
    return render_section(
        "Which layers",
        render_paragraph(
            about if facts["blocks"] else "Each row is a trial on the front, each column a group of layers.",
            "note",
        ),
        render_table(["trial", *columns], rows, "heat"),
        render_groups(shown),
    )


def render_cell(name: str, share: float) -> str:
    said = f"{100 * share:.0f}" if share else ""
    return (
        f'<td style="background: rgba(var(--on), {0.07 + 0.78 * share:.2f})" title="{escape(name)}: '
        f'{share:.0%}">{said}</td>'
    )


def render_groups(trials: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"<li>trial {t['trial']}, {escape(t['said'])}: {escape(name_groups(t['choice']['groups']))}</li>"
        for t in trials
    ]
    return f"<ul class=note>{''.join(lines)}</ul>"


def name_groups(groups: Sequence[str]) -> str:
    return "the whole denoiser" if "*" in groups else ", ".join(groups) or "only what is always trained"


def render_drivers(facts: ReportData) -> str:
    effects, objectives = facts["importance"], list(facts["objectives"])
    if not effects:
        return render_section(
            "What drives what",
            render_paragraph(
                f"Too few trials have ended to tell: it takes {N_SPREAD}, beside no training and full "
                "fine-tuning.",
                "note",
            ),
        )
    most = {
        name: max(abs(e["effects"][name]["value"]) + 1.96 * e["effects"][name]["error"] for e in effects)
        for name in objectives
    }
    rows = []
    for effect in effects:
        cells, sure = [escape(describe_change(effect))], False
        for name in objectives:
            value, error = effect["effects"][name]["value"], effect["effects"][name]["error"]
            sure |= abs(value) > 2 * error
            cells += [draw_effect_bar(value, error, most[name]), f"{value:+.3g} ± {error:.2g}"]
        rows.append(render_row(cells, kind="" if sure else "dim"))
    about = (
        "What each objective changes by, in its own units, when one thing changes and all else "
        "stays, by the model that the search has learned, with standard errors (bars: 95 %). Pale: "
        "cannot be told from nothing."
    )
    return render_section(
        "What drives what",
        render_paragraph(about, "note"),
        render_table(["change", *(text for name in objectives for text in (find_title(name), ""))], rows),
    )


def describe_change(effect: dict[str, Any]) -> str:
    if effect["to"] is True:
        return f"{effect['coordinate']} on"
    return (
        "learning rate: lowest to highest"
        if effect["coordinate"] == "rate"
        else f"{effect['coordinate']}: {effect['from']} to {effect['to']}"
    )


def render_pairs(facts: ReportData) -> str:
    shown = [
        t
        for t in list_finished(facts)
        if (t["anchor"] == "full" or t["pick"]) and (Path(t["run"]) / PAIRS_PICTURE).is_file()
    ]
    figures = [render_pair_figure(trial) for trial in sorted(shown, key=lambda t: bool(t["pick"]))]
    if not figures:
        return render_section(
            "Generated images and the training images nearest to them",
            render_paragraph("The run folders with the images are not on this machine.", "note"),
        )
    about = (
        "The generated images that come nearest to a training image, relative to held-out ones, "
        "most suspicious first; below each its distance (d), and that as a share of the distance "
        "to the nearest held-out image."
    )
    return render_section(
        "Generated images and the training images nearest to them",
        render_paragraph(f"{about} This part shows training images.", "note"),
        *figures,
    )


def render_no_pairs(facts: ReportData) -> str:
    return render_section(
        "Generated images and the training images nearest to them",
        render_paragraph("Left out of this report on request.", "note"),
    )


def render_pair_figure(trial: dict[str, Any]) -> str:
    data = base64.b64encode((Path(trial["run"]) / PAIRS_PICTURE).read_bytes()).decode()
    said = f"{describe_point(trial)}; {describe_comparison(ALWAYS[:1], trial['rewards'])}"
    return (
        f'<figure><figcaption>{escape(said)}</figcaption><div class="wide"><img '
        f'alt="{escape(said)}" src="data:image/png;base64,{data}"></div></figure>'
    )


def render_fates(facts: ReportData) -> str:
    """What became of the images in the inner loop."""
    names = {
        "seen": "drawn",
        "trained": "trained on",
        "skipped": "skipped",
        "dropped": "dropped for their noise norm",
        "queued": "queued for augmentation",
        "surplus": "surplus of refilled steps",
    }
    if not facts["training"]:
        return ""
    used = [name for name in names if any(one[name] for one in facts["training"])]
    rows = [
        render_row(
            [str(one["trial"]), *(f"{one[name]:,} ({one[name] / max(one['seen'], 1):.0%})" for name in used)],
            one["trial"],
        )
        for one in facts["training"]
    ]
    inner = facts["config"]["inner"]
    about = (
        "The study skips images by their loss."
        if inner["skip"]
        else "No image was to be skipped (inner.skip is not set)."
    )
    return render_section(
        "What became of the images in fine-tuning",
        render_paragraph(about, "note"),
        render_table(["trial", *(names[name] for name in used)], rows),
    )


def render_images(facts: ReportData) -> str:
    data = facts["data"]
    if not data:
        return render_section("Images", render_paragraph("split.json is not on this machine.", "note"))
    uses = {
        "train": "fine-tuned on",
        "holdout": "what the search's figures compare with",
        "test": "for `retrain` only",
    }
    rows = [
        render_row([name, f"{part['images']:,}", f"<code>{part['digest']}</code>", render_code(uses[name])])
        for name, part in data["parts"].items()
    ]
    about = (
        f"{take_last_part(data['source'])}, {data['resolution']} x {data['resolution']} pixels; no "
        "image, by its exact pixels, is in two parts. The hash is of the pixels and captions "
        "(SHA-256, 16 digits)."
    )
    return render_section(
        "Images", render_paragraph(about), render_table(["part", "images", "hash", "use"], rows)
    )


def render_setting(facts: ReportData) -> str:
    space, inner, rewards, search = (
        facts["space"],
        *(facts["config"][key] for key in ("inner", "rewards", "search")),
    )
    states = {
        state: sum(t["state"] == state for t in facts["trials"])
        for state in ("COMPLETE", "PRUNED", "FAIL", "RUNNING")
    }
    rates = "; ".join(
        f"{method} {low:g} to {high:g}" for method, (low, high) in space["learning_rate"].items()
    )
    volume = facts["hypervolume"]
    shards = f", {n} shards" if (n := inner["ensemble"]["shards"]) > 1 else ""
    rows = {
        "space": f"{space['name']}: {space['description']}" if space["description"] else space["name"],
        "groups": ", ".join(space["groups"]),
        "methods": ", ".join(space["methods"]),
        "learning rates": rates,
        "ranks": ", ".join(map(str, space["rank"])),
        "each fine-tuning": f"{inner['budget_images']:,} images, batches of {inner['batch_size']}, "
        f"{inner['rounds']} rounds, {inner['optimizer']}{shards}",
        "scored on": f"{rewards['n_samples']} samples, {rewards['sampling_steps']} steps at guidance "
        f"{rewards['guidance']:g}, features of {rewards['extractor']}; the front again over "
        f"{rewards['confirm']} fresh draws",
        "objectives": ", ".join(
            f"{find_title(name)} ({direction})" for name, direction in facts["objectives"].items()
        ),
        "limits": ", ".join(f"{name} {bound:g}" for name, bound in facts["limits"].items()) or "none",
        "trials": ", ".join(f"{n} {state.lower()}" for state, n in states.items() if n)
        + f"; {search['sampler']} sampler, seed {search['seed']}",
        "hypervolume": f"{volume['value']:.4g} ± {volume['error']:.2g}, from "
        f"{', '.join(f'{find_title(name)} {value:.4g}' for name, value in volume['reference'].items())}"
        if volume
        else "not known before the anchors have ended",
    }
    return render_section("Space and budget", render_definitions(rows))


def render_definitions(rows: dict[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in rows.items() if value)}</dl>"


def render_cost(facts: ReportData) -> str:
    spent, made = facts["cost"], facts["made_with"]
    said = (
        f"{spent['runs']} fine-tunings with their scoring took {spent['hours']:.2f} hours of a "
        f"worker, {spent['median_seconds']:.0f} seconds in the median."
    )
    versions = ", ".join(f"{name} {version}" for name, version in made.items() if name != "device")
    return render_section(
        "Cost and versions",
        render_paragraph(said),
        render_definitions(
            {
                "device": made.get("device", "not recorded"),
                "versions": versions or "not recorded",
                "report": f"written {facts['written']} by memcontrol {facts['reported_by']}",
            }
        ),
    )


def render_reproduction(facts: ReportData) -> str:
    shown = {
        key: {
            **facts[key],
            "base": take_last_part(facts["config"]["base"]),
            "data": {**facts[key]["data"], "path": take_last_part(facts["config"]["data"]["path"])},
        }
        for key in ("given", "config")
    }
    given, whole = (
        yaml.safe_dump(shown[key], sort_keys=False, allow_unicode=True) for key in ("given", "config")
    )
    commands = (
        f"memcontrol search {facts['study']}.yaml --workers 1\nmemcontrol pick "
        f"{facts['study']}.yaml\nmemcontrol retrain {facts['study']}.yaml"
    )
    about = (
        "The study file, less what is at its default. The same config, seed, images (compare the "
        "hashes) and CPU give the same numbers with one worker; on GPUs they agree within the "
        "errors above."
    )
    return render_section(
        "How to reproduce it",
        render_paragraph(about),
        f"<pre>{escape(commands)}</pre><pre># {escape(facts['study'])}.yaml\n{escape(given)}</pre>",
        f"<details><summary>with all defaults</summary><pre>{escape(whole)}</pre></details>",
    )


def render_limits(facts: ReportData) -> str:
    figures = [
        *facts["objectives"],
        *(name for name in ("memorization", "copy_rate", "fid") if name not in facts["objectives"]),
    ]
    meanings = {find_title(name): REWARDS[name].meaning for name in figures if name in REWARDS}
    return render_section(
        "What the figures mean, and what they cannot see",
        render_definitions(meanings),
        f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in BLIND_SPOTS)}</ul>",
    )
