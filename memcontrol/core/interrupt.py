"""Owns Ctrl-C and SIGTERM: that Ctrl-C was pressed is remembered, since a library in whose callback Python
raises KeyboardInterrupt may swallow it; a worker that is told to end leaves a checkpoint first."""

from __future__ import annotations

import signal
import sys

pressed = False
is_terminated = False  # SIGTERM came


def remember() -> None:
    """From now on Ctrl-C is raised as always, and remembered; where it is ignored (a job in the background)
    it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, on_interrupt)
        sys.unraisablehook = _pass_over


def _pass_over(raised: sys.UnraisableHookArgs) -> None:
    """Of what Python raises where nothing can catch it, as an object is taken down, it prints a traceback:
    not of Ctrl-C, which is remembered."""
    if not issubclass(raised.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(raised)


def on_interrupt(number, frame) -> None:
    global pressed
    pressed = True
    raise KeyboardInterrupt


def remember_termination() -> None:
    """From now on SIGTERM is remembered; whoever has something to save looks at `is_terminated`."""
    signal.signal(signal.SIGTERM, _on_termination)


def _on_termination(number, frame) -> None:
    global is_terminated
    is_terminated = True


def end_if_terminated() -> None:
    """Ends the process where SIGTERM came, with the exit code that a shell gives for it."""
    if is_terminated:
        raise SystemExit(128 + signal.SIGTERM)


def check() -> None:
    """Raises KeyboardInterrupt where one was swallowed; called wherever a command waits for its workers."""
    if pressed:
        raise KeyboardInterrupt
