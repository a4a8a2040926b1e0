"""Everything that waits for a card, in order of importance and within some minutes: a whole search, trials an
hour beside others, the step's share of the card's arithmetic and its kernels, shards, the first step, peak
memory beside what is predicted, and the paths that only a card takes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks._gpu_size import ROW, SIZES, Size, shorten_error

ROOT = Path(__file__).parent.parent
MINUTES = 8.0
LEAST = 12.0  # seconds without which a part is not begun: what it takes to import the libraries
# a part gets so large a share of the time that is left when it begins
SHARES = {
    "search": 0.55,
    "peers": 0.45,
    "step": 0.4,
    "shards": 0.3,
    "trial": 0.35,
    "memory": 0.4,
    "paths": 0.95,
}


def run(
    device: str, minutes: float = MINUTES, keep: Callable[[list[dict]], None] = lambda rows: None
) -> list[dict]:
    """Rows of all parts, printed as they come; `keep` is given those so far after each part, and when it is
    cut short."""
    return run_parts(SIZES[device], minutes, keep)


def run_parts(size: Size, minutes: float, keep: Callable[[list[dict]], None]) -> list[dict]:
    rows: list[dict] = []
    deadline = time.monotonic() + 60 * minutes
    for part in list_parts(size):
        left = deadline - time.monotonic()
        seconds = min(left, max(LEAST, SHARES[part.split()[0]] * left))
        try:
            for row in (
                run_part(part, size, seconds) if left >= LEAST else [make_row("not run", "no time left")]
            ):
                rows.append({"part": part, **row})
                print(describe(rows[-1]), flush=True)
        finally:
            keep(rows)
    return rows


def list_parts(size: Size) -> list[str]:
    """By importance."""
    memory = [f"memory {base} {side}" for base, side in size.memory]
    return ["search", "peers", "step", "shards", "trial", *memory, "paths"]


def make_row(what: str, figure: float | str, unit: str = "", beside: str = "") -> dict:
    return {"what": what, "figure": figure, "unit": unit, "beside": beside}


def describe(row: dict) -> str:
    figure = f"{row['figure']:.3g}" if isinstance(row["figure"], float) else str(row["figure"])
    words = f"{row['part']}: {row['what']}: {figure} {row['unit']}".rstrip()
    return f"{words} ({row['beside']})" if row["beside"] else words


def run_part(part: str, size: Size, seconds: float) -> Iterator[dict]:
    """The rows that a part tells, as it tells them; one more where it fails, or is not done in time."""
    started, words = time.monotonic(), [part, json.dumps(asdict(size))]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._gpu_parts", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), end(process)))
        timer.start()
        try:
            assert process.stdout is not None
            yield from (json.loads(line.removeprefix(ROW)) for line in process.stdout if line.startswith(ROW))
            process.wait()
        finally:
            timer.cancel()
            end(process)
            if process.stdout is not None:
                process.stdout.close()
        said.seek(0)
        took = time.monotonic() - started
        if late.is_set():
            yield make_row("cut off", took, "s", "its share of the time was over")
        elif process.returncode:
            yield make_row("failed", f"exit {process.returncode}", beside=shorten_error(said.read()))
        else:
            yield make_row("the part took", took, "s")


def end(process: subprocess.Popen) -> None:
    """With what it started; a search is given a moment to end its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            time.sleep(1 if number == signal.SIGTERM else 0)
    process.wait()
