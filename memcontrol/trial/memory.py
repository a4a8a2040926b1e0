"""Owns what the stages of a trial hold in memory, as measured: on the card, or of this process."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure_peak_mib() -> float:
    """The most memory that this process has held so far: on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class StageMemory:
    """The peak of each stage of a trial. On a CPU less what the process held when it had no model yet: its
    libraries."""

    def __init__(self, libraries_mib: float = 0.0):
        self.libraries_mib = libraries_mib
        self.peaks: dict[str, float] = {}

    @contextlib.contextmanager
    def watch(self, stage: str) -> Iterator[None]:
        _reset_peak()
        try:
            yield
        finally:
            peak = _read_peak_mib() - self.libraries_mib
            self.peaks[stage] = round(max(peak, self.peaks.get(stage, 0.0)), 1)


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # where the kernel does not let it, peaks are those so far
            _RESET.write_text("5")


def _read_peak_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return read_process_mib("VmHWM")


def read_process_mib(name: str = "VmRSS") -> float:
    """Of this process, a line of /proc/self/status; 0 where there is none."""
    if not _STATUS.is_file():
        return 0.0
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return next((int(words[1]) / 2**10 for words in lines if words[0] == f"{name}:"), 0.0)
