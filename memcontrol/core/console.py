"""Owns how much is said, and where: the console on stderr, --quiet and --verbose, JSON on stdout, and a
search's log file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from memcontrol.core import interrupt
from memcontrol.core.errors import SearchEnded
from memcontrol.core.files import make_private_folder, open_private
from memcontrol.core.version import __version__

QUIET, NORMAL, VERBOSE = "quiet", "normal", "verbose"
LOG = logging.getLogger("memcontrol")
_FORM = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
level = NORMAL  # of this process


def make_console():
    """Where people are told what goes on; says nothing when quiet. Names are printed as they are: nothing in
    them is taken for markup."""
    from rich.console import Console

    width = None if sys.stderr.isatty() or "COLUMNS" in os.environ else 150
    return Console(stderr=True, width=width, quiet=level == QUIET, markup=False, emoji=False)


def say(console, text: str, style: str | None = None) -> None:
    """One line as it is: nothing in it is coloured, cut or taken for markup."""
    console.print(escape_controls(text), style=style, highlight=False, soft_wrap=True, markup=False)


def escape_controls(text: str) -> str:
    """One line, whatever is in a name: line breaks, controls of terminals and what is no UTF-8 as Python
    writes them."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text
    )


def warn(console, text: str) -> None:
    say(console, f"warning: {text}", "yellow")


def print_json(value: object) -> None:
    json.dump(value, sys.stdout, indent=1, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


@contextlib.contextmanager
def log_to_file(path: Path, what: str) -> Iterator[None]:
    """What is logged in the block goes to the end of the file, between lines that say what begins and how it
    ended; to stderr as well, with every detail, when verbose, less warnings, which are shown there anyway."""
    make_private_folder(path.parent)
    open_private(path, "ab").close()
    aloud = logging.StreamHandler()
    aloud.addFilter(lambda record: record.levelno < logging.WARNING)
    handlers: list[logging.Handler] = [
        logging.FileHandler(path, encoding="utf-8", errors="backslashreplace"),  # names may be no UTF-8
        *([aloud] if level == VERBOSE else []),
    ]
    before = LOG.level, LOG.propagate  # of a program that has its own logging
    LOG.setLevel(logging.DEBUG if level == VERBOSE else logging.INFO)
    LOG.propagate = False
    for handler in handlers:
        handler.setFormatter(_FORM)
        LOG.addHandler(handler)
    LOG.info("memcontrol %s begins: %s", __version__, what)
    try:
        yield
        LOG.info("ended")
    except KeyboardInterrupt:
        LOG.info("ended by %s", interrupt.name_signal())
        raise
    except SearchEnded as ended:
        LOG.info("ended: %s", ended)
        raise
    except BaseException as error:
        LOG.info("ended by %s: %s", type(error).__name__, error)
        raise
    finally:
        for handler in handlers:
            LOG.removeHandler(handler)
            handler.close()
        LOG.setLevel(before[0])
        LOG.propagate = before[1]
