"""Owns a look at a folder of images: each is read once, and what is found of it, of its captions and of
copies among them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from memcontrol.config.data import BY_CAPTION, DataConfig
from memcontrol.core.errors import MemControlError
from memcontrol.data.dataset import Unpacked, read_unpacked
from memcontrol.data.images import ImageRecord
from memcontrol.data.index import Seen, ShowDone, examine_files, recall_twins
from memcontrol.data.twins import Twins, describe_plain, find_twins
from memcontrol.reading.captions import Captions, find_captions
from memcontrol.reading.decode import TooLarge, decode_image, locate_page
from memcontrol.reading.folder import Listing, list_folder
from memcontrol.reading.greys import Greys, choose_greys, refuse_mixed_depths
from memcontrol.reading.groups import GROUP, LABEL, join_rows, make_grouping, propose_grouping
from memcontrol.reading.parts import assign_parts
from memcontrol.reading.tables import Tables, read_tables

WITHOUT_CAPTION = "image without a caption"
_TWINS_NAME = "twins of "  # how a group of twins is called
_MOST_SHOWN = 256  # thumbnails that tell whether images are photographs
# of an even ground: greys that are one, and its share of a natural picture at the most. Its median is .05 in
# CIFAR photographs, .1 in chest X-rays, .47 in digits
_GROUND_LEVELS, _MOST_GROUND = 16, 0.3


@dataclass(frozen=True)
class Look:
    """The images of a folder, what was seen of each and where that is kept, and the scale of their greys; the
    folder's metadata; how many files are left out, by reason; what a person should know; and what tells
    who is in an image."""

    folder: Path
    records: list[ImageRecord]
    seen: list[Seen]
    kept: Path | None
    greys: Greys | None
    tables: Tables
    captions: Captions
    left_out: dict[str, int]
    unreadable: tuple[str, ...]
    notes: tuple[str, ...]
    group: str | None

    def take(self, rows: Sequence[int]) -> Look:
        return replace(
            self, records=[self.records[row] for row in rows], seen=[self.seen[row] for row in rows]
        )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Widths and heights."""
        return [(one.width, one.height) for one in self.seen]

    def decode(self, row: int) -> Image.Image:
        return decode_image(self.folder / self.records[row].name, self.greys)

    def show_thumbnails(self) -> np.ndarray:
        """uint8 [N, 3, S, S]."""
        return np.stack([one.show_thumbnail(self.greys) for one in self.seen])

    def find_twins(self, seed: int = 0) -> Twins:
        digests = [record.digest for record in self.records]
        return recall_twins(
            self.kept, digests, seed, lambda: find_twins(self.show_thumbnails(), digests, self.decode, seed)
        )

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
    config: DataConfig,
    warn: Callable[[str], None],
    seed: int = 0,
    kept: Path | None = None,
    progress: ShowDone = lambda done, total: None,
    proposes: bool = False,
) -> Look:
    """Reads every image of a folder that is not known from `kept`, as the config says but for its path; in
    groups of which it says nothing, by what seems to tell them, where one `proposes`. Raises
    MemControlError."""
    listing = list_folder(folder)
    unpacked = read_unpacked(folder)
    tables = read_tables(folder, listing.tables, unpacked)
    captions = find_captions(folder, listing.images, listing.texts, tables, config.caption)
    found = examine_files(folder, listing.images, kept, config.pages, config.max_pixels, progress)
    failures = [
        unpacked.name_failure(folder, file, error) if unpacked else error
        for file, error in found.failures.items()
    ]
    unreadable = _skip(failures, config.skip_unreadable, warn)
    patients, group = _find_patients(found.images), config.group
    if proposes:
        group = propose_grouping([locate_page(name)[0] for name in found.images], tables, patients)
    groups = _find_groups(folder, list(found.images), group, tables, patients)
    captions = captions.leave_out_names(groups)
    greys = find_greys({folder / name: one for name, one in found.images.items() if one.kind})
    labels = _find_labels(folder, list(found.images), config.label, tables, captions)
    records = [_make_image(name, one, groups, labels, captions, seed) for name, one in found.images.items()]
    return Look(
        folder,
        records,
        list(found.images.values()),
        kept,
        greys,
        tables,
        captions,
        _count_left_out(listing, captions, unpacked, failures, records),
        unreadable,
        (
            *(unpacked.notes if unpacked else ()),
            *listing.describe_left_out(),
            *captions.notes,
            *_describe_captions(records),
            *_describe_ungrouped(groups, group),
        ),
        group,
    )


