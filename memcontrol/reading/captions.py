"""Owns captions: what is said of each image, by a metadata table, a text file beside it, or its folder."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from memcontrol.core.errors import MemControlError
from memcontrol.core.seeds import derive_seed
from memcontrol.reading.parts import is_part_folder
from memcontrol.reading.tables import TableRow, Tables, clean_text, describe_read_error, read_text

COLUMNS = ("text", "txt", "caption", "prompt", "description")  # that are looked for, in this order
TEXT_SUFFIXES = (".txt", ".caption")
_BY_FOLDERS, _NOWHERE = "the folders' names", "nothing"
_STRAYS, _UNMATCHED = "text file of no image", "row of the metadata whose image is not there"
_KOHYA = re.compile(r"([1-9]\d{0,2})_(.+)")  # a folder's repeats and subject, as kohya's sd-scripts name it


@dataclass(frozen=True)
class Captions:
    """Of each image the texts that are said of it, by its path: none, one, or several to draw from; where
    they come from, for a person; what a person should know of them; and how many of a kind are of no
    image."""

    texts: Mapping[str, tuple[str, ...]]
    source: str
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def leave_out_names(self, ids: Mapping[str, str]) -> Captions:
        """Without captions where the folders' names are those of persons: one for each of `ids`, by image."""
        pairs = {(self.texts.get(name, ()), one) for name, one in ids.items()}
        said, who = ({pair[i] for pair in pairs} for i in (0, 1))
        if self.source != _BY_FOLDERS or () in said or not len(pairs) == len(said) == len(who) > 1:
            return self
        note = "the folders' names are those of data.group's groups, and are not used as captions"
        return replace(self, texts={}, source=_NOWHERE, notes=(*self.notes, note))

    def shuffle(self, name: str, seed: int) -> tuple[str, ...]:
        """An image's texts, one at least, in an order that is the same for the same seed."""
        texts = self.texts.get(name) or ("",)
        if len(texts) == 1:
            return texts
        order = np.random.default_rng(derive_seed(seed, "caption", name)).permutation(len(texts))
        return tuple(texts[i] for i in order)


def find_captions(
    folder: Path, images: Sequence[str], texts: Sequence[str], tables: Tables, column: str | None
) -> Captions:
    """Of `images`, from `texts` beside them and from the tables' column of that name, or one of COLUMNS;
    where neither has any, the images' folders name them. All are paths inside the folder. Raises
    MemControlError."""
    chosen = _choose_column(folder, tables, column)
    said = _read_column(folder, tables, chosen) if chosen else {}
    beside, strays = _read_text_files(folder, images, texts)
    for name, caption in beside.items():
        if said.setdefault(name, (caption,)) != (caption,):
            raise MemControlError(
                f"{folder}: '{name}' has one caption in {tables.rows[name][0].place} and another in its text "
                "file; keep one of them"
            )
    notes = [*_describe_strays(strays), *_describe_unused(tables, chosen), *_describe_repeats(images)]
    sources = [tables.describe_column(chosen)] if chosen else []
    sources += ["text files beside the images"] if beside else []
    if not any(said.values()):
        said = _name_by_folders(images)
        sources = [_BY_FOLDERS] if any(said.values()) else []
    of_none = {_STRAYS: len(strays), _UNMATCHED: len(tables.unmatched)}
    left_out = {kind: n for kind, n in of_none.items() if n}
    return Captions(said, " and ".join(sources) or _NOWHERE, tuple(notes), left_out)


def _choose_column(folder: Path, tables: Tables, asked: str | None) -> str | None:
    if asked is None:
        known = [column for name in COLUMNS if (column := tables.find_column([name]))]
        rows = [row.values for some in tables.rows.values() for row in some]
        used = (column for column in known if any(clean_text(row.get(column)) for row in rows))
        return next(used, known[0] if known else None)
    found = tables.find_column([asked])
    if found is None:
        has = f"which have {', '.join(tables.columns)}" if tables.columns else "of which there are none"
        where = ", ".join(tables.names) or f"{folder}'s metadata tables"
        raise MemControlError(f"data.caption is '{asked}': no column of {where}, {has}")
    return found


def _read_column(folder: Path, tables: Tables, column: str) -> dict[str, tuple[str, ...]]:
    """Of each image in the tables. Raises MemControlError where two rows differ."""
    found: dict[str, tuple[str, ...]] = {}
    for name, rows in tables.rows.items():
        said = [(row, texts) for row in rows if (texts := _take_texts(folder, row, column))]
        for row, texts in said[1:]:
            if texts != said[0][1]:
                raise MemControlError(
                    f"{folder}: '{name}' has one caption in {said[0][0].place} and another in {row.place}; "
                    "keep one of them, or put both into a list in one row"
                )
        found[name] = said[0][1] if said else ()
    return found


