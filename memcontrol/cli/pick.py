"""Owns `memcontrol pick`: what it prints."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from memcontrol.cli.arguments import add_command, add_json, add_pick_arguments, add_study
from memcontrol.cli.printing import make_json, print_table, warn_of_pick
from memcontrol.core.console import make_console, print_json

if TYPE_CHECKING:
    from memcontrol.study.record import Record
    from memcontrol.study.store import Study


def add_pick(subparsers) -> None:
    pick = add_command(subparsers, "pick", _run_pick, "choose one trial of the study")
    add_study(pick)
    add_pick_arguments(pick)
    add_json(pick, "one JSON object on stdout")


def _run_pick(args: argparse.Namespace) -> int:
    from memcontrol.study.pick import choose_record
    from memcontrol.study.place import StudyPlace

    with contextlib.closing(StudyPlace.load(args.study, name=args.name).open()) as study:
        record = choose_record(study, args.trial, args.rule, args.limit)
        if args.json:
            print_json(make_json(record, study))
        else:
            _print_pick(study, record, args.study, by_rule=args.trial is None)
    return 0


def _print_pick(study: Study, record: Record, file: Path, by_rule: bool) -> None:
    from memcontrol.view.tables import make_study_table

    n_groups = len(study.space.groups)
    print_table(
        make_study_table(
            [record], n_groups, f"{study.config.name}: pick", record, study.records(), study.limits
        )
    )
    if by_rule:
        warn_of_pick(study, record, make_console(), file)
    sys.stdout.write(f"groups: {', '.join(record.chosen.groups) or '-'}\nrun: {record.run}\n")
