"""Owns files of tensors, and folders, that are made once: whoever comes first makes them, all others read
them; and files that are written a part at a time, since the whole would not fit into memory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from memcontrol.core.files import make_private_folder, name_full_disk, replace_file

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_DTYPES = {  # as safetensors calls them
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int8": "I8",
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


def load_or_make(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU and mapped from it. Where there is none it is made, by
    one process at a time: `path` names what its content depends on. Raises DiskFull."""
    with hold_lock(path):
        if not path.exists():
            save_tensors(path, make())
    return map_tensors(path)


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    published: bool = False,
) -> None:
    """A safetensors file. The library's own writer holds all of it once more as bytes; this one none. Raises
    DiskFull."""
    rows = {
        name: TensorRows(str(tensor.dtype), tuple(tensor.shape), (tensor,))
        for name, tensor in tensors.items()
    }
    write_tensors(path, rows, metadata, published)


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU and mapped from it."""
    from safetensors.torch import load_file

    return load_file(path)


def find_cache_folder() -> Path:
    """The user's own, for what no study owns: $MEMCONTROL_CACHE, or memcontrol/ where the system keeps
    caches."""
    if given := os.environ.get("MEMCONTROL_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memcontrol"


def make_folder(path: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made by one process at a time where there is none: `path` names what its content depends
    on. Half of one is never seen. Raises DiskFull."""
    with hold_lock(path):
        if not path.is_dir():
            part = path.with_name(f".{path.name}.part")
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
            try:
                with name_full_disk(path):
                    make(part)
                    os.replace(part, path)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return path


def digest_file(path: Path) -> str:
    """SHA-256 of the content; once for each process and state of the file."""
    state = path.stat()
    return _digest_state(path, state.st_size, state.st_mtime_ns)


@functools.cache
def _digest_state(path: Path, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def map_bytes(path: Path, name: str) -> np.ndarray:
    """A uint8 tensor of a safetensors file as an array that is read from the file where it is looked at."""
    import numpy as np

    with open(path, "rb") as file:
        n_head = int.from_bytes(file.read(8), "little")
        told = json.loads(file.read(n_head))[name]
    assert told["dtype"] == "U8", "images are bytes"
    start = 8 + n_head + told["data_offsets"][0]
    # "c": torch warns of what may not be written; what is written stays in this process
    return np.memmap(path, np.uint8, "c", offset=start, shape=tuple(told["shape"]))


def iterate_rows(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """`size` rows at a time. Of a mapped array, what was read is let go again: else the process would come to
    hold the whole file."""
    for start in range(0, len(array), size):
        yield array[start : start + size]
        mapped = getattr(array, "_mmap", None)
        if mapped is not None:
            mapped.madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def hold_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """One process at a time, of those that would make the file. Whether it is this one: another one may be,
    where `wait` is off."""
    from filelock import FileLock, Timeout

    make_private_folder(path.parent)
    lock = FileLock(f"{path}.lock", timeout=-1 if wait else 0, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@dataclass(frozen=True)
class TensorRows:
    """A tensor that is written in parts along its first axis: its type, its shape [N, ...], and the parts."""

    dtype: str  # as str(torch.dtype)
    shape: tuple[int, ...]
    parts: Iterable[Tensor]


def write_tensors(
    path: Path,
    tensors: Mapping[str, TensorRows],
    metadata: Mapping[str, str] | None = None,
    published: bool = False,
) -> None:
    """A safetensors file, part by part: no more than one is in memory. Raises DiskFull, and ValueError where
    the parts are not as many rows as was said."""
    # wide types first, so that each tensor begins at a multiple of its width
    names = sorted(tensors, key=lambda name: -_count_width(tensors[name]))
    with replace_file(path, published) as part, open(part, "wb") as file:
        file.write(_format_head(names, tensors, metadata or {}))
        for name in names:
            _write_parts(file, name, tensors[name])


def _count_width(rows: TensorRows) -> int:
    return int(_DTYPES[rows.dtype].strip("IUBFOL") or 8) // 8


def _count_bytes(rows: TensorRows) -> int:
    n = _count_width(rows)
    for size in rows.shape:
        n *= size
    return n


def _format_head(
    names: Sequence[str], tensors: Mapping[str, TensorRows], metadata: Mapping[str, str]
) -> bytes:
    """The header's length as eight bytes, and the header: type, shape and place of each tensor."""
    head: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in names:
        end = start + _count_bytes(tensors[name])
        kind = {"dtype": _DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape)}
        head[name] = {**kind, "data_offsets": [start, end]}
        start = end
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_parts(file: BinaryIO, name: str, rows: TensorRows) -> None:
    import torch

    n_written = 0
    for tensor in rows.parts:
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        file.write(data.data)
        n_written += data.nbytes
    if n_written != _count_bytes(rows):
        raise ValueError(f"{name}: {n_written} bytes were given in place of {_count_bytes(rows)}")
