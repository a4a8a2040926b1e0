"""Owns a run's pictures: a sheet of its samples, and those nearest to a training image beside it and beside
the nearest held-out one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from memcontrol.core.files import replace_file
from memcontrol.core.run_folder import RunFolder
from memcontrol.core.spec import Spec
from memcontrol.scoring.copying import ratio
from memcontrol.scoring.evidence import Evidence
from memcontrol.trial.loaded import LoadedModels

SMALL, LARGE = 64, 128  # pixels of a tile's side: of images up to SMALL, and of larger ones
GAP, N_COLUMNS, N_SAMPLES = 6, 12, 60
TITLE_WIDTH, LINE = 72, 18


@dataclass(frozen=True)
class Strip:
    """The most suspicious images of a run, most suspicious first, each uint8 [N, 3, H, W]: `generated`, the
    `training` and `held_out` images nearest to them; `distances` to the training ones [N], and their share of
    the distance to the held-out ones [N]."""

    title: str
    generated: np.ndarray
    training: np.ndarray
    held_out: np.ndarray
    distances: np.ndarray
    shares: np.ndarray

    @property
    def rows(self) -> dict[str, np.ndarray]:
        return {
            "generated": self.generated,
            "nearest\ntraining": self.training,
            "nearest\nheld out": self.held_out,
        }


def make_strip(
    title: str, samples: Mapping[str, np.ndarray], evidence: Evidence, spec: Spec, loaded: LoadedModels
) -> Strip:
    space = evidence.space("pixels")
    (distances, matches), (others, held) = space.to_train, space.nearest_held
    shares = ratio(distances, others)
    rows = np.argsort(shares, kind="stable")[:N_COLUMNS]
    training, held_out = (
        loaded.train_images(spec).take(matches[rows].tolist()),
        loaded.parts(spec)[spec.reference].take(held[rows].tolist()),
    )
    return Strip(
        title, samples["images"][rows], training.pixels(), held_out.pixels(), distances[rows], shares[rows]
    )


def save_pictures(
    run: RunFolder, samples: Mapping[str, np.ndarray], evidence: Evidence, spec: Spec, loaded: LoadedModels
) -> None:
    save_png(draw_samples(samples["images"]), run.samples_picture)
    save_png(draw_pairs([make_strip("", samples, evidence, spec, loaded)]), run.pairs_picture)


def save_png(picture: Image.Image, path: Path) -> None:
    with replace_file(path) as part:
        picture.save(part, format="PNG")


def draw_samples(images: np.ndarray) -> Image.Image:
    """The first of uint8 [N, 3, H, W], in the order of their prompts, which all trials have in common."""
    shown, side = images[:N_SAMPLES], choose_side(images)
    sheet = Image.new("RGB", (N_COLUMNS * (side + GAP), -(-len(shown) // N_COLUMNS) * (side + GAP)), "white")
    for i, image in enumerate(shown):
        sheet.paste(make_tile(image, side), (i % N_COLUMNS * (side + GAP), i // N_COLUMNS * (side + GAP)))
    return sheet


def draw_pairs(strips: Sequence[Strip]) -> Image.Image:
    """For each run a strip of three rows, with what lies between the images below them."""
    font, side = ImageFont.load_default(11), choose_side(strips[0].generated)
    below = LINE + 3 * (side + GAP)  # of the pictures
    height = below + 2 * LINE
    sheet = Image.new("RGB", (TITLE_WIDTH + N_COLUMNS * (side + GAP), len(strips) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for s, strip in enumerate(strips):
        top = s * height
        draw.text((4, top + 2), strip.title, fill="black", font=font)
        for r, (name, images) in enumerate(strip.rows.items()):
            row = top + LINE + r * (side + GAP)
            draw.text((4, row + side // 2 - 8), name, fill="black", font=font)
            for column, image in enumerate(images):
                sheet.paste(make_tile(image, side), (TITLE_WIDTH + column * (side + GAP), row))
        for column, (distance, share) in enumerate(zip(strip.distances, strip.shares)):
            draw.text(
                (TITLE_WIDTH + column * (side + GAP), top + below),
                f"d {distance:.2f}\n{share:.2f} of held",
                fill="black",
                font=font,
            )
    return sheet


def choose_side(images: np.ndarray) -> int:
    return SMALL if images.shape[-1] <= SMALL else LARGE


def make_tile(image: np.ndarray, side: int) -> Image.Image:
    way = Image.Resampling.NEAREST if image.shape[-1] <= side else Image.Resampling.LANCZOS
    return Image.fromarray(image.transpose(1, 2, 0)).resize((side, side), way)
