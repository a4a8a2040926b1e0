"""Owns greys of more than 8 bits: which values are shown as black and as white, the same for a whole
folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from memcontrol.core.errors import MemControlError

_BITS = (8, 10, 12, 14, 16)  # that cameras and X-ray machines store
# images whose lightest value is below a share of the scale, and how many of them are just dark
_DARKEST, _MOST_DARK = 12, 0.05
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # of TIFF (6.0, page 37)


@dataclass(frozen=True)
class Greys:
    """The values that are shown as black and as white."""

    black: float
    white: float

    def convert(self, values: np.ndarray, inverted: bool = False) -> Image.Image:
        """RGB of greys [H, W]; inverted where black is shown as white."""
        share = (values - self.black) / max(self.white - self.black, 1e-12)
        share = 1 - share if inverted else share
        return Image.fromarray((255 * share.clip(0, 1)).round().astype(np.uint8)).convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether its greys have more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def read_greys(image: Image.Image) -> np.ndarray:
    """float64 [H, W], as stored. What is not finite is the least."""
    values = np.asarray(image, np.float64)
    return np.where(np.isfinite(values), values, np.nanmin(np.where(np.isfinite(values), values, np.nan)))


def is_inverted(image: Image.Image) -> bool:
    """Whether the least value is white, of deep greys; Pillow turns those of 8 bits itself."""
    return getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def refuse_mixed_depths(greys: Greys, ranges: Mapping[Path, tuple[float, float]]) -> None:
    """Of images' least and largest values: some that would be shown as nearly black are dark; many are of
    another depth. Raises MemControlError."""
    whole = greys.white - greys.black
    dark = [path for path, (_, most) in ranges.items() if most - greys.black < whole / _DARKEST]
    if len(dark) > max(1, _MOST_DARK * len(ranges)):
        largest = max(ranges[path][1] for path in dark)
        other = max(ranges, key=lambda path: ranges[path][1])
        raise MemControlError(
            f"greys of two depths: {len(dark)} images, such as {dark[0]}, hold values up to {largest:g} "
            f"alone, and others, such as {other}, up to {ranges[other][1]:g}; store all of them in one "
            "depth, or the first ones would be shown as nearly black"
        )


def choose_greys(least: float, most: float, mode: str) -> Greys:
    """The scale of values between these. Whole ones from 0 on: that of as many bits as hold the largest;
    signed ones, and floats: from the least to the largest, and from 0 to 1 where floats reach into its upper
    half."""
    if mode.startswith("F"):
        return Greys(0.0, 1.0) if 0 <= least and 0.5 < most <= 1 else Greys(min(0.0, least), most)
    if least < 0:
        return Greys(least, most)
    return Greys(0.0, next((2.0**bits - 1 for bits in _BITS if most < 2**bits), most))