def _count_left_out(
    listing: Listing,
    captions: Captions,
    unpacked: Unpacked | None,
    failures: Iterable[MemControlError],
    records: Sequence[ImageRecord],
) -> dict[str, int]:
    """Of a folder what is not used, by kind; and images that lack a caption."""
    found = Counter({reason: len(names) for reason, names in listing.left_out.items()})
    found.update(captions.left_out)
    found.update(unpacked.left_out if unpacked else {})
    found.update("too large" if isinstance(error, TooLarge) else "cannot be decoded" for error in failures)
    found[WITHOUT_CAPTION] = sum(not record.caption for record in records)
    return {reason: n for reason, n in found.items() if n}


def _describe_captions(records: Sequence[ImageRecord]) -> Iterator[str]:
    n_without = sum(not record.caption for record in records)
    if n_without:
        is_all = n_without == len(records)
        yield (
            "no image has a caption" if is_all else f"{n_without} of {len(records)} images have no caption"
        )
    n_several = sum(bool(record.further) for record in records)
    if n_several:
        yield f"{n_several} images have several captions: each use of one in training draws one of them"


def _make_image(
    name: str,
    seen: Seen,
    groups: Mapping[str, str],
    labels: Mapping[str, str],
    captions: Captions,
    seed: int,
) -> ImageRecord:
    file, _ = locate_page(name)
    caption, *further = captions.shuffle(file, seed)
    group = groups.get(file) or (f"pages of {file}" if file != name else "")
    return ImageRecord(name, caption, seen.digest, group, tuple(further), labels.get(file, ""))


def _skip(
    failures: Iterable[MemControlError], may_skip: bool, warn: Callable[[str], None]
) -> tuple[str, ...]:
    """What is said of images that cannot be read. Raises MemControlError where none may be skipped."""
    said = []
    for error in failures:
        if not may_skip:
            raise error
        said.append(f"skipped: {error}".rpartition("; ")[0])  # mending is one way
        warn(said[-1])
    return tuple(said)


def _find_groups(
    folder: Path,
    names: Sequence[str],
    rule: str | None,
    tables: Tables,
    patients: Mapping[str, str],
    key: str = GROUP,
) -> dict[str, str]:
    """By file, as data.group says, or another key; empty for one that is of none. Raises MemControlError."""
    if not rule:
        return {}
    try:
        find = make_grouping(rule, tables, patients, key)
        return {file: find(file) for file in dict.fromkeys(locate_page(name)[0] for name in names)}
    except MemControlError as error:
        raise MemControlError(f"{folder}: {error}") from None


def _find_labels(
    folder: Path, names: Sequence[str], rule: str | None, tables: Tables, captions: Captions
) -> dict[str, str]:
    """By file, as data.label says. Raises MemControlError."""
    if rule != BY_CAPTION:
        return _find_groups(folder, names, rule, tables, {}, LABEL)
    found: dict[str, str] = {}
    for file in dict.fromkeys(locate_page(name)[0] for name in names):
        texts = [text for text in captions.texts.get(file, ()) if text]
        if len(texts) != 1:
            has = f"{len(texts)} captions" if texts else "no caption"
            raise MemControlError(
                f"{folder}: data.label is '{BY_CAPTION}', and image '{file}' has {has}; each image needs one"
            )
        found[file] = texts[0]
    return found


def _describe_ungrouped(groups: Mapping[str, str], rule: str | None) -> Iterator[str]:
    without = [file for file, group in groups.items() if not group]
    if without:
        yield f"{len(without)} images say no {rule}, such as {without[0]}: each is a group of its own"


def _find_patients(seen: Mapping[str, Seen]) -> dict[str, str]:
    """By file, of those that say so."""
    return {locate_page(name)[0]: one.patient for name, one in seen.items() if one.patient}


def find_greys(seen: Mapping[Path, Seen]) -> Greys | None:
    """The scale of images of more than 8 bits, None where there are none: from the values that they have in
    all. Raises MemControlError where they have no common one, and for 16-bit colour in whose high bytes there
    is next to nothing, which is all that is read of it."""
    kinds: dict[str, dict[Path, Seen]] = {}
    for path, one in seen.items():
        if one.kind:
            kinds.setdefault(one.kind, {})[path] = one
    _refuse_dark_colours(kinds.pop("colour", {}))
    if len(kinds) > 1:
        whole, fractions = (next(iter(kinds[kind])) for kind in ("I", "F"))
        raise MemControlError(
            f"some greys are whole numbers, such as {whole}, and others fractions, such as {fractions}, with "
            "no common scale; store all of them alike"
        )
    for kind, found in kinds.items():
        ranges = {path: (one.least, one.most) for path, one in found.items()}
        greys = choose_greys(
            min(low for low, _ in ranges.values()), max(high for _, high in ranges.values()), kind
        )
        refuse_mixed_depths(greys, ranges)
        return greys
    return None


