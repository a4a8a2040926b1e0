"""Owns where trial numbers stand beside the points of the front's drawings, so that none lies on another or
on a mark that matters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memcontrol.view.front_data import FrontPoint

_MOST_NUMBERED = 40  # points, beyond which only the front and the anchors have their numbers
_ANGLES = [math.radians(degrees) for degrees in (-45, 45, 0, -135, 135, 180, -90, 90)]  # best first
_NEAR, _FAR = (1.0, 1.5), (2.5, 4.0)  # how far from the mark, in heights of a letter
_LETTER_WIDTH, _LINE_HEIGHT = 0.66, 1.3  # of its height, a digit's

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class PlacedLabel:
    """A number in a drawing: its middle, and whether a line leads to its mark."""

    x: float
    y: float
    box: Box
    has_line: bool


def place_labels(
    points: Sequence[FrontPoint],
    places: Mapping[int, tuple[float, float]],
    field: Box,
    size: float,
    mark: float,
) -> dict[int, PlacedLabel]:
    """By trial. `places`: where each point is drawn; `field`: where a label may be; `size`: a letter's
    height; `mark`: half a mark's side. A label that has no free place is left out: the drawing tells it
    otherwise, or the table does."""
    wanted = points if len(points) <= _MOST_NUMBERED else [point for point in points if point.stands_out]
    order = sorted(wanted, key=lambda point: (not point.is_pick, not point.is_anchor, not point.is_on_front))
    firm = [_make_box(*places[point.trial], mark, mark) for point in points if point.stands_out]
    pale = [_make_box(*places[point.trial], mark, mark) for point in points if not point.stands_out]
    placed: dict[int, PlacedLabel] = {}
    for point in order:
        reaches = (*_NEAR, *_FAR) if point.stands_out else _NEAR[:1]
        taken = [*firm, *(label.box for label in placed.values())]
        free = [
            label
            for label in _list_candidates(point, places[point.trial], reaches, size, mark)
            if _is_inside(label.box, field) and not any(_overlap(label.box, box) for box in taken)
        ]
        if free:  # the nearest, and of these the one on fewest pale marks
            placed[point.trial] = min(
                free, key=lambda label: (label.has_line, sum(_overlap(label.box, box) for box in pale))
            )
    return placed


def _list_candidates(
    point: FrontPoint, place: tuple[float, float], reaches: Sequence[float], size: float, mark: float
) -> list[PlacedLabel]:
    half = len(str(point.trial)) * size * _LETTER_WIDTH / 2, size * _LINE_HEIGHT / 2
    ring = mark * 2.2 if point.is_pick else mark
    found = []
    for reach in reaches:
        for angle in _ANGLES:
            x = place[0] + math.cos(angle) * (ring + half[0] + (reach - 0.8) * size)
            y = place[1] + math.sin(angle) * (ring + half[1] + (reach - 0.8) * size)
            found.append(PlacedLabel(x, y, _make_box(x, y, *half), reach in _FAR))
    return found


def _make_box(x: float, y: float, half_width: float, half_height: float) -> Box:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _is_inside(box: Box, field: Box) -> bool:
    return box[0] >= field[0] and box[1] >= field[1] and box[2] <= field[2] and box[3] <= field[3]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
