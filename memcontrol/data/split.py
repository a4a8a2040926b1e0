"""Owns how images are split into training, held-out and test images, and what split.json records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from memcontrol.core.config import CALIBRATION, DIGITS, PARTS, DataConfig
from memcontrol.core.errors import MemControlError
from memcontrol.core.seeds import derive_seed
from memcontrol.data.greys import Greys
from memcontrol.data.groups import join_rows, make_grouping, pair_equals
from memcontrol.data.images import (
    SUFFIXES,
    ImageRecord,
    Images,
    decode_image,
    find_greys,
    list_digit_records,
    list_names,
    read_metadata,
    read_records,
    take_captions,
)
from memcontrol.data.twins import Twins, find_twins, shrink_to_thumbnail

_TWINS_NAME = "twins of "  # how a group of twins is called
_N_NAMED = 3  # of pairs of twins that are refused
FEWEST_IMAGES = 8  # per part; below it no interval says anything


@dataclass(frozen=True)
class Split:
    """Images in their parts, and what was found out about them on the way, as split.json records it."""

    parts: dict[str, Images]
    found: dict[str, Any]


def load_parts(
    config: DataConfig,
    resolution: int,
    seed: int,
    warn=lambda line: None,
    known: Mapping[str, Any] | None = None,
) -> Split:
    """Reads and checks every image and splits them into train, holdout and test, disjoint by content, twins
    and groups. `known`: what split.json records of a study that has begun, whose twins are not sought again.
    Raises MemControlError."""
    found: dict[str, Any] = {}
    if config.path == DIGITS:
        parts, greys = split_records(list_digit_records(), config, seed), None
    else:
        parts, found, greys = _list_folder_parts(Path(config.path), config, seed, warn, known)
    for part, records in parts.items():
        if len(records) < FEWEST_IMAGES:
            raise MemControlError(
                f"data: {part} has {len(records)} images and the rewards need at least {FEWEST_IMAGES}; "
                "add images or change data.train, data.holdout, data.test"
            )
    images = {
        part: Images(config.path, resolution, tuple(records), config.fit, greys)
        for part, records in parts.items()
    }
    return Split(images, found | _count_groups(images, config))


def _count_groups(parts: dict[str, Images], config: DataConfig) -> dict[str, Any]:
    if not config.group:
        return {}
    return {"groups": {part: len(set(images.groups)) for part, images in parts.items()}}


def _list_folder_parts(
    folder: Path, config: DataConfig, seed: int, warn, known: Mapping[str, Any] | None
) -> tuple[dict[str, list[ImageRecord]], dict[str, Any], Greys | None]:
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
    look = look_at_images(folder, config.skip_unreadable, warn, config.group)
    if not look.records:
        raise MemControlError(
            f"data: {folder} holds no images; known endings are {', '.join(sorted(SUFFIXES))}"
        )
    if look.greys:
        warn(describe_greys(look.greys))
    pairs, found = _recall_twins(look, known) if known else _seek_twins(look, seed)
    if not given:
        records = look.name_twins(pairs).records
        return split_records(records, config, seed, pairs), found, look.greys
    # by their folders, since a group belongs to one part
    homes = [record.name.split("/")[0] for record in look.records]
    records = look.name_twins([(i, j) for i, j in pairs if homes[i] == homes[j]]).records
    names = (*PARTS, CALIBRATION) if (folder / CALIBRATION).is_dir() else PARTS
    parts = {part: [record for record in records if record.name.startswith(f"{part}/")] for part in names}
    _refuse_shared_images(parts)
    _refuse_shared_groups(parts)
    dropped = choose_dropped(records, pairs, config.twins, "data.twins=drop")
    if dropped:
        warn(f"{len(dropped)} images are left out: twins of images in another part, such as {dropped[0]}")
        found["twins"] = {**found["twins"], "dropped": dropped}
    left = {part: [one for one in own if one.name not in dropped] for part, own in parts.items()}
    return left, found, look.greys


@dataclass(frozen=True)
class Look:
    """The images of a folder as they were read, their thumbnails uint8 [n, 3, S, S], widths and heights, and
    the scale of their greys."""

    folder: Path
    records: list[ImageRecord]
    thumbnails: list[np.ndarray]
    sizes: list[tuple[int, int]]
    greys: Greys | None

    def take(self, rows: Sequence[int]) -> Look:
        return Look(
            self.folder,
            [self.records[row] for row in rows],
            [self.thumbnails[row] for row in rows],
            [self.sizes[row] for row in rows],
            self.greys,
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
    folder: Path, skip_unreadable: bool, warn, group: str | None = None, greys: Greys | None = None
) -> Look:
    """Raises MemControlError."""
    metadata = read_metadata(folder)
    captions = take_captions(metadata)
    greys = greys or find_greys(folder, list_names(folder, captions))
    thumbnails: list[np.ndarray] = []
    sizes: list[tuple[int, int]] = []

    def see(image: Image.Image) -> None:
        thumbnails.append(shrink_to_thumbnail(image))
        sizes.append(image.size)

    records = read_records(folder, captions, skip_unreadable, warn, greys, see)
    if group:
        find_group = make_grouping(group, metadata)
        records = [replace(record, group=find_group(record.name)) for record in records]
    return Look(folder, records, thumbnails, sizes, greys)


def describe_greys(greys: Greys) -> str:
    return (
        f"greys of more than 8 bits: {greys.black:g} is shown as black and {greys.white:g} as white, in all "
        "images alike"
    )


def _seek_twins(look: Look, seed: int) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """Pairs of rows, and what split.json records of them."""
    found = look.find_twins(seed)
    names = [record.name for record in look.records]
    return list(found.pairs), {
        "twins": {
            "pairs": [[names[i], names[j]] for i, j in found.pairs],
            "threshold": found.threshold,
            "covered": dict(found.covered),
            "compared": found.n_compared,
            "plain": found.n_plain,
        }
    }


def _recall_twins(look: Look, known: Mapping[str, Any]) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """Of a study that has begun; of one from before twins were sought, none."""
    if "twins" not in known:
        return [], {}
    rows = {record.name: row for row, record in enumerate(look.records)}
    pairs = [(rows[a], rows[b]) for a, b in known["twins"]["pairs"] if a in rows and b in rows]
    return pairs, {"twins": known["twins"]}


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


def _refuse_shared_groups(parts: dict[str, list[ImageRecord]]) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for part, records in parts.items():
        for record in records:
            if not record.group:
                continue
            other, name = seen.setdefault(record.group, (part, record.name))
            if other != part:
                raise MemControlError(
                    f"data: {other} and {part} share group '{record.group}': '{name}' and '{record.name}'; a "
                    "group belongs to one part, since copying could not be told from chance"
                )


def choose_dropped(
    records: Sequence[ImageRecord],
    pairs: Sequence[tuple[int, int]],
    rule: str,
    cure: str,
    parts: Sequence[str] = (*PARTS, CALIBRATION),
) -> list[str]:
    """Names of the images that are left out, as a rule says, since they are twins of one in an earlier of the
    parts, which names begin with. Raises MemControlError where it says that there may be none."""
    order = {part: number for number, part in enumerate(parts)}
    places = [order.get(record.name.split("/")[0], 0) for record in records]
    across = [(i, j) for i, j in pairs if places[i] != places[j]]
    if rule == "keep" or not across:
        return []
    if rule == "refuse":
        named = "; ".join(f"'{records[i].name}' and '{records[j].name}'" for i, j in across[:_N_NAMED])
        more = f", and {len(across) - _N_NAMED} more" if len(across) > _N_NAMED else ""
        raise MemControlError(
            f"data: {len(across)} pairs of images in two parts are nearly the same: {named}{more}; copying "
            f"could not be told from chance: remove one of each, or set {cure} to leave out the one that is "
            "not trained on"
        )
    return list(dict.fromkeys(records[max((i, j), key=lambda row: places[row])].name for i, j in across))


def split_records(
    records: list[ImageRecord],
    config: DataConfig,
    seed: int,
    pairs: Sequence[tuple[int, int]] = (),
) -> dict[str, list[ImageRecord]]:
    """A random disjoint split; images with the same pixels, of one group, or twins by `pairs` of rows stay in
    one part, so that none is in two."""
    sizes = _count_parts(len(records), config)
    joined = [
        *pair_equals([record.digest for record in records]),
        *pair_equals([record.group for record in records]),
        *pairs,
    ]
    units: dict[int, list[ImageRecord]] = {}
    for record, first in zip(records, join_rows(len(records), joined)):
        units.setdefault(first, []).append(record)
    order = np.random.default_rng(derive_seed(seed, "split")).permutation(len(units))
    members = list(units.values())
    parts: dict[str, list[ImageRecord]] = {part: [] for part in sizes}
    for i in order:
        part = next((part for part in sizes if len(parts[part]) < sizes[part]), None)
        if part:
            parts[part] += members[i]
    return parts


def _count_parts(n: int, config: DataConfig) -> dict[str, int]:
    names = (*PARTS, CALIBRATION) if config.calibration else PARTS
    given = {part: getattr(config, part) for part in names}
    sizes = {part: size if isinstance(size, int) else round(n * size) for part, size in given.items()}
    if sum(sizes.values()) > n + len(names) - 1:
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
            | ({"group": record.group} if record.group else {})
            for record in images.records
        ]
        for part, images in parts.items()
    }


def parse_parts(stored: Mapping[str, Any]) -> dict[str, Images]:
    """Of what split.json records."""
    greys = Greys(*stored["greys"]) if stored.get("greys") else None
    return {
        part: Images(
            stored["source"],
            stored["resolution"],
            tuple(ImageRecord(**row) for row in rows),
            stored.get("fit", "crop"),
            greys,
        )
        for part, rows in stored["parts"].items()
    }
