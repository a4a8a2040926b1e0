"""Owns the command line: arguments, and how every command ends."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from memcontrol.cli import commands, looking
from memcontrol.core import console as saying
from memcontrol.core import interrupt
from memcontrol.core.errors import MemControlError
from memcontrol.core.version import __version__

STUDY_HELP = "the study's YAML file"


class OneLine(argparse.ArgumentParser):
    """Says a mistake in one line, and where help is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    top = OneLine(
        prog="memcontrol",
        description="Search which parameters of a diffusion model to fine-tune, so that quality stays and "
        "memorization goes.",
    )
    top.add_argument("--version", action="version", version=f"memcontrol {__version__}")
    add_levels(top)
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        add_demo,
        add_init,
        add_search,
        add_readers,
        add_retrain,
        add_export,
        add_audit,
        add_dashboard,
        add_report,
        add_compare,
        add_rewards,
        add_spaces,
        add_completion,
    ):
        add(subparsers)
    return top


def add_command(
    subparsers, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    added = subparsers.add_parser(name, help=text, description=text)
    add_levels(added)
    added.set_defaults(run=run)
    return added


def add_levels(parser: argparse.ArgumentParser) -> None:
    said = parser.add_mutually_exclusive_group()  # before and after the command
    for level, text in (
        (saying.QUIET, "say nothing on stderr but errors"),
        (saying.VERBOSE, "say every detail, as a search's log file does"),
    ):
        said.add_argument(
            f"--{level}",
            action="store_const",
            dest="level",
            const=level,
            default=argparse.SUPPRESS,
            help=text,
        )


def add_demo(subparsers) -> None:
    demo = add_command(
        subparsers,
        "demo",
        commands.run_demo,
        "search, pick and retrain on the embedded digits, from one command",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder to work in (default: runs/demo)"
    )
    demo.add_argument(
        "--trials", type=make_whole_parser(0), help="sampled trials, beside the three anchors (default: 4)"
    )
    demo.add_argument("--workers", type=make_whole_parser(1), help="worker processes (default: 2)")
    demo.add_argument("--seed", type=int, default=0, help="the study's seed (default: 0)")


def add_init(subparsers) -> None:
    init = add_command(
        subparsers,
        "init",
        looking.run_init,
        "look at a folder of images and write a study for it, with the reason beside each value",
    )
    init.add_argument(
        "images",
        type=Path,
        metavar="DIR",
        help="the images, with captions in metadata.jsonl or metadata.csv if there are any",
    )
    init.add_argument(
        "--out", type=Path, metavar="STUDY.yaml", help="file to write (default: NAME.yaml in this folder)"
    )
    init.add_argument("--name", help="the study's name (default: the folder's)")
    init.add_argument(
        "--base",
        metavar="MODEL",
        help="tiny, a folder in diffusers' format, or a Hub id (default: Stable Diffusion 1.5 where "
        "there is a GPU, else tiny)",
    )


def add_search(subparsers) -> None:
    search = add_command(subparsers, "search", commands.run_search, "run or continue a study")
    search.add_argument("study", type=Path, metavar="STUDY.yaml", help=STUDY_HELP)
    search.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="values that replace those of the file, for example inner.batch_size=8",
    )
    search.add_argument(
        "--trials", type=make_whole_parser(0), help="sampled trials in all, beside the three anchors"
    )
    search.add_argument("--workers", type=make_whole_parser(1), help="jobs at a time")
    search.add_argument("--executor", choices=("inline", "local", "ray", "slurm"), help="where trials run")
    search.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, try a few short trials, and say what the search will take",
    )


