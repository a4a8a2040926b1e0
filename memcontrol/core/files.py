"""Owns how files are written: to a neighbour first, then renamed, so that a reader never sees half a file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

from memcontrol.core.errors import DiskFull

PACKAGE = Path(__file__).parent.parent  # where assets and, in a wheel, search spaces lie
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# the system's and SQLite's, wrapped by others
_NO_SPACE_WORDS = ("No space left", "File too large", "Disk quota exceeded", "database or disk is full")


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a temporary neighbour of `path`; it takes the path's place if the block ends well. Raises
    DiskFull."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with name_full_disk(path):
            yield part
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    except OSError as error:
        if error.filename == str(part):
            error.filename = str(path)  # the only one that a person knows
        raise
    finally:
        part.unlink(missing_ok=True)


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


def write_text(path: Path, text: str) -> None:
    """In UTF-8; bytes of names of files that are none, as Python escapes them, which JSON and YAML read
    alike."""
    with replace_file(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))
