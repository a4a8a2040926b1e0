"""Owns `memcontrol rewards` and `memcontrol spaces`: what there is to choose from, and how a space fits a
base."""

from __future__ import annotations

import argparse
import sys

from memcontrol.cli.arguments import add_command, add_json
from memcontrol.cli.printing import print_table
from memcontrol.core.console import print_json
from memcontrol.core.errors import MemControlError


def add_rewards(subparsers) -> None:
    rewards = add_command(
        subparsers, "rewards", _run_rewards, "list every reward: direction, interval, cost, meaning"
    )
    add_json(rewards, "one JSON object on stdout")


def _run_rewards(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from memcontrol.core.reward_table import REWARDS
    from memcontrol.view.tables import RewardList

    if args.json:
        print_json({name: asdict(reward) for name, reward in REWARDS.items()})
    else:
        print_table(RewardList())
    return 0


def add_spaces(subparsers) -> None:
    spaces = add_command(subparsers, "spaces", _run_spaces, "list, show or check search spaces")
    actions = spaces.add_subparsers(
        dest="action", required=True, metavar="list | show | check", help="what to do"
    )
    actions.add_parser("list", help="the shipped spaces")
    show = actions.add_parser("show", help="print a shipped space, or derive one")
    show.add_argument("name", metavar="NAME", help="of `spaces list`; auto derives one from --base")
    show.add_argument(
        "--base",
        default="tiny",
        metavar="MODEL",
        help="for auto: tiny, a folder, a .safetensors file or a Hub id, or `{id: ..., config: ...}` as in a "
        "study file (default: tiny)",
    )
    check = actions.add_parser("check", help="match a space against a base model")
    check.add_argument("name", metavar="NAME_OR_FILE", help="a shipped space or a YAML file")
    check.add_argument(
        "--base",
        default="tiny",
        metavar="MODEL",
        help="tiny, a folder (config.json files suffice), a .safetensors file or a Hub id, or `{id: ..., "
        "config: ...}` (default: tiny)",
    )
    add_json(check)


def _run_spaces(args: argparse.Namespace) -> int:
    if args.action == "list":
        _list_spaces()
    elif args.action == "show":
        sys.stdout.write(_read_space(args.name, args.base))
    else:
        _check_fit(args)
    return 0


def _list_spaces() -> None:
    from memcontrol.core.space_yaml import list_shipped_spaces, load_space

    for name in list_shipped_spaces():
        space = load_space(name)
        sys.stdout.write(f"{name:26} {len(space.groups):3} groups  {space.description}\n")


def _read_space(name: str, base: str) -> str:
    """The YAML of a shipped space, or of one that is derived."""
    from memcontrol.core.space_yaml import list_shipped_spaces

    shipped = list_shipped_spaces()
    if name == "auto":
        from memcontrol.config.base import parse_base
        from memcontrol.model.derive_space import derive_space
        from memcontrol.model.source import make_empty_denoiser

        return derive_space(make_empty_denoiser(parse_base(base)), base)
    if name not in shipped:
        raise MemControlError(
            f"space '{name}' is not shipped; shipped are {', '.join(shipped)}; 'auto' derives one from --base"
        )
    return shipped[name].read_text(encoding="utf-8")


def _check_fit(args: argparse.Namespace) -> None:
    from memcontrol.config.base import parse_base
    from memcontrol.core.space_yaml import load_space
    from memcontrol.model.cost import survey_space
    from memcontrol.model.source import make_empty_denoiser

    found = survey_space(make_empty_denoiser(parse_base(args.base)), load_space(args.name))
    if args.json:
        print_json(found)
    else:
        _print_survey(found)


def _print_survey(found: dict) -> None:
    write, total = sys.stdout.write, found["total"]
    for group in found["groups"]:
        parts = [f"{method} {n:,} ({n / total:.4%})" for method, n in group["parameters"].items()]
        write(f"{group['name']:24} {len(group['modules']):4} modules  {', '.join(parts)}\n")
        write("".join(f"    {name}\n" for name in group["modules"]))
    write(f"{total:,} parameters in all\n")
    for method, counts in found["methods"].items():
        on, off, cost = counts["all_on"], counts["all_off"], counts["cost"]
        write(f"{method:12} all groups on {on:13,} ({on / total:8.4%})   off {off:13,}")
        write(f"   {_describe_cost(cost)} for a step of one image\n" if cost else "\n")


def _describe_cost(cost: dict[str, float]) -> str:
    return f"{_format_size(cost['step_gflops'])} GFLOP and {_format_size(cost['memory_mib'])} MiB"


def _format_size(value: float) -> str:
    """Three digits of what is small, no decimals of what is large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
