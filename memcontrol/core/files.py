"""Owns how files are written: to a neighbour first, then renamed, so that a reader never sees half a file;
and for whom: their owner, but for what is made to be given away."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memcontrol.core.errors import DiskFull, MemControlError

PACKAGE = Path(__file__).parent.parent  # where assets and, in a wheel, search spaces lie
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# the system's and SQLite's, wrapped by others
_NO_SPACE_WORDS = ("No space left", "File too large", "Disk quota exceeded", "database or disk is full")


_OWNER_FILE, _OWNER_FOLDER = 0o600, 0o700


def make_private_folder(path: Path) -> Path:
    """The folder, and those above it that are missing, which only their owner may enter, whatever the umask.
    One that is there stays as it is."""
    if path.is_dir():
        return path
    for place in reversed([path, *path.parents]):
        if not place.is_dir():
            with contextlib.suppress(FileExistsError):  # another process made it just now
                place.mkdir(_OWNER_FOLDER)
                place.chmod(_OWNER_FOLDER)
    path.mkdir(exist_ok=True)  # the error of one that is a file
    return path


def open_private(path: Path, mode: str, **more: Any) -> Any:
    """As `open`; a file that it makes is its owner's alone, whatever the umask."""
    return open(path, mode, opener=_make_owned, **more)


def _make_owned(path: str, flags: int) -> int:
    file = os.open(path, flags, _OWNER_FILE)
    if os.fstat(file).st_size == 0 and stat.S_ISREG(os.fstat(file).st_mode):
        with contextlib.suppress(PermissionError):  # another user's
            os.fchmod(file, _OWNER_FILE)
    return file


def make_public(folder: Path) -> None:
    """Gives all files in a folder the rights that the umask gives new ones."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def make_private(path: Path) -> None:
    """Takes from everyone but the owner the right to a file, or to a folder and all in it."""
    places = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    for place in places:
        if not place.is_symlink():
            with contextlib.suppress(FileNotFoundError, PermissionError):
                place.chmod(stat.S_IMODE(place.stat().st_mode) & _OWNER_FOLDER)


@contextlib.contextmanager
def replace_file(path: Path, published: bool = False) -> Iterator[Path]:
    """Yields a temporary neighbour of `path`, which is there already, and empty; it takes the path's place if
    the block ends well. Only its owner may read it, unless it is `published`: then as the umask says. Raises
    DiskFull."""
    if published:
        path.parent.mkdir(parents=True, exist_ok=True)
    else:
        make_private_folder(path.parent)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with name_full_disk(path):
            part.unlink(missing_ok=True)
            with open(part, "wb") if published else open_private(part, "wb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            yield part
            part.chmod(mode)  # safetensors puts a file of its own in its place
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    except OSError as error:
        if error.filename == str(part):
            error.filename = str(path)  # the only one that a person knows
        raise
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path, older_seconds: float = 0) -> None:
    """Removes what processes that were killed have left of `replace_file` in a folder, as far as it has not
    changed for so long."""
    for part in folder.glob(".*.part"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime >= older_seconds:
                part.unlink()


@contextlib.contextmanager
def name_full_disk(path: Path) -> Iterator[None]:
    """Turns "no space left" of whichever library writes below into one line. Raises DiskFull."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) in _NO_SPACE or any(
            words in str(error) for words in _NO_SPACE_WORDS
        ):
            raise DiskFull(
                f"no space left to write {path}: free some space, then run the same command again"
            ) from error
        raise


def write_text(path: Path, text: str, published: bool = False) -> None:
    """In UTF-8; bytes of names of files that are none, as Python escapes them, which JSON and YAML read
    alike."""
    with replace_file(path, published) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path):
    """Raises MemControlError where it is none."""
    return parse_json(path.read_text(encoding="utf-8"), path)


def parse_json(text: str, place: Path):
    """The JSON that was read from a place. Raises MemControlError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise MemControlError(f"{place} holds no JSON that can be read: {said}") from None
