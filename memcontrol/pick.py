"""Owns the choice of one trial among those of a study: by a rule, under limits, or by number."""

from __future__ import annotations

from collections.abc import Sequence

from memcontrol.errors import MemControlError
from memcontrol.pareto import front, knee, parse_limit
from memcontrol.study import Record

TOLERANCE = 1.05
RULES = ("knee", "quality", "memorization")


def finished(records: Sequence[Record]) -> list[Record]:
    complete = [record for record in records if record.finished]
    if not complete:
        raise MemControlError("no trial of this study has finished yet; let the search run on")
    return complete


def front_of(records: Sequence[Record]) -> list[Record]:
    """The records that no other dominates, best in the first objective first."""
    return [records[i] for i in front([values_of(record) for record in records])]


def by_number(records: Sequence[Record], number: int) -> Record:
    for record in records:
        if record.number == number and record.finished:
            return record
    raise MemControlError(f"trial {number} is not among the finished ones: {', '.join(str(record.number) for record in records)}")


def pick(records: Sequence[Record], rule: str = "knee", limits: Sequence[str] = (), wanted: dict[str, float] = {}) -> Record:
    """One finished trial that fine-tunes and keeps the limits, and where any does the study's own, `wanted`.

    knee: of the front, the trials at most 5 % worse than full fine-tuning in the first objective (an FID of some hundred
    images errs by more); of those, the ones whose copying cannot be told from chance (the interval of the copy rate reaches
    the false-positive line); of those, the one nearest to the ideal, on a scale where full fine-tuning is at 1. A condition
    that no trial meets is dropped.
    quality, memorization: the best in the first or the last objective.
    Raises MemControlError.
    """
    complete = finished(records)
    parsed = [parse_limit(text, list(complete[0].rewards)) for text in limits]
    allowed = [record for record in complete if record.anchor != "none" and all(limit.holds(record.rewards) for limit in parsed)]
    if not allowed:
        best = {name: min(record.rewards[name] for record in complete) for name in {limit.reward for limit in parsed}}
        reached = ", ".join(f"{name} {value:.4g}" for name, value in best.items())
        raise MemControlError(f"no finished trial keeps {' and '.join(limits)}; the least reached: {reached}" if limits else "only the untrained base has finished")
    keeping = [record for record in allowed if all(record.rewards[name] <= bound for name, bound in wanted.items())]
    points = front_of(keeping or allowed)
    if rule == "quality":
        return points[0]
    if rule == "memorization":
        return min(points, key=lambda record: values_of(record)[::-1])
    if rule != "knee":
        raise MemControlError(f"rule '{rule}' is unknown; allowed: {', '.join(RULES)}")
    full = next((values_of(record) for record in complete if record.anchor == "full"), None)
    for condition in (lambda record: not full or values_of(record)[0] <= TOLERANCE * full[0], not_copying):
        points = [record for record in points if condition(record)] or points
    return points[knee([values_of(record) for record in points], full)]


def not_copying(record: Record) -> bool:
    return record.rewards["copy_rate_low"] <= record.rewards["copy_rate_line"]


def values_of(record: Record) -> list[float]:
    return list(record.values.values())