def _refuse_dark_colours(wide: Mapping[Path, Seen]) -> None:
    """Of 16 bits. Raises MemControlError."""
    high = max((int(one.most) for one in wide.values()), default=255)
    if high < 128:
        raise MemControlError(
            f"16-bit colour such as '{next(iter(wide))}' holds values up to {high * 256 + 255} of 65,535, and"
            " would be read as nearly black; convert it to 8 bits, or to the full range"
        )


def describe_greys(greys: Greys) -> str:
    return (
        f"greys of more than 8 bits: {greys.black:g} is shown as black and {greys.white:g} as white, in all "
        "images alike"
    )


@dataclass(frozen=True)
class FolderSummary:
    """What a folder of images holds: the look at it; how many images are in each part, where the folder has
    parts; sides in pixels; groups of images with the same pixels, and pairs that are nearly the same; what a
    person should know; how many files have several pages, of which the first was looked at; whether they are
    natural pictures, not characters or line art; and, once they are dealt out, which images are left out as
    twins of one in another part."""

    look: Look
    parts: dict[str, int]
    sides: tuple[int, int, int]  # least, median, most of the shorter side
    is_grey: bool
    copies: tuple[tuple[str, ...], ...]
    near: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    n_several: int = 0
    are_photographs: bool = False
    dropped: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return len(self.look.records)

    @property
    def unreadable(self) -> tuple[str, ...]:
        """What cannot be decoded, and why."""
        return tuple(text.removeprefix("skipped: ").removeprefix("image ") for text in self.look.unreadable)

    @property
    def captions(self) -> Counter[str]:
        return Counter(record.caption for record in self.look.records)


def summarize_folder(
    folder: Path, progress: Callable[[str, int, int], None], kept: Path | None = None
) -> FolderSummary:
    """Reads every image that is not known from `kept`. Raises MemControlError where there are none."""
    if not folder.is_dir():
        raise MemControlError(f"{folder} is no folder; give a folder of images")
    config = DataConfig(path=str(folder), skip_unreadable=True, pages="first")
    tell = partial(progress, "reading images")
    look = look_at_images(folder, config, lambda line: None, 0, kept, tell, proposes=True)
    if not look.records:
        said = "; ".join(look.notes)
        raise MemControlError(
            f"{folder} holds no images that can be decoded{f' ({said})' if said else ''}; give a folder of "
            "images, with metadata.csv or text files beside them for captions"
        )
    homes = assign_parts(folder, [record.file for record in look.records], look.tables) or {}
    progress("looking for twins", 0, 1)
    twins = look.find_twins()
    progress("looking for twins", 1, 1)
    near = tuple((look.records[i].name, look.records[j].name) for i, j in twins.pairs)
    shorter = [min(size) for size in look.sizes]
    return FolderSummary(
        look,
        dict(Counter(homes[record.file] for record in look.records if record.file in homes)),
        (min(shorter), int(statistics.median(shorter)), max(shorter)),
        _are_grey(look),
        _group_copies(look.records),
        near,
        (
            *look.notes,
            *([describe_greys(look.greys)] if look.greys else []),
            *describe_plain(twins.n_plain),
        ),
        sum(one.n_pages > 1 for one in look.seen),
        show_photographs(_show_some_thumbnails(look)),
    )


def _are_grey(look: Look) -> bool:
    """Whether no image has colour, however it is stored."""
    shown = (one.show_thumbnail(look.greys) for one in look.seen)
    return all((image[0] == image[1]).all() and (image[1] == image[2]).all() for image in shown)


def _show_some_thumbnails(look: Look) -> np.ndarray:
    """Of images all over the folder, uint8 [N, 3, S, S]."""
    rows = choose_shown(len(look.records))
    return np.stack([look.seen[row].show_thumbnail(look.greys) for row in rows])


def choose_shown(n: int) -> list[int]:
    """Rows of so many images that tell what they are, all over them."""
    return np.unique(np.linspace(0, n - 1, min(n, _MOST_SHOWN)).astype(int)).tolist()


def show_photographs(images: np.ndarray) -> bool:
    """Whether most of uint8 [N, 3, S, S] are natural pictures. Characters and line art lie on an even ground:
    the darkest or the lightest grey of an image takes much of it. What is photographed on such a ground
    counts as drawn."""
    greys = images.mean(1)  # [N, S, S]
    ends = (greys.min((1, 2), keepdims=True), greys.max((1, 2), keepdims=True))
    grounds = [(abs(greys - end) <= _GROUND_LEVELS).mean((1, 2)) for end in ends]
    return float(np.median(np.maximum(*grounds))) <= _MOST_GROUND


def _group_copies(records: list[ImageRecord]) -> tuple[tuple[str, ...], ...]:
    groups: dict[str, list[str]] = {}
    for record in records:
        groups.setdefault(record.digest, []).append(record.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)
