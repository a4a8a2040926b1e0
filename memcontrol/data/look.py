"""Owns a look at a folder of images: each is read once, and what is found of it, of its captions and of
copies among them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from memcontrol.core.errors import MemControlError
from memcontrol.data.captions import Captions, find_captions
from memcontrol.data.folder import list_folder
from memcontrol.data.greys import Greys
from memcontrol.data.groups import join_rows, make_grouping, propose_grouping
from memcontrol.data.images import ImageRecord, decode_image, find_greys, read_records
from memcontrol.data.parts import assign_parts
from memcontrol.data.tables import Tables, read_tables
from memcontrol.data.twins import Twins, find_twins, shrink_to_thumbnail

_TWINS_NAME = "twins of "  # how a group of twins is called
_N_GREY = 200  # images that are looked at for colour


@dataclass(frozen=True)
class Look:
    """The images of a folder as they were read, their thumbnails uint8 [n, 3, S, S], widths and heights, and
    the scale of their greys; the folder's metadata; how many files are left out, by reason; and what a person
    should know."""

    folder: Path
    records: list[ImageRecord]
    thumbnails: list[np.ndarray]
    sizes: list[tuple[int, int]]
    greys: Greys | None
    tables: Tables
    captions: Captions
    left_out: dict[str, int]
    notes: tuple[str, ...]

    def take(self, rows: Sequence[int]) -> Look:
        return replace(
            self,
            records=[self.records[row] for row in rows],
            thumbnails=[self.thumbnails[row] for row in rows],
            sizes=[self.sizes[row] for row in rows],
        )

    def decode(self, row: int) -> Image.Image:
        return decode_image(self.folder / self.records[row].name, self.greys)

    def find_twins(self, seed: int = 0) -> Twins:
        digests = [record.digest for record in self.records]
        return find_twins(np.stack(self.thumbnails), digests, self.decode, seed)

    def name_twins(self, pairs: Sequence[tuple[int, int]]) -> Look:
        """Twins of no group become one."""
        first = join_rows(len(self.records), pairs)
        counts = Counter(first)
        return replace(
            self,
            records=[
                replace(record, group=f"{_TWINS_NAME}{self.records[row].name}")
                if counts[row] > 1 and not record.group
                else record
                for record, row in zip(self.records, first)
            ],
        )


def look_at_images(
    folder: Path,
    skip_unreadable: bool,
    warn: Callable[[str], None],
    group: str | None = None,
    caption: str | None = None,
    greys: Greys | None = None,
    seed: int = 0,
) -> Look:
    """Reads every image of a folder. `group` and `caption` are as data.group and data.caption. Raises
    MemControlError."""
    listing = list_folder(folder)
    tables = read_tables(folder, listing.tables)
    captions = find_captions(folder, listing.images, listing.texts, tables, caption)
    greys = greys or find_greys([folder / name for name in listing.images])
    thumbnails: list[np.ndarray] = []
    sizes: list[tuple[int, int]] = []
    unreadable: list[str] = []

    def see(image: Image.Image) -> None:
        thumbnails.append(shrink_to_thumbnail(image))
        sizes.append(image.size)

    def skip(line: str) -> None:
        unreadable.append(line)
        warn(line)

    records = read_records(folder, listing.images, skip_unreadable, skip, greys, see)
    records = [replace(record, caption=captions.draw(record.name, seed)) for record in records]
    if group:
        find_group = make_grouping(group, tables, folder)
        records = [replace(record, group=find_group(record.name)) for record in records]
    left_out = {reason: len(names) for reason, names in listing.left_out.items()}
    notes = [*listing.describe_left_out(), *captions.notes]
    if greys:
        notes.append(describe_greys(greys))
    return Look(
        folder,
        records,
        thumbnails,
        sizes,
        greys,
        tables,
        captions,
        left_out | ({"cannot be decoded": len(unreadable)} if unreadable else {}),
        tuple(notes),
    )


def describe_greys(greys: Greys) -> str:
    return (
        f"greys of more than 8 bits: {greys.black:g} is shown as black and {greys.white:g} as white, in all "
        "images alike"
    )


@dataclass(frozen=True)
class FolderSummary:
    """What a folder of images holds: its images; how many in each part, where the folder has parts; sides in
    pixels; groups of images with the same pixels, and pairs that are nearly the same; what cannot be decoded,
    and why; where captions come from; what a person should know; the scale of greys of more than 8 bits; and
    what seems to tell who is in an image."""

    records: tuple[ImageRecord, ...]
    parts: dict[str, int]
    sides: tuple[int, int, int]  # least, median, most of the shorter side
    is_grey: bool
    copies: tuple[tuple[str, ...], ...]
    near: tuple[tuple[str, str], ...]
    unreadable: tuple[str, ...]
    caption_source: str
    notes: tuple[str, ...]
    greys: Greys | None = None
    group: str | None = None

    @property
    def n(self) -> int:
        return len(self.records)

    @property
    def captions(self) -> Counter[str]:
        return Counter(record.caption for record in self.records)


def summarize_folder(folder: Path, progress: Callable[[str, int, int], None]) -> FolderSummary:
    """Reads every image once, some twice. Raises MemControlError where there are none."""
    if not folder.is_dir():
        raise MemControlError(f"{folder} is no folder; give a folder of images")
    unreadable: list[str] = []
    progress("reading images", 0, 3)
    look = look_at_images(folder, True, unreadable.append)
    if not look.records:
        raise MemControlError(
            f"{folder} holds no images that can be decoded; give a folder of images, with "
            "metadata.csv or text files beside them for captions"
        )
    progress("reading images", 1, 3)
    names = [record.name for record in look.records]
    homes = assign_parts(folder, names, look.tables)
    near = _find_near_pairs(look)
    progress("reading images", 3, 3)
    unread = tuple(text.removeprefix("skipped: image ") for text in unreadable)
    shorter = [min(size) for size in look.sizes]
    return FolderSummary(
        tuple(look.records),
        dict(Counter(homes[name] for name in names if name in homes)) if homes else {},
        (min(shorter), int(statistics.median(shorter)), max(shorter)),
        _are_grey(folder, look),
        _group_copies(look.records),
        near,
        unread,
        look.captions.source,
        look.notes,
        look.greys,
        propose_grouping(names, look.tables, folder),
    )


def _are_grey(folder: Path, look: Look) -> bool:
    """Whether the first images have no colour, however they are stored."""
    pixels = (np.asarray(decode_image(folder / record.name, look.greys)) for record in look.records[:_N_GREY])
    return all(
        (image[..., 0] == image[..., 1]).all() and (image[..., 1] == image[..., 2]).all() for image in pixels
    )


def _group_copies(records: list[ImageRecord]) -> tuple[tuple[str, ...], ...]:
    groups: dict[str, list[str]] = {}
    for record in records:
        groups.setdefault(record.digest, []).append(record.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _find_near_pairs(look: Look) -> tuple[tuple[str, str], ...]:
    """Twins that do not have the same pixels."""
    records = look.records
    return tuple((records[i].name, records[j].name) for i, j in look.find_twins().pairs)
