"""Owns what one reading tells of each image of a folder; kept in a file, so that none is read twice.

A row stands for one page of one file, in the state (size, times) in which it was read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL
from PIL import Image

from memcontrol.config.data import Pages
from memcontrol.core import interrupt
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import name_full_disk, open_private
from memcontrol.data.cache import hold_lock
from memcontrol.data.twins import THUMBNAIL_SIDE, Twins, shrink_to_thumbnail
from memcontrol.reading.decode import OpenedFile, convert_to_rgb, name_page, open_file, refuse_large
from memcontrol.reading.greys import Greys, is_deep, read_greys
from memcontrol.reading.threads import map_in_threads

_READ_BY = f"1 {PIL.__version__}"  # by which images are read; what was read by others is read anew
_SECONDS = 1.0  # after which what was read is written
_SHAPE = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
ShowDone = Callable[[int, int], None]
Told = TypeVar("Told")


@dataclass(frozen=True)
class Seen:
    """What one reading tells of an image: a hash of its pixels, its sides, how many pages its file has; for
    whose it is a name that says nothing; its thumbnail, as bytes uint8 [3, S, S], of deep greys float32 [S,
    S]; of these their kind ("I": whole numbers, "F": fractions; "colour": colour of 16 bits), and the least
    and the largest value; and whether the least is white."""

    digest: str
    width: int
    height: int
    n_pages: int
    patient: str
    thumbnail: bytes
    kind: str = ""
    least: float = 0.0
    most: float = 0.0
    is_inverted: bool = False

    def show_thumbnail(self, greys: Greys | None) -> np.ndarray:
        """uint8 [3, S, S]."""
        if self.kind not in ("I", "F"):
            return np.frombuffer(self.thumbnail, np.uint8).reshape(3, *_SHAPE)
        assert greys is not None, "deep greys have a scale"
        image = greys.convert(np.frombuffer(self.thumbnail, np.float32).reshape(_SHAPE), self.is_inverted)
        return np.asarray(image).transpose(2, 0, 1)


@dataclass(frozen=True)
class Examined:
    """Images in order, by their paths inside the folder (of files of which all pages are read, by
    `name_page`); and why others cannot be."""

    images: dict[str, Seen] = field(default_factory=dict)
    failures: dict[str, MemControlError] = field(default_factory=dict)


_SEEN_COLUMNS = [column.name for column in fields(Seen)]
_MAKE_TABLES = f"""
CREATE TABLE IF NOT EXISTS images (file TEXT, page INTEGER, state TEXT, {", ".join(_SEEN_COLUMNS)});
CREATE UNIQUE INDEX IF NOT EXISTS pages ON images (file, page);
CREATE TABLE IF NOT EXISTS twins (about TEXT PRIMARY KEY, found TEXT);
"""
_KEEP_IMAGE = f"INSERT OR REPLACE INTO images VALUES ({', '.join('?' * (3 + len(_SEEN_COLUMNS)))})"


@dataclass(frozen=True)
class _Rules:
    """Of which files all pages are read, and which are too large."""

    pages: Pages
    most_pixels: int | None


def examine_files(
    folder: Path,
    files: Sequence[str],
    kept: Path | None = None,
    pages: Pages = "refuse",
    most_pixels: int | None = None,
    progress: ShowDone = lambda done, total: None,
) -> Examined:
    """Reads the files of a folder that are not known from `kept` in the state that they have, on all cores;
    there, what is read is kept every second. Raises MemControlError: files of several pages, where they are
    to be refused; DiskFull."""
    rules, failures = _Rules(pages, most_pixels), {}
    with _open_index(kept) as index:
        known = _recall_images(index, folder, set(files))
        todo = [file for file in files if not _is_complete(known.get(file), pages)]
        n_known = len(files) - len(todo)
        read = map_in_threads(partial(_examine_file, folder, rules), todo)
        for file, found in _pause(zip(todo, read), index, lambda n: progress(n_known + n, len(files))):
            if isinstance(found, MemControlError):
                failures[file] = found
            else:
                state, known[file] = found
                rows = [(file, page, state, *astuple(seen)) for page, seen in enumerate(known[file])]
                index.executemany(_KEEP_IMAGE, rows)
    return _choose_pages(folder, {file: known[file] for file in files if file in known}, rules, failures)


def _pause(
    results: Iterable[Told], index: sqlite3.Connection, progress: Callable[[int], None]
) -> Iterator[Told]:
    """What was done with results so far is written now and then, and told."""
    last, n = time.monotonic(), 0
    progress(n)
    for n, result in enumerate(results, start=1):
        interrupt.check()
        yield result
        if time.monotonic() - last > _SECONDS:
            index.commit()
            progress(n)
            last = time.monotonic()
    progress(n)


def _is_complete(seen: list[Seen] | None, pages: Pages) -> bool:
    return seen is not None and (pages != "all" or len(seen) == seen[0].n_pages)


@contextlib.contextmanager
def _open_index(path: Path | None) -> Iterator[sqlite3.Connection]:
    """One process at a time: the others then find what it kept, which is there whatever happens."""
    lock = hold_lock(path) if path else contextlib.nullcontext()
    with name_full_disk(path or Path()), lock, contextlib.closing(_connect(path)) as index:
        try:
            yield index
        finally:
            index.commit()


def _connect(path: Path | None) -> sqlite3.Connection:
    """A file that is broken, or of another form, is begun anew."""
    if path:
        open_private(path, "ab").close()
    index = sqlite3.connect(path or ":memory:")
    try:
        index.executescript(_MAKE_TABLES)
        index.execute(f"SELECT file, page, state, {', '.join(_SEEN_COLUMNS)} FROM images LIMIT 1").fetchall()
        return index
    except sqlite3.DatabaseError as error:
        index.close()
        if path is None or not _is_broken(error):
            raise
    path.unlink()
    return _connect(path)


def _is_broken(error: sqlite3.DatabaseError) -> bool:
    return not isinstance(error, sqlite3.OperationalError) or "no such column" in str(error)


def _recall_images(index: sqlite3.Connection, folder: Path, files: set[str]) -> dict[str, list[Seen]]:
    """Of each file that is as it was when it was read, the pages from the first on; rows of others go."""
    found: dict[str, list[Seen]] = {}
    gone, states = set(), {}
    for file, page, state, *values in index.execute("SELECT * FROM images ORDER BY file, page"):
        if file not in states:
            states[file] = _tell_state(f"{folder}/{file}") if file in files else None
        if state != states[file]:
            gone.add(file)
        elif page == len(found.setdefault(file, [])):
            found[file].append(Seen(*values))
    index.executemany("DELETE FROM images WHERE file = ?", [(file,) for file in gone])
    return {file: pages for file, pages in found.items() if file not in gone}


def _tell_state(path: str) -> str | None:
    """Of a file that is there: what changes whenever it is written."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {_READ_BY}"


