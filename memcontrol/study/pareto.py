"""Owns fronts: which points no other dominates, the knee among them, and limits such as fid<=12."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memcontrol.core.errors import MemControlError
from memcontrol.core.reward_table import REWARDS

RULES = ("knee", "quality", "memorization")  # by which `pick` chooses one trial
BEYOND = 2.0  # standard errors of a difference that make it clear
_LEAST = BEYOND / 2**0.5  # that many of both errors' sum are no more than BEYOND of the difference's
_N_TOGETHER = 128  # points that others are compared with at a time
_N_MANY = 300  # points from which on most are left out before the front of them is sought


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
        near = difflib.get_close_matches(limit.reward, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise MemControlError(
            f"limit '{text}': unknown reward '{limit.reward}'; {hint}memcontrol rewards lists all"
        )
    return limit


def find_front(points: Sequence[Sequence[float]] | np.ndarray) -> list[int]:
    """Indices of the points that no other dominates (is as good in every value, all minimised, and better in
    one), in order of the first value; of equal points the first stays."""
    if len(points) == 0:
        return []
    values = np.asarray(points, np.float64)
    near = _leave_out_beaten(values)
    order = near[np.lexsort(values[near].T[::-1])]  # stable; whatever dominates a point stands before it
    ranked = values[order]
    if ranked.shape[1] == 2:
        before = np.minimum.accumulate(np.concatenate([[np.inf], ranked[:-1, 1]]))
        return order[ranked[:, 1] < before].tolist()
    kept: list[int] = []
    for i, point in enumerate(ranked):
        if not (ranked[kept] <= point).all(1).any():
            kept.append(i)
    return order[kept].tolist()


def _leave_out_beaten(values: np.ndarray) -> np.ndarray:
    """Indices of the points [N, M] less most of those that are surely beaten in every value: by one of a few
    that are good in all, or in some before others. Sorting what is left is most of finding a front."""
    near, columns = np.arange(len(values)), np.ascontiguousarray(values.T)
    if len(values) < _N_MANY:
        return near
    spread = np.ptp(columns, axis=1)
    if not np.isfinite(spread).all():
        return near
    scale, even = np.where(spread > 0, spread, 1.0), np.ones((1, len(columns)))
    for weights in np.concatenate([even, even + 3 * np.eye(len(columns))]) / scale:
        good = values[near[np.argmin(weights @ columns[:, near])]]
        near = near[~_are_beyond(values[near], good)]
    return near


def find_clearly_beaten(
    losses: np.ndarray, errors: np.ndarray, others: np.ndarray, in_all: bool = False
) -> np.ndarray:
    """Of each point [N], whether one of the `others` (indices into losses and errors [N, M]) is better by
    more than BEYOND standard errors of the difference: in some value, and worse in none by as much; or,
    `in_all`, in every one."""
    left, beaten = np.arange(len(losses)), np.zeros(len(losses), bool)
    above = losses + _LEAST * errors
    best = others[find_front(above[others])]  # who beats most, so that few are compared with all
    if in_all:
        left = left[_may_be_beaten(losses - _LEAST * errors, above[best])]
    order = np.concatenate([best, np.setdiff1d(others, best)])
    for some in np.split(order, range(_N_TOGETHER, len(order), _N_TOGETHER)):
        is_beaten = _beat_clearly(losses, errors, left, some, in_all).any(1)
        beaten[left[is_beaten]] = True
        left = left[~is_beaten]
    return beaten


def _may_be_beaten(below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Whether any of the points above [n, M] is less in every value than each of those below [N, M]."""
    found = np.zeros(len(below), bool)
    for one in above:
        found |= _are_beyond(below + 1e-9 * np.abs(one), one)  # rounded up
    return found


def _are_beyond(values: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Which of the points [N, M] are worse than the one [M] in every value. By columns: numpy takes long over
    short rows."""
    worse = np.ones(len(values), bool)
    for column, value in zip(values.T, point):
        worse &= column > value
    return worse


def _beat_clearly(
    losses: np.ndarray, errors: np.ndarray, these: np.ndarray, others: np.ndarray, in_all: bool
) -> np.ndarray:
    """Which of the others beat which of these [these, others]."""
    some, worse = (np.zeros((len(these), len(others)), bool) for _ in range(2))
    every = ~some
    for values, sds in zip(losses.T, errors.T):
        gains = values[these, None] - values[others]
        beyond = BEYOND * np.hypot(sds[these, None], sds[others])
        better = gains > beyond
        some |= better
        every &= better
        worse |= -gains > beyond
    return every if in_all else some & ~worse


def hypervolume(points: Sequence[Sequence[float]] | np.ndarray, reference: Sequence[float]) -> float:
    """How much of the space below the reference the points dominate (all minimised): steps in the plane,
    beyond it slab by slab along the last value."""
    values = np.asarray(points, np.float64).reshape(-1, len(reference))
    inside = values[_are_beyond(-values, -np.asarray(reference, np.float64))]
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
