"""Owns how images are split into training, held-out and test images, and what split.json records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from memcontrol.config.data import BY_CAPTION, DataConfig
from memcontrol.core.errors import MemControlError
from memcontrol.core.image_parts import CALIBRATION, DIGITS, PARTS
from memcontrol.core.seeds import derive_seed
from memcontrol.data.dataset import locate_images
from memcontrol.data.images import ImageRecord, Images, list_digit_records
from memcontrol.data.index import ShowDone
from memcontrol.data.look import Look, describe_greys, look_at_images
from memcontrol.reading.greys import Greys
from memcontrol.reading.groups import join_rows, pair_equals
from memcontrol.reading.parts import assign_parts

_N_TRIES = 64  # orders of the images, of which the first that leaves no part too small is taken
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
    kept: Path | None = None,
    progress: ShowDone = lambda done, total: None,
) -> Split:
    """Reads and checks every image that is not known from `kept`, and splits them into train, holdout and
    test, disjoint by content, twins and groups. `known`: what split.json records of a study that has begun,
    whose twins are not sought again. Raises MemControlError."""
    found: dict[str, Any] = {}
    source = config.path
    if source == DIGITS:
        parts, greys = split_records(_list_labelled_digits(config.label), config, seed), None
        found["drawn"] = True
        _refuse_few(parts)
    else:
        folder = locate_images(config, kept.parent if kept else None, progress)
        source = str(folder)
        look = look_at_images(folder, config, warn, seed, kept, progress)
        (parts, found), greys = deal_parts(look, config, seed, warn, known), look.greys
    images = {
        part: Images(source, resolution, tuple(records), config.fit, greys) for part, records in parts.items()
    }
    return Split(images, found | _count_groups(images, config))


def _list_labelled_digits(rule: str | None) -> list[ImageRecord]:
    """Raises MemControlError."""
    if rule not in (None, BY_CAPTION):
        raise MemControlError(
            f"data.label is '{rule}', and of the embedded digits the caption alone tells the class; set it "
            f"to {BY_CAPTION}"
        )
    return [replace(one, label=one.caption if rule else "") for one in list_digit_records()]


def _refuse_few(parts: Mapping[str, Sequence[ImageRecord]]) -> None:
    """Raises MemControlError."""
    for part, records in parts.items():
        if len(records) < FEWEST_IMAGES:
            raise MemControlError(
                f"data: {part} has {len(records)} images and the rewards need at least {FEWEST_IMAGES}; "
                f"add images or change data.train, data.holdout, data.test{_tell_of_groups(parts)}"
            )


def _tell_of_groups(parts: Mapping[str, Sequence[ImageRecord]]) -> str:
    """What keeps a part from having as many as were asked for."""
    sizes = Counter(record.group for records in parts.values() for record in records if record.group)
    if not sizes:
        return ""
    return (
        f" (images of a group, or nearly the same, stay together: there are {len(sizes)} groups, the largest "
        f"of {max(sizes.values())} images)"
    )


def _count_groups(parts: dict[str, Images], config: DataConfig) -> dict[str, Any]:
    if not config.group:
        return {}
    return {"groups": {part: len(set(images.groups)) for part, images in parts.items()}}


def deal_parts(
    look: Look,
    config: DataConfig,
    seed: int,
    warn: Callable[[str], None],
    known: Mapping[str, Any] | None = None,
) -> tuple[dict[str, list[ImageRecord]], dict[str, Any]]:
    """The parts of an image folder, as its folders or tables say, or one pool split by the config; and what
    split.json records beside them. `known` as in `load_parts`. Raises MemControlError."""
    if not look.records:
        raise MemControlError(f"data: {look.folder} holds no images that can be read")
    for note in (*look.notes, *([describe_greys(look.greys)] if look.greys else [])):
        warn(note)
    homes = assign_parts(look.folder, [record.file for record in look.records], look.tables)
    pairs, found = _recall_twins(look, known) if known else _seek_twins(look, seed)
    found |= {
        "captions": look.captions.source,
        "left_out": dict(look.left_out),
        "drawn": homes is None,  # by chance, not by a person
    }
    if homes is None:
        parts = split_records(look.name_twins(pairs).records, config, seed, pairs)
        n_left = len(look.records) - sum(map(len, parts.values()))
        if n_left:
            warn(f"{n_left} of {len(look.records)} images are in no part, as data.train and its like say")
    else:
        parts = _deal_out(look, homes, pairs, config, warn, found)
        n_left = sum(record.file not in homes for record in look.records)
    if n_left:
        found["left_out"]["in no part"] = n_left
    _refuse_few(parts)
    return parts, found


def _deal_out(
    look: Look,
    homes: Mapping[str, str],
    pairs: Sequence[tuple[int, int]],
    config: DataConfig,
    warn,
    found: dict[str, Any],
) -> dict[str, list[ImageRecord]]:
    """The parts that a person has made, by the file of each image that is in one; `found` is told what
    becomes of twins. Raises MemControlError."""
    parts_of_rows = [homes.get(record.file) for record in look.records]
    if n_outside := parts_of_rows.count(None):
        first = look.records[parts_of_rows.index(None)].name
        warn(f"{n_outside} images are left out: they are in none of the parts, such as {first}")
    # twins of two parts are no group, since a group belongs to one
    within = [(i, j) for i, j in pairs if parts_of_rows[i] == parts_of_rows[j]]
    records = look.name_twins(within).records
    names = [part for part in (*PARTS, CALIBRATION) if part in parts_of_rows]
    parts = {part: [record for record, home in zip(records, parts_of_rows) if home == part] for part in names}
    if config.twins == "refuse":
        _refuse_shared_images(parts)
    _refuse_shared_groups(parts)
    same = [(i, j) for i, j in pair_equals([record.digest for record in records]) if i < j]
    dropped = choose_dropped(records, parts_of_rows, [*pairs, *same], config.twins, "data.twins=drop")
    if dropped:
        warn(f"{len(dropped)} images are left out: twins of images in another part, such as {dropped[0]}")
        found["twins"] = {**found["twins"], "dropped": dropped}
    return {part: [one for one in own if one.name not in dropped] for part, own in parts.items()}


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
    parts: Sequence[str | None],
    pairs: Sequence[tuple[int, int]],
    rule: str,
    cure: str,
) -> list[str]:
    """Names of the images that are left out, as a rule says, since they are twins of one in an earlier of the
    `parts`, by record; None is in no part. Raises MemControlError where it says that there may be none."""
    order = {part: number for number, part in enumerate((*PARTS, CALIBRATION))}
    places = [order[part] if part else None for part in parts]
    across = [(i, j) for i, j in pairs if None not in (places[i], places[j]) and places[i] != places[j]]
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
    later = (max((i, j), key=lambda row: places[row] or 0) for i, j in across)
    return list(dict.fromkeys(records[row].name for row in later))


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
    members = list(units.values())
    tries: list[dict[str, list[ImageRecord]]] = []
    while len(tries) < _N_TRIES:  # large units may leave too little for the last part
        drawn = ("split", len(tries)) if tries else ("split",)
        order = np.random.default_rng(derive_seed(seed, *drawn)).permutation(len(units))
        tries.append(_fill_parts([members[i] for i in order], sizes))
        if all(len(tries[-1][part]) >= min(FEWEST_IMAGES, size) for part, size in sizes.items()):
            return tries[-1]
    return tries[0]


def _fill_parts(units: Iterable[list[ImageRecord]], sizes: Mapping[str, int]) -> dict[str, list[ImageRecord]]:
    """One after another."""
    parts: dict[str, list[ImageRecord]] = {part: [] for part in sizes}
    for unit in units:
        part = next((part for part in sizes if len(parts[part]) < sizes[part]), None)
        if part:
            parts[part] += unit
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
            | ({"further": list(record.further)} if record.further else {})
            | ({"label": record.label} if record.label else {})
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
            tuple(ImageRecord(**{**row, "further": tuple(row.get("further", ()))}) for row in rows),
            stored.get("fit", "crop"),
            greys,
        )
        for part, rows in stored["parts"].items()
    }
