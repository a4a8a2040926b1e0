"""Owns the report's drawings in SVG: the front, and a bar for each effect. They stand in the page, follow its
colours, and stand alone too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from memcontrol.core.reward_table import MAXIMIZE, format_reward, read_interval
from memcontrol.view.marks import MARKS, PICK, SAMPLED
from memcontrol.view.words import find_title

WIDTH, HEIGHT = 480, 380
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 66, 16, 14, 54
CHART_STYLE = (
    """
text { font: 14px system-ui, sans-serif; fill: var(--ink, #222); }
.axis, .tick { stroke: var(--faint, #bbb); } .front { stroke: var(--ink, #222); fill: none; } .error { stroke: var(--ink, #222); opacity: .35; }
.dim { opacity: .45; }
"""
    + f".pick {{ fill: none; stroke: var(--pick, {PICK}); stroke-width: 2.5; }} "
    + " ".join(f".{kind} {{ fill: var(--{kind}, {mark.colour}); }}" for kind, mark in MARKS.items())
)
TrialData = dict[str, Any]


def draw_front_svg(trials: Sequence[TrialData], objectives: dict[str, str]) -> str:
    """The finished trials over the first two objectives, with 95 % intervals for those on the front and the
    anchors; what no trial on the front has is drawn pale."""
    x, y = list(objectives)[:2]
    across, up = (
        AxisScale([t["values"][name] for t in trials], collect_interval_ends(trials, name), *ends)
        for name, ends in (
            (x, (MARGIN_LEFT, WIDTH - MARGIN_RIGHT)),
            (y, (HEIGHT - MARGIN_BOTTOM, MARGIN_TOP)),
        )
    )
    parts = [
        *draw_grid(across, up),
        *draw_labels(x, y, objectives, across.log, up.log),
        draw_front_line(trials, x, y, across, up),
    ]
    for trial in sorted(trials, key=lambda t: (t["front"], bool(t["anchor"]))):
        parts.append(draw_point(trial, x, y, across, up))
    return wrap_svg(WIDTH, HEIGHT, "The Pareto front", parts)


def collect_interval_ends(trials: Sequence[TrialData], name: str) -> list[float]:
    """Of the intervals that are drawn."""
    return [end for t in trials if t["front"] or t["anchor"] for end in read_interval(name, t["rewards"])]


class AxisScale:
    """From values to pixels between two ends; logarithmic where the largest is over three times the
    smallest."""

    def __init__(self, values: Sequence[float], ends: Sequence[float], begin: float, end: float):
        from matplotlib import ticker

        self.log = 0 < 3 * min(values) < max(values)
        low, high = (
            choose([*values, *(value for value in ends if not self.log or 3 * value > min(values))])
            for choose in (min, max)
        )
        margin = 0.06 * ((math.log(high / low) if self.log else high - low) or 1)
        self.low, self.high = (
            (low / math.exp(margin), high * math.exp(margin)) if self.log else (low - margin, high + margin)
        )
        self.begin, self.end = begin, end
        places = (
            ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7))
            if self.log
            else ticker.MaxNLocator(6, steps=[1, 2, 5, 10])
        )
        self.ticks = [
            float(value)
            for value in places.tick_values(self.low, self.high)
            if self.low <= value <= self.high
        ]

    def __call__(self, value: float) -> float:
        form: Callable[[float], float] = math.log if self.log else float
        share = (form(min(max(value, self.low), self.high)) - form(self.low)) / (
            form(self.high) - form(self.low)
        )
        return self.begin + share * (self.end - self.begin)


def draw_grid(across: AxisScale, up: AxisScale) -> list[str]:
    bottom, left = HEIGHT - MARGIN_BOTTOM, MARGIN_LEFT
    lines = [
        f'<line class="axis" x1="{left}" y1="{bottom}" x2="{WIDTH - MARGIN_RIGHT}" y2="{bottom}"/>',
        f'<line class="axis" x1="{left}" y1="{MARGIN_TOP}" x2="{left}" y2="{bottom}"/>',
    ]
    for value in across.ticks:
        lines.append(
            f'<line class="tick" x1="{across(value):.1f}" y1="{bottom}" x2="{across(value):.1f}" '
            f'y2="{bottom + 4}"/>'
        )
        lines.append(f'<text x="{across(value):.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
    for value in up.ticks:
        lines.append(
            f'<line class="tick" x1="{left - 4}" y1="{up(value):.1f}" x2="{left}" y2="{up(value):.1f}"/>'
        )
        lines.append(f'<text x="{left - 7}" y="{up(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    return lines


def draw_labels(x: str, y: str, objectives: dict[str, str], log_x: bool, log_y: bool) -> list[str]:
    def said(name: str, log: bool) -> str:
        return (
            f"{escape(find_title(name))} ({'higher' if objectives[name] == MAXIMIZE else 'lower'} "
            f"is better{', logarithmic' if log else ''})"
        )

    middle = (MARGIN_TOP + HEIGHT - MARGIN_BOTTOM) / 2
    return [
        f'<text x="{(MARGIN_LEFT + WIDTH - MARGIN_RIGHT) / 2}" y="{HEIGHT - 12}" '
        f'text-anchor="middle">{said(x, log_x)}</text>',
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{said(y, log_y)}</text>',
    ]


def draw_front_line(trials: Sequence[TrialData], x: str, y: str, across: AxisScale, up: AxisScale) -> str:
    """Steps between the points of the front: what lies beyond them none reaches."""
    points = sorted((across(t["values"][x]), up(t["values"][y])) for t in trials if t["front"])
    path = "".join(
        f"{'M' if i == 0 else 'H'}{px:.1f}{' ' if i == 0 else 'V'}{py:.1f}"
        for i, (px, py) in enumerate(points)
    )
    return f'<path class="front" d="{path}"/>' if path else ""


def draw_point(trial: TrialData, x: str, y: str, across: AxisScale, up: AxisScale) -> str:
    kind, px, py = trial["anchor"] or SAMPLED, across(trial["values"][x]), up(trial["values"][y])
    bars = ""
    if trial["front"] or trial["anchor"]:
        (left, right), (low, high) = read_interval(x, trial["rewards"]), read_interval(y, trial["rewards"])
        bars = (
            f'<path class="error" d="M{across(left):.1f} {py:.1f}H{across(right):.1f}M{px:.1f} '
            f'{up(low):.1f}V{up(high):.1f}"/>'
        )
    ring = f'<circle class="pick" cx="{px:.1f}" cy="{py:.1f}" r="11"/>' if trial["pick"] else ""
    pale = "" if trial["front"] or trial["anchor"] else " dim"
    return (
        f'{bars}{ring}<g class="point {kind}{pale}" tabindex="0" data-trial="{trial["trial"]}" '
        f'transform="translate({px:.1f} {py:.1f})">'
        f"<title>{escape(describe_point(trial))}</title>{MARKS[kind].shape}</g>"
    )


def describe_point(trial: TrialData) -> str:
    name = f", {MARKS[trial['anchor']].title}" if trial["anchor"] else ""
    values = ", ".join(f"{find_title(key)} {format_reward(key, trial['rewards'])}" for key in trial["values"])
    return f"trial {trial['trial']}{name}{', the pick' if trial['pick'] else ''}: {trial['said']}: {values}"


def draw_legend() -> str:
    """The shapes, as HTML."""
    items = [
        f'<svg viewBox="-8 -8 16 16" class="key {kind}" aria-hidden="true">{mark.shape}</svg> {mark.title}'
        for kind, mark in MARKS.items()
    ]
    items.append(
        '<svg viewBox="-12 -12 24 24" class="key" aria-hidden="true"><circle class="pick" '
        'r="10"/></svg> the pick'
    )
    items.append(
        '<svg viewBox="-8 -8 16 16" class="key" aria-hidden="true"><path class="front" d="M-8 '
        '-4H0V4H8"/></svg> the front'
    )
    return f'<p class="legend">{"".join(f"<span>{item}</span>" for item in items)}</p>'


def draw_effect_bar(value: float, error: float, most: float) -> str:
    """An effect as a bar from the middle, with its 95 % interval; `most` fills half the width."""
    scale = 46 / (most or 1)
    begin, end = sorted((50.0, 50 + scale * value))
    low, high = (min(max(50 + scale * (value + sign * 1.96 * error), 1), 99) for sign in (-1, 1))
    side = "up" if value > 0 else "down"
    return (
        '<svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true"><line '
        'x1="50" x2="50" y1="0" y2="12" class="axis"/>'
        f'<rect class="{side}" x="{begin:.1f}" y="2" width="{max(end - begin, 0.4):.1f}" '
        f'height="8"/><line class="error" x1="{low:.1f}" x2="{high:.1f}" y1="6" y2="6"/></svg>'
    )


def wrap_svg(width: int, height: int, name: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(name)}">'
    )
    return f"{head}<style>{CHART_STYLE}</style>{''.join(parts)}</svg>"
