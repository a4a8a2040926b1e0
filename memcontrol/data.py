"""Owns the images: folders with captions and the embedded digits, how they are read, checked and split."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from memcontrol.config import DIGITS, DataConfig
from memcontrol.errors import MemControlError
from memcontrol.seeds import seed_of

PARTS = ("train", "holdout", "test")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
METADATA = ("metadata.jsonl", "metadata.csv")
DIGIT_WORDS = "zero one two three four five six seven eight nine".split()
FEWEST_IMAGES = 8  # per part; below it no interval says anything


@dataclass(frozen=True)
class Record:
    """One image: its path inside the data folder (or its index among the digits), caption, and hash of its pixels."""

    name: str
    caption: str
    digest: str = ""


@dataclass(frozen=True)
class Images:
    """Some of a source's images, in order; pixels are decoded only when asked for."""

    source: str
    resolution: int
    records: tuple[Record, ...]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def captions(self) -> list[str]:
        return [record.caption for record in self.records]

    @cached_property
    def digest(self) -> str:
        """Names the content: the same images with the same captions at the same resolution, in the same order."""
        lines = [f"{record.digest} {record.caption}" for record in self.records]
        return hashlib.sha256("\n".join([str(self.resolution), *lines]).encode()).hexdigest()[:16]

    def take(self, rows: Sequence[int]) -> Images:
        return replace(self, records=tuple(self.records[row] for row in rows))

    def pixels(self) -> np.ndarray:
        """uint8 [N, 3, resolution, resolution]."""
        read = digit_reader() if self.source == DIGITS else folder_reader(Path(self.source))
        squares = [squared(read(record.name), self.resolution) for record in self.records]
        return np.stack(squares).transpose(0, 3, 1, 2)


