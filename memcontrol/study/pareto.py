"""Owns fronts: which points no other dominates, the knee among them, and limits such as fid<=12."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memcontrol.core.errors import MemControlError
from memcontrol.core.reward_table import REWARDS


@dataclass(frozen=True)
class Limit:
    """reward <= bound, or >= bound."""

    reward: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.reward}{self.sign}{self.bound:g}"

    def excess(self, value: float) -> float:
        """How far the value lies beyond the bound; at most 0 where it keeps it."""
        return value - self.bound if self.sign == "<=" else self.bound - value

    def holds(self, rewards: dict[str, float]) -> bool:
        """What was not measured, such as a caption's noise norm where there are no captions, keeps no
        limit."""
        return self.reward in rewards and self.excess(rewards[self.reward]) <= 0


def parse_limit(text: str, known: Sequence[str]) -> Limit:
    """ "fid<=12" as a Limit on one of the `known` rewards. Raises MemControlError."""
    match = re.fullmatch(r"\s*(\w+)\s*(<=|>=)\s*(\S+)\s*", text)
    reward, sign, bound = match.groups() if match else ("", "", "")
    try:
        limit = Limit(reward, sign, float(bound))
    except ValueError:
        raise MemControlError(
            f"limit '{text}': write it as REWARD<=NUMBER or REWARD>=NUMBER, for example fid<=12"
        ) from None
    if limit.reward not in known and limit.reward in REWARDS:
        raise MemControlError(
            f"limit '{text}': this study did not measure {limit.reward} (short trials leave out what takes "
            f"long); it has {', '.join(sorted(known))}"
        )
    if limit.reward not in known:
        raise MemControlError(
            f"limit '{text}': unknown reward '{limit.reward}'; this study has {', '.join(sorted(known))}"
        )
    return limit


def find_front(points: Sequence[Sequence[float]] | np.ndarray) -> list[int]:
    """Indices of the points that no other dominates (is as good in every value, all minimised, and better in
    one), in order of the first value; of equal points the first stays."""
    if len(points) == 0:
        return []
    values = np.asarray(points, np.float64)
    order = np.lexsort(values.T[::-1])  # stable; whatever dominates a point stands before it
    ranked = values[order]
    if ranked.shape[1] == 2:
        before = np.minimum.accumulate(np.concatenate([[np.inf], ranked[:-1, 1]]))
        return order[ranked[:, 1] < before].tolist()
    kept: list[int] = []
    for i, point in enumerate(ranked):
        if not (ranked[kept] <= point).all(1).any():
            kept.append(i)
    return order[kept].tolist()


def hypervolume(points: Sequence[Sequence[float]] | np.ndarray, reference: Sequence[float]) -> float:
    """How much of the space below the reference the points dominate (all minimised): steps in the plane,
    beyond it slab by slab along the last value."""
    values = np.asarray(points, np.float64).reshape(-1, len(reference))
    inside = values[(values < np.asarray(reference)).all(1)]
    best = inside[find_front(inside)]
    if len(best) == 0:
        return 0.0
    if len(reference) == 1:
        return float(reference[0] - best[0, 0])
    if len(reference) == 2:
        tops = np.concatenate([[reference[1]], best[:-1, 1]])
        return float(((reference[0] - best[:, 0]) * (tops - best[:, 1])).sum())
    rising = best[np.argsort(best[:, -1], kind="stable")]
    heights = np.diff(rising[:, -1], append=reference[-1])  # of the slab that begins at each point
    return sum(
        height * hypervolume(rising[: i + 1, :-1], reference[:-1])
        for i, height in enumerate(heights)
        if height > 0
    )


def find_knee(points: Sequence[Sequence[float]], scale: Sequence[float] | None = None) -> int:
    """The index of the point nearest to the ideal one, the best of each value (all minimised), in units of
    `scale`; without it of what lies between the best and the worst. Of equally near ones, the best in the
    first value."""
    values = np.asarray(points, np.float64)
    spread = np.ptp(values, axis=0)
    widths = np.where(spread > 0, spread, 1.0) if scale is None else np.asarray(scale)
    squares = np.square((values - values.min(0)) / widths).sum(1)
    return min(range(len(values)), key=lambda i: (round(squares[i], 12), *values[i]))
