"""Owns named sets of images to be judged, from a folder or from a model: read, matched and brought to
squares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from memcontrol.config.data import DataConfig, Fit
from memcontrol.core.errors import MemControlError
from memcontrol.data.images import Images, count_at_once, fit_square
from memcontrol.data.index import ShowDone
from memcontrol.data.look import Look, find_greys, look_at_images
from memcontrol.data.split import choose_dropped
from memcontrol.data.twins import find_twins
from memcontrol.reading.groups import pair_equals
from memcontrol.reading.parts import refuse_parts

_LARGEST_SIDE = 512  # pixels to which larger images are brought: no feature network looks at more
_SAME_SHAPE = 0.05  # by how much sides' ratios may differ
FITS: tuple[Fit, ...] = ("crop", "pad", "squash")


@dataclass(frozen=True)
class Pictures:
    """A named set of images: their names, who is in them, how to read some of them as uint8 [B, 3, side,
    side], and which are known to be nearly the same, by name."""

    title: str
    names: tuple[str, ...]
    digests: tuple[str, ...]
    read: Callable[[list[int]], np.ndarray]
    side: int
    groups: tuple[str, ...]
    twins: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def iterate_rows(self) -> Iterator[list[int]]:
        """As many at a time as may be in memory."""
        size = count_at_once(self.side)
        for start in range(0, len(self), size):
            yield list(range(start, min(start + size, len(self))))

    def read_small(self, rows: list[int], side: int) -> np.ndarray:
        """uint8 [B, 3, side, side]."""
        found = self.read(rows)
        if found.shape[-1] == side:
            return found
        tiles = (fit_square(Image.fromarray(one.transpose(1, 2, 0)), side) for one in found)
        return np.stack(list(tiles)).transpose(0, 3, 1, 2)


@dataclass(frozen=True)
class FolderImages:
    """The images of a folder, the shapes that they have, and which are nearly the same, by name."""

    title: str
    look: Look
    twins: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ()  # images that are left out, twins of another set's

    @property
    def side(self) -> int:
        """Of the squares that they are brought to: what is usual among them."""
        return min(int(median(min(size) for size in self.look.sizes)), _LARGEST_SIDE)

    @property
    def shape(self) -> float:
        """Width over height, as is usual."""
        return float(median(width / height for width, height in self.look.sizes))

    def make_images(self, side: int, fit: Fit) -> Images:
        """Brought to squares of `side` pixels."""
        return Images(str(self.look.folder), side, tuple(self.look.records), fit, self.look.greys)

    def make_pictures(self, fit: Fit) -> Pictures:
        return make_pictures(self.title, self.make_images(self.side, fit), self.twins)

    def name_twins(self, pairs: Sequence[tuple[int, int]]) -> FolderImages:
        """With these rows as twins."""
        records = self.look.records
        twins = tuple((records[i].name, records[j].name) for i, j in pairs)
        return replace(self, look=self.look.name_twins(pairs), twins=twins)

    def leave_out(self, names: Sequence[str]) -> FolderImages:
        """Without the images of these names."""
        gone = set(names)
        kept = [i for i, record in enumerate(self.look.records) if record.name not in gone]
        return replace(self, look=self.look.take(kept), dropped=tuple(names))


def read_folder(
    title: str, folder: Path, config: DataConfig, warn: Callable[[str], None], progress: ShowDone
) -> FolderImages:
    """The images of a folder and its sub-folders, read as the config says but for its path. Raises
    MemControlError: none, or one that cannot be decoded."""
    if not folder.is_dir():
        raise MemControlError(f"{title}: {folder} is no folder; give a folder of images")
    look = look_at_images(folder, config, warn, progress=progress)
    refuse_parts(title, folder, [record.file for record in look.records], look.tables)
    if not look.records:
        raise MemControlError(f"{title}: {folder} holds no images; give a folder of images")
    for note in look.notes:
        warn(f"{title}: {note}")
    return FolderImages(title, look)


def read_folder_pictures(
    title: str, folder: Path, warn: Callable[[str], None], skip_unreadable: bool = False
) -> Pictures:
    """The centre squares of a folder's images. Raises MemControlError."""
    config = DataConfig(path=str(folder), skip_unreadable=skip_unreadable)
    return read_folder(title, folder, config, warn, lambda done, total: None).make_pictures("crop")


def share_greys(sets: Mapping[str, FolderImages]) -> dict[str, FolderImages]:
    """With one scale for the deep greys of all. Raises MemControlError where there is none."""
    seen = {
        one.look.folder / record.name: seen
        for one in sets.values()
        for record, seen in zip(one.look.records, one.look.seen)
    }
    greys = find_greys(seen)
    return {name: replace(one, look=replace(one.look, greys=greys)) for name, one in sets.items()}


def leave_out_twins(
    train: FolderImages, holdout: FolderImages, rule: str, warn: Callable[[str], None]
) -> tuple[FolderImages, FolderImages]:
    """Held-out images that are nearly training images, by a rule as data.twins is one; twins within a part
    become a group. Raises MemControlError where they are refused."""
    n = len(train.look.records)
    records = [
        replace(record, name=f"{part}/{record.name}")
        for part, one in (("train", train), ("holdout", holdout))
        for record in one.look.records
    ]
    pairs = find_twins(
        np.concatenate([train.look.show_thumbnails(), holdout.look.show_thumbnails()]),
        [record.digest for record in records],
        lambda row: train.look.decode(row) if row < n else holdout.look.decode(row - n),
    ).pairs
    pairs += tuple((i, j) for i, j in pair_equals([record.digest for record in records]) if i < j)
    homes = ["train"] * n + ["holdout"] * (len(records) - n)
    dropped = choose_dropped(records, homes, pairs, rule, "--twins drop")
    if dropped:
        warn(
            f"{len(dropped)} of {len(holdout.look.records)} held-out images are left out: they are nearly "
            f"training images, such as {dropped[0]}"
        )
    known = train.name_twins([pair for pair in pairs if max(pair) < n])
    held = holdout.name_twins([(i - n, j - n) for i, j in pairs if min(i, j) >= n])
    return known, held.leave_out([name.removeprefix("holdout/") for name in dropped])


def choose_fits(generated: FolderImages | None, train: FolderImages, given: Fit | None) -> tuple[Fit, ...]:
    """How images are brought to squares: as is said; else by the centre square, and where generated images
    are of another shape than training images in all ways, since they were made so."""
    if given:
        return (given,)
    shape = generated.shape if generated else 1.0
    return ("crop",) if abs(shape / train.shape - 1) <= _SAME_SHAPE else FITS


def make_pictures(title: str, images: Images, twins: tuple[tuple[str, str], ...] = ()) -> Pictures:
    names, digests = (tuple(getattr(record, key) for record in images.records) for key in ("name", "digest"))

    def read(rows: list[int]) -> np.ndarray:
        return images.take(rows).pixels()

    return Pictures(title, names, digests, read, images.resolution, tuple(images.groups), twins)


def wrap_samples(pixels: np.ndarray) -> Pictures:
    """uint8 [N, 3, H, H] that a model made."""
    names = tuple(f"sample {i}" for i in range(len(pixels)))
    digests = tuple("" for _ in names)
    return Pictures("generated", names, digests, lambda rows: pixels[rows], pixels.shape[-1], names)
