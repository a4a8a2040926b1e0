"""Owns the inner loop: fine-tunes an injected adapter on cached latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from memcontrol.adapters import Adapter
from memcontrol.config import InnerConfig
from memcontrol.errors import Diverged
from memcontrol.models import Base, Encoded
from memcontrol.seeds import seed_of


@dataclass(frozen=True)
class TrainLog:
    """What a fine-tuning did: optimizer steps, images seen, and the mean loss of its first and last tenth."""

    n_steps: int
    images_seen: int
    first_loss: float
    last_loss: float


def train(
    base: Base, adapter: Adapter, data: Encoded, inner: InnerConfig, *, seed: int, progress: Callable[[int, int], None]
) -> TrainLog:
    """Trains for inner.budget_images images seen, with AdamW and linear warm-up. Raises Diverged where the loss is not finite."""
    parameters = adapter.parameters()
    if not parameters:
        return TrainLog(0, 0, math.nan, math.nan)
    optimizer = torch.optim.AdamW(adapter.groups(), weight_decay=inner.weight_decay, fused=True)
    n_steps = math.ceil(inner.budget_images / inner.batch_size)
    generator = torch.Generator()
    losses: list[float] = []
    for step in range(n_steps):
        generator.manual_seed(seed_of(seed, "step", step))  # a step depends on its number alone, so a run can resume anywhere
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * pace((step + 1) / n_steps, inner)
        loss = batch_loss(base, data, inner, batch_rows(len(data.mean), inner.batch_size, seed, step), generator)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise Diverged(f"the loss became {losses[-1]} at step {step + 1} of {n_steps} (learning rate {adapter.said_rates()})")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, inner.max_grad_norm)
        optimizer.step()
        progress(step + 1, n_steps)
    tenth = max(1, n_steps // 10)
    return TrainLog(n_steps, n_steps * inner.batch_size, sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth)


def pace(share: float, inner: InnerConfig) -> float:
    """The learning rate's factor when `share` of the steps is done: linear warm-up, then constant or a half cosine to 0."""
    if share < inner.warmup:
        return share / inner.warmup
    if inner.schedule == "constant":
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (share - inner.warmup) / (1 - inner.warmup))


def batch_rows(n: int, batch_size: int, seed: int, step: int) -> torch.Tensor:
    """Rows of the step's batch: passes over reshuffled data, each pass shuffled by its own number."""
    first = step * batch_size
    rows, shuffles = [], {}
    for position in range(first, first + batch_size):
        number, place = divmod(position, n)
        if number not in shuffles:
            shuffles[number] = torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, "pass", number)))
        rows.append(shuffles[number][place])
    return torch.stack(rows)


def batch_loss(base: Base, data: Encoded, inner: InnerConfig, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mean denoising loss; latents are drawn anew from their posterior, some captions are replaced by the empty one."""
    mean, deviation = data.mean[rows], data.deviation[rows]  # [B, C, h, w]
    clean = mean + deviation * torch.randn(mean.shape, generator=generator)
    dropped = torch.rand(len(rows), generator=generator) < inner.caption_dropout
    text = data.texts(torch.where(dropped, 0, data.caption_rows[rows]))
    losses, _ = base.losses(clean.to(base.device), {name: tensor.to(base.device) for name, tensor in text.items()}, generator)
    return losses.mean()
