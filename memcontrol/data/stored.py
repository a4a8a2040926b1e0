"""Owns the splits of a dataset that is no folder of images: their columns, and their rows, images as they are
stored."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any, BinaryIO

from memcontrol.core.errors import MemControlError
from memcontrol.reading.folder import is_picture_suffix
from memcontrol.reading.tables import describe_read_error

OTHER_IMAGES = "__others__"  # of a row of a tar: which further images it has
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")  # that are looked for first
# a member's key and kind, as webdataset cuts its name
_SAMPLE = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]+)")
_TEXT_KINDS = ("txt", "text", "transcript", "caption", "cls", "cls2", "index", "inx", "id")  # of members
_TAR_IMAGE = "image"  # the column of a tar's images


@dataclass(frozen=True)
class Columns:
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
        return {column: value for column, value in found.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(one, str) for one in value.values())
    if isinstance(value, list):
        return all(isinstance(one, str) for one in value)
    return isinstance(value, (str, int, float))


@dataclass(frozen=True)
class StoredSplit:
    """What the library reads: the dataset's path, the split's name, its files where these lie here as plain
    shards, and the library's own split."""

    path: str
    name: str
    files: tuple[str, ...]
    stored: Any

    def count_rows(self) -> int:
        """0 where the dataset does not say."""
        known = (self.stored.info.splits or {}).get(self.name)
        return known.num_examples or 0 if known else 0

    def list_shards(self) -> list[tuple[int, str]]:
        """Of each the number of rows before it, and its name; the split itself where none is known."""
        if not self.files or not all(file.lower().endswith(".parquet") for file in self.files):
            return [(0, f"split '{self.name}' of {self.path}")]
        from pyarrow import parquet

        counts = [parquet.read_metadata(file).num_rows for file in self.files]
        return [(sum(counts[:i]), PurePath(file).name) for i, file in enumerate(self.files)]

    def find_columns(self) -> Columns:
        """Raises MemControlError."""
        from datasets import ClassLabel
        from datasets import Image as ImageFeature

        features = self.stored.features or {}
        images = [name for name, kind in features.items() if isinstance(kind, ImageFeature)]
        if not images:
            raise MemControlError(
                f"data.path is '{self.path}', which has no column of images; its columns are "
                f"{', '.join(features)}"
            )
        labels = {name: kind for name, kind in features.items() if isinstance(kind, ClassLabel)}
        return Columns(tuple(sorted(images, key=_rank_kind)), labels)

    def iterate(self) -> Iterator[Mapping[str, Any]]:
        """Rows, with images as they are stored."""
        from datasets import Image as ImageFeature

        split = self.stored
        for name, kind in split.features.items():
            if isinstance(kind, ImageFeature):
                split = split.cast_column(name, ImageFeature(decode=False))
        yield from split


@dataclass(frozen=True)
class TarSplit:
    """WebDataset tars that lie here, read without the library: that one refuses samples that differ in what
    they have, and wants the members of each side by side."""

    path: str
    name: str
    files: tuple[str, ...]

    def count_rows(self) -> int:
        return sum(map(len, self.members))

    def list_shards(self) -> list[tuple[int, str]]:
        counts = [len(samples) for samples in self.members]
        return [(sum(counts[:i]), PurePath(file).name) for i, file in enumerate(self.files)]

    def find_columns(self) -> Columns:
        """Raises MemControlError."""
        kinds = {kind for samples in self.members for sample in samples.values() for kind in sample}
        if not any(map(_is_picture, kinds)):
            raise MemControlError(
                f"data.path is '{self.path}', which has no images; its members are {', '.join(sorted(kinds))}"
            )
        return Columns((_TAR_IMAGE,), {})

    @cached_property
    def members(self) -> list[dict[str, dict[str, tuple[int, int]]]]:
        """By tar, of each sample by its key where the content of each kind begins, and its length."""
        return [_list_members(file) for file in self.files]

    def iterate(self) -> Iterator[Mapping[str, Any]]:
        """Rows, with images as they are stored."""
        for file, samples in zip(self.files, self.members):
            with open(file, "rb") as tar:
                for key, sample in samples.items():
                    yield _read_sample(tar, f"{file}: {key}", sample)


DatasetSplit = StoredSplit | TarSplit


def _list_members(path: str) -> dict[str, dict[str, tuple[int, int]]]:
    found: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # of which it keeps all
            cut = _SAMPLE.fullmatch(member.name) if member.isfile() else None
            if cut:
                place = (member.offset_data, member.size)
                if found.setdefault(cut[1], {}).setdefault(cut[2].lower(), place) != place:
                    raise MemControlError(f"{path} holds {member.name!r} twice; keep one of them")
    return found


def _read_sample(tar: BinaryIO, title: str, sample: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """A row. Raises MemControlError."""
    images = sorted(filter(_is_picture, sample), key=_rank_kind)
    row: dict[str, Any] = {"__key__": title.rpartition(": ")[2], OTHER_IMAGES: tuple(images[1:])}
    for kind, (offset, size) in sample.items():
        if kind in images[1:] or not (kind in images or kind in _TEXT_KINDS or kind == "json"):
            continue
        tar.seek(offset)
        content = tar.read(size)
        if kind in images:
            row[_TAR_IMAGE] = {"bytes": content, "path": f"{PurePath(row['__key__']).name}.{kind}"}
            continue
        try:
            row[kind] = json.loads(content) if kind == "json" else content.decode("utf-8-sig")
        except ValueError as error:
            raise MemControlError(f"{title}.{kind} cannot be read: {describe_read_error(error)}") from None
    return row


def _is_picture(kind: str) -> bool:
    return is_picture_suffix(PurePath(f"x.{kind}").suffix)


def _rank_kind(kind: str) -> int:
    """Which column, or kind of member, is taken for the image."""
    return _IMAGE_COLUMNS.index(kind) if kind in _IMAGE_COLUMNS else len(_IMAGE_COLUMNS)
