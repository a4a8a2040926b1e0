"""Owns the interactive plots that are kept in the study for optuna-dashboard: the front, and the hypervolume as the search went on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memcontrol.figures import MAXIMIZE, interval_of
from memcontrol.growth import history
from memcontrol.marks import MARKS, PICK, SAMPLED
from memcontrol.notes import said_of, title_of
from memcontrol.picking import front_of
from memcontrol.study import Record

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def front_plot(records: Sequence[Record], picked: Record | None, n_groups: int, title: str) -> Figure:
    """All finished trials over the first two objectives with their 95 % intervals; the front joined, the pick circled; masks named where one points."""
    import plotly.graph_objects as go

    x, y = list(records[0].objectives)[:2]
    figure = go.Figure(layout={"title": title, "xaxis_title": axis_title(x, records[0]), "yaxis_title": axis_title(y, records[0]), "legend": {"orientation": "h", "y": -0.2}})
    front = front_of(records)
    figure.add_scatter(x=[r.values[x] for r in front], y=[r.values[y] for r in front], mode="lines", line={"shape": "hv", "color": "#999", "width": 1}, name="front", hoverinfo="skip")
    for kind, mark in MARKS.items():
        if shown := [record for record in records if (record.anchor or SAMPLED) == kind]:
            figure.add_scatter(**points(shown, x, y, n_groups), mode="markers", name=mark.title, marker={"symbol": mark.symbol, "color": mark.colour, "size": 9})
    if picked:
        ring = {"symbol": "circle-open", "size": 20, "color": PICK, "line": {"width": 2}}
        figure.add_scatter(x=[picked.values[x]], y=[picked.values[y]], mode="markers", name="pick", marker=ring, hoverinfo="skip")
    return figure


def axis_title(name: str, record: Record) -> str:
    return f"{title_of(name)} ({'higher' if record.objectives[name] == MAXIMIZE else 'lower'} is better)"


def points(records: Sequence[Record], x: str, y: str, n_groups: int) -> dict[str, Any]:
    def errors(name: str) -> dict[str, Any]:
        reach = [(low, record.rewards[name], high) for record in records for low, high in [interval_of(name, record.rewards)]]
        above, below = ([end - value for _, value, end in reach], [value - end for end, value, _ in reach])
        return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 0.6, "width": 0}

    texts = [f"trial {record.number}: {said_of(record.chosen, n_groups)}<br>{', '.join(record.chosen.groups)}" for record in records]
    return {
        "x": [record.values[x] for record in records], "y": [record.values[y] for record in records], "error_x": errors(x), "error_y": errors(y), "text": texts,
    }  # fmt: skip


def hypervolume_plot(records: Sequence[Record], reference: Sequence[float], title: str) -> Figure:
    """As trials ended: the hypervolume, and twice its standard error."""
    import plotly.graph_objects as go

    volumes = history(records, reference)
    numbers = list(volumes)
    figure = go.Figure(layout={"title": title, "xaxis_title": "trials ended", "yaxis_title": "hypervolume", "showlegend": False})
    for sign in (1, -1):
        figure.add_scatter(
            x=numbers, y=[max(v + sign * 2 * (v.error or 0.0), 0.0) for v in volumes.values()], mode="lines", line={"width": 0, "shape": "hv"}, fill=None if sign > 0 else "tonexty",
            fillcolor="rgba(0,114,178,.2)", hoverinfo="skip",
        )  # fmt: skip
    figure.add_scatter(x=numbers, y=[float(v) for v in volumes.values()], mode="lines+markers", line={"shape": "hv", "color": "#0072B2"})
    return figure
