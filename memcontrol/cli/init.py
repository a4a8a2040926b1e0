"""Owns `memcontrol init`: what it asks and prints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from memcontrol.cli.arguments import add_command
from memcontrol.core.console import make_console, say, warn


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
