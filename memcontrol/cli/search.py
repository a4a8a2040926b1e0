"""Owns `memcontrol search`, a dry run included, and `memcontrol fork`: what they ask and print."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from memcontrol.cli.arguments import add_command, add_study, make_whole_parser, parse_hours
from memcontrol.cli.printing import warn_of_pick
from memcontrol.core.console import make_console, say

if TYPE_CHECKING:
    from memcontrol.core.jobs import Event
    from memcontrol.execution.executor import Executor
    from memcontrol.study.place import StudyPlace
    from memcontrol.study.store import Study


def add_search(subparsers) -> None:
    search = add_command(subparsers, "search", _run_search_command, "run or continue a study")
    add_study(search)
    search.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="values that replace those of the file, for example inner.batch_size=8",
    )
    search.add_argument(
        "--trials", type=make_whole_parser(0), help="sampled trials in all, beside the anchors"
    )
    search.add_argument(
        "--workers",
        type=make_whole_parser(1),
        help="jobs at a time; given again while the search runs elsewhere, it goes on with so many",
    )
    search.add_argument(
        "--hours",
        type=parse_hours,
        metavar="N",
        help="end in time: begin no trial that would surely not end, then leave checkpoints, as Ctrl-C does",
    )
    search.add_argument("--executor", choices=("inline", "local", "ray", "slurm"), help="where trials run")
    search.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, try a few short trials, and say what the search will take",
    )


def add_fork(subparsers) -> None:
    text = "begin a study of another name with those trials of a searched one that stay valid"
    fork = add_command(subparsers, "fork", _run_fork, text)
    fork.add_argument("study", type=Path, metavar="STUDY.yaml", help="its YAML file, with the keys as wanted")
    fork.add_argument("--as", dest="new_name", required=True, metavar="NAME", help="of the new study")


def _run_fork(args: argparse.Namespace) -> int:
    from memcontrol.commands.fork import fork

    made = fork(args.study, args.new_name)
    for number, reason in made.left.items():
        sys.stdout.write(f"trial {number} is left: {reason}\n")
    n = len(made.taken) + len(made.left)
    sys.stdout.write(f"{len(made.taken)} of {n} finished trials are taken over\n")
    say(make_console(), f"next: memcontrol search {made.file}")
    return 0


def _run_search_command(args: argparse.Namespace) -> int:
    from memcontrol.commands.operate import hand_over_workers
    from memcontrol.commands.search import list_overrides
    from memcontrol.core.errors import SearchEnded
    from memcontrol.execution.make import open_executor
    from memcontrol.study.place import StudyPlace

    overrides = list_overrides(args.overrides, args.trials, args.workers, args.executor)
    place = StudyPlace.load(args.study, overrides, args.name)
    if args.dry_run:
        _print_config(place)
        _print_prediction(place)
        return 0
    if (n_workers := hand_over_workers(place)) is not None:
        said = f"a search of study '{place.config.name}' runs already, and goes on with {n_workers} workers"
        say(make_console(), f"{said}; nothing else is changed")
        return 0
    try:
        with open_executor(place.config, place.folder.path) as executor:
            show_search(place, executor, args.hours)
    except SearchEnded as ended:
        say(make_console(), f"the search ended: {ended}; nothing is lost, and the same command goes on")
        return 0
    say(
        make_console(),
        f"next: memcontrol retrain {args.study} (the pick, on test images); look: dashboard, report",
    )
    return 0


def _print_config(place: StudyPlace) -> None:
    import yaml

    from memcontrol.study.database import hide_password, validate_url

    config = place.config
    _ = place.space  # what is wrong with it is said before anything is printed
    storage = {"storage": hide_password(validate_url(config.storage))} if config.storage else {}
    values = {**config.model_dump(mode="json"), **storage}
    yaml.safe_dump(values, sys.stdout, sort_keys=False, allow_unicode=True)
    sys.stdout.flush()


def _print_prediction(place: StudyPlace) -> None:
    """As comments: what is printed stays YAML."""
    from memcontrol.core.jobs import Progress, Warned
    from memcontrol.execution.job_queue import JobQueue
    from memcontrol.execution.make import open_executor
    from memcontrol.search.prediction import describe_prediction, predict_search, run_calibrations
    from memcontrol.view.live import LOADING, Steps, describe_stage

    folder, console = place.folder.path, make_console()
    say(console, f"{LOADING}, then short trials of each kind")
    with open_executor(place.config, folder, "dry-run") as executor, Steps(console) as steps:

        def show(event: Event) -> None:
            if isinstance(event, Progress):
                steps.show(describe_stage(event.stage), event.done, event.total)
            elif isinstance(event, Warned):
                steps.warn(event.text)

        calibrations = run_calibrations(place.config, folder, JobQueue(executor, show))
    anchors = place.space.list_anchors(place.config.search.anchors)
    for line in describe_prediction(predict_search(place.config, anchors, calibrations)):
        sys.stdout.write(f"# {line}\n")


def show_search(place: StudyPlace, executor: Executor, hours: float | None = None) -> None:
    from memcontrol.commands.search import run_search

    run_search(place, executor, hours=hours)
    with contextlib.closing(place.open()) as study:
        _show_study(study, place, make_console())


def _show_study(study: Study, place: StudyPlace, screen) -> None:
    """The trials of a finished search, the pick among them, and the picture of the front."""
    from memcontrol.study.pick import find_pick, require_finished
    from memcontrol.view.front_data import make_front_data, mark_trials
    from memcontrol.view.front_png import draw_front_png
    from memcontrol.view.live import shorten_path
    from memcontrol.view.tables import describe_rank_agreement, describe_spread, make_study_table

    complete = require_finished(study.records())
    picked = find_pick(complete, study)
    warn_of_pick(study, picked, screen, place.file)
    screen.print(make_study_table(complete, len(place.space.groups), "trials", picked, None, study.limits))
    if len(study.config.rewards.objectives) > 1:
        picture = place.folder.front_picture
        trials = mark_trials(complete, picked, len(place.space.groups))
        draw_front_png(make_front_data(trials, study.objectives), picture, study.config.name)
        say(screen, f"front: {shorten_path(picture)}")
    for line in filter(None, (describe_spread(complete), describe_rank_agreement(complete))):
        say(screen, line)
