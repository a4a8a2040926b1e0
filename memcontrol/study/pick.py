"""Owns the choice of one trial among those of a study: by a rule, under limits, or by number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.estimate import READ_95, Rewards
from memcontrol.core.run_folder import RunFolder
from memcontrol.study.pareto import RULES, Limit, find_clearly_beaten, find_front, find_knee, parse_limit
from memcontrol.study.record import Record
from memcontrol.study.store import Study

_LEAST_P = 0.05  # from which on copying cannot be told from chance


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
    wanted = {record.number for record in (*select_front(complete), *select_front(keeping))}
    wanted |= {record.number for record in complete if record.anchor == "full"}
    return [record for record in complete if not record.confirmed and record.number in wanted]


def select_ties(records: Sequence[Record]) -> list[Record]:
    """Those whose place the errors leave open: on the front, but beaten beyond error in some objective by one
    that they beat in none; or off the front, but not so beaten by any."""
    if not records:
        return []
    losses = np.array([record.losses for record in records])
    errors = np.array([record.errors for record in records])
    best = np.isin(np.arange(len(records)), find_front(losses))
    beaten = find_clearly_beaten(losses, errors, np.arange(len(records)))
    return [record for record, is_tie in zip(records, best == beaten) if is_tie]


def keeps_limits(record: Record, limits: Sequence[Limit]) -> bool:
    return all(limit.holds(record.rewards) for limit in limits)


def find_trial(records: Sequence[Record], number: int) -> Record:
    for record in records:
        if record.number == number and record.finished:
            return record
        if record.number == number and record.dropped:
            raise MemControlError(
                f"trial {number} was dropped: {record.dropped}; memcontrol drop --undo has it count again"
            )
    raise MemControlError(
        f"trial {number} is not among the finished ones: "
        f"{', '.join(str(record.number) for record in records if record.finished)}"
    )


def choose_trial(
    records: Sequence[Record], rule: str = "knee", limits: Sequence[str] = (), wanted: Sequence[Limit] = ()
) -> Record:
    """One finished trial that fine-tunes and keeps the limits, and where any does the study's own, `wanted`.
    Where some were measured again, one of those: what one measurement says of the best of many is too good.

    knee: of the front, the trials that are no worse than full fine-tuning in the first objective, as far as
    errors tell; of those, the ones whose copying cannot be told from chance (no clear copy, and p at least
    0.05); of those, the one nearest to the ideal, each objective in units of what lies between no training
    and full fine-tuning. A condition that no trial meets is dropped. quality, memorization: the best in the
    first or the last objective. Raises MemControlError.
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
        raise MemControlError(f"rule '{rule}' is unknown; allowed: {', '.join(RULES)}")
    anchors = {record.anchor: record for record in complete if record.anchor}
    if full := anchors.get("full"):
        points = [record for record in points if _is_no_worse(record, full)] or points
    points = [record for record in points if not _is_copying(record)] or points
    # the last objective first: of two that are equally near to the ideal, the one that copies less
    losses = [record.losses[::-1] for record in points]
    return points[find_knee(losses, _measure_scale(points, anchors)[::-1])]


def _describe_reached(records: Sequence[Record], limits: Sequence[Limit]) -> str:
    """The best of each limited reward: "fid 18.4, recall 0.49"."""
    best = {}
    for limit in limits:
        values = [record.rewards[limit.reward] for record in records]
        best[limit.reward] = min(values) if limit.sign == "<=" else max(values)
    return ", ".join(f"{name} {value:.4g}" for name, value in best.items())


def _is_no_worse(record: Record, full: Record) -> bool:
    """Whether its first loss is no worse than full fine-tuning's by more than its 95 % interval reaches; true
    where no error is known."""
    error = _measure_errors_of_difference(record, full)[0]
    return not error or record.losses[0] - full.losses[0] <= READ_95 * error


def _measure_errors_of_difference(one: Record, other: Record) -> list[float]:
    """The standard errors of the differences of two trials' losses. Both were given the same prompts and
    noise, and what that makes alike, as far as it was kept image by image, does not count."""
    kept = [RunFolder(record.run).read_contributions() for record in (one, other)]
    return [
        math.sqrt(max(a**2 + b**2 - 2 * _correlate(kept[0].get(name), kept[1].get(name)) * a * b, 0.0))
        for name, a, b in zip(one.objectives, one.errors, other.errors)
    ]


def _correlate(mine: np.ndarray | None, theirs: np.ndarray | None) -> float:
    """Of what each image adds to a reward of two models; 0 where it is not known."""
    if mine is None or theirs is None or len(mine) != len(theirs) or not (mine.std() and theirs.std()):
        return 0.0
    return float(np.corrcoef(mine, theirs)[0, 1])


def _measure_scale(points: Sequence[Record], anchors: Mapping[str, Record]) -> list[float]:
    """What a difference in each loss is measured in: what lies between no training and full fine-tuning, at
    least what errors leave open; without these what lies between the points."""
    errors = np.array([record.errors for record in points])
    scale = 2 * np.sqrt(2) * np.median(errors, axis=0)
    if {"none", "full"} <= anchors.keys():
        scale = np.maximum(scale, np.abs(np.subtract(anchors["none"].losses, anchors["full"].losses)))
    spread = np.ptp([record.losses for record in points], axis=0)
    return np.where(scale > 0, scale, np.where(spread > 0, spread, 1.0)).tolist()


def _is_copying(record: Record) -> bool:
    """Whether images of it are clear copies, or come nearer to training images than with labels permuted; of
    rewards from before there was a p, whether the interval of the copy rate lies above chance."""
    rewards = record.rewards
    p = rewards.get("copying_p", rewards.get("copy_rate_p"))
    if p is not None:
        return rewards.get("clear_copy_rate", 0.0) > 0 or p < _LEAST_P
    low = Rewards(rewards).low("copy_rate")
    return low is not None and low > rewards.get("copy_rate_line", 0.0)


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
    require_finished(study.records())
    return find_trial(study.records(), trial)


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
    if failed.dropped:
        return f"the anchor 'full' was dropped, so nothing is compared with it: {failed.dropped}"
    return f"the anchor 'full' ended without a result, so nothing is compared with it: {failed.reason}"
