"""Owns how images are split into training, held-out and test images, and what split.json records."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from memcontrol.core.config import DIGITS, PARTS, DataConfig
from memcontrol.core.errors import MemControlError
from memcontrol.core.seeds import derive_seed
from memcontrol.data.images import (
    SUFFIXES,
    ImageRecord,
    Images,
    list_digit_records,
    read_captions,
    read_records,
)

FEWEST_IMAGES = 8  # per part; below it no interval says anything


def load_parts(config: DataConfig, resolution: int, seed: int, warn=lambda line: None) -> dict[str, Images]:
    """Reads and checks every image and splits them into train, holdout and test, disjoint by content. Raises
    MemControlError."""
    if config.path == DIGITS:
        parts = split_records(list_digit_records(), config, seed)
    else:
        parts = _list_folder_parts(Path(config.path), config, seed, warn)
    for part, records in parts.items():
        if len(records) < FEWEST_IMAGES:
            raise MemControlError(
                f"data: {part} has {len(records)} images and the rewards need at least {FEWEST_IMAGES}; "
                "add images or change data.train, data.holdout, data.test"
            )
    return {part: Images(config.path, resolution, tuple(records)) for part, records in parts.items()}


def _list_folder_parts(folder: Path, config: DataConfig, seed: int, warn) -> dict[str, list[ImageRecord]]:
    """The parts of an image folder: its sub-folders train, holdout and test, or one pool split by the
    config."""
    if not folder.is_dir():
        raise MemControlError(
            f"data.path is '{config.path}': no such folder; give 'digits' or a folder of images"
        )
    given = [part for part in PARTS if (folder / part).is_dir()]
    if given and len(given) < len(PARTS):
        missing = ", ".join(f"{part}/" for part in PARTS if part not in given)
        raise MemControlError(
            f"data: {folder} has {given[0]}/ but no {missing}; add it, or put all images in one "
            "folder to be split"
        )
    captions = read_captions(folder)
    records = read_records(folder, captions, config.skip_unreadable, warn)
    if not records:
        raise MemControlError(
            f"data: {folder} holds no images; known endings are {', '.join(sorted(SUFFIXES))}"
        )
    if not given:
        return split_records(records, config, seed)
    parts = {part: [record for record in records if record.name.startswith(f"{part}/")] for part in PARTS}
    _refuse_shared_images(parts)
    return parts


def _refuse_shared_images(parts: dict[str, list[ImageRecord]]) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for part, records in parts.items():
        for record in records:
            other, name = seen.setdefault(record.digest, (part, record.name))
            if other != part:
                raise MemControlError(
                    f"data: {other} and {part} share an image: '{name}' and '{record.name}' have the same "
                    "pixels; remove one, since copying could not be told from chance"
                )


def split_records(records: list[ImageRecord], config: DataConfig, seed: int) -> dict[str, list[ImageRecord]]:
    """A random disjoint split; images with the same pixels stay in one part, so that none is in two."""
    sizes = _count_parts(len(records), config)
    groups: dict[str, list[ImageRecord]] = {}
    for record in records:
        groups.setdefault(record.digest, []).append(record)
    order = np.random.default_rng(derive_seed(seed, "split")).permutation(len(groups))
    members = list(groups.values())
    parts: dict[str, list[ImageRecord]] = {part: [] for part in PARTS}
    for i in order:
        part = next((part for part in PARTS if len(parts[part]) < sizes[part]), None)
        if part:
            parts[part] += members[i]
    return parts


def _count_parts(n: int, config: DataConfig) -> dict[str, int]:
    given = {part: getattr(config, part) for part in PARTS}
    sizes = {part: size if isinstance(size, int) else round(n * size) for part, size in given.items()}
    if sum(sizes.values()) > n + len(PARTS) - 1:
        asked = ", ".join(f"{part} {size}" for part, size in given.items())
        raise MemControlError(
            f"data: {asked} asks for {sum(sizes.values())} images and there are {n}; ask for fewer"
        )
    return sizes


def format_ranges(rows: Iterable[int]) -> str:
    """Rising row numbers in few characters: "0-3, 7, 9-12"."""
    ends: list[list[int]] = []
    for row in rows:
        if ends and row == ends[-1][1] + 1:
            ends[-1][1] = row
        else:
            ends.append([row, row])
    return ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in ends)


def dump_parts(parts: dict[str, Images]) -> dict:
    """What split.json records."""
    return {
        part: [
            {"name": record.name, "caption": record.caption, "digest": record.digest}
            for record in images.records
        ]
        for part, images in parts.items()
    }


def parse_parts(values: dict, source: str, resolution: int) -> dict[str, Images]:
    return {
        part: Images(source, resolution, tuple(ImageRecord(**row) for row in rows))
        for part, rows in values.items()
    }
