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
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any, TextIO

from PIL import Image

from memcontrol.config.data import DataConfig
from memcontrol.core import interrupt
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import (
    make_private_folder,
    name_full_disk,
    open_private,
    read_json,
    write_json,
)
from memcontrol.core.image_parts import DIGITS, PARTS
from memcontrol.core.published import HUB
from memcontrol.data.cache import find_cache_folder, hold_lock
from memcontrol.data.index import ShowDone
from memcontrol.data.stored import OTHER_IMAGES, Columns, DatasetSplit, StoredSplit, TarSplit
from memcontrol.reading.folder import is_picture_suffix, list_folder
from memcontrol.reading.parts import find_part
from memcontrol.reading.tables import is_table

_STORED = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}  # and who reads it
_SAVED = ("dataset_dict.json", "state.json")  # of what Dataset.save_to_disk wrote
_ABOUT = ".unused.json"  # of the dataset: its shards, and what was left out
_WITHOUT_IMAGE = "row of the dataset without an image"
_N_DIGITS = 7  # of a row's number, with which its file's name begins
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
    about = sha256(os.fsencode(f"{path} {split}")).hexdigest()[:12]
    folder = (home or find_cache_folder()) / f"dataset-{about}"
    state = _describe_files(path)
    with hold_lock(folder), name_full_disk(folder):
        if _is_changed(folder, state):
            splits = _open_splits(path)
            plan = plan_splits(path, list(splits), split)
            part = folder.with_name(f".{folder.name}.{state[:8]}.part")
            make_private_folder(part)
            with (
                _name_failure(path),
                open_private(
                    part / "metadata.jsonl", "w", encoding="utf-8", errors="backslashreplace"
                ) as table,
            ):
                total = sum(splits[name].count_rows() for name in plan.folders)
                writer = _Writer(part, table, total, progress)
                for name, inside in plan.folders.items():
                    writer.write_split(splits[name], inside)
                unused = [*writer.describe_unused(), *plan.describe_unused()]
                left_out = {_WITHOUT_IMAGE: writer.n_without} if writer.n_without else {}
                write_json(part / _ABOUT, asdict(Unpacked(path, writer.shards, left_out, unused, state)))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
    return folder


def _describe_files(path: str) -> str:
    """Of a dataset's files that lie here: what changes whenever one of them is written."""
    place = Path(path)
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    stats = [(str(file), file.stat()) for file in files if file.is_file()]
    lines = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    return sha256(os.fsencode("\n".join(lines))).hexdigest()


def _is_changed(folder: Path, state: str) -> bool:
    """Whether a dataset is to be unpacked, since it is not yet, or was written since."""
    known = read_unpacked(folder)
    return not folder.is_dir() or (known is not None and known.state not in ("", state))


