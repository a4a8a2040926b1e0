"""Owns a run's pictures: a sheet of its samples, and those nearest to a training image beside it and beside the nearest held-out one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from memcontrol.bench import Bench
from memcontrol.copying import ratio
from memcontrol.evidence import Evidence
from memcontrol.files import replacing
from memcontrol.spec import PAIRS_PICTURE, SAMPLES_PICTURE, Spec

SMALL, LARGE = 64, 128  # pixels of a tile's side: of images up to SMALL, and of larger ones
GAP, N_COLUMNS, N_SAMPLES = 6, 12, 60
LEFT, LINE = 72, 18


@dataclass(frozen=True)
class Strip:
    """The most suspicious images of a run, most suspicious first, each uint8 [N, 3, H, W]: `generated`, the `training` and `held_out` images
    nearest to them; `distances` to the training ones [N], and their share of the distance to the held-out ones [N]."""

    title: str
    generated: np.ndarray
    training: np.ndarray
    held_out: np.ndarray
    distances: np.ndarray
    shares: np.ndarray

    @property
    def rows(self) -> dict[str, np.ndarray]:
        return {"generated": self.generated, "nearest\ntraining": self.training, "nearest\nheld out": self.held_out}


def strip_of(title: str, samples: Mapping[str, np.ndarray], evidence: Evidence, spec: Spec, bench: Bench) -> Strip:
    space = evidence.space("pixels")
    (distances, matches), (others, held) = space.to_train, space.nearest_held
    shares = ratio(distances, others)
    rows = np.argsort(shares, kind="stable")[:N_COLUMNS]
    training, held_out = bench.train_images(spec).take(matches[rows].tolist()), bench.parts(spec)[spec.reference].take(held[rows].tolist())
    return Strip(title, samples["images"][rows], training.pixels(), held_out.pixels(), distances[rows], shares[rows])


def save_pictures(run: Path, samples: Mapping[str, np.ndarray], evidence: Evidence, spec: Spec, bench: Bench) -> None:
    save(samples_picture(samples["images"]), run / SAMPLES_PICTURE)
    save(pairs_picture([strip_of("", samples, evidence, spec, bench)]), run / PAIRS_PICTURE)


def save(picture: Image.Image, path: Path) -> None:
    with replacing(path) as part:
        picture.save(part, format="PNG")


def samples_picture(images: np.ndarray) -> Image.Image:
    """The first of uint8 [N, 3, H, W], in the order of their prompts, which all trials have in common."""
    shown, side = images[:N_SAMPLES], side_of(images)
    sheet = Image.new("RGB", (N_COLUMNS * (side + GAP), -(-len(shown) // N_COLUMNS) * (side + GAP)), "white")
    for i, image in enumerate(shown):
        sheet.paste(tile(image, side), (i % N_COLUMNS * (side + GAP), i // N_COLUMNS * (side + GAP)))
    return sheet


def pairs_picture(strips: Sequence[Strip]) -> Image.Image:
    """For each run a strip of three rows, with what lies between the images below them."""
    font, side = ImageFont.load_default(11), side_of(strips[0].generated)
    below = LINE + 3 * (side + GAP)  # of the pictures
    height = below + 2 * LINE
    sheet = Image.new("RGB", (LEFT + N_COLUMNS * (side + GAP), len(strips) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for s, strip in enumerate(strips):
        top = s * height
        draw.text((4, top + 2), strip.title, fill="black", font=font)
        for r, (name, images) in enumerate(strip.rows.items()):
            row = top + LINE + r * (side + GAP)
            draw.text((4, row + side // 2 - 8), name, fill="black", font=font)
            for column, image in enumerate(images):
                sheet.paste(tile(image, side), (LEFT + column * (side + GAP), row))
        for column, (distance, share) in enumerate(zip(strip.distances, strip.shares)):
            draw.text((LEFT + column * (side + GAP), top + below), f"d {distance:.2f}\n{share:.2f} of held", fill="black", font=font)
    return sheet


def side_of(images: np.ndarray) -> int:
    return SMALL if images.shape[-1] <= SMALL else LARGE


def tile(image: np.ndarray, side: int) -> Image.Image:
    way = Image.Resampling.NEAREST if image.shape[-1] <= side else Image.Resampling.LANCZOS
    return Image.fromarray(image.transpose(1, 2, 0)).resize((side, side), way)
