"""Owns whether the machine suffices: its device, its memory, and the folder that results go to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from memcontrol.checks.finding import FAIL, OK, WARN, Finding

if TYPE_CHECKING:
    from memcontrol.config.study import Config

LIBRARIES_GIB = 1.0  # what a worker holds before it has a model: torch, diffusers, and CUDA's own on a card
_FREE_SHARE = 0.5  # of a card's memory: below it others are at work there
_LITTLE_DISK_GB, _NO_DISK_GB = 5.0, 0.2


def check_device() -> Finding:
    """The cards, or the cores and how many of them torch takes."""
    import torch

    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return _check_cards(torch, n) if n else _check_cores(torch)


def _check_cards(torch, n: int) -> Finding:
    cards, busy = [], False
    for i in range(n):
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(i))
        busy |= free < _FREE_SHARE * total
        kind = "bfloat16" if torch.cuda.get_device_capability(i) >= (8, 0) else "float16, no bfloat16"
        cards.append(f"{torch.cuda.get_device_name(i)} ({free:.1f} of {total:.1f} GiB free, {kind})")
    said = ", ".join(f"{cards.count(card)} x {card}" for card in dict.fromkeys(cards))
    if busy:
        return Finding("device", WARN, f"{said}: somebody else is at work there", "nvidia-smi (shows who)")
    return Finding("device", OK, said)


def _check_cores(torch) -> Finding:
    from memcontrol.reading.threads import count_cores

    cores, given = count_cores(), os.environ.get("OMP_NUM_THREADS")
    said = f"no GPU; {cores} core{'s' if cores > 1 else ''}, torch takes {torch.get_num_threads()}"
    said += f" (OMP_NUM_THREADS={given})" if given else " (OMP_NUM_THREADS is not set)"
    if torch.get_num_threads() > cores:
        text = f"{said}: more threads than cores make each other slower"
        return Finding("device", WARN, text, f"export OMP_NUM_THREADS={cores}")
    return Finding("device", OK, said)


def check_memory(config: Config | None, file: Path | None) -> Finding:
    """The main memory that processes may still take, against the workers' libraries alone."""
    from memcontrol.execution.make import count_workers

    free, total = count_free_gib(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    here = config and config.search.executor in ("local", "inline")
    n = count_workers(config.search) if config and here else 1
    said, needed = f"{free:.1f} of {total:.1f} GiB free", n * LIBRARIES_GIB
    if free >= needed:
        return Finding("memory", OK, said)
    text = f"{said}, and {n} worker{'s take' if n > 1 else ' takes'} {needed:.0f} GiB before any model"
    if free < LIBRARIES_GIB or file is None:
        return Finding("memory", FAIL, text, "end other programs (top shows them), or take a larger machine")
    fewer = max(1, int(free // LIBRARIES_GIB))
    return Finding("memory", WARN, text, f"memcontrol search {shlex.quote(str(file))} --workers {fewer}")


def count_free_gib() -> float:
    """Of main memory, by the smallest limit that the system knows."""
    import torch

    from memcontrol.model.batches import count_free_bytes

    return count_free_bytes(torch.device("cpu")) / 2**30


def check_folder(folder: Path, disk_gb: float | None) -> Finding:
    """Whether the study's folder can be written, with the locks and databases that a study has there, and
    what is left on its disk; of one that is not there yet, the folder that it will be made in. What is
    written for it is gone again."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".memcontrol-doctor-", dir=place) as trial:
            _write_and_lock(Path(trial))
    except (OSError, sqlite3.Error) as error:
        return _explain_unwritable(place, error)
    left = shutil.disk_usage(place).free / 1e9
    said = f"{folder} can be written, {left:,.1f} GB are left"
    if left < _LITTLE_DISK_GB:
        state = FAIL if left < _NO_DISK_GB else WARN
        cure = (
            "free some space (du -sh runs/*; memcontrol clean STUDY.yaml --keep front), or search.keep: front"
        )
        return Finding("folder", state, f"{said}: little", cure)
    if disk_gb and disk_gb > left:
        text = f"{said}, less than search.disk_gb, {disk_gb:g}"
        return Finding("folder", WARN, text, f"search.disk_gb: {int(left)}")
    return Finding("folder", OK, said)


def _write_and_lock(folder: Path) -> None:
    with open(folder / "lock", "wb") as file:
        file.write(b"1")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with contextlib.closing(sqlite3.connect(folder / "study.db", timeout=1)) as connection:
        connection.execute("CREATE TABLE a (b)")
        connection.commit()


def _explain_unwritable(place: Path, error: Exception) -> Finding:
    quoted = shlex.quote(str(place))
    if not place.is_dir():
        text = f"{place} is a file, and the study's folder would lie in it"
        return Finding("folder", FAIL, text, f"mv {quoted} {quoted}.old, or another place for the study file")
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, PermissionError) or not os.access(place, os.W_OK):
        return Finding("folder", FAIL, f"{place} cannot be written: {reason}", f"chmod u+rwx {quoted}")
    text = f"{place} takes no files with locks, as SQLite needs them: {reason}"
    return Finding(
        "folder", FAIL, text, "df -h, df -i (is it full?); on a network's disk use PostgreSQL (storage:)"
    )
