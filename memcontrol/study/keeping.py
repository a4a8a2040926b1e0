"""Owns whose weights and samples a study still needs: what may yet be on its front, be picked, or be compared
with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memcontrol.core.reward_table import list_errors
from memcontrol.study.pareto import BEYOND, Limit, find_clearly_beaten
from memcontrol.study.pick import keeps_limits, select_front, select_ties
from memcontrol.study.record import Record


def select_beaten(records: Sequence[Record], limits: Sequence[Limit] = ()) -> list[Record]:
    """Once the front was measured again: the ended trials that are neither on a front that is reported or
    picked from (of all, of those measured again, and of those of either that keep the limits), nor off it
    within error only, nor anchors."""
    complete = [record for record in records if record.finished]
    wanted = {record.number for record in (*complete, *records) if record.anchor or record.state == "RUNNING"}
    wanted |= {record.number for record in select_ties(complete)}
    for among in (complete, [record for record in complete if record.confirmed]):
        keeping = [record for record in among if keeps_limits(record, limits)]
        wanted |= {record.number for record in (*select_front(among), *select_front(keeping))}
    return [record for record in records if record.number not in wanted]


def select_surely_beaten(records: Sequence[Record], limits: Sequence[Limit] = ()) -> list[Record]:
    """While trials run: those that no fresh draws of the others should bring back to the front. Another one
    is better in every objective by more than two standard errors of the difference and, where the trial keeps
    the limits, keeps them by as much. What was measured again already, and may be the pick, is left to
    `select_beaten`."""
    complete = [record for record in records if record.finished]
    ended = [record for record in records if record.state in ("PRUNED", "FAIL") and not record.anchor]
    if not complete:
        return ended
    losses = np.array([record.losses for record in complete])  # [N, M]
    errors = np.array([record.errors for record in complete])
    safe = np.array([_keeps_surely(record, limits) for record in complete])  # [N]
    keeping = np.array([keeps_limits(record, limits) for record in complete])  # [N]
    beaten = find_clearly_beaten(losses, errors, np.arange(len(complete)), in_all=True)
    by_safe = find_clearly_beaten(losses, errors, np.flatnonzero(safe), in_all=True) if limits else beaten
    able = np.where(keeping, by_safe, beaten)
    able &= np.array([not record.anchor and not record.confirmed for record in complete])
    return [*ended, *(complete[i] for i in np.flatnonzero(able))]


def _keeps_surely(record: Record, limits: Sequence[Limit]) -> bool:
    """Whether each limited reward lies within its limit by two of its standard errors."""
    known = {limit.reward: limit for limit in limits if limit.reward in record.rewards}
    errors = dict(zip(known, list_errors(record.rewards, dict.fromkeys(known, "minimize"))))
    return len(known) == len({limit.reward for limit in limits}) and all(
        limit.excess(record.rewards[name]) + BEYOND * errors[name] <= 0 for name, limit in known.items()
    )
