"""Owns `memcontrol demo`: the whole job on the embedded digits."""

from __future__ import annotations

import argparse
from pathlib import Path

from memcontrol.cli.arguments import add_command, make_whole_parser


def add_demo(subparsers) -> None:
    text = "search, pick and retrain on the embedded digits, from one command"
    demo = add_command(subparsers, "demo", _run_demo, text)
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder to work in (default: runs/demo)"
    )
    demo.add_argument(
        "--trials", type=make_whole_parser(0), help="sampled trials, beside the three anchors (default: 4)"
    )
    demo.add_argument("--workers", type=make_whole_parser(1), help="worker processes (default: 2)")
    demo.add_argument("--seed", type=int, default=0, help="the study's seed (default: 0)")


def _run_demo(args: argparse.Namespace) -> int:
    from memcontrol.cli.retrain import plan_pick, show_retraining
    from memcontrol.cli.search import show_search
    from memcontrol.commands.demo import write_demo_study
    from memcontrol.execution.make import open_executor
    from memcontrol.study.place import StudyPlace

    place = StudyPlace.load(write_demo_study(args.out, args.seed, args.trials, args.workers))
    # One executor for both parts: the base stays loaded.
    with open_executor(place.config, place.folder.path) as executor:
        show_search(place, executor)
        show_retraining(plan_pick(place), executor)
    return 0