def add_readers(subparsers) -> None:
    readers = {
        "status": (looking.run_status, "list all trials with their state"),
        "front": (looking.run_front, "list the Pareto front"),
        "importance": (looking.run_importance, "which groups drive which reward, with error"),
    }
    for name, (run, text) in readers.items():
        added = add_command(subparsers, name, run, text)
        added.add_argument("study", type=Path, metavar="STUDY.yaml", help=STUDY_HELP)
        added.add_argument("--json", action="store_true", help="one JSON document on stdout")

    pick = add_command(subparsers, "pick", looking.run_pick, "choose one trial of the study")
    pick.add_argument("study", type=Path, metavar="STUDY.yaml", help=STUDY_HELP)
    add_pick_arguments(pick)
    pick.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_retrain(subparsers) -> None:
    retrain = add_command(
        subparsers,
        "retrain",
        commands.run_retrain,
        "retrain a choice on the full training set, scored on test data beside full fine-tuning",
    )
    retrain.add_argument("study", type=Path, metavar="STUDY.yaml", help=STUDY_HELP)
    add_pick_arguments(retrain)
    retrain.add_argument(
        "--choice", type=Path, metavar="CHOICE.json", help="a choice from a file, as `pick --json` prints it"
    )
    retrain.add_argument(
        "--out", type=Path, help="run folder to write (default: retrain/KEY in the study's folder)"
    )


def add_export(subparsers) -> None:
    export = add_command(subparsers, "export", commands.run_export, "write a run's model for plain diffusers")
    export.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="a run folder, of a trial or of retrain"
    )
    export.add_argument("out", type=Path, metavar="OUT", help="new folder")
    export.add_argument(
        "--format",
        choices=("adapter", "pipeline", "denoiser"),
        help="default: adapter for LoRA, pipeline for anything else",
    )


def add_audit(subparsers) -> None:
    audit = add_command(
        subparsers,
        "audit",
        commands.run_audit,
        "how much a model or a folder of images copies a training set",
    )
    source = audit.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model",
        metavar="PIPELINE_OR_RUN",
        help="a run folder, or a pipeline (folder or Hub id) to sample from",
    )
    source.add_argument("--images", type=Path, metavar="DIR", help="a folder of generated images")
    audit.add_argument(
        "--train",
        type=Path,
        metavar="DIR",
        help="the training images, with captions if there are any (default for a run: its own)",
    )
    audit.add_argument(
        "--holdout",
        type=Path,
        metavar="DIR",
        help="real images of the same kind, never trained on (default for a run: its own)",
    )
    audit.add_argument(
        "--out",
        type=Path,
        default=Path("audit"),
        help="folder for audit.json and audit.html (default: audit)",
    )
    audit.add_argument(
        "--extractor", default="tiny", help="the feature network (default: tiny, which knows characters)"
    )
    sampling = audit.add_argument_group("sampling from a pipeline")
    sampling.add_argument(
        "--samples", type=make_whole_parser(8), metavar="N", help="images to sample (default: 256)"
    )
    sampling.add_argument(
        "--attacked",
        type=make_whole_parser(0),
        metavar="N",
        help="captions for an extraction attack, 10 images each (default: 0)",
    )
    sampling.add_argument("--steps", type=make_whole_parser(1), help="sampling steps (default: 20)")
    sampling.add_argument("--guidance", type=float, help="guidance scale (default: 1)")
    sampling.add_argument("--seed", type=int, help="of captions and noise (default: 0)")
    audit.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="skip images that cannot be decoded instead of stopping",
    )
    audit.add_argument("--json", action="store_true", help="print audit.json on stdout as well")


def add_dashboard(subparsers) -> None:
    dashboard = add_command(
        subparsers, "dashboard", looking.run_dashboard, "serve the study in optuna-dashboard, read-only"
    )
    dashboard.add_argument("study", type=Path, metavar="STUDY.yaml", help=STUDY_HELP)
    dashboard.add_argument(
        "--storage",
        metavar="URL",
        help="the database under another name, such as that of a role which only reads",
    )
    dashboard.add_argument(
        "--host",
        default="127.0.0.1",
        help="the interface to listen on; any but loopback asks for a token (default: 127.0.0.1)",
    )
    dashboard.add_argument(
        "--port", type=make_whole_parser(0), default=8080, help="0 takes any free one (default: 8080)"
    )
    dashboard.add_argument(
        "--token",
        default=os.environ.get("MEMCONTROL_TOKEN"),
        help="what visitors must bring (default: MEMCONTROL_TOKEN, or one that is drawn where --host is "
        "not loopback)",
    )
    dashboard.add_argument(
        "--writable", action="store_true", help="let visitors write notes, tell trials, and delete studies"
    )


