"""Owns what comes before a search, `memcontrol init` and `memcontrol doctor`: what they ask and print."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from memcontrol.cli.arguments import add_command, add_json, add_name
from memcontrol.core.console import escape_controls, make_console, print_json, say, warn

if TYPE_CHECKING:
    from memcontrol.checks.finding import Finding


def add_init(subparsers) -> None:
    text = "look at a folder of images and write a study for it, with the reason beside each value"
    init = add_command(subparsers, "init", _run_init, text)
    init.add_argument(
        "images",
        metavar="DIR",
        help="the images, with captions in tables or text files beside them if there are any; or a dataset: "
        "a folder of parquet shards or WebDataset tars, or hf://OWNER/NAME",
    )
    init.add_argument(
        "--out", type=Path, metavar="STUDY.yaml", help="file to write (default: NAME.yaml in this folder)"
    )
    init.add_argument("--name", help="the study's name (default: the folder's)")
    init.add_argument(
        "--base",
        metavar="MODEL",
        help="tiny, a folder in diffusers' format, a .safetensors file, or a Hub id, or `{id: ..., adapter: "
        "...}` as in a study file (default: Stable Diffusion 1.5 where there is a GPU, else tiny)",
    )


def _run_init(args: argparse.Namespace) -> int:
    from memcontrol.commands.init import list_warnings, propose_study
    from memcontrol.view.live import Steps, shorten_path

    screen = make_console()
    with Steps(screen) as steps:
        proposal = propose_study(args.images, args.out, args.name, args.base, steps.show)
    for line in proposal.text.splitlines():
        say(screen, line)
    for warning in list_warnings(proposal.seen):
        warn(screen, warning)
    say(screen, f"next: memcontrol search {shorten_path(proposal.path)}")
    sys.stdout.write(f"{proposal.path}\n")
    return 0


def add_doctor(subparsers) -> None:
    text = (
        "look whether a search can work here: packages, device, memory, base, database, and a cure for each"
    )
    doctor = add_command(subparsers, "doctor", _run_doctor, text)
    doctor.add_argument(
        "study",
        type=Path,
        nargs="?",
        metavar="STUDY.yaml",
        help="the study that is to be searched (default: none, this machine alone)",
    )
    add_name(doctor)
    add_json(doctor, "a list of objects on stdout: name, state, text, cure")


def _run_doctor(args: argparse.Namespace) -> int:
    """1 where a search would fail."""
    from dataclasses import asdict

    from memcontrol.checks.finding import FAIL
    from memcontrol.commands.doctor import examine

    found = []
    for one in examine(args.study, args.name):
        found.append(one)
        if not args.json:
            _print_finding(one)
    if args.json:
        print_json([asdict(one) for one in found])
    failed = list(dict.fromkeys(one.name for one in found if one.state == FAIL))
    if failed:
        say(make_console(), f"memcontrol: a search would fail: {', '.join(failed)}")
    return int(bool(failed))


_TEXT_MARGIN = " " * 17  # below a finding's text


def _print_finding(found: Finding) -> None:
    """Lines of the terminal's width; into a pipe one, so that it can be searched. A cure is a line of its
    own, which is not broken, since it is typed; but what a study file should say instead is words."""
    _print_filled(f"{found.state:5} {found.name:10} {escape_controls(found.text)}")
    if found.cure:
        cure = f"      cure:      {escape_controls(found.cure)}"
        _print_filled(cure) if found.name == "study" else sys.stdout.write(f"{cure}\n")
    sys.stdout.flush()


def _print_filled(line: str) -> None:
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        line = textwrap.fill(
            line,
            max(shutil.get_terminal_size().columns, 40),
            subsequent_indent=_TEXT_MARGIN,
            break_on_hyphens=False,
            break_long_words=False,
        )
    sys.stdout.write(f"{line}\n")
