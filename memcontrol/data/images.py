"""Owns the images: folders with captions and the embedded digits, how they are read and checked."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from memcontrol.core.config import DIGITS, PARTS
from memcontrol.core.errors import MemControlError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
_METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class ImageRecord:
    """One image: its path inside the data folder (or its index among the digits), caption, and hash of its
    pixels."""

    name: str
    caption: str
    digest: str = ""


@dataclass(frozen=True)
class Images:
    """Some of a source's images, in order; pixels are decoded only when asked for."""

    source: str
    resolution: int
    records: tuple[ImageRecord, ...]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def captions(self) -> list[str]:
        return [record.caption for record in self.records]

    @cached_property
    def digest(self) -> str:
        """Names the content: the same images with the same captions at the same resolution, in the same
        order."""
        lines = [f"{record.digest} {record.caption}" for record in self.records]
        return hashlib.sha256("\n".join([str(self.resolution), *lines]).encode()).hexdigest()[:16]

    def take(self, rows: Sequence[int]) -> Images:
        return replace(self, records=tuple(self.records[row] for row in rows))

    def iterate_pixels(self, size: int) -> Iterator[np.ndarray]:
        """The pixels of `size` images at a time, each uint8 [n, 3, resolution, resolution]."""
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self)))).pixels()

    def pixels(self) -> np.ndarray:
        """uint8 [N, 3, resolution, resolution]."""
        read = _make_digit_reader() if self.source == DIGITS else _make_folder_reader(Path(self.source))
        squares = [crop_square(read(record.name), self.resolution) for record in self.records]
        return np.stack(squares).transpose(0, 3, 1, 2)


def _make_digit_reader():
    """Reads scikit-learn's handwritten digits (UCI optdigits test set) as dark ink on white paper, 8 x 8
    pixels."""
    from sklearn.datasets import load_digits

    ink = load_digits().images  # [1797, 8, 8] in 0..16
    paper = np.round(255 * (1 - ink / 16)).astype(np.uint8)
    return lambda name: Image.fromarray(paper[int(name)]).convert("RGB")


def _make_folder_reader(folder: Path):
    return lambda name: decode_image(folder / name)


def decode_image(path: Path) -> Image.Image:
    """An image file as upright RGB: EXIF rotation applied, transparency on white, 16-bit grey scaled. Raises
    MemControlError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd but readable files: palettes, EXIF blocks, huge pictures
            with Image.open(path) as image:
                return _convert_to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise MemControlError(
            f"image {path} is not there any more; restore it, or where the images have moved, set "
            "data.path and run the search once more"
        ) from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MemControlError(
            f"image {path} cannot be decoded ({type(error).__name__}); mend or remove it, or set "
            "data.skip_unreadable=true (audit: --skip-unreadable)"
        ) from None


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        grey = np.asarray(image, np.float64)
        return Image.fromarray((grey * (255 / max(65535.0, grey.max()))).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def crop_square(image: Image.Image, resolution: int) -> np.ndarray:
    """The centre square, resized with antialiasing. uint8 [resolution, resolution, 3]."""
    return np.asarray(ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC))


def list_digit_records() -> list[ImageRecord]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return [
        ImageRecord(
            str(i), f"a blurred handwritten digit {label}", hashlib.sha256(pixels.tobytes()).hexdigest()[:16]
        )
        for i, (label, pixels) in enumerate(zip(digits.target, digits.images))
    ]


def read_captions(folder: Path) -> dict[str, str]:
    """Image path inside the folder to caption, from every metadata file of the imagefolder kind below it."""
    captions: dict[str, str] = {}
    for file in sorted(path for name in _METADATA for path in folder.rglob(name)):
        for number, row in enumerate(_read_metadata_rows(file), start=1):
            name = row.get("file_name")
            if not isinstance(name, str) or not name:
                raise MemControlError(
                    f"{file}, row {number}: no 'file_name'; each row needs file_name and text"
                )
            path = file.parent / name
            if not path.is_file():
                raise MemControlError(
                    f"{file}, row {number}: names '{name}', and there is no such image in {file.parent}"
                )
            captions[Path(os.path.normpath(path)).relative_to(os.path.normpath(folder)).as_posix()] = str(
                row.get("text") or ""
            )
    return captions


def _read_metadata_rows(file: Path) -> list[dict]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".csv":
            return list(csv.DictReader(text.splitlines()))
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise MemControlError(f"{file} cannot be read: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise MemControlError(
            f'{file}: each line must be an object such as {{"file_name": "a.png", "text": "a cat"}}'
        )
    return rows


def read_records(folder: Path, captions: dict[str, str], skip_unreadable: bool, warn) -> list[ImageRecord]:
    """A record for each image of the folder, decoded once to see that it can be and to hash its pixels."""
    names = sorted(
        name
        for name in (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
        if _is_image(folder, name, captions)
    )
    records = []
    for name in names:
        try:
            image = decode_image(folder / name)
        except MemControlError as error:
            if not skip_unreadable:
                raise
            warn(f"skipped: {error}".split(";")[0])
            continue
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]
        records.append(
            ImageRecord(name, captions.get(name, "" if captions else _derive_caption(name)), digest)
        )
    return records


def _is_image(folder: Path, name: str, captions: dict[str, str]) -> bool:
    hidden = any(part.startswith(".") for part in Path(name).parts)
    return (
        not hidden
        and (name in captions or Path(name).suffix.lower() in SUFFIXES)
        and (folder / name).is_file()
    )


def _derive_caption(name: str) -> str:
    """Without metadata the caption is the innermost folder's name, unless that folder is a part."""
    parent = Path(name).parent.name
    return "" if parent in PARTS else parent
