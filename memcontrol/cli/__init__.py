"""Owns the command line: arguments, printing, and how every command ends."""

from __future__ import annotations

import contextlib
import io
import os
import sys


def main() -> int:
    """The exit status: 0, or 1 for what a person can mend, said in one line, or 130 after Ctrl-C, 143 after
    SIGTERM, 129 after SIGHUP."""
    from memcontrol.core import interrupt

    interrupt.remember()
    try:
        return _run_command()
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the terminal may be gone
            sys.stderr.write(
                "\nmemcontrol: stopped; everything finished is kept, and the same command continues\n"
            )
        return interrupt.count_exit_status()


def _run_command() -> int:
    """Less what a signal ends."""
    from memcontrol.cli.parser import make_parser, parse_arguments
    from memcontrol.core import console
    from memcontrol.core.errors import MemControlError

    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parse_arguments(make_parser())
    console.level = getattr(args, "level", console.NORMAL)
    try:
        return args.run(args)
    except MemControlError as error:
        sys.stderr.write(f"memcontrol: {error}\n")
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:  # a place that cannot be read or written
        if console.level == console.VERBOSE or not error.filename:
            raise
        sys.stderr.write(f"memcontrol: {error.filename}: {error.strerror}\n")
        return 1
