"""Owns the report's drawings in SVG: the front, and a bar for each effect. They stand in the page, follow its
colours, and stand alone too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from memcontrol.core.estimate import READ_95
from memcontrol.view.front_data import FrontAxis, FrontData, FrontPoint
from memcontrol.view.front_labels import PlacedLabel, place_labels
from memcontrol.view.html import read_asset
from memcontrol.view.marks import MARKS, PICK

_WIDTH, _HEIGHT = 480, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, _WIDTH - 16, 14, _HEIGHT - 54  # of the field that the axes span
_NUMBER_SIZE, _HALF_MARK = 11, 6  # of a trial's number, and half a mark's side
_LOG_TICKS = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))  # times powers of ten: the first that has room


class _AxisScale:
    """From values to pixels between `begin` and `end`. All `values` lie inside, and the `ends` of intervals,
    but for those that would stretch a logarithmic axis; what lies beyond is drawn at its edge."""

    def __init__(
        self, is_log: bool, values: Sequence[float], ends: Sequence[float], begin: float, end: float
    ):
        inside = [value for value in ends if not is_log or 3 * value > min(values)]
        low, high = min([*values, *inside]), max([*values, *inside])
        if is_log:
            factor = math.exp(0.06 * math.log(high / low))
            self.low, self.high = low / factor, high * factor
        else:
            margin = 0.06 * ((high - low) or 1)
            self.low, self.high = low - margin, high + margin
        self.is_log, self.begin, self.end = is_log, begin, end
        self.ticks = self.place_ticks()

    def place_ticks(self) -> list[float]:
        from matplotlib import ticker

        if not self.is_log:
            return self.keep_inside(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
        for subs in _LOG_TICKS:
            ticks = self.keep_inside(ticker.LogLocator(subs=subs, numticks=100))
            if self.has_room(ticks):
                break
        return ticks

    def keep_inside(self, locator: Any) -> list[float]:
        ticks = map(float, locator.tick_values(self.low, self.high))
        return [value for value in ticks if self.low <= value <= self.high]

    def has_room(self, ticks: Sequence[float]) -> bool:
        """Whether no tick's label lies on the next one's: eight pixels for each of its letters across, a line
        up."""
        is_across = self.end > self.begin
        lengths = [8.0 * (len(f"{value:g}") + 1) if is_across else 18.0 for value in ticks]
        gaps = [abs(self(after) - self(before)) for before, after in zip(ticks, ticks[1:])]
        return all(gap >= (a + b) / 2 for gap, a, b in zip(gaps, lengths, lengths[1:]))

    def __call__(self, value: float) -> float:
        form: Callable[[float], float] = math.log if self.is_log else float
        low, high = form(self.low), form(self.high)
        share = (form(min(max(value, self.low), self.high)) - low) / (high - low)
        return self.begin + share * (self.end - self.begin)


def draw_front_svg(data: FrontData) -> str:
    """All points, with 95 % intervals for those on the front and the anchors; the others are drawn pale."""
    told = [point for point in data.points if point.stands_out]
    across = _AxisScale(
        data.x_axis.is_log,
        [point.x for point in data.points],
        [end for point in told for end in point.x_interval],
        _LEFT,
        _RIGHT,
    )
    up = _AxisScale(
        data.y_axis.is_log,
        [point.y for point in data.points],
        [end for point in told for end in point.y_interval],
        _BOTTOM,
        _TOP,
    )
    # what matters lies on top
    points = sorted(data.points, key=lambda point: (point.is_on_front, point.is_anchor))
    places = {point.trial: (across(point.x), up(point.y)) for point in points}
    labels = place_labels(points, places, (_LEFT + 2, _TOP, _RIGHT, _BOTTOM - 2), _NUMBER_SIZE, _HALF_MARK)
    parts = [
        *_draw_axes(across, up),
        *_draw_labels(data),
        _draw_front_line(data.front, across, up),
        *(_draw_point(point, across, up) for point in points),
        *(_draw_number(trial, places[trial], label) for trial, label in labels.items()),
    ]
    return _wrap_svg(_WIDTH, _HEIGHT, "The Pareto front", parts)


def _draw_axes(across: _AxisScale, up: _AxisScale) -> list[str]:
    return [
        _draw_line("axis", _LEFT, _BOTTOM, _RIGHT, _BOTTOM),
        _draw_line("axis", _LEFT, _TOP, _LEFT, _BOTTOM),
        *(_draw_x_tick(value, f"{across(value):.1f}") for value in across.ticks),
        *(_draw_y_tick(value, up(value)) for value in up.ticks),
    ]


def _draw_x_tick(value: float, x: str) -> str:
    text = f'<text x="{x}" y="{_BOTTOM + 18}" text-anchor="middle">{value:g}</text>'
    return _draw_line("tick", x, _BOTTOM, x, _BOTTOM + 4) + text


def _draw_y_tick(value: float, y: float) -> str:
    text = f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    return _draw_line("tick", _LEFT - 4, f"{y:.1f}", _LEFT, f"{y:.1f}") + text


def _draw_line(kind: str, x1: object, y1: object, x2: object, y2: object) -> str:
    return f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def _draw_labels(data: FrontData) -> list[str]:
    across, middle = (_LEFT + _RIGHT) / 2, (_TOP + _BOTTOM) / 2
    turned = f'transform="translate(16 {middle}) rotate(-90)"'
    return [
        _draw_title(data.x_axis, f'x="{across}" y="{_HEIGHT - 12}"', _RIGHT - _LEFT),
        _draw_title(data.y_axis, turned, _BOTTOM - _TOP),
    ]


def _draw_title(axis: FrontAxis, place: str, length: float) -> str:
    """An axis's, no longer than it: a letter is some half as wide as high."""
    size = min(14.0, length / (0.58 * len(axis.full_title)))
    style = f'style="font-size: {size:.1f}px" text-anchor="middle"'
    return f"<text {place} {style}>{escape(axis.full_title)}</text>"


