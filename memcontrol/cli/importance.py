"""Owns `memcontrol importance`: what it prints."""

from __future__ import annotations

import argparse

from memcontrol.cli.arguments import add_command, add_json, add_study
from memcontrol.cli.printing import print_table
from memcontrol.core.console import print_json


def add_importance(subparsers) -> None:
    importance = add_command(
        subparsers, "importance", _run_importance, "which groups drive which reward, with error"
    )
    add_study(importance)
    add_json(importance)


def _run_importance(args: argparse.Namespace) -> int:
    from memcontrol.search.importance import measure_importance
    from memcontrol.study.place import StudyPlace
    from memcontrol.view.tables import make_importance_table

    study = StudyPlace.load(args.study, name=args.name).open()
    effects = measure_importance(study.records(), study.space)
    if args.json:
        print_json([effect.as_dict() for effect in effects])
    else:
        print_table(make_importance_table(effects, study.config.name))
    return 0
