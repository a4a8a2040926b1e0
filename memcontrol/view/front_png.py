"""Owns the picture of the front, with anchors and pick."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from memcontrol.core.files import replace_file
from memcontrol.view.front_data import LOG_TICKS, FrontAxis, FrontData, FrontPoint, list_xy, measure_reaches
from memcontrol.view.front_labels import place_labels
from memcontrol.view.marks import MARKS, PICK, SAMPLED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# of methods
_COLOURS = (
    MARKS[SAMPLED].colour,
    "#56B4E9",
    "#CC79A7",
    "#F0E442",
    "#8c564b",
    "#332288",
    "#44AA99",
    "#999933",
)


def draw_front_png(data: FrontData, path: Path, title: str) -> None:
    """All points, the front joined, anchors and pick marked, with 95 % intervals of the front and the
    anchors; writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), dpi=150, layout="constrained")
    draw_front(axes, data, title)
    with replace_file(path) as part:
        figure.savefig(part, format="png")
    pyplot.close(figure)


def draw_front(axes: Axes, data: FrontData, title: str) -> None:
    _scatter_sampled(axes, data)
    axes.step(*list_xy(data.front), where="post", color="black", linewidth=1, label="front", zorder=1)
    _draw_intervals(axes, [point for point in data.points if point.stands_out])
    _scatter_anchors(axes, data)
    if data.pick:
        _circle_pick(axes, data.pick)
    axes.set(xlabel=data.x_axis.full_title, ylabel=data.y_axis.title, title=title)
    _scale_x(axes, data.x_axis)
    axes.legend(fontsize=8)
    _number_points(axes, data.points)


def _scatter_sampled(axes: Axes, data: FrontData) -> None:
    """A colour for each set of methods."""
    sampled = [point for point in data.points if not point.is_anchor]
    for methods, colour in zip(sorted({_name_methods(point) for point in sampled}), cycle(_COLOURS)):
        points = [point for point in sampled if _name_methods(point) == methods]
        axes.scatter(*list_xy(points), s=28, color=colour, label=f"sampled: {methods}", zorder=2)


def _name_methods(point: FrontPoint) -> str:
    return "+".join(point.choice.methods)


def _scatter_anchors(axes: Axes, data: FrontData) -> None:
    for kind, mark in MARKS.items():
        points = [point for point in data.points if point.is_anchor and point.kind == kind]
        if points:
            axes.scatter(
                *list_xy(points), s=70, marker=mark.marker, color=mark.colour, label=mark.title, zorder=3
            )


def _draw_intervals(axes: Axes, points: Sequence[FrontPoint]) -> None:
    x, y = list_xy(points)
    axes.errorbar(
        x,
        y,
        xerr=measure_reaches(x, [point.x_interval for point in points]),
        yerr=measure_reaches(y, [point.y_interval for point in points]),
        fmt="none",
        label="95 % intervals",
        ecolor="black",
        elinewidth=0.7,
        alpha=0.5,
        zorder=1,
    )


def _circle_pick(axes: Axes, pick: FrontPoint) -> None:
    axes.scatter(
        *list_xy([pick]),
        s=260,
        marker="o",
        facecolors="none",
        edgecolors=PICK,
        linewidths=2,
        label="pick",
        zorder=4,
    )


def _number_points(axes: Axes, points: Sequence[FrontPoint]) -> None:
    """With trials' numbers, where there is room."""
    from matplotlib import patheffects

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # what lies where is known from then on
    scale, frame = figure.dpi / 72, axes.get_window_extent()
    spots = axes.transData.transform([(point.x, point.y) for point in points]).tolist()
    places = {point.trial: (x, -y) for point, (x, y) in zip(points, spots)}  # downwards
    field = frame.x0, -frame.y1, frame.x1, -frame.y0
    for trial, label in place_labels(points, places, field, 8 * scale, 5 * scale).items():
        x, y = axes.transData.inverted().transform((label.x, -label.y))
        line = {"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0} if label.has_line else None
        spot = next((point.x, point.y) for point in points if point.trial == trial)
        text = axes.annotate(
            str(trial), spot, (x, y), ha="center", va="center", fontsize=8, arrowprops=line, zorder=5
        )
        text.set_path_effects([patheffects.withStroke(linewidth=2, foreground="white")])


def _scale_x(axes: Axes, axis: FrontAxis) -> None:
    from matplotlib import ticker

    if axis.is_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=LOG_TICKS))
        axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
