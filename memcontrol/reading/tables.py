"""Owns metadata tables: what files beside the images say of them, such as captions, row by row."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memcontrol.core.errors import MemControlError

_STEMS = ("metadata", "captions")
_FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path")
_NOTHING = ("nan", "NaN", "<NA>", "None", "null", "N/A")
_SEPARATORS = (",", ";", "\t")
_EXAMPLE = '{"file_name": "a.png", "text": "a cat"}'
# what tells one Unicode from another at the beginning of a file
_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


@dataclass(frozen=True)
class TableRow:
    """What a row says of an image: values by column, and where it stands."""

    values: Mapping[str, Any]
    place: str  # "metadata.csv, row 3"


@dataclass(frozen=True)
class Tables:
    """Of all metadata tables of a folder: rows by the image's path inside it, columns in their order, rows
    that name no image which is there, and the tables' names."""

    rows: Mapping[str, Sequence[TableRow]]
    columns: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def find_column(self, names: Sequence[str]) -> str | None:
        """The first of these names that a column has, in any case and without spaces around it."""
        known = {_simplify(column): column for column in reversed(self.columns)}
        return next((known[name] for name in map(_simplify, names) if name in known), None)


def clean_text(value: Any) -> str:
    """Of a field: nothing where there is none, or what pandas writes for that."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(value).strip()
    return "" if text in _NOTHING else text


def _simplify(column: str) -> str:
    return column.strip().lower()


def is_table(path: Path) -> bool:
    """Whether a file is a metadata table, by its name in any case."""
    return path.stem.lower() in _STEMS and path.suffix.lower() in _READERS


def read_tables(folder: Path, tables: Sequence[str]) -> Tables:
    """Of `tables`, paths inside the folder. Raises MemControlError."""
    rows: dict[str, list[TableRow]] = {}
    columns: dict[str, None] = {}
    unmatched: list[str] = []
    for table in tables:
        for place, values in _read_table(folder / table, table):
            columns.update(dict.fromkeys(values))
            name = _find_image(folder, (folder / table).parent, values, place)
            if name is None:
                unmatched.append(f"{place}, with '{_name_file(values)}'")
            else:
                rows.setdefault(name, []).append(TableRow(values, place))
    if unmatched and not rows:
        raise MemControlError(
            f"{folder}: no row of {', '.join(tables)} names an image that is there, the first being "
            f"{unmatched[0]}; file_name is the image's path, seen from the table"
        )
    return Tables(rows, tuple(columns), tuple(unmatched), tuple(tables))


def _read_table(path: Path, title: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row stands, and its values by column, without spaces around these."""
    try:
        rows = list(_READERS[path.suffix.lower()](path))
    except MemControlError:
        raise
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise MemControlError(f"{path} cannot be read: {describe_read_error(error)}") from None
    for number, row in rows:
        place = f"{title}, row {number}"
        if not isinstance(row, dict):
            raise MemControlError(f"{path}, row {number} is no object; each is one such as {_EXAMPLE}")
        yield place, {str(column).strip(): value for column, value in row.items()}


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
            yield number, json.loads(line)


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """A list of rows; or an object of one for each image, as kohya's scripts write it, which may be the
    caption alone."""
    found = json.loads(read_text(path))
    if isinstance(found, dict):
        found = [
            {"file_name": name, **(row if isinstance(row, dict) else {"text": row})}
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
    for number, row in enumerate(reader, start=1):
        if None in row:
            raise ValueError(
                f"row {number} (line {reader.line_num}) has more fields than there are columns; put texts "
                f"that hold '{separator}' in double quotes"
            )
        yield number, row


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
        yield from enumerate(parquet.read_table(path).to_pylist(), start=1)
    except ArrowException as error:
        raise ValueError(describe_read_error(error)) from None


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