def digit_reader():
    """Reads scikit-learn's handwritten digits (UCI optdigits test set) as dark ink on white paper, 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    ink = load_digits().images  # [1797, 8, 8] in 0..16
    paper = np.round(255 * (1 - ink / 16)).astype(np.uint8)
    return lambda name: Image.fromarray(paper[int(name)]).convert("RGB")


def folder_reader(folder: Path):
    return lambda name: decode(folder / name)


def decode(path: Path) -> Image.Image:
    """An image file as upright RGB: EXIF rotation applied, transparency on white, 16-bit grey scaled. Raises MemControlError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd but readable files: palettes, EXIF blocks, huge pictures
            with Image.open(path) as image:
                return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise MemControlError(f"image {path} is not there any more; restore it, or where the images have moved, set data.path and run the search once more") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MemControlError(
            f"image {path} cannot be decoded ({type(error).__name__}); mend or remove it, or set data.skip_unreadable=true (audit: --skip-unreadable)"
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        grey = np.asarray(image, np.float64)
        return Image.fromarray((grey * (255 / max(65535.0, grey.max()))).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def squared(image: Image.Image, resolution: int) -> np.ndarray:
    """The centre square, resized with antialiasing. uint8 [resolution, resolution, 3]."""
    return np.asarray(ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC))


def load_parts(config: DataConfig, resolution: int, seed: int, warn=lambda line: None) -> dict[str, Images]:
    """Reads and checks every image and splits them into train, holdout and test, disjoint by content. Raises MemControlError."""
    if config.path == DIGITS:
        parts = split(digit_records(), config, seed)
    else:
        parts = folder_parts(Path(config.path), config, seed, warn)
    for part, records in parts.items():
        if len(records) < FEWEST_IMAGES:
            raise MemControlError(
                f"data: {part} has {len(records)} images and the rewards need at least {FEWEST_IMAGES}; "
                "add images or change data.train, data.holdout, data.test"
            )
    return {part: Images(config.path, resolution, tuple(records)) for part, records in parts.items()}


def refuse_results_among(source: str, folder: Path) -> None:
    """Raises MemControlError where a study's folder lies among its images: its pictures would count as images the next time."""
    images = Path(source)
    places = [images / part for part in PARTS if (images / part).is_dir()] or [images]
    if source != DIGITS and any(folder.resolve().is_relative_to(place.resolve()) for place in places):
        raise MemControlError(
            f"results would go to {folder}, among the images of data.path, '{source}', and count as images themselves; move the study file out of there, "
            f"for example to {images.resolve().parent}"
        )


def digit_records() -> list[Record]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return [
        Record(str(i), f"a blurred handwritten digit {label}", hashlib.sha256(pixels.tobytes()).hexdigest()[:16])
        for i, (label, pixels) in enumerate(zip(digits.target, digits.images))
    ]


def folder_parts(folder: Path, config: DataConfig, seed: int, warn) -> dict[str, list[Record]]:
    """The parts of an image folder: its sub-folders train, holdout and test, or one pool split by the config."""
    if not folder.is_dir():
        raise MemControlError(f"data.path is '{config.path}': no such folder; give 'digits' or a folder of images")
    given = [part for part in PARTS if (folder / part).is_dir()]
    if given and len(given) < len(PARTS):
        missing = ", ".join(f"{part}/" for part in PARTS if part not in given)
        raise MemControlError(f"data: {folder} has {given[0]}/ but no {missing}; add it, or put all images in one folder to be split")
    captions = read_captions(folder)
    records = checked(folder, captions, config.skip_unreadable, warn)
    if not records:
        raise MemControlError(f"data: {folder} holds no images; known endings are {', '.join(sorted(SUFFIXES))}")
    if not given:
        return split(records, config, seed)
    parts = {part: [record for record in records if record.name.startswith(f"{part}/")] for part in PARTS}
    refuse_shared(parts)
    return parts


def read_captions(folder: Path) -> dict[str, str]:
    """Image path inside the folder to caption, from every metadata file of the imagefolder kind below it."""
    captions: dict[str, str] = {}
    for file in sorted(path for name in METADATA for path in folder.rglob(name)):
        for number, row in enumerate(metadata_rows(file), start=1):
            name = row.get("file_name")
            if not isinstance(name, str) or not name:
                raise MemControlError(f"{file}, row {number}: no 'file_name'; each row needs file_name and text")
            path = file.parent / name
            if not path.is_file():
                raise MemControlError(f"{file}, row {number}: names '{name}', and there is no such image in {file.parent}")
            captions[Path(os.path.normpath(path)).relative_to(os.path.normpath(folder)).as_posix()] = str(row.get("text") or "")
    return captions


def metadata_rows(file: Path) -> list[dict]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".csv":
            return list(csv.DictReader(text.splitlines()))
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise MemControlError(f"{file} cannot be read: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise MemControlError(f'{file}: each line must be an object such as {{"file_name": "a.png", "text": "a cat"}}')
    return rows


def checked(folder: Path, captions: dict[str, str], skip_unreadable: bool, warn) -> list[Record]:
    """A record for each image of the folder, decoded once to see that it can be and to hash its pixels."""
    names = sorted(name for name in (path.relative_to(folder).as_posix() for path in folder.rglob("*")) if is_image(folder, name, captions))
    records = []
    for name in names:
        try:
            image = decode(folder / name)
        except MemControlError as error:
            if not skip_unreadable:
                raise
            warn(f"skipped: {error}".split(";")[0])
            continue
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]
        records.append(Record(name, captions.get(name, "" if captions else folder_caption(name)), digest))
    return records


def is_image(folder: Path, name: str, captions: dict[str, str]) -> bool:
    hidden = any(part.startswith(".") for part in Path(name).parts)
    return not hidden and (name in captions or Path(name).suffix.lower() in SUFFIXES) and (folder / name).is_file()


def folder_caption(name: str) -> str:
    """Without metadata the caption is the innermost folder's name, unless that folder is a part."""
    parent = Path(name).parent.name
    return "" if parent in PARTS else parent


def refuse_shared(parts: dict[str, list[Record]]) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for part, records in parts.items():
        for record in records:
            other, name = seen.setdefault(record.digest, (part, record.name))
            if other != part:
                raise MemControlError(
                    f"data: {other} and {part} share an image: '{name}' and '{record.name}' have the same pixels; "
                    "remove one, since copying could not be told from chance"
                )


def split(records: list[Record], config: DataConfig, seed: int) -> dict[str, list[Record]]:
    """A random disjoint split; images with the same pixels stay in one part, so that none is in two."""
    sizes = part_sizes(len(records), config)
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.digest, []).append(record)
    order = np.random.default_rng(seed_of(seed, "split")).permutation(len(groups))
    members = list(groups.values())
    parts: dict[str, list[Record]] = {part: [] for part in PARTS}
    for i in order:
        part = next((part for part in PARTS if len(parts[part]) < sizes[part]), None)
        if part:
            parts[part] += members[i]
    return parts


def part_sizes(n: int, config: DataConfig) -> dict[str, int]:
    given = {part: getattr(config, part) for part in PARTS}
    sizes = {part: size if isinstance(size, int) else round(n * size) for part, size in given.items()}
    if sum(sizes.values()) > n + len(PARTS) - 1:
        asked = ", ".join(f"{part} {size}" for part, size in given.items())
        raise MemControlError(f"data: {asked} asks for {sum(sizes.values())} images and there are {n}; ask for fewer")
    return sizes


def parts_as_dict(parts: dict[str, Images]) -> dict:
    """What split.json records."""
    return {
        part: [{"name": record.name, "caption": record.caption, "digest": record.digest} for record in images.records]
        for part, images in parts.items()
    }


def parts_from_dict(values: dict, source: str, resolution: int) -> dict[str, Images]:
    return {part: Images(source, resolution, tuple(Record(**row) for row in rows)) for part, rows in values.items()}