def _take_texts(folder: Path, row: TableRow, column: str) -> tuple[str, ...]:
    value = row.values.get(column)
    several = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(one, Mapping) for one in several):
        value = next(one for one in several if isinstance(one, Mapping))
        raise MemControlError(
            f"{folder}: {row.place} has captions by name in '{column}' ({', '.join(map(str, value))}); put "
            "the one that is meant into a column of its own"
        )
    return tuple(text for one in several if (text := clean_text(one)))


def _read_text_files(
    folder: Path, images: Sequence[str], texts: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Captions by image, and text files that are of none. Raises MemControlError."""
    by_stem: dict[str, list[str]] = {}
    for name in images:
        by_stem.setdefault(_cut_suffix(name), []).append(name)
    found: dict[str, str] = {}
    strays = []
    for text in texts:
        owners = by_stem.get(_cut_suffix(text), [])
        caption = _read_text_file(folder / text) if owners else ""
        if not owners:
            strays.append(text)
        for name in owners if caption else ():
            if found.setdefault(name, caption) != caption:
                raise MemControlError(f"{folder}: '{name}' has two text files that differ; keep one of them")
    if found:
        _refuse_repeats(folder, images)
    return found, strays


def _cut_suffix(name: str) -> str:
    return posixpath.splitext(name)[0]


def _read_text_file(path: Path) -> str:
    try:
        return clean_text(read_text(path))
    except (OSError, UnicodeError) as error:
        raise MemControlError(f"caption {path} cannot be read: {describe_read_error(error)}") from None


def _refuse_repeats(folder: Path, names: Sequence[str]) -> None:
    """kohya's folders say how often their images are used in an epoch; here all are used alike."""
    parents = {PurePosixPath(name).parent.name for name in names}
    repeats = {parent: match[1] for parent in sorted(parents) if (match := _KOHYA.fullmatch(parent))}
    if len({int(one) for one in repeats.values()}) > 1:
        raise MemControlError(
            f"{folder}: the folders {', '.join(repr(one) for one in repeats)} ask for different repeats, as "
            "kohya's scripts read their names; all images are used alike here: give them one number"
        )


def _describe_repeats(images: Sequence[str]) -> Iterator[str]:
    folders = (posixpath.basename(place) for place in sorted(set(map(posixpath.dirname, images))))
    found = next((name for name in folders if _KOHYA.fullmatch(name)), None)
    if found:
        yield (
            f"the number in a folder's name such as '{found}' is not used: all images are used alike, as "
            "often as inner.budget_images says"
        )


def _name_by_folders(images: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """By the innermost folder, unless that is a part; of kohya's by the subject alone."""
    folders = {posixpath.dirname(name) for name in images}
    parents = {place: "" if is_part_folder(place) else posixpath.basename(place) for place in folders}
    subjects = {parent: cut_repeats(parent) for parent in parents.values()}
    if len(set(subjects.values())) < len(subjects):  # "18_years" and "19_years" are no repeats
        subjects = {parent: parent for parent in subjects}
    texts = {place: (subjects[parent],) if parent else () for place, parent in parents.items()}
    return {name: texts[posixpath.dirname(name)] for name in images}


def cut_repeats(folder: str) -> str:
    """The subject of a folder that is named as kohya's scripts ask for it; any other name as it is."""
    found = _KOHYA.fullmatch(folder)
    return found[2] if found else folder


def _describe_strays(strays: Sequence[str]) -> Iterator[str]:
    if strays:
        yield f"{len(strays)} text files are of no image, such as {strays[0]}"


def _describe_unused(tables: Tables, chosen: str | None) -> Iterator[str]:
    if tables.empty:
        yield f"{', '.join(tables.empty)}: a table without rows"
    if tables.unmatched:
        n, first = len(tables.unmatched), tables.unmatched[0]
        yield f"{n} rows of the metadata name images that are not there, the first being {first}"
    others = [name for one in COLUMNS if (name := tables.find_column([one])) and name != chosen]
    if chosen and others:
        said = ", ".join(f"'{name}'" for name in others)
        yield f"captions are column '{chosen}'; {said} is not used (data.caption names another)"
    if tables.columns and not chosen:
        yield (
            f"{', '.join(tables.names)} has columns {', '.join(tables.columns)} and none of "
            f"{', '.join(COLUMNS)}; "
            "data.caption can name the one with captions"
        )
