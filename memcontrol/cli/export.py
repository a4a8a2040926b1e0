"""Owns `memcontrol export` and `recipe`: what they ask and print."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from memcontrol.cli.arguments import add_command, add_pick_arguments, add_study
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
    export.add_argument(
        "--license",
        metavar="ID",
        help="as the Hub calls it, such as apache-2.0, or a name of your own (default: the base's)",
    )
    export.add_argument("--license-link", metavar="URL", help="where the text of a license of your own is")
    export.add_argument(
        "--no-picture",
        dest="picture",
        action="store_false",
        help="leave out the card's picture, one of the samples, which the exported files draw again",
    )


def _run_export(args: argparse.Namespace) -> int:
    from memcontrol.commands.export import describe_loading, export

    screen = make_console()
    more = (args.license, args.license_link, args.picture, lambda line: say(screen, line))
    out = export(args.run_dir, args.out, args.format, args.precision, *more)
    sys.stdout.write(f"{out}\n")
    say(screen, describe_loading(args.run_dir, out))
    return 0


def add_recipe(subparsers) -> None:
    text = "write a trial's mask and settings as the config of another trainer"
    recipe = add_command(subparsers, "recipe", _run_recipe, text)
    add_study(recipe)
    recipe.add_argument(
        "--for",
        dest="trainer",
        required=True,
        metavar="TRAINER",
        help="kohya, ai-toolkit, onetrainer, simpletuner, diffusers or peft",
    )
    add_pick_arguments(recipe)
    recipe.add_argument("--out", type=Path, help="folder to write the files to (default: print them)")


def _run_recipe(args: argparse.Namespace) -> int:
    from memcontrol.commands.recipe import write_files
    from memcontrol.recipes.planning import plan_recipe
    from memcontrol.recipes.trainers import write_recipe
    from memcontrol.study.pick import choose_record
    from memcontrol.study.place import StudyPlace

    place, screen = StudyPlace.load(args.study, name=args.name), make_console()
    with contextlib.closing(place.open()) as study:
        choice = choose_record(study, args.trial, args.rule, args.limit).chosen
        plan = plan_recipe(study.config, study.space, choice, place.folder)
    files = write_recipe(plan, args.trainer)
    for note in plan.notes:
        say(screen, note)
    if args.out:
        write_files(files, args.out)
        sys.stdout.write("".join(f"{args.out / name}\n" for name in files))
    else:
        heads = len(files) > 1
        sys.stdout.write("\n".join((f"# {name}\n" if heads else "") + text for name, text in files.items()))
    return 0
