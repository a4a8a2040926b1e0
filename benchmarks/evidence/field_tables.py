"""The tables and the picture of the study of the field, from what its runs found."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from memcontrol.core.files import read_json

COLUMNS = {  # by reward: title, and how its mean is written
    "fid": ("FID", "{:.1f}"),
    "kid": ("KID", "{:.3f}"),
    "memorization": ("M", "{:.3f}"),
    "copy_rate": ("copied", "{:.1%}"),
    "local_copy_rate": ("parts copied", "{:.1%}"),
    "membership_auc": ("membership AUC", "{:.3f}"),
    "epsilon_low": ("epsilon, at least", "{:.2f}"),
    "utility": ("utility", "{:.3f}"),
}
ANCHORS = ("no training", "plain LoRA", "full fine-tuning")
PICK = "pick, masks alone"


def write_tables(folder: Path) -> None:
    """field-KIND.md for each field-KIND.json of the folder, and field.png of all."""
    found = [read_json(path) for path in sorted(folder.glob("field-*.json"))]
    for one in found:
        text = f"{describe_settled(one)}\n\n{format_table(one['rows'])}\n{format_comparisons(one['rows'])}"
        (folder / f"field-{one['kind']}.md").write_text(text)
        print(text)
    if found:
        draw(found, folder / "field.png")


def describe_settled(found: dict[str, Any]) -> str:
    rates = ", ".join(f"{method} {rate:g}" for method, rate in found["rates"].items())
    return (
        f"Budget {found['budget']:,} images; stopped early after {found['stopped after']:,}; rates: {rates}. "
        f"Means over {len({row['seed'] for row in found['rows']})} splits with their standard errors."
    )


def format_table(rows: Sequence[dict]) -> str:
    heads = ["arm", *(title for title, _ in COLUMNS.values()), "steps", "minutes"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        cells = [
            format_cell([row["rewards"].get(name) for row in own], form)
            for name, (_, form) in COLUMNS.items()
        ]
        steps = statistics.mean(row["steps"] for row in own)
        minutes = statistics.mean(row["seconds"] for row in own) / 60
        lines.append(f"| {' | '.join([arm, *cells, f'{steps:.0f}', f'{minutes:.1f}'])} |")
    return "\n".join(lines) + "\n"


def format_cell(values: Sequence[float | None], form: str) -> str:
    """The mean over seeds with its standard error; nothing where a seed has none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < len(values) or not known:
        return ""
    mean, error = average(known)
    return form.format(mean) + (f" ± {form.format(error)}" if len(known) > 1 else "")


def average(values: Sequence[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), error


def format_comparisons(rows: Sequence[dict]) -> str:
    """The pick beside each anchor, in pairs on the same splits."""
    lines = [
        "| the pick (masks alone) less | FID, 95 % | membership AUC, 95 % | M, 95 % | it is dominated |",
        "|---|---|---|---|---|",
    ]
    for anchor in ANCHORS:
        pairs = list(pair_rows(rows, anchor))
        if pairs:
            cells = [
                format_difference([mine[name] - theirs[name] for mine, theirs in pairs])
                for name in ("fid", "membership_auc", "memorization")
            ]
            n = sum(is_dominated(mine, theirs) for mine, theirs in pairs)
            lines.append(f"| {anchor} | {' | '.join(cells)} | on {n} of {len(pairs)} splits |")
    return "\n".join(lines) + "\n"


def pair_rows(rows: Sequence[dict], arm: str) -> Iterator[tuple[dict, dict]]:
    """Rewards of the pick and of an arm, by split."""
    mine = {row["seed"]: row["rewards"] for row in rows if row["arm"] == PICK}
    theirs = {row["seed"]: row["rewards"] for row in rows if row["arm"] == arm}
    yield from ((mine[seed], theirs[seed]) for seed in mine if seed in theirs)


def is_dominated(mine: dict, theirs: dict) -> bool:
    """Whether the other is no worse in FID and memorization, and better in one."""
    both = [(theirs[name], mine[name]) for name in ("fid", "memorization")]
    return all(a <= b for a, b in both) and any(a < b for a, b in both)


def format_difference(values: Sequence[float]) -> str:
    """The mean with Student's interval."""
    mean, error = average(values)
    if len(values) < 2:
        return f"{mean:+.3g}"
    half = float(student.ppf(0.975, len(values) - 1)) * error
    return f"{mean:+.3g} ({mean - half:+.3g} to {mean + half:+.3g})"


def draw(found: Sequence[dict], path: Path) -> None:
    """FID and membership AUC of each arm, a panel for each kind: splits, and their means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(found), figsize=(5 * len(found) + 2.5, 5), layout="constrained", squeeze=False
    )
    arms = list(dict.fromkeys(row["arm"] for one in found for row in one["rows"]))
    for panel, one in zip(panels[0], found):
        for i, arm in enumerate(arms):
            own = [row["rewards"] for row in one["rows"] if row["arm"] == arm]
            points = [[rewards[name] for rewards in own] for name in ("fid", "membership_auc")]
            if own:
                colour = pyplot.get_cmap("tab20")(i)
                panel.scatter(*points, color=colour, s=14, alpha=0.6)
                means = [statistics.mean(values) for values in points]
                panel.scatter(*means, color=colour, s=70, marker="D", edgecolors="black", label=arm)
        panel.axhline(0.5, color="grey", linestyle=":", linewidth=1)
        panel.set(title=one["kind"], xlabel="FID on test images, log", xscale="log", ylabel="membership AUC")
    panels[0, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
