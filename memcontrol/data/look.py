"""Owns a first look at a folder of images: sides, colour, captions, copies, near copies."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memcontrol.core.config import PARTS
from memcontrol.core.errors import MemControlError
from memcontrol.data.greys import Greys
from memcontrol.data.groups import propose_grouping
from memcontrol.data.images import ImageRecord, decode_image, read_metadata
from memcontrol.data.split import Look, look_at_images

_N_GREY = 200  # images that are looked at for colour


@dataclass(frozen=True)
class FolderSummary:
    """What a folder of images holds: its images; how many in each part, where the folder has parts; sides in
    pixels; groups of images with the same pixels, and pairs that are nearly the same; what cannot be decoded,
    and why; the scale of greys of more than 8 bits; and what seems to tell who is in an image."""

    records: tuple[ImageRecord, ...]
    parts: dict[str, int]
    sides: tuple[int, int, int]  # least, median, most of the shorter side
    is_grey: bool
    copies: tuple[tuple[str, ...], ...]
    near: tuple[tuple[str, str], ...]
    unreadable: tuple[str, ...]
    has_metadata: bool
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
            "metadata.jsonl or metadata.csv for captions"
        )
    progress("reading images", 1, 3)
    given = [part for part in PARTS if (folder / part).is_dir()]
    parts = {part: sum(record.name.startswith(f"{part}/") for record in look.records) for part in given}
    metadata = read_metadata(folder)
    near = _find_near_pairs(look)
    progress("reading images", 3, 3)
    unread = tuple(text.removeprefix("skipped: image ") for text in unreadable)
    shorter = [min(size) for size in look.sizes]
    return FolderSummary(
        tuple(look.records),
        parts,
        (min(shorter), int(statistics.median(shorter)), max(shorter)),
        _are_grey(folder, look),
        _group_copies(look.records),
        near,
        unread,
        bool(metadata),
        look.greys,
        propose_grouping([record.name for record in look.records], metadata),
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