@dataclass(frozen=True)
class Unpacked:
    """What is known of a dataset in the folder that it was unpacked into: what a person calls it; its shards,
    each with the number of its first row among all; what is left out, by kind; what a person should know; and
    in which state its files were."""

    path: str
    shards: list[tuple[int, str]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    state: str = ""

    def name_row(self, file: str) -> str:
        """Where in the dataset a file of the folder comes from."""
        number = int(re.split(r"\D", PurePath(file).name)[0])
        known = [(first, title) for first, title in self.shards if first <= number]
        first, title = known[-1] if known else (1, self.path)
        return f"{title}, row {number - first + 1}"

    def name_failure(self, folder: Path, file: str, error: MemControlError) -> MemControlError:
        """That of a file, which nobody knows, as one of its row."""
        said = str(error).replace(f"image {folder / file}", f"the image of {self.name_row(file)}")
        return type(error)(said)


def read_unpacked(folder: Path) -> Unpacked | None:
    """Of a folder that no dataset was unpacked into, nothing."""
    if not (folder / _ABOUT).is_file():
        return None
    found = read_json(folder / _ABOUT)
    # before shards were recorded there was but a list of notes
    return Unpacked("the dataset", notes=found) if isinstance(found, list) else Unpacked(**found)


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


def _open_splits(path: str) -> dict[str, DatasetSplit]:
    """By name, none of which is read as yet. Raises MemControlError."""
    place = Path(path)
    for tar in sorted(place.rglob("*.tar")) if place.is_dir() else [place]:
        _refuse_cut_tar(tar)
    if place.is_file() and place.suffix.lower() == ".tar":
        return {"train": TarSplit(path, "train", (path,))}
    try:
        import datasets
    except ImportError:
        raise MemControlError(
            f"data.path is '{path}', a dataset; install what reads it: pip install 'memcontrol[datasets]'"
        ) from None
    datasets.disable_progress_bars()
    with _name_failure(path):
        files = _list_files(datasets, path)
        if files and all(file.lower().endswith(".tar") for some in files.values() for file in some):
            return {name: TarSplit(path, name, some) for name, some in files.items()}
        found = _load(datasets, path)
        stored = dict(found) if isinstance(found, dict) else {str(found.split or "train"): found}
        return {name: StoredSplit(path, name, files.get(name, ()), one) for name, one in stored.items()}


def _is_saved(path: str) -> bool:
    """Whether `Dataset.save_to_disk` wrote it."""
    return any((Path(path) / name).is_file() for name in _SAVED)


def _list_files(datasets: Any, path: str) -> dict[str, tuple[str, ...]]:
    """Of each split, in their order; of what does not lie here as plain shards none."""
    if path.startswith(HUB) or _is_saved(path):
        return {}
    if Path(path).is_file():
        return {"train": (path,)}
    files = datasets.load_dataset_builder(path).config.data_files or {}
    return {str(name): tuple(map(str, some)) for name, some in files.items()}


def _load(datasets: Any, path: str) -> Any:
    if path.startswith(HUB):
        name, config, revision = _parse_hub(path)
        return datasets.load_dataset(name, config, revision=revision, streaming=True)
    if _is_saved(path):
        return datasets.load_from_disk(path)
    if Path(path).is_file():
        kind = _STORED[Path(path).suffix.lower()]
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

    folder: Path
    table: TextIO
    total: int
    progress: ShowDone
    n: int = 0
    n_without: int = 0
    others: tuple[str, ...] = ()  # further columns of images
    shards: list[tuple[int, str]] = field(default_factory=list)
    told: float = 0.0

    def describe_unused(self) -> Iterator[str]:
        if self.n_without:
            yield f"{self.n_without} rows of the dataset have no image"
        if self.others:
            yield f"columns of images that are not used: {', '.join(self.others)}"

    def write_split(self, split: DatasetSplit, inside: str) -> None:
        """Raises MemControlError."""
        columns = split.find_columns()
        first = self.n + 1
        self.shards += [(first + n, title) for n, title in split.list_shards()]
        make_private_folder(self.folder / inside)
        for row in split.iterate():
            interrupt.check()
            self.n += 1
            others = (*self.others, *columns.others, *row.get(OTHER_IMAGES, ()))
            self.others = tuple(dict.fromkeys(others))
            if name := self.write_image(inside, columns, row):
                values = {**columns.describe(row), "file_name": name}
                self.table.write(json.dumps(values, ensure_ascii=False) + "\n")
            else:
                self.n_without += 1
            if time.monotonic() - self.told > _TOLD_EVERY_SECONDS:
                self.progress(self.n, max(self.total, self.n))
                self.told = time.monotonic()

    def write_image(self, inside: str, columns: Columns, row: Mapping[str, Any]) -> str | None:
        """As it is stored; its name, None where the row has none."""
        used = columns.images[:1] if columns.others else columns.images
        stored = next((row[column] for column in used if row.get(column)), None)
        if not stored:
            return None
        name = str(PurePath(inside) / _name_image(self.n, stored, row))
        if stored.get("bytes") is None:
            _write_missing(self.folder / name, Path(stored["path"]).read_bytes())
        else:
            _write_missing(self.folder / name, stored["bytes"])
        return name


def _write_missing(path: Path, content: bytes) -> None:
    if not (path.is_file() and path.stat().st_size == len(content)):
        with open_private(path, "wb") as file:
            file.write(content)


def _name_image(number: int, stored: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """By its number, and the name that it has in the dataset: that may say who is in it."""
    given = PurePath(stored.get("path") or row.get("__key__") or "")
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", given.stem)
    return f"{number:0{_N_DIGITS}}{f'-{stem}' if stem else ''}{_choose_suffix(stored)}"


def _choose_suffix(stored: Mapping[str, Any]) -> str:
    """That which it has, or as its content asks for; so that what is no picture is refused as a broken one,
    one of a picture."""
    given = PurePath(stored.get("path") or "").suffix.lower()
    return given if is_picture_suffix(given) else _guess_suffix(stored) or ".png"


def _guess_suffix(stored: Mapping[str, Any]) -> str:
    """As Pillow knows the content; empty where it does not."""
    try:
        with Image.open(io.BytesIO(stored["bytes"])) as image:
            kind = image.format
    except Exception:  # whatever a decoder thinks of it: said by whoever reads the folder
        return ""
    known: Iterable[str] = (suffix for suffix, name in Image.registered_extensions().items() if name == kind)
    return min(known, key=lambda suffix: (suffix not in (".jpg", ".png", ".tif"), suffix), default="")
