"""Owns Ctrl-C: it is remembered, since a library in whose callback Python raises KeyboardInterrupt may
swallow it."""

from __future__ import annotations

import signal

pressed = False


def remember() -> None:
    """From now on Ctrl-C is raised as always, and remembered; where it is ignored (a job in the background)
    it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, on_interrupt)


def on_interrupt(number, frame) -> None:
    global pressed
    pressed = True
    raise KeyboardInterrupt


def check() -> None:
    """Raises KeyboardInterrupt where one was swallowed; called wherever a command waits for its workers."""
    if pressed:
        raise KeyboardInterrupt
