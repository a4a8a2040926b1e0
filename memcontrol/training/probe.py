"""Owns what is asked of the denoiser itself, on noise and timesteps that are the same for every model: loss
gap, noise norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from memcontrol.config.inner import InnerConfig
from memcontrol.config.rewards import RewardsConfig
from memcontrol.core.estimate import Estimate, Measured
from memcontrol.core.seeds import derive_seed
from memcontrol.model.base import Base, Noised
from memcontrol.model.encoded import Encoded
from memcontrol.training.mitigations import noise_norms

# a draw for each of as many timesteps, evenly over their range: a random one would drown the gap
N_PROBE_IMAGES, N_PROBE_DRAWS = 32, 4
_PROBE_SHARE = 0.1  # of the passes of training and sampling, which probes must not exceed
_STEP_PASSES = 3  # a training step of an image, in passes forward


@dataclass(frozen=True)
class ProbeSize:
    """Images of each set, draws of noise for each, and whether each is asked for without its caption too."""

    images: int = N_PROBE_IMAGES
    draws: int = N_PROBE_DRAWS
    norms: bool = True

    @property
    def n_passes(self) -> int:
        return 2 * self.images * self.draws * (2 if self.norms else 1)


def choose_probe_size(inner: InnerConfig, rewards: RewardsConfig, n_probes: int = 1) -> ProbeSize | None:
    """So many probes take at most a tenth of what training and sampling take: first images go, then draws,
    then noise norms. None where not even one image of each set is left; a probe whose reward is an objective
    or has a limit keeps its size."""
    full = ProbeSize()
    asked = [*rewards.objectives, *rewards.limits]
    if any(name.startswith(("loss_gap", "noise_norm")) for name in asked):
        return full
    allowed = _PROBE_SHARE * count_trial_passes(inner, rewards) / n_probes
    sizes = [
        ProbeSize(images, draws, norms)
        for norms in (True, False)
        for draws, least in ((N_PROBE_DRAWS, 8), (1, 2), (1, 1))
        for images in range(N_PROBE_IMAGES, least - 1, -1)
    ]
    return next((size for size in sizes if size.n_passes <= allowed), None)


def count_trial_passes(inner: InnerConfig, rewards: RewardsConfig) -> int:
    """Passes of one image forward that training and sampling take."""
    sampling = rewards.n_samples * rewards.sampling_steps * (1 if rewards.guidance == 1 else 2)
    return _STEP_PASSES * inner.budget_images * inner.passes_per_image + sampling


@torch.no_grad()
def _probe_losses(
    base: Base, data: Encoded, seed: int, size: ProbeSize, norms: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, and norms of what a caption changes in the prediction (Wen et al. 2024, arXiv 2407.21720), of
    the first images: each [draws, images]. Norms are 0 unless asked for."""
    clean, found = data.mean[: size.images].float(), []
    side, first = clean.shape[-1] * base.pixels_per_latent, data.texts(data.caption_rows[:1])
    n_at_a_time = base.choose_sampling_batch(first, 1.0, side)
    for draw in range(size.draws):
        generator = torch.Generator().manual_seed(derive_seed(seed, "probe", draw))
        drawn = base.draw_noise(clean.shape, generator, quantile=(draw + 0.5) / size.draws)
        noised = base.mix(clean.to(base.device), drawn.to(base.device))
        ask = partial(_ask_denoiser, base, data, noised, norms)
        parts = [part for _, part in base.work_in_parts(len(clean), n_at_a_time, ask)]
        found.append([torch.cat(each) for each in zip(*parts)])
    return torch.stack([losses for losses, _ in found]), torch.stack([apart for _, apart in found])


def _ask_denoiser(
    base: Base, data: Encoded, noised: Noised, norms: bool, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and norms of some of the images, each [b], on the CPU."""
    part, captions = noised.part(rows), data.caption_rows[: len(noised.noisy)][rows]
    text, empty = (data.texts(each) for each in (captions, torch.zeros_like(captions)))
    losses, predicted = base.denoise(part, text)
    apart = (
        noise_norms(predicted, base.denoise(part, empty)[1]) if norms and text else torch.zeros_like(losses)
    )
    return losses.cpu(), apart.cpu()


def measure_loss_gap(
    base: Base, train: Encoded, holdout: Encoded, seed: int, size: ProbeSize = ProbeSize()
) -> float:
    """(held-out loss - training loss) / held-out loss: 0 without memorization, towards 1 with it."""
    known, held = (float(_probe_losses(base, data, seed, size)[0].mean()) for data in (train, holdout))
    return (held - known) / held


def _estimate_loss_gap(known: np.ndarray, held: np.ndarray) -> Estimate:
    """The loss gap from losses by image [N] and [M], its error that of having drawn these images."""
    ratio = known.mean() / held.mean()
    if min(len(known), len(held)) < 2:
        return Estimate(float(1 - ratio))
    variances = [np.var(losses, ddof=1) / len(losses) if len(losses) > 1 else 0.0 for losses in (known, held)]
    return Estimate(float(1 - ratio), math.sqrt(variances[0] + ratio**2 * variances[1]) / float(held.mean()))


def measure_probe_rewards(
    base: Base, train: Encoded, holdout: Encoded, seed: int, size: ProbeSize = ProbeSize()
) -> Measured:
    """The loss gap, and MemControl's noise norm of training images: mean, largest (of means over draws), and
    its ratio to held-out images, without which it means little. Without captions the gap alone."""
    (known, norms), (held, held_norms) = (
        _probe_losses(base, data, seed, size, size.norms) for data in (train, holdout)
    )
    found: Measured = {
        "loss_gap": _estimate_loss_gap(known.mean(0).double().numpy(), held.mean(0).double().numpy())
    }
    if not train.text or not size.norms:
        return found
    mean, largest, beside = float(norms.mean()), float(norms.mean(0).max()), float(held_norms.mean())
    return found | {
        "noise_norm_mean": mean,
        "noise_norm_max": largest,
        "noise_norm_ratio": mean / max(beside, 1e-12),
    }
