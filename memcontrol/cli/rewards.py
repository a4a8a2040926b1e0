"""Owns `memcontrol rewards`: the table of all rewards."""

from __future__ import annotations

import argparse

from memcontrol.cli.arguments import add_command, add_json
from memcontrol.cli.printing import print_table
from memcontrol.core.console import print_json


def add_rewards(subparsers) -> None:
    rewards = add_command(
        subparsers, "rewards", _run_rewards, "list every reward: direction, interval, cost, meaning"
    )
    add_json(rewards, "one JSON object on stdout")


def _run_rewards(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from memcontrol.core.reward_table import REWARDS
    from memcontrol.view.tables import make_rewards_table

    if args.json:
        print_json({name: asdict(reward) for name, reward in REWARDS.items()})
    else:
        print_table(make_rewards_table())
    return 0
