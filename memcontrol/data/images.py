"""Owns the images: of a folder, or the embedded digits, with their captions, as squares of pixels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from memcontrol.config.data import Fit
from memcontrol.core.image_parts import DIGITS
from memcontrol.reading.decode import decode_image, locate_page
from memcontrol.reading.greys import Greys
from memcontrol.reading.threads import map_in_threads

# images that are in memory at a time: a multiple of what a feature network takes, fewer where they are large
_MOST_AT_ONCE, _BYTES_AT_ONCE = 256, 2**26


def count_at_once(side: int) -> int:
    """How many images of a side in pixels are in memory at a time."""
    return max(1, min(_MOST_AT_ONCE, _BYTES_AT_ONCE // (3 * side * side)))


@dataclass(frozen=True)
class ImageRecord:
    """One image: its path inside the data folder (or its index among the digits), caption, hash of its
    pixels, and the group of images that it belongs to, such as a person; empty: none but itself; the
    captions from which training draws beside the first; and the class that it shows, where that is known."""

    name: str
    caption: str
    digest: str = ""
    group: str = ""
    further: tuple[str, ...] = ()
    label: str = ""

    @property
    def file(self) -> str:
        """That it lies in, beside other pages or alone."""
        return locate_page(self.name)[0]


@dataclass(frozen=True)
class Images:
    """Some of a source's images, in order; pixels are decoded only when asked for, brought to squares as
    `fit` says, and deep greys to 8 bits by one scale for all."""

    source: str
    resolution: int
    records: tuple[ImageRecord, ...]
    fit: Fit = "crop"
    greys: Greys | None = None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def captions(self) -> list[str]:
        return [record.caption for record in self.records]

    @property
    def further_captions(self) -> list[tuple[str, ...]]:
        """Those of each image beside the first."""
        return [record.further for record in self.records]

    @property
    def groups(self) -> list[str]:
        """Who is in each image."""
        return [record.group or f"{self.source} {record.name}" for record in self.records]

    @property
    def labels(self) -> list[str]:
        """Which class is in each image."""
        return [record.label for record in self.records]

    @cached_property
    def digest(self) -> str:
        """Names the content: the same images with the same captions at the same resolution, in the same
        order, brought to squares alike, deep greys by the same scale."""
        lines = [" ".join((record.digest, record.caption, *record.further)) for record in self.records]
        form = str(self.resolution) if self.fit == "crop" else f"{self.resolution} {self.fit}"
        form += f" {self.greys.black} {self.greys.white}" if self.greys else ""
        return hashlib.sha256("\n".join([form, *lines]).encode()).hexdigest()[:16]

    def take(self, rows: Sequence[int]) -> Images:
        return replace(self, records=tuple(self.records[row] for row in rows))

    def iterate_pixels(self, size: int) -> Iterator[np.ndarray]:
        """The pixels of `size` images at a time, each uint8 [n, 3, resolution, resolution]."""
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self)))).pixels()

    def pixels(self) -> np.ndarray:
        """uint8 [N, 3, resolution, resolution]."""
        read = (
            _make_digit_reader()
            if self.source == DIGITS
            else _make_folder_reader(Path(self.source), self.greys)
        )

        def make_square(record: ImageRecord) -> np.ndarray:
            return fit_square(read(record.name), self.resolution, self.fit)

        squares = map_in_threads(make_square, self.records, _count_threads())
        return np.stack(list(squares)).transpose(0, 3, 1, 2)


def _count_threads() -> int | None:
    """As many as a worker may use beside others."""
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or None


def _make_digit_reader():
    """Reads scikit-learn's handwritten digits (UCI optdigits test set) as dark ink on white paper, 8 x 8
    pixels."""
    from sklearn.datasets import load_digits

    ink = load_digits().images  # [1797, 8, 8] in 0..16
    paper = np.round(255 * (1 - ink / 16)).astype(np.uint8)
    return lambda name: Image.fromarray(paper[int(name)]).convert("RGB")


def _make_folder_reader(folder: Path, greys: Greys | None):
    return lambda name: decode_image(folder / name, greys)


def fit_square(image: Image.Image, resolution: int, fit: Fit = "crop") -> np.ndarray:
    """The centre square, the whole on black, or the whole squashed; resized with antialiasing. uint8
    [resolution, resolution, 3]."""
    size, way = (resolution, resolution), Image.Resampling.BICUBIC
    if fit == "pad":
        return np.asarray(ImageOps.pad(image, size, way))
    return np.asarray(ImageOps.fit(image, size, way) if fit == "crop" else image.resize(size, way))


def list_digit_records() -> list[ImageRecord]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return [
        ImageRecord(
            str(i), f"a blurred handwritten digit {label}", hashlib.sha256(pixels.tobytes()).hexdigest()[:16]
        )
        for i, (label, pixels) in enumerate(zip(digits.target, digits.images))
    ]
