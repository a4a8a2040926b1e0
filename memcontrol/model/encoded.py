"""Owns a data set as the denoiser sees it: latent posteriors and caption encodings, made in chunks and kept
as one file that is mapped, not read."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memcontrol.data.cache import TensorRows, hold_lock, map_tensors, save_tensors, write_tensors
from memcontrol.data.images import Images
from memcontrol.model.base import Base
from memcontrol.model.families import Text

_CHUNKS = {"captions": 64, "images": 256}  # how many are encoded before they are written

TellDone = Callable[[int, int], None]  # images and captions done, of how many


@dataclass(frozen=True)
class Encoded:
    """A data set as the denoiser sees it: the latent posterior of each image and the encodings of each
    distinct caption."""

    mean: Tensor  # [N, C, h, w], scaled
    deviation: Tensor  # [N, C, h, w], scaled
    text: Text  # each [U, ...]; row 0 is the empty caption
    caption_rows: Tensor  # [N], into text

    def texts(self, rows: Tensor) -> Text:
        """Encodings of the captions in `rows` [B] of `text`."""
        return {name: tensor[rows] for name, tensor in self.text.items()}


@dataclass(frozen=True)
class _Chunk:
    """Some images, or some distinct captions, of a data set."""

    kind: str  # images or captions
    number: int
    rows: range

    @property
    def file_name(self) -> str:
        return f"{self.kind}-{self.number:05}.safetensors"


@dataclass(frozen=True)
class EncodingTask:
    """The encodings of one data set under one base: which chunks there are, and where they and the whole
    lie."""

    base: Base
    images: Images
    cache: Path

    @property
    def path(self) -> Path:
        """The whole, by the content that it depends on."""
        precision = "" if self.base.precision.is_plain else f"-{self.base.precision}"
        return self.cache / f"latents-{self.images.digest}-{self.base.source.digest}{precision}.safetensors"

    @property
    def captions(self) -> list[str]:
        """The distinct ones, the empty one first."""
        return list(dict.fromkeys(["", *self.images.captions]))

    def list_chunks(self) -> list[_Chunk]:
        # captions first: text encoders come and go before the first image is decoded
        sizes = {"captions": len(self.captions), "images": len(self.images)}
        return [
            _Chunk(kind, number, range(start, min(start + _CHUNKS[kind], n)))
            for kind, n in sizes.items()
            for number, start in enumerate(range(0, n, _CHUNKS[kind]))
        ]

    @property
    def folder(self) -> Path:
        """Of the chunks, until the whole is there."""
        return self.path.with_suffix(".chunks")

    def run(self, tell: TellDone = lambda done, total: None) -> None:
        """Makes the whole, beside any other process that does so: each takes chunks that nobody has."""
        if self.path.exists():
            return
        chunks = self.list_chunks()
        total, done = sum(len(chunk.rows) for chunk in chunks), 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.base.hold_encoders())
            for chunk in chunks:
                if chunk.kind == "images":
                    stack.close()  # the text encoders go
                self.make(chunk, wait=False)
                done += len(chunk.rows)
                tell(done, total)
        self.join(chunks)

    def make(self, chunk: _Chunk, wait: bool) -> None:
        """The chunk's file; where another process is at it and this one does not wait, it is left to that."""
        path = self.folder / chunk.file_name
        with hold_lock(path, wait) as is_mine:
            if is_mine and not path.exists() and not self.path.exists():
                save_tensors(path, self.encode(chunk))

    def encode(self, chunk: _Chunk) -> dict[str, Tensor]:
        if chunk.kind == "captions":
            captions = [self.captions[row] for row in chunk.rows]
            return {f"text.{name}": tensor for name, tensor in self.base.encode_captions(captions).items()}
        mean, deviation = self.base.encode_images(self.images.take(chunk.rows))
        return {"mean": mean, "deviation": deviation}

    def join(self, chunks: Sequence[_Chunk]) -> None:
        """One file of all chunks; those that a process which died had begun are made here."""
        with hold_lock(self.path):
            if not self.path.exists():
                for chunk in chunks:
                    self.make(chunk, wait=True)
                write_tensors(self.path, self.list_tensors(chunks))
            shutil.rmtree(self.folder, ignore_errors=True)

    def list_tensors(self, chunks: Sequence[_Chunk]) -> dict[str, TensorRows]:
        row_of = {caption: row for row, caption in enumerate(self.captions)}
        rows = torch.tensor([row_of[caption] for caption in self.images.captions])
        found = {"caption_rows": TensorRows(str(rows.dtype), tuple(rows.shape), [rows])}
        for kind in ("captions", "images"):
            paths = [self.folder / chunk.file_name for chunk in chunks if chunk.kind == kind]
            for name, first in map_tensors(paths[0]).items():
                n = sum(len(chunk.rows) for chunk in chunks if chunk.kind == kind)
                found[name] = TensorRows(str(first.dtype), (n, *first.shape[1:]), _read_parts(paths, name))
        return found


def _read_parts(paths: Sequence[Path], name: str) -> Iterator[Tensor]:
    return (map_tensors(path)[name] for path in paths)


def load_encoded(
    base: Base, images: Images, cache: Path, tell: TellDone = lambda done, total: None
) -> Encoded:
    """The images' latents and encodings, computed once per content, base and precision, and kept under
    `cache`; mapped from there."""
    task = EncodingTask(base, images, cache)
    task.run(tell)
    stored = map_tensors(task.path)
    text = {name.removeprefix("text."): stored.pop(name) for name in list(stored) if name.startswith("text.")}
    return Encoded(text=text, **stored)
