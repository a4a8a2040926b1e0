"""Owns `memcontrol enqueue`, `drop` and `stop`, an operator's hand on a study, and `clean`, which asks before
it removes anything."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from memcontrol.cli.arguments import add_command, add_study, make_whole_parser
from memcontrol.core.errors import MemControlError

if TYPE_CHECKING:
    from memcontrol.commands.clean import Cleaning


def add_enqueue(subparsers) -> None:
    text = "have a choice of your own tried, before any other is sampled"
    enqueue = add_command(subparsers, "enqueue", _run_enqueue, text)
    add_study(enqueue)
    what = enqueue.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--choice", type=Path, metavar="FILE", help="JSON as `front --json` prints a choice, or a trial"
    )
    what.add_argument("--groups", metavar="A,B", help="the groups to train, with commas")
    enqueue.add_argument("--method", help="of --groups; the space's first unless given")
    enqueue.add_argument("--rank", type=make_whole_parser(1), help="of --groups; the middle one unless given")
    enqueue.add_argument(
        "--lr", type=float, help="learning rate of --groups; the middle of its range unless given"
    )


def add_drop(subparsers) -> None:
    text = "have a trial count for nothing from now on; it is kept, and shown as dropped"
    drop = add_command(subparsers, "drop", _run_drop, text)
    add_study(drop)
    drop.add_argument("--trial", type=int, metavar="N", required=True, help="its number")
    which = drop.add_mutually_exclusive_group(required=True)
    which.add_argument("--why", metavar="TEXT", help="the reason, which stands beside it from now on")
    which.add_argument("--undo", action="store_true", help="have it count again")


def add_stop(subparsers) -> None:
    text = "have a search end that runs elsewhere: when its running trials have ended"
    stop = add_command(subparsers, "stop", _run_stop, text)
    add_study(stop)
    stop.add_argument("--now", action="store_true", help="at their checkpoints, as Ctrl-C does")


def _run_enqueue(args: argparse.Namespace) -> int:
    from memcontrol.commands.clean import is_being_searched
    from memcontrol.commands.operate import enqueue_at, read_choice_file
    from memcontrol.study.place import StudyPlace
    from memcontrol.view.words import describe_choice

    if args.choice and any(given is not None for given in (args.method, args.rank, args.lr)):
        raise MemControlError("--method, --rank and --lr go with --groups; --choice holds its own")
    place = StudyPlace.load(args.study, name=args.name)
    choice = read_choice_file(args.choice) if args.choice else None
    groups = [name.strip() for name in (args.groups or "").split(",") if name.strip()]
    trial = enqueue_at(place, choice, groups, args.method, args.rank, args.lr)
    said = describe_choice(trial.chosen, len(place.space.groups))
    then = "the search that runs" if is_being_searched(place) else f"memcontrol search {args.study}"
    sys.stdout.write(
        f"trial {trial.number} is enqueued: {said}; {then} begins it before any other is sampled\n"
    )
    return 0


def _run_drop(args: argparse.Namespace) -> int:
    from memcontrol.commands.operate import drop_at
    from memcontrol.study.place import StudyPlace

    others = drop_at(StudyPlace.load(args.study, name=args.name), args.trial, args.why or "", args.undo)
    said = "counts again" if args.undo else "counts for nothing from now on (--undo takes that back)"
    named = ", ".join(map(str, others[:20])) + (", ..." if len(others) > 20 else "")
    beside = f"; with it what was measured on its fine-tuning, trials {named}" if others else ""
    sys.stdout.write(f"trial {args.trial} {said}{beside}\n")
    return 0


def _run_stop(args: argparse.Namespace) -> int:
    from memcontrol.commands.operate import stop_at
    from memcontrol.study.place import StudyPlace

    stop_at(StudyPlace.load(args.study, name=args.name), args.now)
    when = "at its trials' checkpoints" if args.now else "when its running trials have ended"
    sys.stdout.write(f"the search is told to end {when}; memcontrol search {args.study} goes on\n")
    return 0


def add_clean(subparsers) -> None:
    text = "remove what a search left: images, latents, weights, and the study itself"
    clean = add_command(subparsers, "clean", _run_clean, text)
    add_study(clean)
    clean.add_argument(
        "--keep",
        choices=("front",),
        help="front: keep the study, its results, and the models on its front with their pictures",
    )
    clean.add_argument("--yes", action="store_true", help="remove without a question")


def _run_clean(args: argparse.Namespace) -> int:
    from memcontrol.commands.clean import plan_cleaning, run_cleaning
    from memcontrol.study.place import StudyPlace

    plan = plan_cleaning(StudyPlace.load(args.study, name=args.name), args.keep)
    sys.stdout.write("".join(f"{line}\n" for line in _describe_plan(plan)))
    sys.stdout.flush()
    if not args.yes and not _ask_person():
        return 1
    run_cleaning(plan)
    sys.stdout.write(f"removed {_say_size(plan.n_bytes)}\n")
    return 0


def _describe_plan(plan: Cleaning) -> list[str]:
    """What is removed: by name, and of folders of choices how many there are."""
    top = plan.folder.path
    inside = [path.relative_to(top).parts for path in plan.paths]
    names = [parts[0] for parts in inside if len(parts) == 1]
    parts_of = Counter(parts[0] for parts in inside if len(parts) > 1)
    lines = [f"to remove from {top}: {_say_size(plan.n_bytes)}"]
    lines += [f"  {name}" for name in names] if names else []
    lines += [f"  {n} files and folders of {name}" for name, n in parts_of.items()]
    return [*lines, *(f"stays: {text}" for text in plan.stays)]


def _ask_person() -> bool:
    """Raises MemControlError where there is nobody to ask."""
    if not sys.stdin.isatty():
        raise MemControlError("nothing was removed; give --yes to remove it")
    sys.stdout.write("remove it? [y/N] ")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _say_size(n_bytes: int) -> str:
    return f"{n_bytes:,} bytes" if n_bytes < 2**20 else f"{n_bytes:,} bytes ({n_bytes / 2**20:,.1f} MiB)"
