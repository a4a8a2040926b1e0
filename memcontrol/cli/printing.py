"""Owns what several commands print: tables on stdout, and warnings about a pick."""

from __future__ import annotations

import shlex
import sys

from memcontrol.core.console import warn


def print_table(table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False).print(table)


def make_json(record, study) -> dict:
    """A trial as every --json has it; where the study has limits, with whether it keeps them."""
    from memcontrol.study.pick import keeps_limits

    kept = {"keeps_limits": keeps_limits(record, study.limits)} if study.limits and record.finished else {}
    return record.as_dict() | kept


def warn_of_pick(study, picked, screen, file) -> None:
    """Of a pick that is the baseline itself, and of one that keeps no limits, since none does."""
    from memcontrol.study.pick import keeps_limits

    if picked and picked.anchor == "full":
        warn(
            screen,
            "no mask on the front is as good as full fine-tuning in the first objective, within its error, "
            "so the pick is full fine-tuning itself; search on with more trials, or pick one that "
            f"memcontrol front lists: memcontrol pick {shlex.quote(str(file))} --trial N",
        )
    if picked and not keeps_limits(picked, study.limits):
        bounds = ", ".join(_describe_bound(limit, picked) for limit in study.limits)
        warn(screen, f"no trial keeps the study's limits, {bounds}; the pick leaves them aside")


def _describe_bound(limit, picked) -> str:
    from memcontrol.core.reward_table import format_reward

    value = format_reward(limit.reward, picked.rewards) or "none"
    return f"{limit} (the pick has {value})"
