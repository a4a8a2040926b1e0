"""Owns the errors a user can mend: one line that says what was given, what is allowed and what to do."""

from __future__ import annotations

import sys


class MemControlError(Exception):
    """The library raises it, the command line prints it as one line and exits with 1."""


def refuse_windows() -> None:
    """Raises MemControlError on Windows: locks, signals, rights and mapped files are those of POSIX here."""
    if sys.platform == "win32":
        raise MemControlError(
            "memcontrol runs on Linux and macOS, not on Windows itself; install it in WSL 2 (wsl --install)"
        )


class Diverged(MemControlError):
    """The loss became NaN or infinite: the choice is recorded as pruned and the search goes on."""


class RewardFailed(MemControlError):
    """A reward of the user's own raised, or gave no number: the trial is given up at once, since trying again
    gives the same, and the search goes on."""


class DiskFull(MemControlError):
    """Nothing more can be written: the search stops, everything finished is kept, the same command goes
    on."""


class FolderFull(MemControlError):
    """A further trial would exceed the bound on the study's folder: the search stops, and the same command
    goes on once there is room."""


class SearchEnded(MemControlError):
    """The search was told to end, or its time is over: everything is kept, the same command goes on."""


class TrialsKeepFailing(MemControlError):
    """Trial after trial fails for good, so that something other than their choices is wrong: the search
    stops."""


class SpaceExhausted(MemControlError):
    """Every choice of the space was asked for already: the search ends with what it has."""
