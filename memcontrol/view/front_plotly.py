"""Owns the interactive plots that are kept in the study for optuna-dashboard: the front, and the hypervolume
as the search went on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memcontrol.core.reward_table import MAXIMIZE, read_interval
from memcontrol.study.hypervolume import trace_hypervolume
from memcontrol.study.pick import select_front
from memcontrol.study.record import Record
from memcontrol.view.marks import MARKS, PICK, SAMPLED
from memcontrol.view.words import describe_choice, find_title

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def plot_front(records: Sequence[Record], picked: Record | None, n_groups: int, title: str) -> Figure:
    """All finished trials over the first two objectives with their 95 % intervals; the front joined, the pick
    circled; masks named where one points."""
    import plotly.graph_objects as go

    x, y = list(records[0].objectives)[:2]
    figure = go.Figure(
        layout={
            "title": title,
            "xaxis_title": title_axis(x, records[0]),
            "yaxis_title": title_axis(y, records[0]),
            "legend": {"orientation": "h", "y": -0.2},
        }
    )
    front = select_front(records)
    figure.add_scatter(
        x=[r.values[x] for r in front],
        y=[r.values[y] for r in front],
        mode="lines",
        line={"shape": "hv", "color": "#999", "width": 1},
        name="front",
        hoverinfo="skip",
    )
    for kind, mark in MARKS.items():
        if shown := [record for record in records if (record.anchor or SAMPLED) == kind]:
            figure.add_scatter(
                **collect_points(shown, x, y, n_groups),
                mode="markers",
                name=mark.title,
                marker={"symbol": mark.symbol, "color": mark.colour, "size": 9},
            )
    if picked:
        ring = {"symbol": "circle-open", "size": 20, "color": PICK, "line": {"width": 2}}
        figure.add_scatter(
            x=[picked.values[x]],
            y=[picked.values[y]],
            mode="markers",
            name="pick",
            marker=ring,
            hoverinfo="skip",
        )
    return figure


def title_axis(name: str, record: Record) -> str:
    return f"{find_title(name)} ({'higher' if record.objectives[name] == MAXIMIZE else 'lower'} is better)"


def collect_points(records: Sequence[Record], x: str, y: str, n_groups: int) -> dict[str, Any]:
    def errors(name: str) -> dict[str, Any]:
        reach = [
            (low, record.rewards[name], high)
            for record in records
            for low, high in [read_interval(name, record.rewards)]
        ]
        above, below = ([end - value for _, value, end in reach], [value - end for end, value, _ in reach])
        return {
            "type": "data",
            "symmetric": False,
            "array": above,
            "arrayminus": below,
            "thickness": 0.6,
            "width": 0,
        }

    texts = [
        f"trial {record.number}: "
        f"{describe_choice(record.chosen, n_groups)}<br>{', '.join(record.chosen.groups)}"
        for record in records
    ]
    return {
        "x": [record.values[x] for record in records],
        "y": [record.values[y] for record in records],
        "error_x": errors(x),
        "error_y": errors(y),
        "text": texts,
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
    for sign in (1, -1):
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
