"""Owns the report: one HTML page about a study that needs no network, made from its facts and the pictures in its run folders."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from memcontrol.charts import bar, front_chart, legend, told
from memcontrol.errors import MemControlError
from memcontrol.figures import BLIND, FIGURES, MAXIMIZE, written
from memcontrol.files import replacing
from memcontrol.notes import title_of
from memcontrol.spec import PAIRS_PICTURE
from memcontrol.surrogate import N_SPREAD

Facts = dict[str, Any]
ALWAYS = ("copy_rate", "trained_fraction")  # figures of the front's table beside the objectives

STYLE = """
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

SCRIPT = """
const line = document.querySelector('.told'), of = n => document.querySelectorAll(`[data-trial="${n}"]`);
function show(n) { document.querySelectorAll('.on').forEach(e => e.classList.remove('on')); of(n).forEach(e => e.classList.add('on'));
  const point = document.querySelector(`.point[data-trial="${n}"] title`); if (point) line.textContent = point.textContent; }
document.querySelectorAll('[data-trial]').forEach(e => ['mouseenter', 'focus', 'click'].forEach(kind => e.addEventListener(kind, () => show(e.dataset.trial))));
"""


def write_report(facts: Facts, path: Path, with_images: bool = True) -> None:
    """Raises MemControlError where the path is no page's: a study file given in its place must not be lost."""
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise MemControlError(f"the report is one HTML page, and {path} is not named as one; give OUT.html (data goes to stdout: --csv, --json)")
    with replacing(path) as part:
        part.write_text(page(facts, with_images), encoding="utf-8")