def _examine_file(folder: Path, rules: _Rules, file: str) -> tuple[str | None, list[Seen]] | MemControlError:
    """Its state before it was read, and its first page or all."""
    try:
        state = _tell_state(f"{folder}/{file}")
        with open_file(folder / file) as opened:
            refuse_large(folder / file, opened.size, rules.most_pixels)
            n = opened.n_pages if rules.pages == "all" else 1
            return state, [_examine_page(opened, page) for page in range(n)]
    except MemControlError as error:
        return error


def _examine_page(opened: OpenedFile, page: int) -> Seen:
    with opened.read_page(page) as image:
        return _describe_deep(image, opened) if is_deep(image) else _describe_shown(image, opened)


def _describe_deep(image: Image.Image, opened: OpenedFile) -> Seen:
    """As its values are: which are shown as black and as white, the whole folder will say."""
    values, is_inverted = read_greys(image), bool(image.info.get("inverted"))
    plain = values.astype(np.float32)
    return Seen(
        _digest(f"{image.size} {is_inverted}", plain),
        *image.size,
        opened.n_pages,
        opened.patient,
        shrink_to_thumbnail(Image.fromarray(plain)).tobytes(),
        image.mode[0],
        float(values.min()),
        float(values.max()),
        is_inverted,
    )


def _describe_shown(image: Image.Image, opened: OpenedFile) -> Seen:
    shown, is_wide = convert_to_rgb(image, None), bool(image.info.get("wide"))
    pixels = np.asarray(shown)
    return Seen(
        _digest(f"{shown.size}", pixels),
        *shown.size,
        opened.n_pages,
        opened.patient,
        shrink_to_thumbnail(shown).tobytes(),
        "colour" if is_wide else "",
        0.0,
        float(pixels.max()) if is_wide else 0.0,
    )


def _digest(form: str, pixels: np.ndarray) -> str:
    found = hashlib.sha256(form.encode())
    found.update(np.ascontiguousarray(pixels).data)
    return found.hexdigest()[:16]


def _choose_pages(
    folder: Path, known: Mapping[str, list[Seen]], rules: _Rules, failures: dict[str, MemControlError]
) -> Examined:
    """Of the files that could be read; what another time was not too large may be so now. Raises
    MemControlError."""
    images: dict[str, Seen] = {}
    several: list[str] = []
    for file, seen in known.items():
        try:
            refuse_large(folder / file, (seen[0].width, seen[0].height), rules.most_pixels)
        except MemControlError as error:
            failures[file] = error
            continue
        if seen[0].n_pages == 1 or rules.pages == "first":
            images[file] = seen[0]
        elif rules.pages == "all":
            images |= {name_page(file, page): one for page, one in enumerate(seen)}
        else:
            several.append(file)
    if several:
        raise MemControlError(
            f"{len(several)} files have several pages or frames, such as {folder / several[0]} with "
            f"{known[several[0]][0].n_pages}; set data.pages to first or all (audit: --pages), or store those"
            " that are meant as files of their own"
        )
    return Examined(images, failures)


def recall_twins(kept: Path | None, digests: Sequence[str], seed: int, find: Callable[[], Twins]) -> Twins:
    """Of images with these digests; found where they are not known from `kept`, and kept there."""
    if kept is None:
        return find()
    about = hashlib.sha256("\n".join([_READ_BY, str(seed), *digests]).encode()).hexdigest()
    with _open_index(kept) as index:
        row = index.execute("SELECT found FROM twins WHERE about = ?", (about,)).fetchone()
        if row:
            told = json.loads(row[0])
            return Twins(**{**told, "pairs": tuple((i, j) for i, j in told["pairs"])})
        found = find()
        told = json.dumps({column.name: getattr(found, column.name) for column in fields(Twins)})
        index.execute("DELETE FROM twins")
        index.execute("INSERT INTO twins VALUES (?, ?)", (about, told))
    return found
