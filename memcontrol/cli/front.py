"""Owns `memcontrol front`: what it prints."""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING

from memcontrol.cli.arguments import add_command, add_json, add_study
from memcontrol.cli.printing import make_json, print_table
from memcontrol.core.console import make_console, print_json, say, warn

if TYPE_CHECKING:
    from memcontrol.study.store import Study

_ONCE = (
    "some of these were measured once only, as the search chose them, and may look better than they are; "
    "the end of the search measures them again"
)


def add_front(subparsers) -> None:
    front = add_command(subparsers, "front", _run_front, "list the Pareto front")
    add_study(front)
    add_json(front)


def _run_front(args: argparse.Namespace) -> int:
    from memcontrol.study.pick import require_finished, select_front
    from memcontrol.study.place import StudyPlace

    with contextlib.closing(StudyPlace.load(args.study, name=args.name).open()) as study:
        if args.json:
            records = select_front(require_finished(study.records()))
            print_json([make_json(record, study) for record in records])
        else:
            _print_front(study)
    return 0


def _print_front(study: Study) -> None:
    """With those that errors leave on or off it, and the pick."""
    from memcontrol.study.pick import (
        find_pick,
        require_finished,
        select_front,
        select_ties,
        select_to_confirm,
    )
    from memcontrol.view.tables import describe_spread, make_study_table
    from memcontrol.view.words import describe_network_doubt

    complete, n_groups = require_finished(study.records()), len(study.space.groups)
    records = select_front(complete)
    picked = find_pick(complete, study)
    beside = [*select_ties(complete), *([picked] if picked else [])]  # limits may keep a pick off the front
    shown = list({record.number: record for record in (*records, *beside)}.values())
    print_table(
        make_study_table(shown, n_groups, f"{study.config.name}: front", picked, complete, study.limits)
    )
    if spread := describe_spread(complete):
        say(make_console(), spread)
    if doubt := describe_network_doubt(study.config.rewards.extractor, study.config.data.path):
        warn(make_console(), doubt)
    if study.config.rewards.confirm and select_to_confirm(complete):
        warn(make_console(), _ONCE)
