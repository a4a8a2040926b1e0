"""Owns fronts: which points no other dominates, the knee among them, and limits such as fid<=12."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from memcontrol.errors import MemControlError


@dataclass(frozen=True)
class Limit:
    """reward <= bound, or >= bound."""

    reward: str
    sign: str
    bound: float

    def excess(self, value: float) -> float:
        """How far the value lies beyond the bound; at most 0 where it keeps it."""
        return value - self.bound if self.sign == "<=" else self.bound - value

    def holds(self, rewards: dict[str, float]) -> bool:
        """What was not measured, such as a caption's noise norm where there are no captions, keeps no limit."""
        return self.reward in rewards and self.excess(rewards[self.reward]) <= 0


def parse_limit(text: str, known: Sequence[str]) -> Limit:
    """"fid<=12" as a Limit on one of the `known` rewards. Raises MemControlError."""
    found = re.fullmatch(r"\s*(\w+)\s*(<=|>=)\s*(\S+)\s*", text)
    reward, sign, bound = found.groups() if found else ("", "", "")
    try:
        limit = Limit(reward, sign, float(bound))
    except ValueError:
        raise MemControlError(f"limit '{text}': write it as REWARD<=NUMBER or REWARD>=NUMBER, for example fid<=12") from None
    if limit.reward not in known:
        raise MemControlError(f"limit '{text}': unknown reward '{limit.reward}'; this study has {', '.join(sorted(known))}")
    return limit


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Every value of a is at most b's, and one is less (all minimised)."""
    return all(x <= y for x, y in zip(a, b)) and any(x < y for x, y in zip(a, b))


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other dominates, in order of the first value; of equal points the first stays."""
    kept = [
        i
        for i, point in enumerate(points)
        if not any(dominates(other, point) or (j < i and list(other) == list(point)) for j, other in enumerate(points))
    ]
    return sorted(kept, key=lambda i: tuple(points[i]))


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """How much of the space below the reference the points dominate (all minimised): slab by slab along the last value."""
    inside = sorted((point for point in points if all(x < r for x, r in zip(point, reference))), key=lambda point: point[-1])
    if len(reference) == 1:
        return reference[0] - inside[0][0] if inside else 0.0
    total = 0.0
    for i, point in enumerate(inside):
        top = inside[i + 1][-1] if i + 1 < len(inside) else reference[-1]
        if top > point[-1]:
            total += (top - point[-1]) * hypervolume([other[:-1] for other in inside[: i + 1]], reference[:-1])
    return total


def knee(points: Sequence[Sequence[float]], reference: Sequence[float] | None = None) -> int:
    """The index of the point nearest to the ideal one, the best of each value (all minimised).

    Each value is scaled to 0 at the ideal and 1 at the reference point; without a reference, at the worst of the points.
    """
    lows = [min(column) for column in zip(*points)]
    highs = reference or [max(column) for column in zip(*points)]

    def distance(point: Sequence[float]) -> float:
        return sum(((x - low) / (high - low if high > low else 1)) ** 2 for x, low, high in zip(point, lows, highs))

    return min(range(len(points)), key=lambda i: (distance(points[i]), tuple(points[i])))
