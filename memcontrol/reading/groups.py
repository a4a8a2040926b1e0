"""Owns groups: who is in an image, or which class it shows, as its path, its folder or a column of the
metadata tells, and how images that belong together are joined."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath

from memcontrol.core.errors import MemControlError
from memcontrol.reading.dicom import PATIENT
from memcontrol.reading.parts import is_part_folder
from memcontrol.reading.tables import Tables, clean_text

BY_FOLDER = "folder"
GROUP, LABEL = "data.group", "data.label"  # keys that say such a rule
_COLUMN_NAMES = r"^(patient|subject|person|participant|identity)([ _-]?(id|name|number))?$"
_NAME_PATTERN = r"(?i)((?:patient|subject|subj|person|case|pat|pt|id|p)[_-]?\d+)"
_FEWEST_PROPOSED = 8  # groups, below which a coincidence may look like them
FindGroup = Callable[[str], str]  # of an image by its path inside the folder


def make_grouping(rule: str, tables: Tables, patients: Mapping[str, str], key: str = GROUP) -> FindGroup:
    """What tells an image's group, or its label, by what data.group, or another `key`, says: a pattern,
    `folder`, a column of the metadata, or the `patients` that DICOM files say; empty for one of these that
    says none. Else it raises MemControlError for an image of which it is not known."""
    if "(" in rule:
        return _group_by_pattern(rule, key)
    if rule == PATIENT and tables.find_column([rule]) is None:
        if not patients:
            raise MemControlError(f"{key} is '{PATIENT}', and no image says one; DICOM files do, or a column")
        return lambda name: patients.get(name, "")
    return partial(_group_by_folder, key) if rule == BY_FOLDER else _group_by_column(rule, tables, key)


def _name_unit(key: str) -> str:
    """Group, or label."""
    return key.rpartition(".")[2]


def _group_by_pattern(rule: str, key: str) -> FindGroup:
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise MemControlError(f"{key} is '{rule}', which is no regular expression: {error}") from None
    if not pattern.groups:
        raise MemControlError(f"{key} is '{rule}', which has no group in parentheses that could be the name")

    def find(name: str) -> str:
        found = pattern.search(name)
        if not found or not found.group(1):
            raise MemControlError(
                f"{key} is '{rule}', which does not match image '{name}'; each image needs a "
                f"{_name_unit(key)}"
            )
        return found.group(1)

    return find


def _group_by_folder(key: str, name: str) -> str:
    """The innermost folder, whichever part it lies in."""
    folders = PurePosixPath(name).parent.parts
    own = folders[1:] if folders and is_part_folder(folders[0]) else folders
    if not own:
        raise MemControlError(
            f"{key} is '{BY_FOLDER}', and image '{name}' lies in no folder of its own; each image needs "
            f"a {_name_unit(key)}"
        )
    return "/".join(own)


def _group_by_column(rule: str, tables: Tables, key: str) -> FindGroup:
    column = tables.find_column([rule])
    if column is None:
        columns = ", ".join(tables.columns) or "none"
        raise MemControlError(
            f"{key} is '{rule}': no pattern with a group in parentheses, not '{BY_FOLDER}', and no column "
            f"of the metadata, which has {columns}"
        )

    def find(name: str) -> str:
        values = (row.values.get(column) for row in tables.rows.get(name, ()))
        said = {text for value in values if (text := clean_text(value))}
        if len(said) != 1:
            has = f"{len(said)} of them" if said else "none"
            raise MemControlError(
                f"{key} is '{rule}', and image '{name}' has {has} in the metadata; each image needs a "
                f"{_name_unit(key)}"
            )
        return said.pop()

    return find


def propose_grouping(names: Sequence[str], tables: Tables, patients: Mapping[str, str]) -> str | None:
    """What data.group could be: a column, or what DICOM says, of which images share a value; else a pattern
    that names people, or the like, several of whose images there are; None where nothing looks like it."""
    rules = [column for column in sorted(tables.columns) if re.search(_COLUMN_NAMES, column, re.IGNORECASE)]
    rules += [PATIENT] if patients else []
    for rule in rules:
        if 1 < _count_groups_by(rule, names, tables, patients) < len(names):
            return rule
    n = _count_groups_by(_NAME_PATTERN, names, tables, patients)
    return _NAME_PATTERN if _FEWEST_PROPOSED <= n <= len(names) / 1.5 else None


def _count_groups_by(rule: str, names: Sequence[str], tables: Tables, patients: Mapping[str, str]) -> int:
    """0 where an image has none; one that says no patient is alone."""
    try:
        find = make_grouping(rule, tables, patients)
        return len({find(name) or name for name in names})
    except MemControlError:
        return 0


def join_rows(n: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Of n rows, the first row of all that pairs join each to."""
    first = list(range(n))

    def find(row: int) -> int:
        while first[row] != row:
            first[row] = first[first[row]]
            row = first[row]
        return row

    for i, j in pairs:
        one, other = sorted((find(i), find(j)))
        first[other] = one
    return [find(row) for row in range(n)]


def pair_equals(names: Sequence[str]) -> Iterable[tuple[int, int]]:
    """Pairs of rows that join those with the same name; of an empty one none."""
    seen: dict[str, int] = {}
    for row, name in enumerate(names):
        if name:
            yield seen.setdefault(name, row), row
