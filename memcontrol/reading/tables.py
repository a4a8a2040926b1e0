"""Owns metadata tables: what files beside the images say of them, such as captions, row by row."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from memcontrol.core.errors import MemControlError

_STEMS = ("metadata", "captions")
_FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path")
_NOTHING = {"nan", "<na>", "none", "null", "n/a"}  # in any case
_SEPARATORS = (",", ";", "\t")
_EXAMPLE = '{"file_name": "a.png", "text": "a cat"}'
_CLOSE = 'each quote that begins a text needs one that ends it, and within a text quotes are doubled ("")'
# what tells one Unicode from another at the beginning of a file
_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


Taken = TypeVar("Taken")


class NameRow(Protocol):
    """A dataset that was unpacked: what a person calls it, and where the row of a file in it stands."""

    @property
    def path(self) -> str: ...

    def name_row(self, file: str) -> str: ...


@dataclass(frozen=True)
class TableRow:
    """What a row says of an image: values by column, where it stands, and whether it is a caption that stands
    alone, in no column."""

    values: Mapping[str, Any]
    place: str  # "metadata.csv, row 3"
    is_bare: bool = False


@dataclass(frozen=True)
class Tables:
    """Of all metadata tables of a folder: rows by the image's path inside it, columns in their order, rows
    that name no image which is there, the tables' names, and which of these hold nothing."""

    rows: Mapping[str, Sequence[TableRow]]
    columns: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()

    def find_column(self, names: Sequence[str]) -> str | None:
        """The first of these names that a column has, in any case and without spaces around it."""
        known = {_simplify(column): column for column in reversed(self.columns)}
        return next((known[name] for name in map(_simplify, names) if name in known), None)

    def describe_column(self, column: str) -> str:
        """For a person, who knows of no column where captions stand alone."""
        is_bare = all(row.is_bare for rows in self.rows.values() for row in rows)
        return ("" if is_bare else f"column '{column}' of ") + ", ".join(self.names)


def clean_text(value: Any) -> str:
    """Of a field: nothing where there is none, or what pandas writes for that."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(value).strip()
    return "" if text.lower() in _NOTHING else text


def _simplify(column: str) -> str:
    return column.strip().lower()


def is_table(path: Path) -> bool:
    """Whether a file is a metadata table, by its name in any case."""
    return path.stem.lower() in _STEMS and path.suffix.lower() in _READERS


def read_tables(folder: Path, tables: Sequence[str], dataset: NameRow | None = None) -> Tables:
    """Of `tables`, paths inside the folder; where a dataset was unpacked into it, rows stand where that one
    says. Raises MemControlError."""
    rows: dict[str, list[TableRow]] = {}
    columns: dict[str, None] = {}
    unmatched: list[str] = []
    empty: list[str] = []
    for table in tables:
        found = list(_read_table(folder / table, table))
        empty += [] if found else [table]
        for row in found:
            columns.update(dict.fromkeys(row.values))
            name = _find_image(folder, (folder / table).parent, row.values, row.place)
            if name is None:
                unmatched.append(f"{row.place}, with '{_name_file(row.values)}'")
            else:
                rows.setdefault(name, []).append(
                    replace(row, place=dataset.name_row(name)) if dataset else row
                )
    if unmatched and not rows:
        raise MemControlError(
            f"{folder}: no row of {', '.join(tables)} names an image that is there, the first being "
            f"{unmatched[0]}; file_name is the image's path, seen from the table"
        )
    if dataset:
        columns.pop("file_name", None)  # which is ours
    names = (dataset.path,) if dataset else tuple(tables)
    return Tables(rows, tuple(columns), tuple(unmatched), names, tuple(empty))


def _read_table(path: Path, title: str) -> Iterator[TableRow]:
    """Rows, without spaces around columns."""
    try:
        rows = list(_READERS[path.suffix.lower()](path)) if path.stat().st_size else []
    except MemControlError:
        raise
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise MemControlError(f"{path} cannot be read: {describe_read_error(error)}") from None
    for number, row in rows:
        if isinstance(row, _Bare):
            yield TableRow({"file_name": row.name, "text": row.caption}, f"{title}, {row.name!r}", True)
        elif isinstance(row, dict):
            values = {str(column).strip(): value for column, value in row.items()}
            _refuse_twice(path, list(row))
            yield TableRow(values, f"{title}, row {number}")
        else:
            raise MemControlError(f"{path}, row {number} is no object; each is one such as {_EXAMPLE}")


def _refuse_twice(path: Path, columns: Sequence[Any]) -> None:
    """Columns of one name, of which one would be taken in silence. Raises MemControlError."""
    known = [name for name in (_simplify(str(column)) for column in columns) if name]
    if len(set(known)) < len(known):
        twice = next(name for name in known if known.count(name) > 1)
        raise MemControlError(
            f"{path} has the column {twice!r} {known.count(twice)} times; give each a name of its own"
        )


def describe_read_error(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "it is not UTF-8; store it so"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _find_image(folder: Path, beside: Path, values: Mapping[str, Any], place: str) -> str | None:
    """The path inside the folder of the image that a row is of; None where there is no such image. Raises
    MemControlError."""
    name = _name_file(values)
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise MemControlError(
            f"{folder}: {place} has no 'file_name'; each row names its image, as {_EXAMPLE} does"
        )
    path = os.path.normpath(beside / name.strip())
    inside = os.path.relpath(path, os.path.normpath(folder)) if not os.path.isabs(name) else None
    if inside is None:
        path = os.path.realpath(path)
        inside = os.path.relpath(path, os.path.realpath(folder))
    if inside.split(os.sep)[0] == os.pardir:
        raise MemControlError(
            f"{folder}: {place} names '{name}', which lies outside the folder; move the image into it, or "
            "take the row out"
        )
    return Path(inside).as_posix() if os.path.isfile(path) else None


def _name_file(values: Mapping[str, Any]) -> Any:
    """What a row's first column of files says, None where there is none."""
    known = {_simplify(column): value for column, value in values.items()}
    return next((known[name] for name in _FILE_COLUMNS if name in known), None)


