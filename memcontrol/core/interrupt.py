"""Owns the signals that end a command: Ctrl-C, SIGTERM and SIGHUP end it alike, and which one came is
remembered, since a library in whose callback Python raises KeyboardInterrupt may swallow it; a worker that is
told to end leaves a checkpoint first."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

came: int | None = None  # the signal that ends this command
came_at = 0.0
is_terminated = False  # this worker was told to end
_remembered: set[signal.Signals] = set()
_ONE_PRESS_SECONDS = 1.0  # systemd and a closed terminal send SIGHUP beside SIGTERM, wrappers a copy of each
_SIGNAL_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


def remember() -> None:
    """From now on the first of these signals raises KeyboardInterrupt, and is remembered; a second one ends
    the process at once. One that is ignored stays so: SIGINT in a job that a script began with `&`, SIGHUP
    under nohup."""
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is usual:
            signal.signal(number, on_interrupt)
            _remembered.add(number)
    if signal.SIGINT in _remembered:
        sys.unraisablehook = _pass_over


def take_back() -> None:
    """Remembers again what was remembered, after a library has set handlers of its own."""
    for number in _remembered:
        signal.signal(number, on_interrupt)


def _pass_over(raised: sys.UnraisableHookArgs) -> None:
    """Of what Python raises where nothing can catch it, as an object is taken down, it prints a traceback:
    not of Ctrl-C, which is remembered."""
    if not issubclass(raised.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(raised)


def on_interrupt(number, frame) -> None:
    global came, came_at
    _leave_lost_terminal()
    if came is None:
        came, came_at = number, time.monotonic()
        raise KeyboardInterrupt
    if time.monotonic() - came_at > _ONE_PRESS_SECONDS:
        os._exit(128 + number)


def _leave_lost_terminal() -> None:
    """What is still said to a terminal that was closed goes nowhere, rather than raise where it is said."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if _is_lost_terminal(descriptor):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _is_lost_terminal(descriptor: int) -> bool:
    """Every write to such a one fails, even of nothing."""
    try:
        os.write(descriptor, b"")
    except OSError:
        return True
    return False


def name_signal() -> str:
    """Of the signal that came."""
    return _SIGNAL_NAMES[signal.Signals(came)] if came else "Ctrl-C"


def count_exit_status() -> int:
    """As a shell gives it: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
    return 128 + (came or signal.SIGINT)


def remember_termination(*further: signal.Signals) -> None:
    """From now on SIGTERM (and such as it) is remembered; whoever has something to save looks at
    `is_terminated`."""
    for number in (signal.SIGTERM, *further):
        signal.signal(number, _on_termination)


def _on_termination(number, frame) -> None:
    global is_terminated
    is_terminated = True


def end_if_terminated() -> None:
    """Ends the process where SIGTERM came, with the exit code that a shell gives for it."""
    if is_terminated:
        raise SystemExit(128 + signal.SIGTERM)


def check() -> None:
    """Raises KeyboardInterrupt where one was swallowed; called wherever a command waits for its workers."""
    if came is not None:
        raise KeyboardInterrupt
