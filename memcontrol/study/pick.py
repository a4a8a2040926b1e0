"""Owns the choice of one trial among those of a study: by a rule, under limits, or by number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.estimate import Rewards
from memcontrol.study.pareto import Limit, find_front, find_knee, parse_limit
from memcontrol.study.record import Record
from memcontrol.study.store import Study

_TOLERANCE = 0.05
_RULES = ("knee", "quality", "memorization")


def require_finished(records: Sequence[Record]) -> list[Record]:
    complete = [record for record in records if record.finished]
    if not complete:
        raise MemControlError("no trial of this study has finished yet; let the search run on")
    return complete


def select_front(records: Sequence[Record]) -> list[Record]:
    """The records that no other dominates, best in the first objective first."""
    losses = [record.losses for record in records]
    return [records[i] for i in find_front(losses)]


def select_to_confirm(records: Sequence[Record], limits: Sequence[Limit] = ()) -> list[Record]:
    """What must be measured again before a front is reported: every trial on it, on the front of those that
    keep the study's limits, and full fine-tuning, which they are compared with. As rewards come in, others
    may move up; none left: done."""
    complete = [record for record in records if record.finished]
    keeping = [record for record in complete if keeps_limits(record, limits)]
    wanted = select_front(complete) + select_front(keeping)
    wanted += [record for record in complete if record.anchor == "full"]
    return [record for record in complete if not record.confirmed and record in wanted]


def select_ties(records: Sequence[Record]) -> list[Record]:
    """Those whose place the errors leave open: on the front, but beaten beyond error in some objective by one
    that they beat in none; or off the front, but not so beaten by any."""
    if not records:
        return []
    losses = np.array([record.losses for record in records])
    errors = np.array([record.errors for record in records])
    best = set(find_front(losses))
    return [
        record for i, record in enumerate(records) if (i in best) == _is_clearly_beaten(losses, errors, i)
    ]


def _is_clearly_beaten(losses: np.ndarray, errors: np.ndarray, i: int) -> bool:
    """Whether of all trials [N, M] one is better than the i-th in some objective by more than two standard
    errors of the difference, and worse in none by as much."""
    beyond, gains = 2 * np.hypot(errors, errors[i]), losses[i] - losses  # [N, M] both
    better, worse = (gains > beyond).any(1), (-gains > beyond).any(1)
    return bool((better & ~worse).any())


def keeps_limits(record: Record, limits: Sequence[Limit]) -> bool:
    return all(limit.holds(record.rewards) for limit in limits)


def find_trial(records: Sequence[Record], number: int) -> Record:
    for record in records:
        if record.number == number and record.finished:
            return record
    raise MemControlError(
        f"trial {number} is not among the finished ones: "
        f"{', '.join(str(record.number) for record in records)}"
    )


def choose_trial(
    records: Sequence[Record], rule: str = "knee", limits: Sequence[str] = (), wanted: Sequence[Limit] = ()
) -> Record:
    """One finished trial that fine-tunes and keeps the limits, and where any does the study's own, `wanted`.
    Where some were measured again, one of those: what one measurement says of the best of many is too good.

    knee: of the front, the trials at most 5 % worse than full fine-tuning in the first objective (an FID of
    some hundred images errs by more); of those, the ones whose copying cannot be told from chance (the
    interval of the copy rate reaches what is expected without copying: strict, so that a pick is safe); of
    those, the one nearest to the ideal, on a scale where full fine-tuning is at 1. A condition that no trial
    meets is dropped. quality, memorization: the best in the first or the last objective. Raises
    MemControlError.
    """
    complete = require_finished(records)
    parsed = [parse_limit(text, list(complete[0].rewards)) for text in limits]
    allowed = [record for record in complete if record.anchor != "none" and keeps_limits(record, parsed)]
    if not allowed:
        raise MemControlError(
            f"no finished trial keeps {' and '.join(limits)}; the best reached: "
            f"{_describe_reached(complete, parsed)}"
            if limits
            else "of this study only the untrained base has finished; let the search run on"
        )
    allowed = [record for record in allowed if record.confirmed] or allowed
    keeping = [record for record in allowed if keeps_limits(record, wanted)]
    points = select_front(keeping or allowed)
    if rule == "quality":
        return points[0]
    if rule == "memorization":
        return min(points, key=lambda record: record.losses[::-1])
    if rule != "knee":
        raise MemControlError(f"rule '{rule}' is unknown; allowed: {', '.join(_RULES)}")
    full = next((record.losses for record in complete if record.anchor == "full"), None)
    if full:
        points = [record for record in points if _is_nearly_as_good(record, full)] or points
    points = [record for record in points if _is_not_copying(record)] or points
    return points[find_knee([record.losses for record in points], full)]


def _describe_reached(records: Sequence[Record], limits: Sequence[Limit]) -> str:
    """The best of each limited reward: "fid 18.4, recall 0.49"."""
    best = {}
    for limit in limits:
        values = [record.rewards[limit.reward] for record in records]
        best[limit.reward] = min(values) if limit.sign == "<=" else max(values)
    return ", ".join(f"{name} {value:.4g}" for name, value in best.items())


def _is_nearly_as_good(record: Record, full: Sequence[float]) -> bool:
    """Whether its first loss is at most TOLERANCE worse than that of full fine-tuning."""
    return record.losses[0] <= full[0] + _TOLERANCE * abs(full[0])


def _is_not_copying(record: Record) -> bool:
    """Whether the interval of its copy rate reaches what is expected without copying."""
    low = Rewards(record.rewards).low("copy_rate")
    return low is None or low <= record.rewards.get("copy_rate_line", 0.0)


def find_pick(records: Sequence[Record], study: Study) -> Record | None:
    """The trial that `memcontrol pick` would choose, where there is any."""
    trained = [record for record in records if record.finished and record.anchor != "none"]
    return choose_trial(records, wanted=study.limits) if trained else None


def choose_record(study: Study, trial: int | None, rule: str | None, limits: Sequence[str]) -> Record:
    """As a command names it: by its number, or by a rule under limits. Raises MemControlError."""
    if trial is None:
        return choose_trial(study.records(), rule or "knee", limits, study.limits)
    if rule or limits:
        raise MemControlError("--trial names one trial; --rule and --limit do not go with it")
    return find_trial(require_finished(study.records()), trial)


def find_full(study: Study) -> Choice | None:
    """Full fine-tuning as the study's anchor found it; None where there is none to compare with, which
    `explain_no_full` explains. Raises MemControlError while it runs."""
    for record in study.records():
        if record.anchor == "full" and record.finished:
            return record.chosen
        if record.anchor == "full" and record.state == "RUNNING":
            raise MemControlError(
                "the anchor 'full' has not finished, so there is no baseline to compare with; let the search "
                "run on"
            )
    return None


def explain_no_full(records: Sequence[Record]) -> str:
    """Why a study has no full fine-tuning to compare with."""
    failed = next((record for record in records if record.anchor == "full"), None)
    if failed is None:
        return "full fine-tuning is no anchor of this study (search.anchors), so nothing is compared with it"
    return f"the anchor 'full' ended without a result, so nothing is compared with it: {failed.reason}"
