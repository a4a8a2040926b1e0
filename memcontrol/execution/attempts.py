"""Owns what a trial's folder says of its attempts: which process works on it, where and how far, and which
attempts failed."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memcontrol.core.files import make_private_folder, open_private, read_json, write_json
from memcontrol.core.run_folder import RunFolder

_PROGRESS_SECONDS = 1.0


class Superseded(Exception):
    """Another attempt at the same trial has begun: this process was thought dead, and must write nothing
    more."""


@dataclass
class Attempt:
    """One process at work on a trial's folder. Its line is the last of attempts.jsonl as long as no other has
    taken over."""

    folder: Path
    identity: str
    written_at: float = field(default=0.0)

    def check(self) -> None:
        """Raises Superseded."""
        if not self.is_current():
            raise Superseded(f"another attempt has taken over {self.folder}")

    def is_current(self) -> bool:
        return read_attempts(self.folder)[-1]["identity"] == self.identity

    def progress(self, stage: str, done: int, total: int) -> None:
        """Says how far it is, at most once a second. Raises Superseded."""
        if time.monotonic() - self.written_at < _PROGRESS_SECONDS:
            return
        self.written_at = time.monotonic()
        self.check()
        write_json(
            RunFolder(self.folder).progress_file,
            {"stage": stage, "done": done, "total": total, "at": format_now(), "identity": self.identity},
        )


def begin_attempt(folder: Path) -> Attempt:
    """Takes the folder over: whoever worked on it before stops at its next step."""
    make_private_folder(folder)
    host, pid = socket.gethostname(), os.getpid()
    line: dict[str, Any] = {
        "identity": f"{host}-{pid}-{time.time_ns()}",
        "host": host,
        "pid": pid,
        "gpu": os.environ.get("CUDA_VISIBLE_DEVICES") or None,
        "started": format_now(),
    }
    with open_private(RunFolder(folder).attempts_file, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return Attempt(folder, line["identity"])


def read_attempts(folder: Path) -> list[dict]:
    """One entry for each attempt, the first first: identity, host, pid, gpu, started. A line cut short by a
    crash counts for nothing."""
    path = RunFolder(folder).attempts_file
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def read_progress(folder: Path) -> dict | None:
    """How far the present attempt is: stage, done, total, at; None before its first word."""
    attempts = read_attempts(folder)
    path = RunFolder(folder).progress_file
    said = read_json(path) if path.is_file() else None
    return said if said and attempts and said["identity"] == attempts[-1]["identity"] else None


def note_failure(folder: Path, reason: str) -> int:
    """Records that an attempt failed. Returns how many have."""
    failures = [*read_failures(folder), {"reason": reason, "at": format_now()}]
    write_json(RunFolder(folder).failures_file, failures)
    return len(failures)


def read_failures(folder: Path) -> list[dict]:
    path = RunFolder(folder).failures_file
    return read_json(path) if path.is_file() else []


def format_now() -> str:
    """UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