def page(facts: Facts, with_images: bool) -> str:
    sections = (front, standings, retrained, masks, drivers, pairs if with_images else no_pairs, fates, images, setting, cost, reproduce, limits)
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(facts["study"])}: MemControl</title><style>{STYLE}</style></head><body>
{question(facts)}{"".join(section(facts) for section in sections)}
<script>{SCRIPT}</script></body></html>
"""


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(text: str, kind: str = "") -> str:
    """Of plain text, in which `...` is code."""
    return f"<p{f' class={kind}' if kind else ''}>{coded(text)}</p>"


def coded(text: str) -> str:
    return re.sub("`(.+?)`", r"<code>\1</code>", escape(text))


def table(heads: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def row(cells: Sequence[str], trial: int | None = None, kind: str = "") -> str:
    marks = f' data-trial="{trial}"' if trial is not None else ""
    return f'<tr class="{kind}"{marks}>{"".join(f"<td class=n>{cell}</td>" if i else f"<td>{cell}</td>" for i, cell in enumerate(cells))}</tr>'


def finished(facts: Facts) -> list[dict[str, Any]]:
    first = list(facts["objectives"])[0]
    sign = -1 if facts["objectives"][first] == MAXIMIZE else 1
    return sorted((t for t in facts["trials"] if t["state"] == "COMPLETE"), key=lambda t: sign * t["values"][first])


def of_anchor(facts: Facts, anchor: str) -> dict[str, Any] | None:
    return next((t for t in finished(facts) if t["anchor"] == anchor), None)


def picked(facts: Facts) -> dict[str, Any] | None:
    return next((t for t in finished(facts) if t["pick"]), None)


def question(facts: Facts) -> str:
    config, chosen, full = facts["config"], picked(facts), of_anchor(facts, "full")
    asked = f"Which parameters of {last(config['base'])} can be fine-tuned on {last(config['data']['path'])} so that quality stays and copying of training images goes?"
    answer = "No trial but the untrained base has finished yet."
    if chosen:
        names = [*facts["objectives"], *(name for name in ALWAYS[:1] if name not in facts["objectives"])]
        against = f", against {compared(names, full['rewards'])} with full fine-tuning" if full and full is not chosen else ""
        if full is chosen:
            against = ". No mask on the front comes within 5 % of it in the first objective, so the pick is full fine-tuning itself: search on, or pick another"
        again = "those on test images stand below" if facts["retrained"] else "`memcontrol retrain` measures the pick again on test images"
        answer = f"Trial {chosen['trial']} ({chosen['said']}): {compared(names, chosen['rewards'])}{against}. These are figures of the search, on held-out images; {again}."
    return f"<h1>{escape(facts['study'])}</h1>{paragraph(asked)}{paragraph(answer, 'lead')}"


def last(path: str) -> str:
    """A name, or the last part of a path: where files lie on a machine is not for a page that is passed on."""
    return Path(path).name if Path(path).is_absolute() else path


def retrained(facts: Facts) -> str:
    """What to trust: trained anew from another seed on all training images, scored on test images."""
    if not facts["retrained"]:
        return ""
    names = [*facts["objectives"], *(name for name in ALWAYS if name not in facts["objectives"])]
    rows = [row([escape(run["said"]), *(written(name, run["rewards"]) for name in names)]) for run in facts["retrained"]]
    about = "Trained again from a new seed on all training images, and scored with new prompts and noise against test images, which the search never saw: the figures to trust. `memcontrol compare` tells differences in pairs."
    return section("Retrained, on test images", paragraph(about, "note"), table(["choice", *map(title_of, names)], rows))


def compared(names: Sequence[str], rewards: dict[str, float]) -> str:
    return ", ".join(f"{title_of(name)} {written(name, rewards)}" for name in names if name in rewards)


def front(facts: Facts) -> str:
    if len(facts["objectives"]) < 2:
        return ""
    chart = front_chart(finished(facts), facts["objectives"])
    link = f'<p class="screen"><a download="{escape(facts["study"])}-front.svg" href="data:image/svg+xml;base64,{base64.b64encode(chart.encode()).decode()}">this figure as SVG</a></p>'
    about = "The line joins the front; bars are 95 % intervals of the front and the anchors; pale points are sampled masks that others beat. Point at one, or tap it, to read what it is."
    return section("Quality and copying", f'<figure class="chart">{chart}</figure>', legend(), f'<p class="told" aria-live="polite">{escape(about)}</p>', link)


def standings(facts: Facts) -> str:
    """The anchors, the front, and what is off it within error only."""
    names = [*facts["objectives"], *(name for name in ALWAYS if name not in facts["objectives"])]
    shown = [t for t in finished(facts) if t["front"] or t["tie"] or t["anchor"]]
    rows = [row([str(t["trial"]), escape(t["anchor"] or "sampled"), escape(t["said"]), *(written(n, t["rewards"]) for n in names), place(t)], t["trial"]) for t in shown]
    note = "Figures with their standard errors, or 95 % intervals in brackets; (few): samples under four for each feature, which make FID too large. + measured again over fresh draws, since the best of many measured once is partly luck."
    return section("Front and anchors", table(["trial", "", "choice", *map(title_of, names), ""], rows), paragraph(note, "note"))


def place(trial: dict[str, Any]) -> str:
    words = {"front": "front", "tie": "within error", "confirmed": "+", "pick": "<b>the pick</b>"}
    return ", ".join(said for key, said in words.items() if trial[key])


def masks(facts: Facts) -> str:
    """For each trial on the front, which share of each block of the network lies in trained modules."""
    columns = facts["blocks"] or facts["space"]["groups"]
    shown = [t for t in finished(facts) if t["front"] and t["anchor"] != "none"]
    rows = []
    for t in shown:
        on = (t["choice"] or {}).get("groups", ())
        shares = t["blocks"] if facts["blocks"] else [float(name in on or "*" in on) for name in columns]
        cells = "".join(cell(name, share) for name, share in zip(columns, shares))
        rows.append(f'<tr data-trial="{t["trial"]}" title="{escape(", ".join(on))}"><th>{t["trial"]} {t["anchor"] or ""}{" (the pick)" if t["pick"] else ""}</th>{cells}</tr>')
    about = "Each row is a trial on the front (an anchor by its name), each column a block of the network from input to output; the number is the share of its parameters, in per cent, that lie in trained modules."
    return section("Which layers", paragraph(about if facts["blocks"] else "Each row is a trial on the front, each column a group of layers.", "note"), table(["trial", *columns], rows, "heat"), groups_of(shown))


def cell(name: str, share: float) -> str:
    said = f"{100 * share:.0f}" if share else ""
    return f'<td style="background: rgba(var(--on), {0.07 + 0.78 * share:.2f})" title="{escape(name)}: {share:.0%}">{said}</td>'


def groups_of(trials: Sequence[dict[str, Any]]) -> str:
    lines = [f"<li>trial {t['trial']}, {escape(t['said'])}: {escape(named(t['choice']['groups']))}</li>" for t in trials]
    return f"<ul class=note>{''.join(lines)}</ul>"


def named(groups: Sequence[str]) -> str:
    return "the whole denoiser" if "*" in groups else ", ".join(groups) or "only what is always trained"


def drivers(facts: Facts) -> str:
    effects, objectives = facts["importance"], list(facts["objectives"])
    if not effects:
        return section("What drives what", paragraph(f"Too few trials have ended to tell: it takes {N_SPREAD}, beside no training and full fine-tuning.", "note"))
    most = {name: max(abs(e["effects"][name]["value"]) + 1.96 * e["effects"][name]["error"] for e in effects) for name in objectives}
    rows = []
    for effect in effects:
        cells, sure = [escape(change(effect))], False
        for name in objectives:
            value, error = effect["effects"][name]["value"], effect["effects"][name]["error"]
            sure |= abs(value) > 2 * error
            cells += [bar(value, error, most[name]), f"{value:+.3g} ± {error:.2g}"]
        rows.append(row(cells, kind="" if sure else "dim"))
    about = "What each objective changes by, in its own units, when one thing changes and all else stays, by the model that the search has learned, with standard errors (bars: 95 %). Pale: cannot be told from nothing."
    return section("What drives what", paragraph(about, "note"), table(["change", *(text for name in objectives for text in (title_of(name), ""))], rows))


def change(effect: dict[str, Any]) -> str:
    if effect["to"] is True:
        return f"{effect['coordinate']} on"
    return "learning rate: lowest to highest" if effect["coordinate"] == "rate" else f"{effect['coordinate']}: {effect['from']} to {effect['to']}"


def pairs(facts: Facts) -> str:
    shown = [t for t in finished(facts) if (t["anchor"] == "full" or t["pick"]) and (Path(t["run"]) / PAIRS_PICTURE).is_file()]
    figures = [pair_figure(trial) for trial in sorted(shown, key=lambda t: bool(t["pick"]))]
    if not figures:
        return section("Generated images and the training images nearest to them", paragraph("The run folders with the images are not on this machine.", "note"))
    about = "The generated images that come nearest to a training image, relative to held-out ones, most suspicious first; below each its distance (d), and that as a share of the distance to the nearest held-out image."
    return section("Generated images and the training images nearest to them", paragraph(f"{about} This part shows training images.", "note"), *figures)


def no_pairs(facts: Facts) -> str:
    return section("Generated images and the training images nearest to them", paragraph("Left out of this report on request.", "note"))


def pair_figure(trial: dict[str, Any]) -> str:
    data = base64.b64encode((Path(trial["run"]) / PAIRS_PICTURE).read_bytes()).decode()
    said = f"{told(trial)}; {compared(ALWAYS[:1], trial['rewards'])}"
    return f'<figure><figcaption>{escape(said)}</figcaption><div class="wide"><img alt="{escape(said)}" src="data:image/png;base64,{data}"></div></figure>'


def fates(facts: Facts) -> str:
    """What became of the images in the inner loop."""
    names = {"seen": "drawn", "trained": "trained on", "skipped": "skipped", "dropped": "dropped for their noise norm", "queued": "queued for augmentation", "surplus": "surplus of refilled steps"}
    if not facts["training"]:
        return ""
    used = [name for name in names if any(one[name] for one in facts["training"])]
    rows = [row([str(one["trial"]), *(f"{one[name]:,} ({one[name] / max(one['seen'], 1):.0%})" for name in used)], one["trial"]) for one in facts["training"]]
    inner = facts["config"]["inner"]
    about = "The study skips images by their loss." if inner["skip"] else "No image was to be skipped (inner.skip is not set)."
    return section("What became of the images in fine-tuning", paragraph(about, "note"), table(["trial", *(names[name] for name in used)], rows))


def images(facts: Facts) -> str:
    data = facts["data"]
    if not data:
        return section("Images", paragraph("split.json is not on this machine.", "note"))
    uses = {"train": "fine-tuned on", "holdout": "what the search's figures compare with", "test": "for `retrain` only"}
    rows = [row([name, f"{part['images']:,}", f"<code>{part['digest']}</code>", coded(uses[name])]) for name, part in data["parts"].items()]
    about = f"{last(data['source'])}, {data['resolution']} x {data['resolution']} pixels; no image, by its exact pixels, is in two parts. The hash is of the pixels and captions (SHA-256, 16 digits)."
    return section("Images", paragraph(about), table(["part", "images", "hash", "use"], rows))


def setting(facts: Facts) -> str:
    space, inner, rewards, search = facts["space"], *(facts["config"][key] for key in ("inner", "rewards", "search"))
    states = {state: sum(t["state"] == state for t in facts["trials"]) for state in ("COMPLETE", "PRUNED", "FAIL", "RUNNING")}
    rates = "; ".join(f"{method} {low:g} to {high:g}" for method, (low, high) in space["learning_rate"].items())
    volume = facts["hypervolume"]
    shards = f", {n} shards" if (n := inner["ensemble"]["shards"]) > 1 else ""
    rows = {
        "space": f"{space['name']}: {space['description']}" if space["description"] else space["name"],
        "groups": ", ".join(space["groups"]), "methods": ", ".join(space["methods"]), "learning rates": rates, "ranks": ", ".join(map(str, space["rank"])),
        "each fine-tuning": f"{inner['budget_images']:,} images, batches of {inner['batch_size']}, {inner['rounds']} rounds, {inner['optimizer']}{shards}",
        "scored on": f"{rewards['n_samples']} samples, {rewards['sampling_steps']} steps at guidance {rewards['guidance']:g}, features of {rewards['extractor']}; the front again over {rewards['confirm']} fresh draws",
        "objectives": ", ".join(f"{title_of(name)} ({direction})" for name, direction in facts["objectives"].items()),
        "limits": ", ".join(f"{name} {bound:g}" for name, bound in facts["limits"].items()) or "none",
        "trials": ", ".join(f"{n} {state.lower()}" for state, n in states.items() if n) + f"; {search['sampler']} sampler, seed {search['seed']}",
        "hypervolume": f"{volume['value']:.4g} ± {volume['error']:.2g}, from {', '.join(f'{title_of(name)} {value:.4g}' for name, value in volume['reference'].items())}" if volume else "not known before the anchors have ended",
    }  # fmt: skip
    return section("Space and budget", definitions(rows))


def definitions(rows: dict[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in rows.items() if value)}</dl>"


def cost(facts: Facts) -> str:
    spent, made = facts["cost"], facts["made_with"]
    said = f"{spent['runs']} fine-tunings with their scoring took {spent['hours']:.2f} hours of a worker, {spent['median_seconds']:.0f} seconds in the median."
    versions = ", ".join(f"{name} {version}" for name, version in made.items() if name != "device")
    return section("Cost and versions", paragraph(said), definitions({"device": made.get("device", "not recorded"), "versions": versions or "not recorded", "report": f"written {facts['written']} by memcontrol {facts['reported_by']}"}))


def reproduce(facts: Facts) -> str:
    shown = {key: {**facts[key], "base": last(facts["config"]["base"]), "data": {**facts[key]["data"], "path": last(facts["config"]["data"]["path"])}} for key in ("given", "config")}
    given, whole = (yaml.safe_dump(shown[key], sort_keys=False, allow_unicode=True) for key in ("given", "config"))
    commands = f"memcontrol search {facts['study']}.yaml --workers 1\nmemcontrol pick {facts['study']}.yaml\nmemcontrol retrain {facts['study']}.yaml"
    about = "The study file, less what is at its default. The same config, seed, images (compare the hashes) and CPU give the same numbers with one worker; on GPUs they agree within the errors above."
    return section("How to reproduce it", paragraph(about), f"<pre>{escape(commands)}</pre><pre># {escape(facts['study'])}.yaml\n{escape(given)}</pre>", f"<details><summary>with all defaults</summary><pre>{escape(whole)}</pre></details>")


def limits(facts: Facts) -> str:
    figures = [*facts["objectives"], *(name for name in ("memorization", "copy_rate", "fid") if name not in facts["objectives"])]
    meanings = {title_of(name): FIGURES[name].meaning for name in figures if name in FIGURES}
    return section("What the figures mean, and what they cannot see", definitions(meanings), f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in BLIND)}</ul>")
