"""Owns `memcontrol export`: what it asks and prints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from memcontrol.cli.arguments import add_command
from memcontrol.core.console import make_console, say


def add_export(subparsers) -> None:
    export = add_command(subparsers, "export", _run_export, "write a run's model for plain diffusers")
    export.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="a run folder, of a trial or of retrain"
    )
    export.add_argument("out", type=Path, metavar="OUT", help="new folder")
    export.add_argument(
        "--format",
        choices=("adapter", "pipeline", "denoiser"),
        help="default: adapter for LoRA, pipeline for anything else",
    )
    export.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of a pipeline or denoiser (default: float32)",
    )


def _run_export(args: argparse.Namespace) -> int:
    from memcontrol.commands.export import describe_loading, export

    out = export(args.run_dir, args.out, args.format, args.precision)
    sys.stdout.write(f"{out}\n")
    say(make_console(), describe_loading(args.run_dir, out))
    return 0
