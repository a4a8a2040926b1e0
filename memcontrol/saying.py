"""Owns how much is said, and where: the console on stderr, --quiet and --verbose, JSON on stdout, and a search's log file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

QUIET, NORMAL, VERBOSE = "quiet", "normal", "verbose"
LOG = logging.getLogger("memcontrol")
FORM = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
level = NORMAL  # of this process


def console():
    """Where people are told what goes on; says nothing when quiet."""
    from rich.console import Console

    width = None if sys.stderr.isatty() or "COLUMNS" in os.environ else 150
    return Console(stderr=True, width=width, quiet=level == QUIET)


def out_json(value: object) -> None:
    json.dump(value, sys.stdout, indent=1, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """What is logged in the block goes to the end of the file; to stderr as well, with every detail, when verbose."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(path, encoding="utf-8"), *([logging.StreamHandler()] if level == VERBOSE else [])]
    LOG.setLevel(logging.DEBUG if level == VERBOSE else logging.INFO)
    LOG.propagate = False
    for handler in handlers:
        handler.setFormatter(FORM)
        LOG.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            LOG.removeHandler(handler)
            handler.close()
