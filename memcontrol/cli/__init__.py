"""Owns the command line: arguments, printing, and how every command ends."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main() -> int:
    """The exit status: 0, or 1 for what a person can mend, said in one line, or 130 after Ctrl-C, 143 after
    SIGTERM, 129 after SIGHUP."""
    from memcontrol.core.errors import MemControlError, refuse_windows

    try:
        refuse_windows()  # before what cannot be imported there
    except MemControlError as error:
        sys.stderr.write(f"memcontrol: {error}\n")
        return 1
    from memcontrol.core import interrupt

    interrupt.remember()
    try:
        return _explain_errors()
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the terminal may be gone
            sys.stderr.write(
                "\nmemcontrol: stopped; everything finished is kept, and the same command continues\n"
            )
        return interrupt.count_exit_status()


def _explain_errors() -> int:
    """Less what a signal ends."""
    from memcontrol.core import console
    from memcontrol.core.errors import MemControlError

    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _run_command()
    except MemControlError as error:
        sys.stderr.write(f"memcontrol: {console.escape_controls(str(error))}\n")
        return 1
    except BrokenPipeError:
        _drop_output()
        return 1
    except OSError as error:  # a place that cannot be read or written
        if error.errno in _NO_ROOM and not error.filename:
            _drop_output()
            sys.stderr.write(f"memcontrol: what is printed cannot be written: {error.strerror}\n")
            return 1
        if console.level == console.VERBOSE or not error.filename:
            raise
        said = f"{os.fsdecode(error.filename)}: {error.strerror}"
        sys.stderr.write(f"memcontrol: {console.escape_controls(said)}\n")
        return 1


def _run_command() -> int:
    """With all that it prints written out."""
    from memcontrol.cli.parser import make_parser, parse_arguments
    from memcontrol.core import console

    try:
        args = parse_arguments(make_parser())
        console.level = getattr(args, "level", console.NORMAL)
        return args.run(args)
    finally:
        sys.stdout.flush()


def _drop_output() -> None:
    """What nobody takes is not tried again as the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
