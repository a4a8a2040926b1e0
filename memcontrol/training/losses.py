"""Owns the denoiser's losses on single images, at timesteps and with noise that are the same for every model:
what tells training images from others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from memcontrol.config.inner import InnerConfig
from memcontrol.config.rewards import RewardsConfig
from memcontrol.core.reward_table import MEMBERSHIP
from memcontrol.core.seeds import derive_seed
from memcontrol.model.base import Base, NoiseDraw
from memcontrol.model.encoded import Encoded
from memcontrol.training.probe import count_trial_passes

N_DRAWS, MOST_IMAGES = 16, 512  # timesteps of each image; images of either side
MOST_AUDITED = 200  # of either side in an audit: 12,800 passes, where sampling takes some 5,000
_QUANTILES = (0.03, 0.75)  # of the timesteps: the middle ones tell most
_ATTACK_SHARE = 0.1  # of the passes of training and sampling, which this must not exceed
_WORTH = {16: 128, 8: 64, 4: 16}  # images of both sides that are worth so many timesteps


@dataclass(frozen=True)
class AttackSize:
    """Members and others that are looked at, and the timesteps of each."""

    members: int
    others: int
    draws: int = N_DRAWS


def choose_attack_size(
    inner: InnerConfig, rewards: RewardsConfig, members: int, others: int
) -> AttackSize | None:
    """As many images as a tenth of the passes of training and sampling allow, of either side alike as far as
    there are; then fewer timesteps. None where only few would be left. Where a figure of membership is an
    objective or has a limit, as many as there may be."""
    most = min(members, MOST_IMAGES), min(others, MOST_IMAGES)
    if any(name.startswith(MEMBERSHIP) for name in (*rewards.objectives, *rewards.limits)):
        return AttackSize(*most)
    allowed = _ATTACK_SHARE * count_trial_passes(inner, rewards)
    for draws, fewest in _WORTH.items():
        n = int(allowed / draws)
        if n >= min(fewest, sum(most)):
            mine = min(most[0], max(n // 2, n - most[1]))
            return AttackSize(mine, min(most[1], n - mine), draws)
    return None


@torch.no_grad()
def measure_losses(
    base: Base,
    data: Encoded,
    digests: Sequence[str],
    seed: int,
    n_draws: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """The denoising losses of all images, each under its first caption, at `n_draws` timesteps at even
    quantiles: [N, n_draws]. The noise follows from the seed and an image's digest alone, so it is the same
    whatever else is in the set."""
    side, text = data.mean.shape[-1] * base.pixels_per_latent, data.texts(data.caption_rows[:1])
    n_at_a_time = base.choose_sampling_batch(text, 1.0, side)
    found = np.empty((len(data.mean), n_draws))
    for k, quantile in enumerate(np.linspace(*_QUANTILES, n_draws)):
        ask = partial(_ask_losses, base, data, digests, seed, k, float(quantile))
        for rows, losses in base.work_in_parts(len(digests), n_at_a_time, ask):
            found[rows, k] = losses
        tell(k + 1, n_draws)
    return found


def _ask_losses(
    base: Base, data: Encoded, digests: Sequence[str], seed: int, k: int, quantile: float, rows: slice
) -> np.ndarray:
    """At one timestep, of some of the images [b]."""
    clean = data.mean[rows].float()
    drawn = _join_draws(
        base.draw_noise((1, *clean.shape[1:]), _seed_noise(seed, digest, k), quantile=quantile)
        for digest in digests[rows]
    )
    noised = base.mix(clean.to(base.device), drawn.to(base.device))
    losses, _ = base.denoise(noised, data.texts(data.caption_rows[rows]))
    return losses.double().cpu().numpy()


def _seed_noise(seed: int, digest: str, k: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, "membership", digest, k))


def _join_draws(draws: Iterator[NoiseDraw]) -> NoiseDraw:
    found = list(draws)
    noise = torch.cat([one.noise for one in found])  # [b, C, h, w]
    return NoiseDraw(noise, noise, torch.cat([one.times for one in found]))
