"""Owns a data set as the denoiser sees it: latent posteriors and caption encodings, made in chunks and kept
as one file that is mapped, not read."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memcontrol.data.cache import TensorRows, hold_lock, map_tensors, save_tensors, write_tensors
from memcontrol.data.images import Images
from memcontrol.model.base import Base
from memcontrol.model.families import Text

_CHUNKS = {"captions": 64, "images": 256}  # how many are encoded before they are written
_EMBEDDINGS = "prompt_embeds"  # what a family's mask is over
_MASKED_FORMAT = "-v2"  # of files without padding; before, they had it

TellDone = Callable[[int, int], None]  # images and captions done, of how many


def list_texts(captions: Sequence[str], further: Sequence[Sequence[str]] = ()) -> list[str]:
    """Distinct captions of images and their further ones, the empty one first."""
    return list(dict.fromkeys(["", *captions, *itertools.chain(*further)]))


@dataclass(frozen=True)
class MaskedTokens:
    """Encodings [U, L, D] of which only the tokens that a mask shows are kept, and all others given back as
    zeros: the denoiser does not look at them."""

    tokens: Tensor  # [T, D], one caption after another
    mask: Tensor  # [U, L]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.mask.shape, self.tokens.shape[1]))

    @cached_property
    def counts(self) -> Tensor:
        """Kept tokens of each caption [U]."""
        return _find_kept(self.mask).count_nonzero(1)

    @cached_property
    def ends(self) -> Tensor:
        """Where each caption's tokens end [U]."""
        return self.counts.cumsum(0)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Of the captions in `rows` [B], [B, L, D]."""
        kept, ends = _find_kept(self.mask[rows]), self.ends[rows]
        found = self.tokens.new_zeros(*kept.shape, self.tokens.shape[1])
        places = zip((ends - self.counts[rows]).tolist(), ends.tolist())
        found[kept] = torch.cat([self.tokens[start:end] for start, end in places])
        return found


@dataclass(frozen=True)
class Encoded:
    """A data set as the denoiser sees it: the latent posterior of each image and the encodings of each
    distinct caption."""

    mean: Tensor  # [N, C, h, w], scaled
    deviation: Tensor  # [N, C, h, w], scaled
    text: Mapping[str, Tensor | MaskedTokens]  # each [U, ...]; row 0 is the empty caption
    caption_rows: Tensor  # [N], into text
    further_rows: Tensor | None = None  # [N, K], of further captions, where images have some; -1: none

    def take(self, rows: Sequence[int]) -> Encoded:
        """Some of the images."""
        chosen = torch.tensor(rows)
        further = None if self.further_rows is None else self.further_rows[chosen]
        mean, deviation = self.mean[chosen], self.deviation[chosen]
        return Encoded(mean, deviation, self.text, self.caption_rows[chosen], further)

    def texts(self, rows: Tensor) -> Text:
        """Encodings of the captions in `rows` [B] of `text`."""
        return {name: tensor[rows] for name, tensor in self.text.items()}

    def draw_captions(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Of each image in `rows` [B] one of its captions, as rows of `text` [B]."""
        first = self.caption_rows[rows]
        if self.further_rows is None:
            return first
        choices = torch.cat([first[:, None], self.further_rows[rows]], 1)  # [B, 1 + K]
        counts = (choices >= 0).sum(1)
        drawn = (torch.rand(len(rows), generator=generator) * counts).long()
        return choices.gather(1, drawn[:, None])[:, 0]


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
        content = f"{self.images.digest}-{self.base.source.digest}"
        kind = _MASKED_FORMAT if self.base.family.mask else ""
        return self.cache / f"latents-{content}{precision}{kind}.safetensors"

    @property
    def captions(self) -> list[str]:
        """The distinct ones, the empty one first."""
        return list_texts(self.images.captions, self.images.further_captions)

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
            text = _drop_padding(self.base.encode_captions(captions), self.base.family.mask)
            return {f"text.{name}": tensor for name, tensor in text.items()}
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
        further = [[row_of[caption] for caption in some] for some in self.images.further_captions]
        if most := max(map(len, further), default=0):
            padded = torch.tensor([some + [-1] * (most - len(some)) for some in further])
            found["further_rows"] = TensorRows(str(padded.dtype), tuple(padded.shape), [padded])
        for kind in ("captions", "images"):
            paths = [self.folder / chunk.file_name for chunk in chunks if chunk.kind == kind]
            n_rows = sum(len(chunk.rows) for chunk in chunks if chunk.kind == kind)
            for name, first in map_tensors(paths[0]).items():
                is_flat = self.base.family.mask and name == f"text.{_EMBEDDINGS}"
                n = sum(map(len, _read_parts(paths, name))) if is_flat else n_rows
                found[name] = TensorRows(str(first.dtype), (n, *first.shape[1:]), _read_parts(paths, name))
        return found


def _drop_padding(text: Text, mask: str | None) -> Text:
    """Of embeddings [n, L, D] the tokens that the mask shows, one caption after another: [t, D]."""
    return {**text, _EMBEDDINGS: text[_EMBEDDINGS][_find_kept(text[mask])]} if mask else text


def _find_kept(mask: Tensor) -> Tensor:
    """Which tokens [n, L] the denoiser looks at: the same bias on all of a caption's is none at all, so that
    it sees every token of one whose mask is empty."""
    shown = mask.bool()
    return shown | ~shown.any(1, keepdim=True)


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
    text: dict[str, Any] = {
        name.removeprefix("text."): stored.pop(name) for name in list(stored) if name.startswith("text.")
    }
    if base.family.mask:
        text[_EMBEDDINGS] = MaskedTokens(text[_EMBEDDINGS], text[base.family.mask])
    return Encoded(text=text, **stored)
