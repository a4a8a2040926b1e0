"""Owns what is asked of the denoiser itself, on noise and timesteps that are the same for every model: loss
gap, noise norms."""

from __future__ import annotations

import math

import numpy as np
import torch

from memcontrol.core.estimate import Estimate, Measured
from memcontrol.core.seeds import derive_seed
from memcontrol.model.base import Base, Encoded
from memcontrol.training.mitigations import noise_norms

# a draw for each of as many timesteps, evenly over their range: a random one would drown the gap
N_PROBE_IMAGES, N_PROBE_DRAWS = 32, 4


@torch.no_grad()
def _probe_losses(
    base: Base, data: Encoded, seed: int, norms: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, and norms of what a caption changes in the prediction (Wen et al. 2024, arXiv 2407.21720), of
    the first images: each [draws, images]. Norms are 0 unless asked for."""
    clean, found = data.mean[:N_PROBE_IMAGES].to(base.device), []
    texts = [
        data.texts(rows)
        for rows in (data.caption_rows[:N_PROBE_IMAGES], torch.zeros(len(clean), dtype=torch.long))
    ]
    for draw in range(N_PROBE_DRAWS):
        generator = torch.Generator().manual_seed(derive_seed(seed, "probe", draw))
        noised = base.add_noise(clean, generator, quantile=(draw + 0.5) / N_PROBE_DRAWS)
        text, empty = ({name: tensor.to(base.device) for name, tensor in each.items()} for each in texts)
        losses, predicted = base.denoise(noised, text)
        apart = (
            noise_norms(predicted, base.denoise(noised, empty)[1])
            if norms and text
            else torch.zeros_like(losses)
        )
        found.append((losses.cpu(), apart.cpu()))
    return torch.stack([losses for losses, _ in found]), torch.stack([apart for _, apart in found])


def measure_loss_gap(base: Base, train: Encoded, holdout: Encoded, seed: int) -> float:
    """(held-out loss - training loss) / held-out loss: 0 without memorization, towards 1 with it."""
    known, held = (float(_probe_losses(base, data, seed)[0].mean()) for data in (train, holdout))
    return (held - known) / held


def _estimate_loss_gap(known: np.ndarray, held: np.ndarray) -> Estimate:
    """The loss gap from losses by image [N] and [M], its error that of having drawn these images."""
    ratio = known.mean() / held.mean()
    variances = [np.var(losses, ddof=1) / len(losses) if len(losses) > 1 else 0.0 for losses in (known, held)]
    return Estimate(float(1 - ratio), math.sqrt(variances[0] + ratio**2 * variances[1]) / float(held.mean()))


def measure_probe_rewards(base: Base, train: Encoded, holdout: Encoded, seed: int) -> Measured:
    """The loss gap, and MemControl's noise norm of training images: mean, largest (of means over draws), and
    its ratio to held-out images, without which it means little. Without captions the gap alone."""
    (known, norms), (held, held_norms) = (
        _probe_losses(base, data, seed, norms=True) for data in (train, holdout)
    )
    found: Measured = {
        "loss_gap": _estimate_loss_gap(known.mean(0).double().numpy(), held.mean(0).double().numpy())
    }
    if not train.text:
        return found
    mean, largest, beside = float(norms.mean()), float(norms.mean(0).max()), float(held_norms.mean())
    return found | {
        "noise_norm_mean": mean,
        "noise_norm_max": largest,
        "noise_norm_ratio": mean / max(beside, 1e-12),
    }
