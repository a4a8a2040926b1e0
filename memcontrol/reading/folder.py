"""Owns what lies in a folder of images: which files are images, captions and metadata, and what is left
out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from memcontrol.core.errors import MemControlError
from memcontrol.reading.captions import TEXT_SUFFIXES, cut_repeats
from memcontrol.reading.decode import locate_page, register_plugins
from memcontrol.reading.dicom import can_read_dicom, is_dicom
from memcontrol.reading.tables import is_table

# what reads them, where it is not there
_HELP = {
    ".heic": "pip install 'memcontrol[formats]'",
    ".heif": "pip install 'memcontrol[formats]'",
    ".jxl": "pip install 'memcontrol[formats]'",
    ".dcm": "pip install 'memcontrol[dicom]'",
    ".nii": "pip install nibabel, and store slices as PNG",
    ".nii.gz": "pip install nibabel, and store slices as PNG",
}
_REG, _OF_KOHYA = ("reg", "regularization"), "kohya's regularization images, which are not trained on"
# of files that Pillow knows by name alone, or that are pages rather than pictures
_NO_FOLDERS = ("@eaDir", "__MACOSX")  # thumbnails of a file server, leftovers of an archive
_NO_PICTURES = {".pdf", ".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf"}


@dataclass(frozen=True)
class Listing:
    """Files by what they are, their paths inside the folder in order; of what is left out, names by the
    reason."""

    images: tuple[str, ...]
    texts: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def describe_left_out(self) -> Iterator[str]:
        """A line for each reason."""
        for reason, names in self.left_out.items():
            are = "files are" if len(names) > 1 else "file is"
            yield f"{len(names)} {are} left out: {reason}, such as {names[0]}"


@cache
def _list_suffixes() -> frozenset[str]:
    """Of the pictures that the installed Pillow reads, with its plugins for HEIC and JPEG XL where these are
    installed."""
    register_plugins()
    Image.init()
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    return frozenset(known - _NO_PICTURES)


def is_picture_suffix(suffix: str) -> bool:
    """Whether files that end so are pictures, by what is installed or could be."""
    return suffix in _list_suffixes() or suffix in _HELP


def list_folder(folder: Path) -> Listing:
    """All files below a folder but hidden ones; links to folders are followed. A file is a picture by its
    ending, or by what it holds. Raises MemControlError."""
    found: dict[str, list[str]] = {"images": [], "texts": [], "tables": []}
    left_out: dict[str, list[str]] = {}
    again: list[str] = []
    names = sorted(_walk(folder, again))
    apart = _list_regularization(names)
    for name in names:
        kind, reason = ("", _OF_KOHYA) if os.path.dirname(name) in apart else _tell_kind(folder, name)
        (left_out.setdefault(reason, []) if reason else found[kind]).append(name)
    if again:
        left_out["a link to a folder that is read already"] = sorted(again)
    return Listing(
        **{kind: tuple(names) for kind, names in found.items()},
        left_out={reason: tuple(names) for reason, names in left_out.items()},
    )


def _walk(folder: Path, again: list[str]) -> Iterator[str]:
    """Names of files; links to folders that were walked through before are added to `again`."""
    seen: set[str] = set()  # a link to a folder above it would never end
    for path, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_unreadable):
        real = os.path.realpath(path)
        if real in seen:
            again.append(os.path.relpath(path, folder))
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _NO_FOLDERS)
        inside = os.path.relpath(path, folder)
        for name in files:
            if not name.startswith("."):
                yield name if inside == os.curdir else f"{inside}/{name}"


def _list_regularization(names: Iterable[str]) -> set[str]:
    """Folders of kohya's regularization images, where others are named as kohya's scripts ask for it: they
    show the class, not what is to be learnt."""
    places = {place: place.split("/") for place in {os.path.dirname(name) for name in names}}
    if not any(cut_repeats(step) != step for steps in places.values() for step in steps):
        return set()
    return {
        place for place, steps in places.items() if any(cut_repeats(step).lower() in _REG for step in steps)
    }


def _refuse_unreadable(error: OSError) -> None:
    raise MemControlError(
        f"{error.filename} cannot be read: {error.strerror}; mend its permissions"
    ) from None


def _tell_kind(folder: Path, name: str) -> tuple[str, str]:
    """Which of a Listing's kinds a file is of, or why it is left out."""
    place, suffix = f"{folder}/{name}", _find_suffix(name)
    if not _is_utf8(name):
        return "", "the name is not UTF-8"
    if locate_page(name)[0] != name:
        return "", "the name ends as that of a page does"
    if not os.path.isfile(place):
        return "", "a link that leads nowhere" if os.path.islink(place) else "no file"
    if is_table(Path(name)):
        return "tables", ""
    if suffix in TEXT_SUFFIXES:
        return "texts", ""
    if suffix in _list_suffixes() or (can_read_dicom() and is_dicom(Path(place))):
        return "images", ""
    if _opens(Path(place)):
        return "images", ""
    if suffix in _HELP and not (suffix == ".dcm" and can_read_dicom()):
        return "", f"{suffix} is not read here ({_HELP[suffix]})"
    return "", f"{suffix or 'without an ending'} is no known picture"


def _find_suffix(name: str) -> str:
    """In small letters; of compressed ones both."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] + suffix if suffix == ".gz" else suffix


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _opens(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except Exception:  # of anything that is no picture, whatever a decoder thinks of it
        return False
