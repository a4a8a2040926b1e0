"""Owns the parts that a person has made: folders or a column that say what is trained on, held out or kept
for the test, under the names that people use."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from memcontrol.core.errors import MemControlError
from memcontrol.core.image_parts import CALIBRATION, PARTS
from memcontrol.reading.tables import Tables, clean_text

_NAMES = {
    "train": ("train", "training"),
    "holdout": ("holdout", "hold-out", "hold_out", "validation", "val", "valid", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
    CALIBRATION: (CALIBRATION,),
}
_PART_BY_NAME = {name: part for part, names in _NAMES.items() for name in names}
_AFTER = re.compile(r"[ _-]?(images?|imgs?|data|set|split|\d{4})$")  # "train_images", "val2017"
_COLUMN, _OTHER_COLUMNS = "split", ("partition", "subset")  # the others may mean something else


def find_part(name: str) -> str | None:
    """The part that is meant by a name of a folder, a split or in a column."""
    name = name.strip().lower()
    return _PART_BY_NAME.get(name) or _PART_BY_NAME.get(_AFTER.sub("", name))


def is_part_folder(name: str) -> bool:
    return find_part(name) is not None


def find_part_folders(folder: Path) -> dict[str, str]:
    """Sub-folders by the part that each is, none where there are none. Raises MemControlError where two are
    the same part, or one of PARTS is missing."""
    found: dict[str, str] = {}
    for name in sorted(name for name in os.listdir(folder) if is_part_folder(name)):
        part = find_part(name) if (folder / name).is_dir() else None
        if part and part in found:
            raise MemControlError(
                f"data: {folder} has {found[part]}/ and {name}/, which both are the part '{part}'; put "
                "the images of both into one of them"
            )
        if part:
            found[part] = name
    _refuse_missing(f"{folder} has", {part: f"{name}/" for part, name in found.items()})
    return found


def assign_parts(folder: Path, images: Sequence[str], tables: Tables) -> dict[str, str] | None:
    """Of images, by their paths, the part of each that has one, by its folder or by a column `split`; None
    where a person has made no parts. Raises MemControlError."""
    folders = {name: part for part, name in find_part_folders(folder).items()}
    if not folders:
        _refuse_deeper_parts(folder, images)
    column = tables.find_column([_COLUMN]) or _find_other_column(tables)
    by_column = _read_split_column(folder, tables, column) if column else {}
    if not folders and not by_column:
        return None
    found = {name: folders[first] for name in images if (first := PurePosixPath(name).parts[0]) in folders}
    for name, part in by_column.items():
        if found.setdefault(name, part) != part:
            raise MemControlError(
                f"data: '{name}' lies in the part '{found[name]}', and column '{column}' says '{part}'; make "
                "them agree, or take the column out"
            )
    return found


def _refuse_deeper_parts(folder: Path, images: Sequence[str]) -> None:
    """Parts below other folders would be pooled. Raises MemControlError."""
    found = _find_part_places(images, 1)
    if len(found) > 1:
        raise MemControlError(
            f"data: {folder} has {', '.join(f'{place}/' for place in found.values())}: parts are folders at "
            "its top; move them there, let data.path name the folder that they lie in, or call them otherwise"
        )


def _find_part_places(images: Sequence[str], n_above: int) -> dict[str, str]:
    """By part the first folder of its name that is below so many others at the least."""
    found: dict[str, str] = {}
    for place in sorted({posixpath.dirname(name) for name in images}):
        steps = place.split("/")
        for depth, step in enumerate(steps[n_above:], start=n_above + 1):
            if part := find_part(step):
                found.setdefault(part, "/".join(steps[:depth]))
    return found


def refuse_parts(title: str, folder: Path, images: Sequence[str], tables: Tables) -> None:
    """Where one set of images is wanted, several parts would be pooled. Raises MemControlError."""
    found = _find_part_places(images, 0)
    if len(found) > 1:
        named = ", ".join(f"{place}/" for place in found.values())
        raise MemControlError(
            f"{title}: {folder} has {named}, which are parts, and one set of images is wanted; give one of "
            f"them, as in audit --train {folder / found.get('train', 'train')} --holdout "
            f"{folder / found.get('holdout', 'holdout')}"
        )
    column = tables.find_column([_COLUMN]) or _find_other_column(tables)
    rows = [row for some in tables.rows.values() for row in some] if column else []
    parts = {part for row in rows if (part := find_part(clean_text(row.values.get(column or ""))))}
    if len(parts) > 1:
        raise MemControlError(
            f"{title}: {folder} has the parts {', '.join(sorted(parts))} in column '{column}' of "
            f"{', '.join(tables.names)}, and one set of images is wanted; put each into a folder of its own"
        )


def _find_other_column(tables: Tables) -> str | None:
    """One of another name that holds nothing but parts, and several."""
    for name in _OTHER_COLUMNS:
        column = tables.find_column([name])
        values = {
            clean_text(row.values.get(column)) for rows in tables.rows.values() for row in rows if column
        }
        parts = {find_part(value) for value in values}
        if len(parts) > 1 and None not in parts:
            return column
    return None


def _read_split_column(folder: Path, tables: Tables, column: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, rows in tables.rows.items():
        for row in rows:
            value = clean_text(row.values.get(column))
            part = find_part(value)
            if not value:
                continue
            if part is None:
                raise MemControlError(
                    f"data: {row.place} has '{value}' in column '{column}'; allowed: "
                    f"{', '.join(_PART_BY_NAME)}"
                )
            if found.setdefault(name, part) != part:
                raise MemControlError(
                    f"data: '{name}' is in two parts, '{found[name]}' and '{part}' ({row.place}); keep one"
                )
    given = {part: part for part in found.values()}
    _refuse_missing(f"column '{column}' of {', '.join(tables.names)} has", given)
    return found


def _refuse_missing(where: str, given: Mapping[str, str]) -> None:
    missing = [part for part in PARTS if part not in given]
    if given and missing:
        names = "; ".join(f"{part}: {', '.join(_NAMES[part])}" for part in missing)
        raise MemControlError(
            f"data: {where} {', '.join(given.values())} but no {', '.join(missing)}; add it, by one of its "
            f"names ({names}), or put all images in one folder to be split"
        )
