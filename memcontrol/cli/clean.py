"""Owns `memcontrol clean`: what it says, and asks before it removes anything."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import TYPE_CHECKING

from memcontrol.cli.arguments import add_command, add_study
from memcontrol.core.errors import MemControlError

if TYPE_CHECKING:
    from memcontrol.commands.clean import Cleaning


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
