"""Owns the inner loop of one shard: draws batches, skips, augments, steps; what it knows between rounds is a
Shard.

Notations

B: Images of a batch, inner.batch_size; forward takes it in slices of inner.micro_batch_size.
N, n: Images of the training set, and of the shard; rows: numbers of images in the training set, [B].
C, h, w: Channels and sides of the latents.
slot: One unit of the shard's budget, with one optimizer step at most; share: how much of the budget is done.
loss: Of each image, the mean squared error of the denoiser's prediction, [B].
memory: The loss that is usual at a timestep (IET-AGC, arXiv 2407.15328).
u = ratio loss / memory: How close an image is to the skip threshold, [B]; below 1 it is skipped.
bar: An image with 1 <= u < bar is queued for augmentation (IET-AGC+).
keep: Which images are trained on now, [B]; n_kept: how many; room: how many more the step takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from memcontrol.core.config import InnerConfig
from memcontrol.core.errors import Diverged
from memcontrol.core.seeds import derive_seed
from memcontrol.model.adapter import Adapter
from memcontrol.model.base import Base, Noised
from memcontrol.model.families import Text
from memcontrol.training.augment import augment_images
from memcontrol.training.mitigations import (
    add_text_noise,
    below_threshold,
    edit_captions,
    list_vocabulary,
    min_snr_weights,
    noise_norms,
)
from memcontrol.training.shard import Material, Shard

_OPTIMIZERS: dict[str, Callable] = {
    "adamw": lambda groups, decay: torch.optim.AdamW(groups, weight_decay=decay, fused=True),
    "adam": lambda groups, decay: torch.optim.Adam(groups, weight_decay=decay, fused=True),
    "nadam": lambda groups, decay: torch.optim.NAdam(groups, weight_decay=decay, decoupled_weight_decay=True),
    "radam": lambda groups, decay: torch.optim.RAdam(groups, weight_decay=decay, decoupled_weight_decay=True),
    "adafactor": lambda groups, decay: torch.optim.Adafactor(groups, weight_decay=decay),
    "sgd": lambda groups, decay: torch.optim.SGD(groups, weight_decay=decay, momentum=0.9),
}
_FUSED = ("adamw", "adam")
_SCREENINGS = 8  # batches that augmentation by rule `kept` may score for one step


@dataclass(frozen=True)
class Batch:
    """Images ready for the denoiser."""

    rows: Tensor  # image numbers [B]
    noised: Noised
    text: Text

    def part(self, rows: slice) -> tuple[Noised, Text]:
        return self.noised.part(rows), {name: tensor[rows] for name, tensor in self.text.items()}


class Loop:
    """Takes the steps of one shard in one round, with the adapter's parameters, their optimizer and their
    moving average."""

    def __init__(
        self, base: Base, adapter: Adapter, material: Material, inner: InnerConfig, shard: Shard, seed: int
    ):
        self.base, self.adapter, self.material = base, adapter, material
        self.inner, self.shard, self.seed = inner, shard, seed
        self.trained = adapter.trained()
        self.parameters: list[Tensor] = list(self.trained.values())
        self.optimizer = _OPTIMIZERS[inner.optimizer](adapter.groups(), inner.weight_decay)
        self.scaler = torch.amp.GradScaler(base.device.type, enabled=inner.precision == "float16")
        self.shadows = [parameter.detach().clone() for parameter in self.parameters] if inner.ema else []
        edits = inner.captions.any and bool(material.data.text)
        self.words = list_vocabulary(base.pipeline.tokenizer) if edits else []

    def take_slot(self, share: float) -> None:
        """One unit of the budget, `share` of the shard's units done with it: at most one optimizer step.
        Raises Diverged."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate_factor(share, self.inner)
        self.optimizer.zero_grad()
        losses: list[float] = []
        n_kept = self.learn_augmented(losses)
        if not n_kept and not (self.inner.augmentation and self.inner.augmentation.rule == "kept"):
            n_kept = self.learn_plain(losses)
        if losses:
            self.shard.losses.append(sum(losses) / len(losses))
        if n_kept:
            self.step(n_kept)

    def learn_plain(self, losses: list[float]) -> int:
        """Gradients of batches until as many images were kept as a batch has, or the draws are used up. How
        many were kept."""
        n_kept = 0
        for _ in range(self.n_draws):
            n_kept += self.learn(self.draw(), losses, self.inner.batch_size - n_kept)
            if n_kept == self.inner.batch_size:
                break
        return n_kept

    def learn_augmented(self, losses: list[float]) -> int:
        """Gradients of a batch of augmented images, once the queue holds one; rule `kept` first scores
        batches to fill it."""
        rule = self.inner.augmentation
        if rule is None:
            return 0
        for _ in range(max(self.n_draws, _SCREENINGS) if rule.rule == "kept" else 0):
            if not self.is_queue_full():
                self.screen(self.draw(), losses)
        if not self.is_queue_full():
            return 0
        return self.learn(self.from_queue(rule.base), [], self.inner.batch_size, from_queue=True)

    @property
    def n_draws(self) -> int:
        """How many batches a step may look at."""
        return self.inner.skip.refill if self.inner.skip else 1

    def is_queue_full(self) -> bool:
        return len(self.shard.queue) >= self.inner.batch_size

    def draw(self) -> Batch:
        """The shard's next batch; a batch depends on its number alone, so a run can go on anywhere."""
        shard, number = self.shard, self.shard.counts["batches"]
        shard.counts["batches"] += 1
        seed = derive_seed(self.seed, "exchanged", shard.exchanged_at) if shard.exchanged_at else self.seed
        rows = shard.rows[
            select_batch_rows(len(shard.rows), self.inner.batch_size, seed, number - shard.exchanged_at)
        ]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "step", number))
        data = self.material.data
        return self.batch(rows, data.mean[rows], data.deviation[rows], generator, number)

    def from_queue(self, base: float) -> Batch:
        """The queue's first images, augmented: RandAugment at base * mean exp(-5 |u - 1|)."""
        shard, size = self.shard, self.inner.batch_size
        rows, u = shard.queue[:size], shard.queue_closeness[:size]
        shard.queue, shard.queue_closeness = shard.queue[size:], shard.queue_closeness[size:]
        number = shard.counts["augmented_batches"]
        shard.counts["augmented_batches"] += 1
        strength = float(torch.exp(-5 * (u - 1).abs()).mean())
        pixels = augment_images(
            self.material.pixels(rows.tolist()), base * strength, derive_seed(self.seed, "augmented", number)
        )
        with torch.no_grad():
            mean, deviation = (
                tensor.cpu() for tensor in self.base.encode_posterior(torch.from_numpy(pixels))
            )
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "augmented step", number))
        return self.batch(rows, mean, deviation, generator, f"augmented {number}")

    def batch(
        self, rows: Tensor, mean: Tensor, deviation: Tensor, generator: torch.Generator, number: object
    ) -> Batch:
        """Latents drawn from their posterior's mean and deviation [B, C, h, w], noised; some captions
        replaced by the empty one, some edited."""
        inner, device = self.inner, self.base.device
        clean = mean + deviation * torch.randn(mean.shape, generator=generator)  # [B, C, h, w]
        dropped = torch.rand(len(rows), generator=generator) < inner.caption_dropout
        text = self.texts(rows, dropped, derive_seed(self.seed, "captions", number))
        noised = self.base.add_noise(
            clean.to(device), generator, inner.noise_offset, inner.input_perturbation
        )
        return Batch(rows, noised, {name: tensor.to(device) for name, tensor in text.items()})

    def texts(self, rows: Tensor, dropped: Tensor, seed: int) -> Text:
        """Encodings of the images' captions, edited and with noise as the config says; of those that are
        `dropped` [B], the empty one's."""
        data, inner = self.material.data, self.inner
        text = data.texts(torch.where(dropped, 0, data.caption_rows[rows]))
        if self.words:
            self.edit_texts(text, rows, dropped, seed)
        return add_text_noise(text, inner.embedding_noise, seed) if inner.embedding_noise and text else text

    def edit_texts(self, text: Text, rows: Tensor, dropped: Tensor, seed: int) -> None:
        """Replaces the encodings of captions that an edit changes."""
        captions = (self.material.captions[row] for row in rows.tolist())
        before = ["" if gone else caption for caption, gone in zip(captions, dropped.tolist())]
        after = edit_captions(before, self.inner.captions, self.words, seed)
        changed = [i for i, (old, new) in enumerate(zip(before, after)) if old != new and not dropped[i]]
        if changed:
            for name, tensor in self.base.encode_captions([after[i] for i in changed]).items():
                text[name][changed] = tensor.to(text[name])

    def learn(self, batch: Batch, losses: list[float], room: int, from_queue: bool = False) -> int:
        """Adds the gradients of the images that are kept, `room` at the most, each by 1 / batch_size. How
        many were kept."""
        seen, n_kept = [], 0
        for rows in _iterate_slices(len(batch.rows), self.inner.micro_batch_size):
            noised, text = batch.part(rows)
            with self.autocast():
                loss, predicted = self.base.denoise(noised, text)
            keep = self.judge_images(
                loss.detach(), predicted.detach(), noised, text, batch.rows[rows], from_queue
            )
            fits = n_kept + keep.cumsum(0) <= room
            self.shard.counts["surplus"] += int((keep & ~fits).sum())
            keep &= fits
            weight = keep.to(loss) * self.weights(noised.timesteps)
            n_kept += (n_new := int(keep.sum()))
            if n_new:
                self.scaler.scale((loss * weight).sum() / self.inner.batch_size).backward()
            seen.append(loss.detach())
        self.note(torch.cat(seen), batch, losses, remember=not from_queue)
        self.shard.counts["trained"] += n_kept
        return n_kept

    @torch.no_grad()
    def screen(self, batch: Batch, losses: list[float]) -> None:
        """Scores a batch without gradients and queues what is not skipped."""
        seen = []
        for rows in _iterate_slices(len(batch.rows), self.inner.micro_batch_size):
            noised, text = batch.part(rows)
            with self.autocast():
                loss, predicted = self.base.denoise(noised, text)
            self.judge_images(loss, predicted, noised, text, batch.rows[rows], False)
            seen.append(loss)
        self.note(torch.cat(seen), batch, losses, remember=True)

    def autocast(self) -> AbstractContextManager:
        precision = getattr(torch, self.inner.precision)
        return torch.autocast(self.base.device.type, precision, enabled=precision != torch.float32)

    def note(self, loss: Tensor, batch: Batch, losses: list[float], remember: bool) -> None:
        """The mean loss for the record, all losses [B] for the memory, once the whole batch was judged by
        what it knew before."""
        losses.append(float(loss.mean()))
        if not math.isfinite(losses[-1]):
            raise Diverged(
                f"the loss became {losses[-1]} after {self.shard.counts['steps']} steps (learning "
                f"rate {self.adapter.said_rates()})"
            )
        self.shard.counts["seen"] += len(loss)
        if self.shard.memory and remember:
            self.shard.memory.update(loss, batch.noised.timesteps)

    def judge_images(
        self, loss: Tensor, predicted: Tensor, noised: Noised, text: Text, rows: Tensor, from_queue: bool
    ) -> Tensor:
        """Which images [B] to train on now; counts those dropped and skipped, and queues those that are to be
        augmented."""
        keep, rule = torch.ones_like(loss, dtype=torch.bool), self.inner.augmentation
        if self.inner.norm_threshold:
            keep &= below_threshold(
                noise_norms(predicted, self.predict_without_caption(noised, text)), self.inner.norm_threshold
            )
            self.shard.counts["dropped"] += len(keep) - int(keep.sum())
        if not self.shard.memory or (from_queue and not (rule and rule.retest)):
            return keep
        known_too_well = keep & ~self.shard.memory.keeps(loss, noised.timesteps)
        self.count_skips(rows[known_too_well.cpu()])
        keep &= ~known_too_well
        if rule and not from_queue:
            u = self.shard.memory.closeness(loss, noised.timesteps)
            waits = keep & ((u < rule.bar) | (rule.rule == "kept"))
            self.enqueue(rows[waits.cpu()], u[waits])
            keep &= ~waits
        return keep

    def count_skips(self, rows: Tensor) -> None:
        for counts in (self.shard.skips, self.shard.skipped):
            counts.index_add_(0, rows, torch.ones_like(rows))
        self.shard.counts["skipped"] += len(rows)

    def enqueue(self, rows: Tensor, closeness: Tensor) -> None:
        self.shard.queue = torch.cat([self.shard.queue, rows])
        self.shard.queue_closeness = torch.cat([self.shard.queue_closeness, closeness.cpu()])
        self.shard.counts["queued"] += len(rows)

    @torch.no_grad()
    def predict_without_caption(self, noised: Noised, text: Text) -> Tensor:
        """The prediction [B, C, h, w] for the empty caption."""
        empty = self.material.data.texts(torch.zeros(len(noised.noisy), dtype=torch.long))
        with self.autocast():
            return self.base.denoise(noised, {name: tensor.to(text[name]) for name, tensor in empty.items()})[
                1
            ]

    def weights(self, timesteps: Tensor) -> Tensor | float:
        """Of each image's loss [B], by min-SNR where the config asks for it."""
        schedule = self.base.schedule
        if self.inner.min_snr is None:
            return 1.0
        return min_snr_weights(
            schedule.alphas_cumprod,
            timesteps,
            self.inner.min_snr,
            schedule.config.prediction_type == "v_prediction",
        )

    def step(self, n_kept: int) -> None:
        """The optimizer's step on the mean gradient of the images kept, clipped."""
        self.scaler.unscale_(self.optimizer)
        if n_kept != self.inner.batch_size:
            torch._foreach_mul_(
                [p.grad for p in self.parameters if p.grad is not None], self.inner.batch_size / n_kept
            )
        torch.nn.utils.clip_grad_norm_(self.parameters, self.inner.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.shard.counts["steps"] += 1
        if self.inner.ema:
            n = self.shard.counts["steps"]
            # a short run must not remember its start for ever
            decay = min(self.inner.ema, (1 + n) / (10 + n))
            with torch.no_grad():
                torch._foreach_lerp_(self.shadows, self.parameters, 1 - decay)

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state by parameter and kind: "NAME exp_avg"."""
        return {
            f"{name} {kind}": value
            for name, parameter in self.trained.items()
            for kind, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def load_moments(self, moments: dict[str, Tensor]) -> None:
        for key, value in moments.items():
            name, kind = key.rsplit(" ", 1)
            parameter = self.trained[name]
            # unfused optimizers keep their counters on the CPU
            on_device = value.ndim or self.inner.optimizer in _FUSED
            self.optimizer.state[parameter][kind] = value.to(parameter.device) if on_device else value.clone()

    def load_shadows(self, state: dict[str, Tensor]) -> None:
        for shadow, name in zip(self.shadows, self.trained):
            shadow.copy_(state[name])


def _iterate_slices(n: int, size: int | None) -> Iterator[slice]:
    for start in range(0, n, size or n):
        yield slice(start, start + (size or n))


def learning_rate_factor(share: float, inner: InnerConfig) -> float:
    """The learning rate's factor when `share` of the steps is done: linear warm-up, then constant or a half
    cosine to 0."""
    if share < inner.warmup:
        return share / inner.warmup
    if inner.schedule == "constant":
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (share - inner.warmup) / (1 - inner.warmup))


def select_batch_rows(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Rows of the step's batch: passes over reshuffled data, each pass shuffled by its own number."""
    position, end, parts = step * batch_size, (step + 1) * batch_size, []
    while position < end:
        number, place = divmod(position, n)
        parts.append(shuffle_rows(n, seed, number)[place : place + end - position])
        position += len(parts[-1])
    return torch.cat(parts)


@lru_cache(maxsize=2)  # a pass lasts many steps, and is as long as the data
def shuffle_rows(n: int, seed: int, number: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed(seed, "pass", number)))
