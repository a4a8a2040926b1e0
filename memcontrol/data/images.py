"""Owns the images: folders with captions and the embedded digits, how they are read and checked."""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from memcontrol.core.config import DIGITS, Fit
from memcontrol.core.errors import MemControlError
from memcontrol.data.dicom import can_read_dicom, decode_dicom, is_dicom
from memcontrol.data.greys import Greys, choose_greys, is_deep, is_inverted, read_greys, refuse_mixed_depths

# images that are in memory at a time: a multiple of what a feature network takes, fewer where they are large
_MOST_AT_ONCE, _BYTES_AT_ONCE = 256, 2**26
_UPRIGHT = {  # what turns an image of each EXIF orientation (CIPA DC-008)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Read = TypeVar("Read")


def count_at_once(side: int) -> int:
    """How many images of a side in pixels are in memory at a time."""
    return max(1, min(_MOST_AT_ONCE, _BYTES_AT_ONCE // (3 * side * side)))


@dataclass(frozen=True)
class ImageRecord:
    """One image: its path inside the data folder (or its index among the digits), caption, hash of its
    pixels, and the group of images that it belongs to, such as a person; empty: none but itself."""

    name: str
    caption: str
    digest: str = ""
    group: str = ""


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
    def groups(self) -> list[str]:
        """Who is in each image."""
        return [record.group or f"{self.source} {record.name}" for record in self.records]

    @cached_property
    def digest(self) -> str:
        """Names the content: the same images with the same captions at the same resolution, in the same
        order, brought to squares alike."""
        lines = [f"{record.digest} {record.caption}" for record in self.records]
        form = str(self.resolution) if self.fit == "crop" else f"{self.resolution} {self.fit}"
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
        squares = [fit_square(read(record.name), self.resolution, self.fit) for record in self.records]
        return np.stack(squares).transpose(0, 3, 1, 2)


def _make_digit_reader():
    """Reads scikit-learn's handwritten digits (UCI optdigits test set) as dark ink on white paper, 8 x 8
    pixels."""
    from sklearn.datasets import load_digits

    ink = load_digits().images  # [1797, 8, 8] in 0..16
    paper = np.round(255 * (1 - ink / 16)).astype(np.uint8)
    return lambda name: Image.fromarray(paper[int(name)]).convert("RGB")


def _make_folder_reader(folder: Path, greys: Greys | None):
    return lambda name: decode_image(folder / name, greys)


def decode_image(path: Path, greys: Greys | None = None) -> Image.Image:
    """An image file as upright RGB, sRGB where it has a colour profile: EXIF rotation applied, transparency
    on white; greys of more than 8 bits by the scale, without one by that of the image itself. Raises
    MemControlError."""

    def read(image: Image.Image) -> Image.Image:
        image.load()
        inverted = is_inverted(image)  # turning it upright loses the tag
        return _convert_to_rgb(_convert_colours(_turn_upright(image)), greys, inverted)

    return _read_image(path, read)


def _turn_upright(image: Image.Image) -> Image.Image:
    """By the orientation alone: Pillow's own way writes the other fields anew, of which one may be odd."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a block that cannot be parsed costs the orientation, not the image
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _convert_colours(image: Image.Image) -> Image.Image:
    """Of an image with a colour profile, to sRGB; as it is where that is what it has, or is unreadable."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        known = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(known).lower():
            return image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        found = ImageCms.profileToProfile(image, known, ImageCms.createProfile("sRGB"), outputMode=mode)
    except Exception:  # a broken profile costs the colours' accuracy, not the image
        return image
    assert found is not None  # only in place there is none
    return found


def _read_image(path: Path, read: Callable[[Image.Image], Read]) -> Read:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd but readable files: palettes, EXIF blocks, huge pictures
            if can_read_dicom() and is_dicom(path):
                return read(decode_dicom(path))
            with Image.open(path) as image:
                return read(image)
    except FileNotFoundError:
        raise MemControlError(
            f"image {path} is not there any more; restore it, or where the images have moved, set "
            "data.path and run the search once more"
        ) from None
    except MemControlError:
        raise
    except Image.DecompressionBombError as error:
        raise MemControlError(f"image {path} is too large: {error}; shrink it") from None
    except Exception as error:  # decoders of broken files raise what they like
        raise MemControlError(
            f"image {path} cannot be decoded ({type(error).__name__}); mend or remove it, or set "
            "data.skip_unreadable=true (audit: --skip-unreadable)"
        ) from None


def _convert_to_rgb(image: Image.Image, greys: Greys | None, inverted: bool) -> Image.Image:
    if is_deep(image):
        values = read_greys(image)
        scale = greys or choose_greys(values.min(), values.max(), image.mode)
        return scale.convert(values, inverted)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


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


def find_greys(paths: Sequence[Path]) -> Greys | None:
    """The scale of images of more than 8 bits, None where there are none: from the values that they have in
    all. Raises MemControlError where they have no common one, and for 16-bit colour in whose high bytes there
    is next to nothing, which is all that is read of it."""
    ranges: dict[Path, tuple[float, float]] = {}
    kinds: dict[str, Path] = {}  # with an image of each
    high, colour = 0, None
    for path in paths:
        if can_read_dicom() and is_dicom(path):  # which says itself what is black and white
            continue
        with contextlib.suppress(MemControlError):  # said by whoever decodes it
            found = _read_image(path, _look_at_depth)
            if found and found[0] == "colour":
                high, colour = max(high, int(found[2])), path
            elif found:
                kinds.setdefault(found[0], path)
                ranges[path] = found[1:]
    if colour and high < 128:
        raise MemControlError(
            f"16-bit colour such as '{colour}' holds values up to {high * 256 + 255} of 65,535, and would be "
            "read as nearly black; convert it to 8 bits, or to the full range"
        )
    if len(kinds) > 1:
        whole, fractions = kinds["I"], kinds["F"]
        raise MemControlError(
            f"some greys are whole numbers, such as {whole}, and others fractions, such as {fractions}, with "
            "no common scale; store all of them alike"
        )
    if not ranges:
        return None
    least, most = min(low for low, _ in ranges.values()), max(high for _, high in ranges.values())
    greys = choose_greys(least, most, next(iter(kinds)))
    refuse_mixed_depths(greys, ranges)
    return greys


def _look_at_depth(image: Image.Image) -> tuple[str, float, float] | None:
    """Kind, least and largest value of an image of more than 8 bits; of colour the high bytes."""
    if is_deep(image):
        values = read_greys(image)
        return image.mode[0], float(values.min()), float(values.max())
    if image.mode in ("RGB", "RGBA") and "16" in str(getattr(image, "tile", "")):
        return "colour", 0.0, float(np.asarray(image.convert("RGB")).max())
    return None


def read_records(
    folder: Path,
    names: Sequence[str],
    skip_unreadable: bool,
    warn,
    greys: Greys | None = None,
    see: Callable[[Image.Image], None] = lambda image: None,
) -> list[ImageRecord]:
    """A record for each image of these names in the folder, as yet without a caption; decoded once to see
    that it can be and to hash its pixels; `see` is shown each."""
    records = []
    for name in names:
        try:
            image = decode_image(folder / name, greys)
        except MemControlError as error:
            if not skip_unreadable:
                raise
            warn(f"skipped: {error}".split(";")[0])
            continue
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]
        see(image)
        records.append(ImageRecord(name, "", digest))
    return records
