"""Owns the interactive plots that are kept in the study for optuna-dashboard: the front, and the hypervolume
as the search went on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memcontrol.study.hypervolume import trace_hypervolume
from memcontrol.study.record import Record
from memcontrol.view.front_data import FrontData, FrontPoint, Interval, list_xy, measure_reaches
from memcontrol.view.marks import MARKS, PICK

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def plot_front(data: FrontData, title: str) -> Figure:
    """All points with their 95 % intervals; the front joined, the pick circled; masks named where one
    points."""
    import plotly.graph_objects as go

    figure = go.Figure(
        layout={
            "title": title,
            "xaxis_title": data.x_axis.title,
            "yaxis_title": data.y_axis.title,
            "legend": {"orientation": "h", "y": -0.2},
        }
    )
    line = {"shape": "hv", "color": "#999", "width": 1}
    x, y = list_xy(data.front)
    figure.add_scatter(x=x, y=y, mode="lines", line=line, name="front", hoverinfo="skip")
    for kind, mark in MARKS.items():
        points = [point for point in data.points if point.kind == kind]
        marker = {"symbol": mark.symbol, "color": mark.colour, "size": 9}
        if points:
            figure.add_scatter(**_describe_points(points), mode="markers", name=mark.title, marker=marker)
    if data.pick:
        ring = {"symbol": "circle-open", "size": 20, "color": PICK, "line": {"width": 2}}
        x, y = list_xy([data.pick])
        figure.add_scatter(x=x, y=y, mode="markers", name="pick", marker=ring, hoverinfo="skip")
    return figure


def _describe_points(points: Sequence[FrontPoint]) -> dict[str, Any]:
    """Where they lie, how far their intervals go, and what is told of each."""
    x, y = list_xy(points)
    return {
        "x": x,
        "y": y,
        "error_x": _make_error_bars(x, [point.x_interval for point in points]),
        "error_y": _make_error_bars(y, [point.y_interval for point in points]),
        "text": [
            f"trial {point.trial}: {point.said}<br>{', '.join(point.choice.groups)}" for point in points
        ],
    }


def _make_error_bars(values: Sequence[float], intervals: Sequence[Interval]) -> dict[str, Any]:
    below, above = measure_reaches(values, intervals)
    return {
        "type": "data",
        "symmetric": False,
        "array": above,
        "arrayminus": below,
        "thickness": 0.6,
        "width": 0,
    }


def plot_hypervolume(records: Sequence[Record], reference: Sequence[float], title: str) -> Figure:
    """As trials ended: the hypervolume, and twice its standard error."""
    import plotly.graph_objects as go

    volumes = trace_hypervolume(records, reference)
    numbers = list(volumes)
    figure = go.Figure(
        layout={
            "title": title,
            "xaxis_title": "trials ended",
            "yaxis_title": "hypervolume",
            "showlegend": False,
        }
    )
    for sign in (1, -1):  # the band's upper edge, then the lower one, filled up to it
        figure.add_scatter(
            x=numbers,
            y=[max(v.value + sign * 2 * (v.error or 0.0), 0.0) for v in volumes.values()],
            mode="lines",
            line={"width": 0, "shape": "hv"},
            fill=None if sign > 0 else "tonexty",
            fillcolor="rgba(0,114,178,.2)",
            hoverinfo="skip",
        )
    figure.add_scatter(
        x=numbers,
        y=[float(v) for v in volumes.values()],
        mode="lines+markers",
        line={"shape": "hv", "color": "#0072B2"},
    )
    return figure
