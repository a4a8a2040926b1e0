"""Owns `memcontrol compare`: what it asks and prints."""

from __future__ import annotations

import argparse
from pathlib import Path

from memcontrol.cli.arguments import add_command, add_json
from memcontrol.cli.printing import print_table
from memcontrol.core.console import print_json


def add_compare(subparsers) -> None:
    compare = add_command(
        subparsers, "compare", _run_compare, "two runs reward by reward, in pairs over their common prompts"
    )
    compare.add_argument("run_a", type=Path, metavar="RUN_DIR", help="a run folder, of a trial or of retrain")
    compare.add_argument("run_b", type=Path, metavar="RUN_DIR", help="another, of the same study and kind")
    add_json(compare, "one JSON object on stdout")


def _run_compare(args: argparse.Namespace) -> int:
    from memcontrol.commands.compare import measure_differences, read_finished_result
    from memcontrol.view.tables import make_differences_table

    apart = measure_differences(args.run_a, args.run_b)
    first, second = (read_finished_result(run)["rewards"] for run in (args.run_a, args.run_b))
    if not args.json:
        title = f"{args.run_a} (first) and {args.run_b} (second)"
        print_table(make_differences_table(apart, first, second, title))
        return 0
    rows = {}
    for name, value in apart.items():
        ends = {"error": value.error, "low": value.low, "high": value.high}
        rows[name] = {"first": first[name], "second": second[name], "difference": float(value)} | ends
    print_json(rows)
    return 0
