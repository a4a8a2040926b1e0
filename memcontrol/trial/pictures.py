"""Owns a run's pictures: a sheet of its samples, and those nearest to a training image beside it and beside
the nearest held-out one."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from memcontrol.config.spec import Spec
from memcontrol.core.files import replace_file
from memcontrol.core.run_folder import PAIRS_LAYOUT, RunFolder
from memcontrol.scoring.evidence import DESCRIPTORS, Evidence
from memcontrol.trial.loaded import LoadedModels

_SMALL, _LARGE = 64, 128  # pixels of a tile's side: of images up to SMALL, and of larger ones
_GAP, N_COLUMNS, _N_SAMPLES = 6, 12, 60
_TITLE_WIDTH, _LINE = 72, 18
_CAPTION_SIZE, _CAPTION_LINE, _CAPTION_LINES = 10, 12, 3  # of the prompts below samples, in pixels


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
    descriptors: Sequence[str]  # [N], in which they are most suspicious
    maps: np.ndarray | None = None  # [N, H, W] where the model differs from its base on the training ones

    @property
    def rows(self) -> dict[str, np.ndarray]:
        known = {} if self.maps is None else {"unlike\nthe base": tint_images(self.training, self.maps)}
        return {
            "generated": self.generated,
            "nearest\ntraining": self.training,
            "nearest\nheld out": self.held_out,
            **known,
        }


def make_strip(
    title: str,
    samples: Mapping[str, np.ndarray],
    evidence: Evidence,
    spec: Spec,
    loaded: LoadedModels,
    maps: Mapping[int, np.ndarray] = {},
) -> Strip:
    """`maps` of training images, by row, where there are any."""
    found = evidence.suspects
    rows = found.order[:N_COLUMNS]
    known = [maps[row] for row in found.training[rows].tolist() if row in maps]
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
        [DESCRIPTORS[number] for number in found.descriptors[rows]],
        np.stack(known) if len(known) == len(rows) else None,
    )


def tint_images(images: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """uint8 [N, 3, H, W], the redder the larger a map [N, H, W] is beside the largest of all; greys
    elsewhere."""
    above = maps - maps.min(axis=(1, 2), keepdims=True)
    strength = (above / max(float(above.max()), 1e-12))[:, None].astype(np.float32)
    if strength.shape[-1] != images.shape[-1]:
        large = torch.nn.functional.interpolate(
            torch.from_numpy(strength), images.shape[-2:], mode="bilinear"
        )
        strength = large.numpy()
    greys = images.mean(axis=1, keepdims=True)
    red = np.array([220, 20, 60]).reshape(1, 3, 1, 1)
    return (greys * (1 - 0.8 * strength) + red * 0.8 * strength).round().astype(np.uint8)


def save_pictures(
    run: RunFolder,
    samples: Mapping[str, np.ndarray],
    evidence: Evidence,
    spec: Spec,
    loaded: LoadedModels,
    maps: Mapping[int, np.ndarray],
) -> None:
    save_png(draw_samples(samples["images"], evidence.captions), run.samples_picture)
    save_png(draw_pairs([make_strip("", samples, evidence, spec, loaded, maps)]), run.pairs_picture)


def save_png(picture: Image.Image, path: Path) -> None:
    """With what `draw_pairs` says of where its images lie."""
    told = PngImagePlugin.PngInfo()
    if PAIRS_LAYOUT in picture.info:
        told.add_text(PAIRS_LAYOUT, picture.info[PAIRS_LAYOUT])
    with replace_file(path) as part:
        picture.save(part, format="PNG", pnginfo=told)


def draw_samples(images: np.ndarray, captions: Sequence[str] = ()) -> Image.Image:
    """The first of uint8 [N, 3, H, W], in the order of their prompts, which all trials have in common; each
    prompt below its image, as far as it fits."""
    shown, side = images[:_N_SAMPLES], _choose_side(images)
    font = ImageFont.load_default(_CAPTION_SIZE)
    texts = [_fit_caption(caption, font, side) for caption in captions[: len(shown)]]
    n_lines = max((text.count("\n") + bool(text) for text in texts), default=0)
    step = side + _GAP + n_lines * _CAPTION_LINE
    size = N_COLUMNS * (side + _GAP), -(-len(shown) // N_COLUMNS) * step
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    places = [(i % N_COLUMNS * (side + _GAP), i // N_COLUMNS * step) for i in range(len(shown))]
    for image, place in zip(shown, places):
        sheet.paste(_make_tile(image, side), place)
    for text, (left, top) in zip(texts, places):
        draw.multiline_text((left, top + side + 1), text, fill="black", font=font, spacing=1)
    return sheet


def _fit_caption(caption: str, font: Any, width: int) -> str:
    """In lines that are no wider than so many pixels, the last one with dots where words are left out."""
    n_letters = int(width / font.getlength("i"))
    while True:
        lines = textwrap.wrap(caption, n_letters, max_lines=_CAPTION_LINES, placeholder="…")
        if n_letters == 1 or all(font.getlength(line) <= width for line in lines):
            return "\n".join(lines)
        n_letters -= 1


def draw_pairs(strips: Sequence[Strip]) -> Image.Image:
    """For each run a strip of three rows, and of four where any has maps, with what lies between the images
    below them."""
    font, side = ImageFont.load_default(11), _choose_side(strips[0].generated)
    below = _LINE + max(len(strip.rows) for strip in strips) * (side + _GAP)  # of the pictures
    height = below + 2 * _LINE
    sheet = Image.new("RGB", (_TITLE_WIDTH + N_COLUMNS * (side + _GAP), len(strips) * height), "white")
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
        below_tiles = zip(strip.descriptors, strip.distances, strip.shares)
        for column, (descriptor, distance, share) in enumerate(below_tiles):
            draw.text(
                (_TITLE_WIDTH + column * (side + _GAP), top + below),
                f"{descriptor} {distance:.2f}\n{share:.2f} of held",
                fill="black",
                font=font,
            )
    tops = [s * height + _LINE for s in range(len(strips))]
    copies = [strip.copies.tolist() for strip in strips]
    told = {
        "left": _TITLE_WIDTH,
        "side": side,
        "step": side + _GAP,
        "strips": [{"top": top, "copies": found} for top, found in zip(tops, copies)],
    }
    sheet.info[PAIRS_LAYOUT] = json.dumps(told)
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
