"""Owns `memcontrol report`: what it asks and prints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from memcontrol.cli.arguments import add_command, add_study
from memcontrol.core.console import make_console, print_json, say
from memcontrol.core.errors import MemControlError


def add_report(subparsers) -> None:
    report = add_command(
        subparsers,
        "report",
        _run_report,
        "write one page about the study that needs no network, or its data",
    )
    add_study(report)
    report.add_argument("out", type=Path, nargs="?", metavar="OUT.html", help="the page to write")
    report.add_argument(
        "--without-images",
        action="store_true",
        help="leave out generated images and the training images nearest to them",
    )
    report.add_argument(
        "--with-paths",
        action="store_true",
        help="in data, say where images and runs lie on this machine",
    )
    data = report.add_mutually_exclusive_group()
    data.add_argument("--csv", action="store_true", help="print a row for each trial on stdout")
    data.add_argument(
        "--json", action="store_true", help="print all that the page says as one JSON document on stdout"
    )


def _run_report(args: argparse.Namespace) -> int:
    from memcontrol.commands.report import report
    from memcontrol.view.report_data import format_csv

    if not (args.out or args.csv or args.json):
        raise MemControlError("report writes a page or prints data; give OUT.html, --csv or --json")
    data = report(args.study, args.out, images=not args.without_images, paths=args.with_paths, name=args.name)
    if args.out:
        say(make_console(), f"report: {args.out}")
    if args.csv:
        sys.stdout.write(format_csv(data))
    if args.json:
        print_json(data)
    return 0