def add_report(subparsers) -> None:
    report = add_command(
        subparsers,
        "report",
        looking.run_report,
        "write one page about the study that needs no network, or its data",
    )
    report.add_argument("study", type=Path, metavar="STUDY.yaml", help=STUDY_HELP)
    report.add_argument("out", type=Path, nargs="?", metavar="OUT.html", help="the page to write")
    report.add_argument(
        "--without-images",
        action="store_true",
        help="leave out generated images and the training images nearest to them",
    )
    data = report.add_mutually_exclusive_group()
    data.add_argument("--csv", action="store_true", help="print a row for each trial on stdout")
    data.add_argument(
        "--json", action="store_true", help="print all that the page says as one JSON document on stdout"
    )


def add_compare(subparsers) -> None:
    compare = add_command(
        subparsers,
        "compare",
        looking.run_compare,
        "two runs figure by figure, in pairs over their common prompts",
    )
    compare.add_argument("run_a", type=Path, metavar="RUN_DIR", help="a run folder, of a trial or of retrain")
    compare.add_argument("run_b", type=Path, metavar="RUN_DIR", help="another, of the same study and kind")
    compare.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_rewards(subparsers) -> None:
    rewards = add_command(
        subparsers, "rewards", looking.run_rewards, "list every figure: direction, interval, cost, meaning"
    )
    rewards.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_spaces(subparsers) -> None:
    spaces = add_command(subparsers, "spaces", looking.run_spaces, "list, show or check search spaces")
    actions = spaces.add_subparsers(
        dest="action", required=True, metavar="list | show | check", help="what to do"
    )
    actions.add_parser("list", help="the shipped spaces")
    show = actions.add_parser("show", help="print a shipped space, or derive one")
    show.add_argument("name", metavar="NAME", help="of `spaces list`; auto derives one from --base")
    show.add_argument(
        "--base", default="tiny", metavar="MODEL", help="for auto: tiny, a folder or a Hub id (default: tiny)"
    )
    check = actions.add_parser("check", help="match a space against a base model")
    check.add_argument("name", metavar="NAME_OR_FILE", help="a shipped space or a YAML file")
    check.add_argument(
        "--base",
        default="tiny",
        metavar="MODEL",
        help="tiny, a folder (config.json files suffice) or a Hub id (default: tiny)",
    )
    check.add_argument("--json", action="store_true", help="one JSON document on stdout")


def add_completion(subparsers) -> None:
    completion = add_command(
        subparsers,
        "completion",
        run_completion,
        "print a script that lets a shell complete memcontrol's commands and options",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="which shell")


def run_completion(args: argparse.Namespace) -> int:
    import shtab

    top = make_parser()
    for action in list_actions(top):
        if action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks for it
    sys.stdout.write(shtab.complete(top, args.shell))
    return 0


def list_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from list_actions(inner)


def add_pick_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rule", help="knee (default), quality or memorization")
    command.add_argument("--trial", type=int, metavar="N", help="this trial")
    command.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="fid<=12",
        help="keep a reward within a bound (repeatable)",
    )


def parse_arguments(top: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; overrides of a search may also stand after its options."""
    args, rest = top.parse_known_args()
    if rest and args.command == "search" and all("=" in text and not text.startswith("-") for text in rest):
        args.overrides += rest
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def make_whole_parser(least: int):
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least {least}")
        return int(text)

    return convert


def main() -> int:
    args = parse_arguments(make_parser())
    interrupt.remember()
    saying.level = getattr(args, "level", saying.NORMAL)
    try:
        return args.run(args)
    except MemControlError as error:
        sys.stderr.write(f"memcontrol: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(
            "\nmemcontrol: stopped; everything finished is kept, and the same command continues\n"
        )
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:  # a place that cannot be read or written
        if saying.level == saying.VERBOSE or not error.filename:
            raise
        sys.stderr.write(f"memcontrol: {error.filename}: {error.strerror}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
