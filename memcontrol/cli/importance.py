"""Owns `memcontrol importance`: what it prints."""

from __future__ import annotations

import argparse
import contextlib
import shlex

from memcontrol.cli.arguments import add_command, add_json, add_study
from memcontrol.cli.printing import print_table
from memcontrol.core.console import make_console, print_json, say


def add_importance(subparsers) -> None:
    importance = add_command(
        subparsers, "importance", _run_importance, "which groups drive which reward, with error"
    )
    add_study(importance)
    add_json(importance)


def _run_importance(args: argparse.Namespace) -> int:
    from memcontrol.search.importance import list_untold, measure_importance
    from memcontrol.study.place import StudyPlace
    from memcontrol.view.tables import describe_clear_effects, make_importance_table

    file = shlex.quote(str(args.study))
    with contextlib.closing(StudyPlace.load(args.study, name=args.name).open()) as study:
        records = study.records()
        effects = measure_importance(records, study.space, file)
        if args.json:
            print_json([effect.as_dict() for effect in effects])
            return 0
        print_table(make_importance_table(effects, study.config.name))
        if untold := list_untold(records, study.space):
            say(make_console(), f"no two trials differ in {', '.join(untold)}, of which nothing can be told")
        if lost := describe_clear_effects(effects, file, records):
            say(make_console(), lost)
    return 0
