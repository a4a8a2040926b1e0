"""Owns `memcontrol dashboard`: what it asks and prints."""

from __future__ import annotations

import argparse
import os
import sys

from memcontrol.cli.arguments import add_command, add_study, make_whole_parser
from memcontrol.core.console import make_console, say, warn


def add_dashboard(subparsers) -> None:
    dashboard = add_command(
        subparsers, "dashboard", _run_dashboard, "serve the study in optuna-dashboard, read-only"
    )
    add_study(dashboard)
    dashboard.add_argument(
        "--storage",
        metavar="URL",
        help="the database under another name, such as that of a role which only reads",
    )
    dashboard.add_argument(
        "--host",
        default="127.0.0.1",
        help="the interface to listen on (default: 127.0.0.1)",
    )
    dashboard.add_argument(
        "--port", type=make_whole_parser(0), default=8080, help="0 takes any free one (default: 8080)"
    )
    dashboard.add_argument(
        "--token",
        default=os.environ.get("MEMCONTROL_TOKEN"),
        help="what visitors must bring (default: MEMCONTROL_TOKEN, or one that is drawn)",
    )
    dashboard.add_argument(
        "--no-token",
        action="store_true",
        help="ask for none, on loopback: every user and program of this machine may then read the study",
    )
    dashboard.add_argument(
        "--prefix",
        default="",
        metavar="/PATH",
        help="the path below which a reverse proxy shows it (default: none)",
    )
    dashboard.add_argument(
        "--writable", action="store_true", help="let visitors write notes, tell trials, and delete studies"
    )


def _run_dashboard(args: argparse.Namespace) -> int:
    from memcontrol.commands.dashboard import open_dashboard
    from memcontrol.dashboard.server import Serving

    token = None if args.no_token else args.token
    serving = Serving(args.host, args.port, token, args.writable, args.no_token, args.prefix)
    server, address = open_dashboard(args.study, args.storage, serving, args.name)
    what = "anyone who has the address may change and delete studies" if args.writable else "read-only"
    if args.no_token:
        warn(make_console(), "without a token every user and program of this machine may read the study")
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()
    say(make_console(), f"{what}; Ctrl-C ends it")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0
    finally:
        server.server_close()
    return 0
