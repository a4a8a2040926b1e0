"""Owns what a check finds: a mark, a line, a cure; and that none hangs, raises or shows a password."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from memcontrol.core.errors import MemControlError

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """What was looked at, `ok`, `warn` or `fail` (a search would fail), what was found, in a line, and what
    to do where it is not well: a command to type, or a key of the study file to set."""

    name: str
    state: str
    text: str
    cure: str = ""


Check = Callable[[], Finding]


def run_check(name: str, check: Check, seconds: float) -> Finding:
    """What the check finds; where it has not ended in time, or raised, that. A service that is silent would
    make a search fail, what only takes long would not."""
    found: list[Finding] = []
    thread = threading.Thread(target=lambda: found.append(_finish_check(name, check)), daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        text, cure = f"no answer within {seconds:g} seconds", _CURES_OF_SILENCE.get(name, "")
        return Finding(name, FAIL if cure else WARN, text, cure)
    return found[0]


_CURES_OF_SILENCE = {
    "database": "look whether it is up and reachable from here (pg_isready), and its host and port",
    "ray": "look whether its head is up: ray status",
    "slurm": "look whether its controller is up: scontrol ping",
}


def _finish_check(name: str, check: Check) -> Finding:
    try:
        found = check()
    except MemControlError as error:
        found = fail_with(name, error)
    except Exception as error:  # of whichever library is broken: it is what was looked for
        reason = " ".join(str(error).split())[:200]
        found = Finding(name, FAIL, f"{type(error).__name__}: {reason}".removesuffix(": "))
    return replace(found, text=_hide_secrets(found.text), cure=_hide_secrets(found.cure))


def _hide_secrets(text: str) -> str:
    try:
        from memcontrol.study.database import hide_password
    except ImportError:  # without its libraries no database was asked, and no URL read
        return text
    return hide_password(text)


def fail_with(name: str, error: MemControlError) -> Finding:
    """Its line is "what is wrong; what to do"."""
    text, _, cure = str(error).partition("; ")
    return Finding(name, FAIL, text, cure)


_NEXT_FAULT = re.compile(r"; (?=(?:unknown )?key ')")  # as memcontrol.config.problems begins its sentences


def list_faults(found: Finding) -> list[Finding]:
    """A finding for each key of a study file that is wrong, of which one line names all; otherwise itself."""
    if found.state != FAIL:
        return [found]
    line = "; ".join(filter(None, (found.text, found.cure)))
    return [fail_with(found.name, MemControlError(fault)) for fault in _NEXT_FAULT.split(line)]
