"""Owns how a file becomes an image: its pages, its size, upright, in sRGB, on white, and deep greys by one
scale."""

from __future__ import annotations

import contextlib
import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import ExifTags, Image, ImageCms

from memcontrol.core.errors import MemControlError
from memcontrol.reading.dicom import DicomFile, can_read_dicom, is_dicom
from memcontrol.reading.greys import Greys, choose_greys, is_deep, is_inverted, read_greys
from memcontrol.reading.threads import Room

MOST_PIXELS = 178_956_970  # of an image, unless a person says otherwise: where Pillow stops by itself
_PAGE = re.compile(r"(.+)#page=(\d+)")  # of a file with several (RFC 8118)
_ONE_PICTURE = {"MPO", "PSD"}  # what else such files hold is a preview, a depth map or a layer
_ROOM = Room(2**30)  # of all images that are being decoded
_BYTES_PER_PIXEL, _BYTES_PER_DEEP_PIXEL = 12, 32  # with the copies on the way
_UPRIGHT = {  # what turns an image of each EXIF orientation (CIPA DC-008)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class OpenedFile:
    """A file whose pixels are not read as yet: width and height, the number of pages, how to read one, and
    for whose it is a name that says nothing."""

    size: tuple[int, int]
    n_pages: int
    read: Callable[[int], Image.Image]
    is_deep: bool = False
    patient: str = ""

    @contextlib.contextmanager
    def read_page(self, page: int) -> Iterator[Image.Image]:
        """Upright and in sRGB, but of the depth that it has; `info` says whether it is `inverted` or `wide`.
        As long as it is in use it takes its share of the memory that all images may take."""
        width, height = self.size
        with _ROOM.hold(width * height * (_BYTES_PER_DEEP_PIXEL if self.is_deep else _BYTES_PER_PIXEL)):
            yield self.read(page)


def name_page(name: str, page: int) -> str:
    """What an image is called that is one page, from 0 on, of a file."""
    return f"{name}#page={page + 1}"


def locate_page(name: str) -> tuple[str, int]:
    """The file's name, and which of its pages is meant, from 0 on."""
    found = _PAGE.fullmatch(name)
    return (found[1], int(found[2]) - 1) if found else (name, 0)


@cache
def register_plugins() -> None:
    """Those of Pillow for HEIC and JPEG XL, where they are installed."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401  registers itself


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[OpenedFile]:
    """Raises MemControlError, whatever a decoder raises inside too."""
    register_plugins()
    try:
        with _still_decoders():
            if can_read_dicom() and is_dicom(path):
                data = DicomFile(path)
                yield OpenedFile(data.size, data.n_frames, data.show, True, data.patient)
            else:
                with Image.open(path) as image:
                    yield _describe_pillow(image)
    except FileNotFoundError:
        raise MemControlError(
            f"image {path} is not there any more; restore it, or where the images have moved, set "
            "data.path and run the search once more"
        ) from None
    except MemControlError:
        raise
    except Exception as error:  # decoders of broken files raise what they like
        raise MemControlError(
            f"image {path} cannot be decoded ({type(error).__name__}); mend or remove it, or set "
            "data.skip_unreadable=true (audit: --skip-unreadable)"
        ) from None


_PROCESS, _UNDO = threading.Lock(), contextlib.ExitStack()
_n_open = 0


@contextlib.contextmanager
def _still_decoders() -> Iterator[None]:
    """Pillow's limit and what becomes of warnings are one for the whole process: as long as a file is open
    there is no limit, since ours is looked at before anything is decoded, and nothing is said of files that
    are odd but readable (palettes, EXIF blocks)."""
    global _n_open
    with _PROCESS:
        if _n_open == 0:
            _UNDO.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            _UNDO.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
            Image.MAX_IMAGE_PIXELS = None
        _n_open += 1
    try:
        yield
    finally:
        with _PROCESS:
            _n_open -= 1
            if _n_open == 0:
                _UNDO.close()


def _describe_pillow(image: Image.Image) -> OpenedFile:
    def read(page: int) -> Image.Image:
        if page:
            image.seek(page)
        # reading and turning it loses these
        told: dict[str | tuple[int, int], bool] = {"inverted": is_inverted(image), "wide": _is_wide(image)}
        image.load()
        found = _convert_colours(_turn_upright(image))
        found.info.update(told)
        return found

    n_pages = 1 if image.format in _ONE_PICTURE else getattr(image, "n_frames", 1)
    return OpenedFile(image.size, n_pages, read, is_deep(image))


def _is_wide(image: Image.Image) -> bool:
    """Whether it has colours of 16 bits, of which only the high bytes are read."""
    return image.mode in ("RGB", "RGBA") and "16" in str(getattr(image, "tile", ""))


class TooLarge(MemControlError):
    """An image of more pixels than are allowed."""


def refuse_large(path: Path, size: tuple[int, int], most_pixels: int | None) -> None:
    """Raises TooLarge."""
    width, height = size
    if width * height > (most_pixels or MOST_PIXELS):
        raise TooLarge(
            f"image {path} is too large: {width} x {height} pixels, and {most_pixels or MOST_PIXELS:,} are "
            "allowed; shrink it, or set data.max_pixels"
        )


def decode_image(path: Path, greys: Greys | None = None) -> Image.Image:
    """An image file, or one page of it by `name_page`, as upright RGB, sRGB where it has a colour profile:
    transparency on white; greys of more than 8 bits by the scale, without one by that of the image itself.
    Raises MemControlError."""
    name, page = locate_page(path.name)
    with open_file(path.with_name(name)) as opened, opened.read_page(page) as image:
        return convert_to_rgb(image, greys)


def convert_to_rgb(image: Image.Image, greys: Greys | None) -> Image.Image:
    """Of a page as it was read."""
    if is_deep(image):
        values = read_greys(image)
        scale = greys or choose_greys(values.min(), values.max(), image.mode)
        return scale.convert(values, image.info.get("inverted", False))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


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
