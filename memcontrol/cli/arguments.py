"""Owns what the arguments of several commands have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from memcontrol.core import console


class OneLineParser(argparse.ArgumentParser):
    """Says a mistake in one line, and where help is."""

    def _print_message(self, message: str, file=None) -> None:
        """argparse says nothing of what cannot be written."""
        if message:
            (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {console.escape_controls(message)}; see {self.prog} --help\n")


def add_command(
    subparsers, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    added = subparsers.add_parser(name, help=text, description=text)
    add_levels(added)
    added.set_defaults(run=run)
    return added


def add_levels(parser: argparse.ArgumentParser) -> None:
    """Before and after the command."""
    levels = parser.add_mutually_exclusive_group()
    texts = {
        console.QUIET: "say nothing on stderr but errors",
        console.VERBOSE: "say every detail, as a search's log file does",
    }
    for level, text in texts.items():
        levels.add_argument(
            f"--{level}",
            action="store_const",
            dest="level",
            const=level,
            default=argparse.SUPPRESS,
            help=text,
        )


def add_study(command: argparse.ArgumentParser) -> None:
    command.add_argument("study", type=Path, metavar="STUDY.yaml", help="the study's YAML file")
    add_name(command)


def add_name(command: argparse.ArgumentParser) -> None:
    command.add_argument("--name", help="another name of the study than the file's")


def add_json(command: argparse.ArgumentParser, text: str = "one JSON document on stdout") -> None:
    command.add_argument("--json", action="store_true", help=text)


def add_pick_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rule", help="knee (default), quality or memorization")
    command.add_argument("--trial", type=int, metavar="N", help="this trial")
    command.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="'fid<=12'",
        help="keep a reward within a bound (repeatable)",
    )


def make_whole_parser(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least {least}")
        return int(text)

    return convert


def parse_hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not 0 < hours < 1e6:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of hours above 0, such as 8 or 0.5")
    return hours
