"""Owns how many images go through a network at a time: as many as free memory holds, and half of them where
that was too many."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

MOST_AT_A_TIME = 64  # beyond it no device gains
_SHARE = 0.7  # of free memory: kernels take work space, and allocators leave gaps
_CPU_BYTES = 2**28  # more activations at a time make no core faster
_WORTH_COLLECTING = 2**28
_CGROUP = Path("/sys/fs/cgroup")

Found = TypeVar("Found")


def count_free_bytes(device: torch.device) -> int:
    """Of a card, what nobody holds, torch's own cache counted as free; of a machine, what processes may still
    take, by the smallest limit that it knows."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_read_available_bytes(), _read_cgroup_bytes())


def _read_available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 2**10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read_cgroup_bytes() -> int:
    """What a container may still take; without a limit as good as endless."""
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return 2**62 if limit == "max" else max(int(limit) - int(used), 0)
    except (OSError, ValueError):
        return 2**62


def choose_batch(bytes_each: int, device: torch.device, fixed_bytes: int = 0) -> int:
    """How many images at a time, a power of two up to 64, where each needs `bytes_each` beside `fixed_bytes`
    in all. A power of two, since a batch is part of what sums round by: runs on one machine shall agree."""
    free = _SHARE * count_free_bytes(device) - fixed_bytes
    if device.type == "cpu":
        free = min(free, _CPU_BYTES)
    n = max(1, min(MOST_AT_A_TIME, int(free // max(bytes_each, 1))))
    return 2 ** (n.bit_length() - 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Of a card, or of a CPU, which has no error class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def release_memory(n_bytes: int | None = None) -> None:
    """Gives back what nobody refers to any more, about `n_bytes` where that is known: a collection of
    Python's cycles takes a third of a second, and is not made for little."""
    if n_bytes is not None and n_bytes < _WORTH_COLLECTING:
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # glibc keeps what is freed between tensors that live: a gigabyte after full fine-tuning of SD 1.5
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def halve_until_it_fits(
    n: int, size: int, work: Callable[[slice], Found], economize: Callable[[], bool] = lambda: False
) -> Iterator[tuple[slice, Found]]:
    """`work` on all of n, `size` at a time: each part and what it gave. A part that does not fit into memory
    is done again in halves, those after it too; one alone that does not, once more after `economize` where
    that says that it could save something. Raises torch.OutOfMemoryError where nothing helps."""
    start, size = 0, min(size, n)
    while start < n:
        rows = slice(start, min(start + size, n))
        found = _try_part(work, rows)
        if found is not None:
            yield rows, found[0]
            start = rows.stop
        elif size > 1:
            size //= 2
        elif not economize():
            yield rows, work(rows)  # for the last time: it raises, or memory was given back meanwhile
            start = rows.stop


def _try_part(work: Callable[[slice], Found], rows: slice) -> tuple[Found] | None:
    """None where memory did not suffice; what the failed call held is free by then."""
    try:
        return (work(rows),)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    release_memory()
    return None