def read_text(path: Path) -> str:
    """In UTF-8, or as its first bytes say. Raises OSError and UnicodeError."""
    content = path.read_bytes()
    return content.decode(_MARKS.get(content[:2], "utf-8-sig"))


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Of JSON, one value a line; other characters than a line feed may be part of a text."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line, object_pairs_hook=_make_object)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"line {number} is no JSON ({error.msg}, column {error.colno}); each is one such as "
                    f"{_EXAMPLE}"
                ) from None


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a name that is there twice, of which the last would be taken in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has {twice!r} {names.count(twice)} times; keep one of them")
    return found


@dataclass(frozen=True)
class _Bare:
    """A caption that stands alone beside its image's name."""

    name: str
    caption: Any


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """A list of rows; or an object of one for each image, as kohya's scripts write it, which may be the
    caption alone."""
    found = json.loads(read_text(path), object_pairs_hook=_make_object)
    if isinstance(found, dict):
        found = [
            {"file_name": name, **row} if isinstance(row, dict) else _Bare(name, row)
            for name, row in found.items()
        ]
    if not isinstance(found, list):
        raise ValueError(f"it is no list of rows such as [{_EXAMPLE}]")
    yield from enumerate(found, start=1)


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    text = read_text(path)
    head = next(iter(text.split("\n")), "")
    separator = next((one for one in _SEPARATORS if _names_images(head, one)), ",")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    _refuse_twice(path, _take_row(0, lambda: reader.fieldnames or (), reader))
    for number in itertools.count(1):
        row = _take_row(number, lambda: next(reader, None), reader)
        if row is None:
            return
        if None in row:
            raise ValueError(
                f"row {number} (line {reader.line_num}) has more fields than there are columns; put texts "
                f"that hold '{separator}' in double quotes"
            )
        yield number, row


def _take_row(number: int, take: Callable[[], Taken], reader: csv.DictReader) -> Taken:
    """Raises ValueError, which says where the row begins and what mends it."""
    begin = reader.line_num + 1
    try:
        return take()
    except csv.Error as error:
        cure = f"shorten the text; where it is none, {_CLOSE}" if "limit" in str(error) else _CLOSE
        what = f"row {number}" if number else "the header"
        raise ValueError(f"{what}, from line {begin} on: {error}; {cure}") from None


def _names_images(head: str, separator: str) -> bool:
    columns = {_simplify(column.strip().strip('"')) for column in head.split(separator)}
    return len(columns) > 1 and not columns.isdisjoint(_FILE_COLUMNS)


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise MemControlError(
            f"{path} needs pyarrow, which is not installed: pip install 'memcontrol[datasets]', or store "
            "metadata.csv"
        ) from None
    try:
        table = parquet.read_table(path)
        _refuse_twice(path, table.column_names)
        yield from enumerate(table.to_pylist(), start=1)
    except ArrowException as error:
        raise ValueError(describe_read_error(error)) from None


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
