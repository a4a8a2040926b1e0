"""Owns the picture of the front, with anchors and pick."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from memcontrol.core.files import replace_file
from memcontrol.core.reward_table import MAXIMIZE, MINIMIZE, read_interval
from memcontrol.study.pick import select_front
from memcontrol.study.record import Record
from memcontrol.view.marks import MARKS, PICK, SAMPLED
from memcontrol.view.words import find_title

# of methods
COLOURS = (MARKS[SAMPLED].colour, "#56B4E9", "#CC79A7", "#F0E442", "#8c564b", "#332288", "#44AA99", "#999933")


def name_kind(record: Record) -> str:
    return "+".join(record.chosen.methods)


def draw_front_png(records: Sequence[Record], picked: Record | None, path: Path, title: str) -> None:
    """All finished trials over the first two objectives, the front joined, anchors and pick marked, with 95 %
    intervals of the front and the anchors; writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    (x_name, x_way), (y_name, y_way) = list(records[0].objectives.items())[:2]
    figure, axes = pyplot.subplots(figsize=(7, 5), dpi=150, layout="constrained")
    sampled = [record for record in records if record.anchor is None]
    for kind, colour in zip(sorted({name_kind(record) for record in sampled}), cycle(COLOURS)):
        points = [record for record in sampled if name_kind(record) == kind]
        axes.scatter(
            *collect_xy(points, x_name, y_name), s=28, color=colour, label=f"sampled: {kind}", zorder=2
        )
    points = select_front(records)
    axes.step(
        *collect_xy(points, x_name, y_name), where="post", color="black", linewidth=1, label="front", zorder=1
    )
    told = [record for record in records if record in points or record.anchor]
    axes.errorbar(
        *collect_xy(told, x_name, y_name),
        xerr=measure_reach(told, x_name),
        yerr=measure_reach(told, y_name),
        fmt="none",
        ecolor="black",
        elinewidth=0.7,
        alpha=0.5,
        zorder=1,
    )
    for anchor, mark in MARKS.items():
        if points := [record for record in records if record.anchor == anchor]:
            axes.scatter(
                *collect_xy(points, x_name, y_name),
                s=70,
                marker=mark.marker,
                color=mark.colour,
                label=mark.title,
                zorder=3,
            )
    if picked:
        axes.scatter(
            *collect_xy([picked], x_name, y_name),
            s=260,
            marker="o",
            facecolors="none",
            edgecolors=PICK,
            linewidths=2,
            label="pick",
            zorder=4,
        )
    better = {MINIMIZE: "lower is better", MAXIMIZE: "higher is better"}
    axes.set(
        xlabel=f"{find_title(x_name)} ({better[x_way]})",
        ylabel=f"{find_title(y_name)} ({better[y_way]})",
        title=title,
    )
    span = [record.values[x_name] for record in records]
    if 0 < 3 * min(span) < max(span):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.legend(fontsize=8)
    with replace_file(path) as part:
        figure.savefig(part, format="png")
    pyplot.close(figure)


def measure_reach(records: Sequence[Record], name: str) -> list[list[float]]:
    """How far the intervals go below and above the values."""
    intervals = [(record.rewards[name], *read_interval(name, record.rewards)) for record in records]
    return [[value - low for value, low, _ in intervals], [high - value for value, _, high in intervals]]


def collect_xy(records: Sequence[Record], x_name: str, y_name: str) -> tuple[list[float], list[float]]:
    return [record.values[x_name] for record in records], [record.values[y_name] for record in records]
