"""Loss gap and noise norms against the same written out with the plain denoiser, and on a model that has
memorized."""

import pytest
import torch

from memcontrol.core.seeds import derive_seed
from memcontrol.training.probe import N_PROBE_DRAWS, measure_loss_gap, measure_probe_rewards


def test_probes_by_hand(base, material):
    found, held = measure_probe_rewards(base, material.data, material.holdout(), 5), material.holdout()
    losses, norms = {}, {}
    for name, data in (("train", material.data), ("held", held)):
        losses[name], norms[name] = [], []
        for draw in range(N_PROBE_DRAWS):
            generator = torch.Generator().manual_seed(derive_seed(5, "probe", draw))
            noise, timesteps = (
                torch.randn(data.mean.shape, generator=generator),
                torch.full((len(data.mean),), (125, 375, 625, 875)[draw]),
            )
            kept = base.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
            noisy = kept.sqrt() * data.mean + (1 - kept).sqrt() * noise
            with torch.no_grad():
                caption, none = (
                    base.denoiser(noisy, timesteps, data.text["prompt_embeds"][rows]).sample
                    for rows in (data.caption_rows, [0] * len(noisy))
                )
            losses[name].append(((caption - noise) ** 2).flatten(1).mean(1))
            norms[name].append((caption - none).flatten(1).norm(dim=1))
    losses, norms = ({name: torch.stack(each) for name, each in found.items()} for found in (losses, norms))
    assert found["loss_gap"].value == pytest.approx(
        float((losses["held"].mean() - losses["train"].mean()) / losses["held"].mean()), abs=1e-5
    )
    ratio = losses["train"].mean(0), losses["held"].mean(0)
    spread = [r.std() / len(r) ** 0.5 / r.mean() for r in ratio]  # of a quotient, to first order
    assert found["loss_gap"].error == pytest.approx(
        float(ratio[0].mean() / ratio[1].mean() * (spread[0] ** 2 + spread[1] ** 2) ** 0.5), rel=1e-3
    )
    assert found["noise_norm_mean"] == pytest.approx(float(norms["train"].mean()), rel=1e-4)
    assert found["noise_norm_max"] == pytest.approx(float(norms["train"].mean(0).max()), rel=1e-4)
    assert found["noise_norm_ratio"] == pytest.approx(
        float(norms["train"].mean() / norms["held"].mean()), rel=1e-4
    )


def test_the_gap_opens_as_a_model_memorizes(base, material, memorized):
    before = measure_loss_gap(base, material.data, material.holdout(), 1)
    with memorized():
        assert measure_loss_gap(base, material.data, material.holdout(), 1) > before + 0.1
