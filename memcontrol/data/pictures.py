"""Owns named sets of images to be judged, from a folder or from a model, read at one size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from memcontrol.core.errors import MemControlError
from memcontrol.data.images import Images, crop_square, read_captions, read_records

PICTURES_CHUNK = 512
# pixels of a side, to which every image is brought: descriptors use 32, the report shows this
PICTURES_SIDE = 64


@dataclass(frozen=True)
class Pictures:
    """A named set of images: where they came from, their names, and how to read some of them as uint8 [B, 3,
    SIDE, SIDE]."""

    title: str
    names: tuple[str, ...]
    digests: tuple[str, ...]
    read: Callable[[list[int]], np.ndarray]

    def __len__(self) -> int:
        return len(self.names)


def read_folder_pictures(
    title: str, folder: Path, warn: Callable[[str], None], skip_unreadable: bool = False
) -> Pictures:
    """The images of a folder and its sub-folders. Raises MemControlError: none, or one that cannot be
    decoded."""
    if not folder.is_dir():
        raise MemControlError(f"{title}: {folder} is no folder; give a folder of images")
    records = read_records(folder, read_captions(folder), skip_unreadable, warn)
    if not records:
        raise MemControlError(f"{title}: {folder} holds no images; give a folder of images")
    return make_pictures(title, Images(str(folder), PICTURES_SIDE, tuple(records)))


def make_pictures(title: str, images: Images) -> Pictures:
    small = replace(images, resolution=PICTURES_SIDE)
    names, digests = (tuple(getattr(record, key) for record in images.records) for key in ("name", "digest"))
    return Pictures(title, names, digests, lambda rows: small.take(rows).pixels())


def wrap_samples(pixels: np.ndarray) -> Pictures:
    """uint8 [N, 3, H, W] that a model made."""
    names = tuple(f"sample {i}" for i in range(len(pixels)))

    def read(rows: list[int]) -> np.ndarray:
        tiles = (crop_square(Image.fromarray(pixels[row].transpose(1, 2, 0)), PICTURES_SIDE) for row in rows)
        return np.stack(list(tiles)).transpose(0, 3, 1, 2)

    return Pictures("generated", names, tuple("" for _ in names), read)