def _draw_front_line(points: Sequence[FrontPoint], across: _AxisScale, up: _AxisScale) -> str:
    """Steps from each point to the next: first as far as its x, then to its y."""
    places = [(f"{across(point.x):.1f}", f"{up(point.y):.1f}") for point in points]
    if not places:
        return ""
    (x, y), rest = places[0], places[1:]
    return f'<path class="front" d="M{x} {y}{"".join(f"H{x}V{y}" for x, y in rest)}"/>'


def _draw_point(point: FrontPoint, across: _AxisScale, up: _AxisScale) -> str:
    x, y = f"{across(point.x):.1f}", f"{up(point.y):.1f}"
    bars = _draw_error_bars(point, across, up) if point.stands_out else ""
    ring = f'<circle class="pick" cx="{x}" cy="{y}" r="11"/>' if point.is_pick else ""
    kind = f"point {point.kind}" if point.stands_out else f"point {point.kind} dim"
    place = f'data-trial="{point.trial}" transform="translate({x} {y})"'
    shape = f"<title>{escape(point.label)}</title>{MARKS[point.kind].shape}"
    return f'{bars}{ring}<g class="{kind}" tabindex="0" {place}>{shape}</g>'


def _draw_number(trial: int, place: tuple[float, float], label: PlacedLabel) -> str:
    """A trial's own, beside its mark."""
    line = _draw_line("leader", *(f"{value:.1f}" for value in (*place, label.x, label.y)))
    text = f'<text class="number" x="{label.x:.1f}" y="{label.y + 4:.1f}" text-anchor="middle">{trial}</text>'
    return f"{line if label.has_line else ''}{text}"


def _draw_error_bars(point: FrontPoint, across: _AxisScale, up: _AxisScale) -> str:
    x, y = across(point.x), up(point.y)
    left, right = map(across, point.x_interval)
    low, high = map(up, point.y_interval)
    path = f"M{left:.1f} {y:.1f}H{right:.1f}M{x:.1f} {low:.1f}V{high:.1f}"
    return f'<path class="error" d="{path}"/>'


def draw_legend(data: FrontData) -> str:
    """The shapes that the drawing has, as HTML."""
    kinds = {point.kind for point in data.points}
    items = [_draw_key(16, mark.shape, mark.title, kind) for kind, mark in MARKS.items() if kind in kinds]
    items.append(_draw_key(24, '<circle class="pick" r="10"/>', "the pick"))
    items.append(_draw_key(16, '<path class="front" d="M-8 -4H0V4H8"/>', "the front"))
    return f'<p class="legend">{"".join(items)}</p>'


def _draw_key(side: int, shape: str, title: str, kind: str = "") -> str:
    box = f"{-side // 2} {-side // 2} {side} {side}"
    classes = f"key {kind}" if kind else "key"
    return f'<span><svg viewBox="{box}" class="{classes}" aria-hidden="true">{shape}</svg> {title}</span>'


def draw_effect_bar(value: float, error: float, most: float) -> str:
    """An effect as a bar from the middle, with its 95 % interval; `most` fills half the width."""
    scale = 46 / (most or 1)
    begin, end = sorted((50.0, 50 + scale * value))
    low, high = (min(max(50 + scale * (value + sign * READ_95 * error), 1), 99) for sign in (-1, 1))
    side, width = "up" if value > 0 else "down", max(end - begin, 0.4)
    return (
        '<svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        '<line x1="50" x2="50" y1="0" y2="12" class="axis"/>'
        f'<rect class="{side}" x="{begin:.1f}" y="2" width="{width:.1f}" height="8"/>'
        f'<line class="error" x1="{low:.1f}" x2="{high:.1f}" y1="6" y2="6"/></svg>'
    )


def _wrap_svg(width: int, height: int, name: str, parts: Sequence[str]) -> str:
    box = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    style = f"<style>{_compose_style()}</style>"
    return f'<svg {box} role="img" aria-label="{escape(name)}">{style}{"".join(parts)}</svg>'


def _compose_style() -> str:
    """The page's colours where the drawing stands in the page, and those of the marks where it stands
    alone."""
    pick = f".pick {{ fill: none; stroke: var(--pick, {PICK}); stroke-width: 2.5; }}"
    kinds = [f".{kind} {{ fill: var(--{kind}, {mark.colour}); }}" for kind, mark in MARKS.items()]
    return "\n".join([read_asset("front_svg.css"), pick, *kinds])
