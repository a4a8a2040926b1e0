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
from memcontrol.scoring.evidence import Evidence
from memcontrol.trial.loaded import LoadedModels

_SMALL, _LARGE = 64, 128  # pixels of a tile's side: of images up to SMALL, and of larger ones
_GAP, _N_COLUMNS, _N_SAMPLES = 6, 12, 60
_TITLE_WIDTH, _LINE = 72, 18


@dataclass(frozen=True)
class Strip:
    """The most suspicious images of a run, most suspicious first, each uint8 [N, 3, H, W]: `generated`, the
    `training` and `held_out` images nearest to them in the descriptor in which they are most suspicious;
    `distances` to the training ones [N], their share of the distance to the held-out ones [N], and whether a
    rule calls them copies [N]; `regions` [N, 4], what of the generated and the training one is compared:
    left, top, right and bottom as shares of a side."""

    title: str
    generated: np.ndarray
    training: np.ndarray
    held_out: np.ndarray
    distances: np.ndarray
    shares: np.ndarray
    copies: np.ndarray
    regions: np.ndarray

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
    found = evidence.suspects
    rows = found.order[:_N_COLUMNS]
    training = loaded.train_images(spec).take(found.training[rows].tolist())
    held_out = loaded.parts(spec)[spec.reference].take(found.held_out[rows].tolist())
    return Strip(
        title,
        samples["images"][rows],
        training.pixels(),
        held_out.pixels(),
        found.distances[rows],
        found.ratios[rows],
        found.is_copy[rows],
        found.regions[rows],
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
    shown, side = images[:_N_SAMPLES], _choose_side(images)
    sheet = Image.new(
        "RGB", (_N_COLUMNS * (side + _GAP), -(-len(shown) // _N_COLUMNS) * (side + _GAP)), "white"
    )
    for i, image in enumerate(shown):
        sheet.paste(
            _make_tile(image, side), (i % _N_COLUMNS * (side + _GAP), i // _N_COLUMNS * (side + _GAP))
        )
    return sheet


def draw_pairs(strips: Sequence[Strip]) -> Image.Image:
    """For each run a strip of three rows, with what lies between the images below them."""
    font, side = ImageFont.load_default(11), _choose_side(strips[0].generated)
    below = _LINE + 3 * (side + _GAP)  # of the pictures
    height = below + 2 * _LINE
    sheet = Image.new("RGB", (_TITLE_WIDTH + _N_COLUMNS * (side + _GAP), len(strips) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for s, strip in enumerate(strips):
        top = s * height
        draw.text((4, top + 2), strip.title, fill="black", font=font)
        for r, (name, images) in enumerate(strip.rows.items()):
            row = top + _LINE + r * (side + _GAP)
            draw.text((4, row + side // 2 - 8), name, fill="black", font=font)
            for column, image in enumerate(images):
                sheet.paste(_make_tile(image, side), (_TITLE_WIDTH + column * (side + _GAP), row))
        for copy in np.flatnonzero(strip.copies).tolist():
            _draw_frame(draw, _TITLE_WIDTH + copy * (side + _GAP), top + _LINE, side)
        for column, region in enumerate(strip.regions):
            for row in range(2):
                corner = _TITLE_WIDTH + column * (side + _GAP), top + _LINE + row * (side + _GAP)
                _draw_region(draw, corner, side, region)
        for column, (distance, share) in enumerate(zip(strip.distances, strip.shares)):
            draw.text(
                (_TITLE_WIDTH + column * (side + _GAP), top + below),
                f"d {distance:.2f}\n{share:.2f} of held",
                fill="black",
                font=font,
            )
    return sheet


def _draw_frame(draw: ImageDraw.ImageDraw, left: int, top: int, side: int) -> None:
    """Around what a rule calls a copy, and what it is a copy of."""
    bottom = top + 2 * side + _GAP
    draw.rectangle((left - 3, top - 3, left + side + 2, bottom + 2), outline="crimson", width=2)


def _draw_region(draw: ImageDraw.ImageDraw, corner: tuple[int, int], side: int, region: np.ndarray) -> None:
    """Around the part that is compared, where it is not the whole image."""
    if (region[2:] - region[:2]).min() < 1:
        left, top, right, bottom = np.tile(corner, 2) + (region * side).round().astype(int)
        draw.rectangle((left, top, right - 1, bottom - 1), outline="gold")


def _choose_side(images: np.ndarray) -> int:
    return _SMALL if images.shape[-1] <= _SMALL else _LARGE


def _make_tile(image: np.ndarray, side: int) -> Image.Image:
    way = Image.Resampling.NEAREST if image.shape[-1] <= side else Image.Resampling.LANCZOS
    return Image.fromarray(image.transpose(1, 2, 0)).resize((side, side), way)
