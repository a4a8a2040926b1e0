"""Owns augmentation of training images: RandAugment with a magnitude that need not be whole."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_N_OPERATIONS = 2
_FULL = 30.0  # the scale of magnitudes: 30 is the strongest


def _warp_image(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Affine, about the centre; what comes in from outside has the colour of the image's own border."""
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    a, b, c, d, e, f = matrix
    x, y = (image.width - 1) / 2, (image.height - 1) / 2
    centred = (a, b, c + x - a * x - b * y, d, e, f + y - d * x - e * y)
    fill = tuple(np.median(border, axis=0).astype(int).tolist())
    return image.transform(
        image.size, Image.Transform.AFFINE, centred, Image.Resampling.BILINEAR, fillcolor=fill
    )


def _rotate_image(image: Image.Image, strength: float) -> Image.Image:
    angle = np.deg2rad(30 * strength)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    return _warp_image(image, (cos, -sin, 0, sin, cos, 0))


def _make_enhancer(kind: type) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, strength: kind(image).enhance(1 + 0.9 * strength)


# Operations and ranges of RandAugment (Cubuk et al. 2020, arXiv 1909.13719); strength is -1..1, 0 leaves the
# image as it is.
OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, strength: image,
    lambda image, strength: _warp_image(image, (1, 0.3 * strength, 0, 0, 1, 0)),
    lambda image, strength: _warp_image(image, (1, 0, 0, 0.3 * strength, 1, 0)),
    lambda image, strength: _warp_image(image, (1, 0, 0.45 * strength * image.width, 0, 1, 0)),
    lambda image, strength: _warp_image(image, (1, 0, 0, 0, 1, 0.45 * strength * image.height)),
    _rotate_image,
    _make_enhancer(ImageEnhance.Brightness),
    _make_enhancer(ImageEnhance.Color),
    _make_enhancer(ImageEnhance.Contrast),
    _make_enhancer(ImageEnhance.Sharpness),
    lambda image, strength: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
    lambda image, strength: ImageOps.solarize(image, 256 - round(256 * abs(strength))),
    lambda image, strength: Image.blend(image, ImageOps.autocontrast(image), abs(strength)),
    lambda image, strength: Image.blend(image, ImageOps.equalize(image), abs(strength)),
)


def augment_images(pixels: np.ndarray, magnitude: float, seed: int) -> np.ndarray:
    """uint8 [B, 3, H, W], each image through two random operations at a magnitude of 0 (none) to 30."""
    draw, strength = random.Random(seed), min(magnitude / _FULL, 1.0)
    images = [Image.fromarray(image) for image in pixels.transpose(0, 2, 3, 1)]
    for _ in range(_N_OPERATIONS):
        images = [draw.choice(OPERATIONS)(image, draw.choice((-1, 1)) * strength) for image in images]
    return np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2)
