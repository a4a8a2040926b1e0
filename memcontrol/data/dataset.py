"""Owns datasets that are no folder of images: on Hugging Face's hub, in its library's own layouts, WebDataset
tars. They are streamed once into a folder of images with a table, each image as it is stored."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any, TextIO

from PIL import Image

from memcontrol.core.config import DIGITS, HUB, PARTS, DataConfig
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import name_full_disk, read_json, write_json
from memcontrol.data.cache import find_cache_folder, hold_lock
from memcontrol.data.index import ShowDone
from memcontrol.reading.folder import list_folder
from memcontrol.reading.parts import find_part
from memcontrol.reading.tables import is_table

_STORED = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}  # and who reads it
_SAVED = ("dataset_dict.json", "state.json")  # of what Dataset.save_to_disk wrote
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")  # that are looked for first
_TEXT_COLUMN = "txt"  # of a WebDataset
_ABOUT = ".unused.json"  # what of the dataset was left out
_TAR_END = bytes(1024)  # two empty blocks (POSIX.1-2001, pax)
_TOLD_EVERY_SECONDS = 1.0
_HUB_FORM = f"{HUB}OWNER/NAME, {HUB}OWNER/NAME/CONFIG or {HUB}OWNER/NAME@REVISION"


def locate_images(config: DataConfig, home: Path | None, progress: ShowDone) -> Path:
    """The folder with the images that data.path names; of a dataset, one below `home`. Raises
    MemControlError."""
    if is_dataset(config.path):
        return unpack_dataset(config.path, config.split, home, progress)
    if config.split:
        raise MemControlError(
            f"data.split is '{config.split}', and data.path is no dataset with splits: '{config.path}'; take "
            "it out"
        )
    folder = Path(config.path)
    if not folder.is_dir():
        raise MemControlError(
            f"data.path is '{config.path}': no such folder; give '{DIGITS}', a folder of images or a dataset "
            f"such as {HUB}OWNER/NAME"
        )
    return folder


def is_dataset(path: str) -> bool:
    """Whether it is on the hub, a shard, or a folder of such without images of its own."""
    if path.startswith(HUB) or (Path(path).suffix.lower() in _STORED and Path(path).is_file()):
        return True
    folder = Path(path)
    return folder.is_dir() and _has_shards(folder) and not list_folder(folder).images


def _has_shards(folder: Path) -> bool:
    names = (name for _, _, files in os.walk(folder, followlinks=True) for name in files)
    return any(
        name.lower().endswith(tuple(_STORED)) and not is_table(Path(name))
        for name in names
        if not name.startswith(".")
    )


@dataclass(frozen=True)
class Plan:
    """Of a dataset's splits, the folder that each one's images go to, empty for that of the whole; and those
    that are not used."""

    folders: Mapping[str, str]
    unused: tuple[str, ...] = ()

    def describe_unused(self) -> Iterator[str]:
        if self.unused:
            yield f"splits that are not used: {', '.join(self.unused)}"


def plan_splits(path: str, names: Sequence[str], asked: str | None) -> Plan:
    """The split that is asked for, or all where they are the parts, or where there is one alone. Raises
    MemControlError."""
    said = ", ".join(names)
    if asked is not None:
        if asked not in names:
            raise MemControlError(f"data.split is '{asked}'; '{path}' has {said}")
        return Plan({asked: ""}, tuple(name for name in names if name != asked))
    if len(names) == 1:
        return Plan({names[0]: ""})
    parts = {name: part for name in names if (part := find_part(name))}
    if not set(PARTS).issubset(parts.values()) or len(set(parts.values())) < len(parts):
        raise MemControlError(
            f"data.path is '{path}', which has the splits {said}: they are not one each for "
            f"{', '.join(PARTS)}; set data.split to the one that is to be dealt out to these"
        )
    return Plan(parts, tuple(name for name in names if name not in parts))


def list_splits(path: str) -> list[str]:
    """Raises MemControlError."""
    return list(_open_splits(path))


def unpack_dataset(path: str, split: str | None, home: Path | None, progress: ShowDone) -> Path:
    """The folder with the dataset's images, below `home`, or the user's own cache: made there where it is not
    yet. What was written before a process was killed is not written again. Raises MemControlError."""
    about = sha256(f"{path} {split}".encode()).hexdigest()[:12]
    folder = (home or find_cache_folder()) / f"dataset-{about}"
    with hold_lock(folder), name_full_disk(folder):
        if not folder.is_dir():
            splits = _open_splits(path)
            plan = plan_splits(path, list(splits), split)
            part = folder.with_name(f".{folder.name}.part")
            part.mkdir(exist_ok=True)
            with _name_failure(path), open(part / "metadata.jsonl", "w", encoding="utf-8") as table:
                writer = _Writer(path, part, table, _count_rows(splits, plan), progress)
                for name, inside in plan.folders.items():
                    writer.write_split(splits[name], inside)
                write_json(part / _ABOUT, [*writer.describe_unused(), *plan.describe_unused()])
            os.replace(part, folder)
    return folder


def describe_unpacked(folder: Path) -> list[str]:
    """What of a dataset is not in the folder that it was unpacked into; of any other folder nothing."""
    return read_json(folder / _ABOUT) if (folder / _ABOUT).is_file() else []


def _count_rows(splits: Mapping[str, Any], plan: Plan) -> int:
    """0 where the dataset does not say."""
    known: list[Any] = [(splits[name].info.splits or {}).get(name) for name in plan.folders]
    return sum(one.num_examples or 0 for one in known) if all(known) else 0


@contextlib.contextmanager
def _name_failure(path: str) -> Iterator[None]:
    """Turns what the library raises into one line."""
    try:
        yield
    except MemControlError:
        raise
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise MemControlError(f"data.path is '{path}', which cannot be read: {said}") from error


def _open_splits(path: str) -> dict[str, Any]:
    """Its splits by name, none of which is read as yet. Raises MemControlError."""
    try:
        import datasets
    except ImportError:
        raise MemControlError(
            f"data.path is '{path}', a dataset; install what reads it: pip install 'memcontrol[datasets]'"
        ) from None
    datasets.disable_progress_bars()
    with _name_failure(path):
        found = _load(datasets, path)
        return dict(found) if isinstance(found, dict) else {str(found.split or "train"): found}


def _load(datasets: Any, path: str) -> Any:
    place = Path(path)
    for tar in sorted(place.rglob("*.tar")) if place.is_dir() else [place]:
        _refuse_cut_tar(tar)
    if path.startswith(HUB):
        name, config, revision = _parse_hub(path)
        return datasets.load_dataset(name, config, revision=revision, streaming=True)
    if any((place / name).is_file() for name in _SAVED):
        return datasets.load_from_disk(path)
    if place.is_file():
        kind = _STORED[place.suffix.lower()]
        return datasets.load_dataset(kind, data_files={"train": [path]}, streaming=True)
    return datasets.load_dataset(path, streaming=True)


def _refuse_cut_tar(path: Path) -> None:
    """The library would read it as far as it goes. Raises MemControlError."""
    if path.suffix.lower() != ".tar" or not path.is_file():
        return
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - len(_TAR_END)))
        if file.read() != _TAR_END:
            raise MemControlError(f"{path} breaks off: it has no end of a tar; copy or make it again")


def _parse_hub(path: str) -> tuple[str, str | None, str | None]:
    """Name, config and revision. Raises MemControlError."""
    found = re.fullmatch(
        r"(?:datasets/)?([^/@]+/[^/@]+)(?:/([^/@]+))?(?:@(.+))?", path.removeprefix(HUB).strip("/")
    )
    if not found:
        raise MemControlError(f"data.path is '{path}'; a dataset of the hub is {_HUB_FORM}")
    return found[1], found[2], found[3]


@dataclass
class _Writer:
    """Writes images and their rows."""

    path: str
    folder: Path
    table: TextIO
    total: int
    progress: ShowDone
    n: int = 0
    n_without: int = 0
    others: tuple[str, ...] = ()  # further columns of images
    told: float = 0.0

    def describe_unused(self) -> Iterator[str]:
        if self.n_without:
            yield f"{self.n_without} rows of the dataset have no image"
        if self.others:
            yield f"columns of images that are not used: {', '.join(self.others)}"

    def write_split(self, split: Any, inside: str) -> None:
        """Raises MemControlError."""
        columns = _find_columns(self.path, split)
        self.others = tuple(dict.fromkeys((*self.others, *columns.others)))
        (self.folder / inside).mkdir(exist_ok=True)
        for row in _iterate(split):
            self.n += 1
            if name := self.write_image(inside, columns, row):
                values = {"file_name": name, **columns.describe(row)}
                self.table.write(json.dumps(values, ensure_ascii=False) + "\n")
            else:
                self.n_without += 1
            if time.monotonic() - self.told > _TOLD_EVERY_SECONDS:
                self.progress(self.n, max(self.total, self.n))
                self.told = time.monotonic()

    def write_image(self, inside: str, columns: _Columns, row: Mapping[str, Any]) -> str | None:
        """As it is stored; its name, None where the row has none."""
        used = columns.images[:1] if columns.others else columns.images
        stored = next((row[column] for column in used if row.get(column)), None)
        if not stored:
            return None
        name = str(PurePath(inside) / _name_image(self.n, stored, row))
        if stored.get("bytes"):
            _write_missing(self.folder / name, stored["bytes"])
        else:
            shutil.copyfile(stored["path"], self.folder / name)
        return name


def _write_missing(path: Path, content: bytes) -> None:
    if not (path.is_file() and path.stat().st_size == len(content)):
        path.write_bytes(content)


def _name_image(number: int, stored: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """By its number, and the name that it has in the dataset: that may say who is in it."""
    given = PurePath(stored.get("path") or row.get("__key__") or "")
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", given.stem)
    suffix = given.suffix.lower() if stored.get("path") and given.suffix else _guess_suffix(stored)
    return f"{number:07}{f'-{stem}' if stem else ''}{suffix}"


def _guess_suffix(stored: Mapping[str, Any]) -> str:
    """As Pillow knows the content; empty where it does not."""
    try:
        with Image.open(io.BytesIO(stored["bytes"])) as image:
            kind = image.format
    except Exception:  # whatever a decoder thinks of it: said by whoever reads the folder
        return ""
    known: Iterable[str] = (suffix for suffix, name in Image.registered_extensions().items() if name == kind)
    return min(known, key=lambda suffix: (suffix not in (".jpg", ".png", ".tif"), suffix), default="")


@dataclass(frozen=True)
class _Columns:
    """Which hold images, the one that is meant first; and names of what is stored as numbers."""

    images: tuple[str, ...]
    labels: Mapping[str, Any]

    @property
    def others(self) -> tuple[str, ...]:
        """Further ones of images; those of a WebDataset are named by the kinds of files, of which a row has
        one."""
        return () if _IMAGE_COLUMNS[2:].count(self.images[0]) else self.images[1:]

    def describe(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What is plain of a row's other columns: texts, numbers, lists of texts, and of what a WebDataset
        has as JSON the same."""
        found: dict[str, Any] = {}
        for column, value in row.items():
            if column in self.labels and isinstance(value, int) and value >= 0:
                found[column] = self.labels[column].int2str(value)
            elif column not in self.images and not column.startswith("__"):
                found |= value if column == "json" and isinstance(value, dict) else {column: value}
        if _TEXT_COLUMN in found and "text" not in found:
            found["text"] = found.pop(_TEXT_COLUMN)
        return {column: value for column, value in found.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(one, str) for one in value.values())
    if isinstance(value, list):
        return all(isinstance(one, str) for one in value)
    return isinstance(value, (str, int, float))


def _find_columns(path: str, split: Any) -> _Columns:
    """Raises MemControlError."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    features = split.features or {}
    images = [name for name, kind in features.items() if isinstance(kind, ImageFeature)]
    if not images:
        raise MemControlError(
            f"data.path is '{path}', which has no column of images; its columns are {', '.join(features)}"
        )
    order = {name: place for place, name in enumerate(_IMAGE_COLUMNS)}
    images.sort(key=lambda name: order.get(name, len(order)))
    labels = {name: kind for name, kind in features.items() if isinstance(kind, ClassLabel)}
    return _Columns(tuple(images), labels)


def _iterate(split: Any) -> Iterator[Mapping[str, Any]]:
    """Rows, with images as they are stored."""
    from datasets import Image as ImageFeature

    for name, kind in split.features.items():
        if isinstance(kind, ImageFeature):
            split = split.cast_column(name, ImageFeature(decode=False))
    yield from split
