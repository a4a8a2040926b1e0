"""Owns a first look at a folder of images: sides, colour, captions, copies, near copies."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from memcontrol.core.config import PARTS
from memcontrol.core.errors import MemControlError
from memcontrol.data.features import nearest, pixel_features
from memcontrol.data.images import ImageRecord, Images, decode_image, read_captions, read_records
from memcontrol.data.split import FEWEST_IMAGES

_N_COMPARED, _N_GREY = 4_000, 200  # images that are looked at for near copies, and for colour
# of the median distance between an image and the third nearest other one: the nearest may be a twin of each
_NEAR = 0.25


@dataclass(frozen=True)
class FolderSummary:
    """What a folder of images holds: its images; how many in each part, where the folder has parts; sides in
    pixels; groups of images with the same pixels, and pairs that are nearly the same; what cannot be decoded,
    and why."""

    records: tuple[ImageRecord, ...]
    parts: dict[str, int]
    sides: tuple[int, int, int]  # least, median, most of the shorter side
    is_grey: bool
    copies: tuple[tuple[str, ...], ...]
    near: tuple[tuple[str, str], ...]
    unreadable: tuple[str, ...]
    has_metadata: bool

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
    captions = read_captions(folder)
    records = read_records(folder, captions, True, unreadable.append)
    if not records:
        raise MemControlError(
            f"{folder} holds no images that can be decoded; give a folder of images, with "
            "metadata.jsonl or metadata.csv for captions"
        )
    progress("reading images", 1, 3)
    given = [part for part in PARTS if (folder / part).is_dir()]
    parts = {part: sum(record.name.startswith(f"{part}/") for record in records) for part in given}
    near = _find_near_pairs(folder, records)
    progress("reading images", 3, 3)
    unread = tuple(text.removeprefix("skipped: image ") for text in unreadable)
    return FolderSummary(
        tuple(records),
        parts,
        _measure_sides(folder, records),
        _are_grey(folder, records),
        _group_copies(records),
        near,
        unread,
        bool(captions),
    )


def _measure_sides(folder: Path, records: list[ImageRecord]) -> tuple[int, int, int]:
    shorter = []
    for record in records:
        with Image.open(folder / record.name) as image:
            shorter.append(min(image.size))
    return min(shorter), int(statistics.median(shorter)), max(shorter)


def _are_grey(folder: Path, records: list[ImageRecord]) -> bool:
    """Whether the first images have no colour, however they are stored."""
    pixels = (np.asarray(decode_image(folder / record.name)) for record in records[:_N_GREY])
    return all(
        (image[..., 0] == image[..., 1]).all() and (image[..., 1] == image[..., 2]).all() for image in pixels
    )


def _group_copies(records: list[ImageRecord]) -> tuple[tuple[str, ...], ...]:
    groups: dict[str, list[str]] = {}
    for record in records:
        groups.setdefault(record.digest, []).append(record.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _find_near_pairs(folder: Path, records: list[ImageRecord]) -> tuple[tuple[str, str], ...]:
    """Images that are nearly the same and not quite, of the first N_COMPARED, nearest first."""
    different = list({record.digest: record for record in records}.values())[:_N_COMPARED]
    if len(different) < FEWEST_IMAGES:
        return ()
    features = pixel_features(Images(str(folder), 32, tuple(different)).pixels())
    distances, indices = nearest(features, features, 4)
    own = indices[:, 0] == np.arange(len(indices))
    other, apart = np.where(own, indices[:, 1], indices[:, 0]), distances[:, 1]
    found = {
        tuple(sorted((i, int(other[i])))): float(apart[i])
        for i in np.flatnonzero(apart < _NEAR * np.median(distances[:, 3])).tolist()
    }
    return tuple(
        (different[i].name, different[j].name) for i, j in sorted(found, key=lambda pair: found[pair])
    )
