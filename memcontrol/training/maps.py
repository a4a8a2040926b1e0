"""Owns maps of where a fine-tuned denoiser differs from its base on an image: what it knows of it."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from memcontrol.config.inner import InnerConfig
from memcontrol.config.rewards import RewardsConfig
from memcontrol.core.seeds import derive_seed
from memcontrol.model.base import Base
from memcontrol.model.families import Text
from memcontrol.training.probe import count_trial_passes

_MAP_QUANTILES = (0.03, 0.14, 0.25, 0.36)  # of the timesteps: little noise, under which details stand
_MAP_SHARE = 0.02  # of a trial's passes
_HALF = 0.5  # of the largest value: where a region ends


def count_map_passes(base: Base, n: int) -> int:
    """Of one image forward, for maps of n images by both models."""
    return 2 * n * len(_MAP_QUANTILES) * len(list_shifts(base))


def may_map(base: Base, inner: InnerConfig, rewards: RewardsConfig, n: int) -> bool:
    """Whether maps of n images are a small part of a trial."""
    return count_map_passes(base, n) <= _MAP_SHARE * count_trial_passes(inner, rewards)


def list_shifts(base: Base) -> list[tuple[int, int]]:
    """By how many pixels images are moved, down and right: by half a latent, which shows more than the grid
    of latents does."""
    steps = (0, base.pixels_per_latent // 2) if base.pixels_per_latent > 1 else (0,)
    return list(itertools.product(steps, steps))


@torch.no_grad()
def predict_shifted(base: Base, images: np.ndarray, text: Text, seed: int) -> Tensor:
    """What the denoiser predicts for images, uint8 [N, 3, H, H], moved a little and noised: [shifts,
    timesteps, N, C, h, w], on the CPU. The noise is that of the seed, the same for any model."""
    found = []
    for down, right in list_shifts(base):
        moved = np.pad(images, ((0, 0), (0, 0), (down, 0), (right, 0)), "edge")
        clean, _ = base.encode_pixels(moved[..., : images.shape[-2], : images.shape[-1]])
        found.append([_predict_at(base, clean.float(), text, seed, quantile) for quantile in _MAP_QUANTILES])
    return torch.stack([torch.stack(each) for each in found])


def _predict_at(base: Base, clean: Tensor, text: Text, seed: int, quantile: float) -> Tensor:
    """[N, C, h, w]."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "map", quantile))
    noised = base.mix(
        clean.to(base.device), base.draw_noise(clean.shape, generator, quantile=quantile).to(base.device)
    )

    def predict(rows: slice) -> Tensor:
        own = {name: tensor[rows] for name, tensor in text.items()}
        return base.denoise(noised.part(rows), own)[1].float().cpu()

    size = base.choose_sampling_batch(text, 1.0, clean.shape[-1] * base.pixels_per_latent)
    return torch.cat([part for _, part in base.work_in_parts(len(clean), size, partial(predict))])


def compare_predictions(base: Base, before: Tensor, after: Tensor, side: int) -> np.ndarray:
    """The squared difference of two models' predictions, as `predict_shifted` gives them, by pixel: float32
    [N, side, side]."""
    apart = (after - before).square().sum(3).mean(1)  # [shifts, N, h, w]
    large = torch.nn.functional.interpolate(apart, (side, side), mode="bilinear", align_corners=False)
    back = [
        np.pad(moved[:, down:, right:], ((0, 0), (0, down), (0, right)), "edge")
        for moved, (down, right) in zip(large.numpy(), list_shifts(base))
    ]
    sigma = base.pixels_per_latent / 2
    return gaussian_filter(np.mean(back, axis=0), (0, sigma, sigma)).astype(np.float32)


def find_regions(maps: np.ndarray) -> np.ndarray:
    """Of maps [N, H, W], each one's region above half of its range: [N, H, W]."""
    low, high = (edge(maps, axis=(1, 2), keepdims=True) for edge in (np.min, np.max))
    return maps > low + _HALF * (high - low)


def frame_regions(maps: np.ndarray) -> list[list[float]]:
    """The box around each region of maps [N, H, W]: left, top, right and bottom as shares of a side."""
    found = []
    for region in find_regions(maps):
        if not region.any():  # nothing differs
            found.append([0.0, 0.0, 1.0, 1.0])
            continue
        rows, columns = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
        height, width = region.shape
        ends = (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)
        found.append([round(float(end), 4) for end in ends])
    return found
