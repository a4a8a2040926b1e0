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
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from memcontrol.config.inner import InnerConfig
from memcontrol.core.errors import Diverged
from memcontrol.core.seeds import derive_seed
from memcontrol.model.adapter import Adapter
from memcontrol.model.base import Base, Noised, NoiseDraw
from memcontrol.model.batches import is_out_of_memory, release_memory
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
from memcontrol.training.optimizers import FUSED, OPTIMIZERS, RoundedAdafactor
from memcontrol.training.shard import Material, Shard
from memcontrol.training.unit_gradients import PrivateSteps

_SCREENINGS = 8  # batches that augmentation by rule `kept` may score for one step


@dataclass(frozen=True)
class Batch:
    """Images ready for the denoiser."""

    rows: Tensor  # image numbers [B]
    noised: Noised
    text: Text

    def part(self, rows: slice) -> tuple[Noised, Text]:
        return self.noised.part(rows), {name: tensor[rows] for name, tensor in self.text.items()}


@dataclass(frozen=True)
class Gathered:
    """A batch on the CPU, before it is noised."""

    rows: Tensor  # image numbers [B]
    clean: Tensor  # [B, C, h, w]
    drawn: NoiseDraw
    text: Text

    def pin(self) -> Gathered:
        text = {name: tensor.pin_memory() for name, tensor in self.text.items()}
        return Gathered(self.rows, self.clean.pin_memory(), self.drawn.pin(), text)


@dataclass(frozen=True)
class Verdict:
    """What became of the images of a batch, or of a slice of it, each [B]: their losses; which the rules
    `keep`, and of these which the step `trains` on, since it takes no more than a batch; which were dropped,
    skipped, or wait to be augmented, and their closeness u to the skip threshold."""

    loss: Tensor
    keep: Tensor
    trains: Tensor
    dropped: Tensor
    skipped: Tensor
    waits: Tensor
    closeness: Tensor

    @staticmethod
    def join(parts: Sequence[Verdict]) -> Verdict:
        names = [one.name for one in fields(Verdict)]
        return Verdict(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def read(self) -> Verdict:
        """On the CPU, in one copy."""
        if not self.loss.is_cuda:
            return self
        kinds = {one.name: getattr(self, one.name).dtype for one in fields(self)}
        columns = torch.stack([getattr(self, name).double() for name in kinds]).cpu()
        return Verdict(**{name: column.to(kind) for (name, kind), column in zip(kinds.items(), columns)})


class Loop:
    """Takes the steps of one shard in one round, with the adapter's parameters, their optimizer and their
    moving average."""

    def __init__(
        self,
        base: Base,
        adapter: Adapter,
        material: Material,
        inner: InnerConfig,
        shard: Shard,
        seed: int,
        *,
        n_forward: int | None = None,
        may_halve: bool = True,
        private_seed: int | None = None,
    ):
        """`n_forward` images go through the denoiser at a time, inner.micro_batch_size unless it was found
        to be too many; `may_halve`: fewer where memory does not suffice. `private_seed`: what all draws of a
        private fine-tuning follow from."""
        self.base, self.adapter, self.material = base, adapter, material
        self.inner, self.shard, self.seed = inner, shard, seed
        self.trained = adapter.trained()
        self.parameters: list[Tensor] = list(self.trained.values())
        self.optimizer: Any = (
            RoundedAdafactor(adapter.groups(), inner.weight_decay, seed)
            if adapter.is_low_memory
            else OPTIMIZERS[inner.optimizer](adapter.groups(), inner.weight_decay)
        )
        self.n_forward = n_forward or inner.micro_batch_size or inner.batch_size
        # ranks that share a base must all take the same forwards
        self.may_halve = may_halve and "micro_batch_size" in inner.memory_keys and not base.is_sharded
        self.alphas_cumprod: Any = base.schedule.alphas_cumprod.to(base.device) if inner.min_snr else None
        self.has_rules = bool(inner.norm_threshold or shard.memory)
        self.unread: list[tuple[int, Tensor]] = []  # steps before, and the mean loss, of each slot
        self.scaler = torch.amp.GradScaler(base.device.type, enabled=base.precision.compute == torch.float16)
        self.shadows = [parameter.detach().clone() for parameter in self.parameters] if inner.ema else []
        edits = inner.captions.any and bool(material.data.text)
        self.words = list_vocabulary(base.pipeline.tokenizer) if edits else []
        # on a CPU it would take the cores from the steps; edited captions are encoded on the device
        ahead = base.device.type == "cuda" and not edits
        self.private: PrivateSteps | None = None
        if inner.privacy:
            assert private_seed is not None, "a seed that others know would undo the noise"
            self.private = PrivateSteps(base, adapter, inner, material.name_units(), private_seed)
        self.reader = ThreadPoolExecutor(1) if ahead and not inner.privacy else None
        self.ahead: dict[int, Future[Gathered]] = {}

    def take_slot(self, share: float) -> None:
        """One unit of the budget, `share` of the shard's units done with it: at most one optimizer step.
        Where memory does not suffice it is done again with half the images in a forward. Raises Diverged,
        and torch.OutOfMemoryError where that is not allowed or one image does not fit."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate_factor(share, self.inner)
        before, n_losses = self.shard.copy(), len(self.shard.losses)
        while not self.try_slot():
            self.shard.restore(before, n_losses)
            self.n_forward = max(1, self.n_forward // 2)
            release_memory()

    def try_slot(self) -> bool:
        """False where memory did not suffice; nothing of the weights has changed then."""
        self.optimizer.zero_grad()
        losses: list[float] = []
        try:
            n_kept = self.learn_private() if self.private else self.learn_augmented(losses)
            if not n_kept and not (self.inner.augmentation and self.inner.augmentation.rule == "kept"):
                n_kept = self.learn_plain(losses)
        except RuntimeError as error:
            if is_out_of_memory(error) and self.base.is_sharded:
                raise _explain_lack(self.n_forward, error) from error
            if not is_out_of_memory(error) or not self.may_halve or self.n_forward == 1:
                raise
            return False
        if losses:
            self.shard.losses.append(sum(losses) / len(losses))
        if n_kept:
            self.step(n_kept)
        return True

    def flush(self) -> None:
        """Reads the losses of slots that nobody has looked at yet: a card need not wait for them within a
        slot. Raises Diverged."""
        if self.private and not _are_finite(self.parameters):
            raise Diverged(
                f"weights are not finite after {self.shard.counts['steps']} steps (learning rate "
                f"{self.adapter.said_rates()})"
            )
        if not self.unread:
            return
        steps, losses = [n for n, _ in self.unread], torch.stack([loss for _, loss in self.unread]).tolist()
        self.unread = []
        for n, loss in zip(steps, losses):
            self.check_loss(loss, n)
            self.shard.losses.append(loss)

    def check_loss(self, loss: float, n_steps: int) -> None:
        # a private fine-tuning goes on, whatever its images' losses are: only weights have their noise
        if not math.isfinite(loss) and not self.private:
            raise Diverged(
                f"the loss became {loss} after {n_steps} steps (learning rate {self.adapter.said_rates()})"
            )

    def learn_plain(self, losses: list[float]) -> int:
        """Gradients of batches until as many images were kept as a batch has, or the draws are used up. How
        many were kept."""
        if not self.has_rules:
            return self.learn_all(self.draw())
        n_kept = 0
        for _ in range(self.n_draws):
            n_kept += self.learn(self.draw(), losses, self.inner.batch_size - n_kept)
            if n_kept == self.inner.batch_size:
                break
        return n_kept

    def learn_private(self) -> int:
        """The gradient of a step that differs by little and noise whether or not any one unit is there. As
        many images as a batch has on the average, by which it was divided."""
        private = self.private
        assert private is not None
        number = self.shard.counts["batches"]
        self.shard.counts["batches"] += 1
        units, seen = private.draw_units(number), []
        private.begin()
        if units:
            batch = self.place(self.gather_units(private, units, number))
            for rows in private.list_slices(len(units), self.n_forward):
                noised, text = batch.part(rows)
                seen.append(private.add(noised, text, self.weights(noised.timesteps), self.n_forward))
            self.unread.append((self.shard.counts["steps"], torch.cat(seen).nanmean()))
        private.finish(number)
        self.shard.counts["seen"] += len(units)
        self.shard.counts["trained"] += len(units)
        return self.inner.batch_size

    def gather_units(self, private: PrivateSteps, units: Sequence[Tensor], number: int) -> Gathered:
        """All draws of the units."""
        data, generator = self.material.data, private.make_generator("step", number)
        rows = private.draw_rows(units, generator)
        return self.prepare(
            rows, data.mean[rows], data.deviation[rows], generator, private.derive("captions", number)
        )

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
        number = self.shard.counts["batches"]
        self.shard.counts["batches"] += 1
        gathered = self.gather_ahead(number) if self.reader else self.gather(number)
        return self.place(gathered)

    def gather_ahead(self, number: int) -> Gathered:
        """The batch that another thread has gathered while this one computed; it goes on with the next."""
        reader = self.reader
        assert reader is not None
        found = self.ahead.pop(number, None) or reader.submit(self.gather, number)
        self.ahead = {number + 1: reader.submit(self.gather, number + 1)}
        return found.result()

    def gather(self, number: int) -> Gathered:
        """A batch on the CPU, from the files that are mapped."""
        shard, data = self.shard, self.material.data
        seed = derive_seed(self.seed, "exchanged", shard.exchanged_at) if shard.exchanged_at else self.seed
        rows = shard.rows[
            select_batch_rows(len(shard.rows), self.inner.batch_size, seed, number - shard.exchanged_at)
        ]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "step", number))
        return self.prepare(rows, data.mean[rows], data.deviation[rows], generator, number)

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
        mean, deviation = self.base.encode_pixels(pixels)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "augmented step", number))
        return self.place(self.prepare(rows, mean, deviation, generator, f"augmented {number}"))

    def prepare(
        self, rows: Tensor, mean: Tensor, deviation: Tensor, generator: torch.Generator, number: object
    ) -> Gathered:
        """Latents drawn from their posterior's mean and deviation [B, C, h, w], and their noise; some
        captions replaced by the empty one, some edited."""
        inner = self.inner
        # [B, C, h, w]
        clean = mean.float() + deviation.float() * torch.randn(mean.shape, generator=generator)
        dropped = torch.rand(len(rows), generator=generator) < inner.caption_dropout
        text = self.texts(rows, dropped, derive_seed(self.seed, "captions", number))
        drawn = self.base.draw_noise(clean.shape, generator, inner.noise_offset, inner.input_perturbation)
        found = Gathered(rows, clean, drawn, text)
        return found.pin() if self.reader else found

    def place(self, gathered: Gathered) -> Batch:
        """The batch on the device, noised."""
        clean = gathered.clean.to(self.base.device, non_blocking=True)
        noised = self.base.mix(clean, gathered.drawn.to(self.base.device))
        return Batch(gathered.rows, noised, self.base.cast(gathered.text))

    def texts(self, rows: Tensor, dropped: Tensor, seed: int) -> Text:
        """Encodings of the images' captions, of several one that is drawn, edited and with noise as the
        config says; of those that are `dropped` [B], the empty one's."""
        data, inner = self.material.data, self.inner
        generator = torch.Generator().manual_seed(derive_seed(seed, "which"))
        captions = torch.where(dropped, 0, data.draw_captions(rows, generator))
        text = data.texts(captions)
        if self.words:
            self.edit_texts(text, captions, dropped, seed)
        return add_text_noise(text, inner.embedding_noise, seed) if inner.embedding_noise and text else text

    def edit_texts(self, text: Text, captions: Tensor, dropped: Tensor, seed: int) -> None:
        """Replaces the encodings of captions, by their rows [B], that an edit changes."""
        before = [self.material.texts[row] for row in captions.tolist()]
        after = edit_captions(before, self.inner.captions, self.words, seed)
        changed = [i for i, (old, new) in enumerate(zip(before, after)) if old != new and not dropped[i]]
        if changed:
            for name, tensor in self.base.encode_captions([after[i] for i in changed]).items():
                text[name][changed] = tensor.to(text[name])

    def learn_all(self, batch: Batch) -> int:
        """Gradients of a batch of which no rule may leave an image out; nothing of it is read back. How many
        images it has."""
        seen = []
        for rows in self.list_slices(batch):
            loss, _, noised = self.denoise(batch, rows)
            total = (loss * self.weights(noised.timesteps)).sum() / self.inner.batch_size
            self.scaler.scale(total).backward()
            seen.append(loss.detach())
        self.unread.append((self.shard.counts["steps"], torch.cat(seen).mean()))
        self.shard.counts["seen"] += len(batch.rows)
        self.shard.counts["trained"] += len(batch.rows)
        return len(batch.rows)

    def learn(self, batch: Batch, losses: list[float], room: int, from_queue: bool = False) -> int:
        """Adds the gradients of the images that are kept, `room` at the most, each by 1 / batch_size. How
        many were kept."""
        verdicts: list[Verdict] = []
        room_left: Tensor | int = room
        slices = self.list_slices(batch)
        for rows in slices:
            loss, predicted, noised = self.denoise(batch, rows)
            verdict = self.judge_images(loss.detach(), predicted.detach(), batch, rows, from_queue)
            fits = verdict.keep.cumsum(0) <= room_left
            verdict = replace(verdict, trains=verdict.keep & fits)
            room_left = room_left - verdict.trains.sum()
            # one slice is the batch, and read now: where nothing is kept there is no backward to pay for
            verdicts.append(verdict.read() if len(slices) == 1 else verdict)
            if len(slices) > 1 or verdicts[0].trains.numpy().any():
                weight = verdict.trains.to(loss) * self.weights(noised.timesteps)
                self.scaler.scale((loss * weight).sum() / self.inner.batch_size).backward()
        judged = Verdict.join(verdicts).read()
        n_kept = int(judged.trains.numpy().sum())
        self.note(judged, batch, losses, remember=not from_queue)
        self.shard.counts["surplus"] += int(judged.keep.numpy().sum()) - n_kept
        self.shard.counts["trained"] += n_kept
        return n_kept

    def denoise(self, batch: Batch, rows: slice) -> tuple[Tensor, Tensor, Noised]:
        """Losses [b] and predictions [b, C, h, w] of a slice of a batch, and the slice."""
        noised, text = batch.part(rows)
        return *self.base.denoise(noised, text), noised

    def list_slices(self, batch: Batch) -> list[slice]:
        n = len(batch.rows)
        return [slice(start, start + self.n_forward) for start in range(0, n, self.n_forward)]

    @torch.no_grad()
    def screen(self, batch: Batch, losses: list[float]) -> None:
        """Scores a batch without gradients and queues what is not skipped."""
        verdicts = []
        for rows in self.list_slices(batch):
            loss, predicted, _ = self.denoise(batch, rows)
            verdicts.append(self.judge_images(loss, predicted, batch, rows, False))
        self.note(Verdict.join(verdicts).read(), batch, losses, remember=True)

    def note(self, judged: Verdict, batch: Batch, losses: list[float], remember: bool) -> None:
        """What was judged of a batch, in the shard's counts and queue; the mean loss for the record; all
        losses [B] for the memory, once the whole batch was judged by what it knew before."""
        (mean,) = judged.loss.mean()[None].tolist()
        losses.append(mean)
        self.check_loss(mean, self.shard.counts["steps"])
        self.shard.counts["seen"] += len(judged.loss)
        self.shard.counts["dropped"] += int(judged.dropped.numpy().sum())
        self.count_skips(batch.rows[judged.skipped])
        self.enqueue(batch.rows[judged.waits], judged.closeness[judged.waits])
        if self.shard.memory and remember:
            self.shard.memory.update(judged.loss.to(self.base.device), batch.noised.timesteps)

    def judge_images(
        self, loss: Tensor, predicted: Tensor, batch: Batch, rows: slice, from_queue: bool
    ) -> Verdict:
        """Which images of a slice [b] to train on now, which are dropped and skipped, and which wait to be
        augmented; on the device, nothing is counted yet."""
        noised, text = batch.part(rows)
        keep, rule = torch.ones_like(loss, dtype=torch.bool), self.inner.augmentation
        none = torch.zeros_like(keep)
        verdict = Verdict(loss, keep, keep, none, none, none, torch.zeros_like(loss, dtype=torch.float64))
        if self.inner.norm_threshold:
            keep = below_threshold(
                noise_norms(predicted, self.predict_without_caption(noised, text)), self.inner.norm_threshold
            )
            verdict = replace(verdict, keep=keep, dropped=~keep)
        if not self.shard.memory or (from_queue and not (rule and rule.retest)):
            return verdict
        skipped = keep & ~self.shard.memory.keeps(loss, noised.timesteps)
        keep = keep & ~skipped
        verdict = replace(verdict, keep=keep, skipped=skipped)
        if rule and not from_queue:
            u = self.shard.memory.closeness(loss, noised.timesteps)
            waits = keep & ((u < rule.bar) | (rule.rule == "kept"))
            verdict = replace(verdict, keep=keep & ~waits, waits=waits, closeness=u)
        return verdict

    def count_skips(self, rows: Tensor) -> None:
        for counts in (self.shard.skips, self.shard.skipped):
            counts.index_add_(0, rows, torch.ones_like(rows))
        self.shard.counts["skipped"] += len(rows)

    def enqueue(self, rows: Tensor, closeness: Tensor) -> None:
        self.shard.queue = torch.cat([self.shard.queue, rows])
        self.shard.queue_closeness = torch.cat([self.shard.queue_closeness, closeness])
        self.shard.counts["queued"] += len(rows)

    @torch.no_grad()
    def predict_without_caption(self, noised: Noised, text: Text) -> Tensor:
        """The prediction [B, C, h, w] for the empty caption."""
        empty = self.material.data.texts(torch.zeros(len(noised.noisy), dtype=torch.long))
        return self.base.denoise(noised, {name: tensor.to(text[name]) for name, tensor in empty.items()})[1]

    def weights(self, timesteps: Tensor) -> Tensor | float:
        """Of each image's loss [B], by min-SNR where the config asks for it."""
        schedule = self.base.schedule
        if self.inner.min_snr is None:
            return 1.0
        return min_snr_weights(
            self.alphas_cumprod,
            timesteps,
            self.inner.min_snr,
            schedule.config.prediction_type == "v_prediction",
        )

    def step(self, n_kept: int) -> None:
        """The optimizer's step on the mean gradient of the images kept, clipped."""
        self.base.ranks.add_gradients(self.parameters)
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
            on_device = value.ndim or self.inner.optimizer in FUSED
            self.optimizer.state[parameter][kind] = value.to(parameter.device) if on_device else value.clone()

    def load_shadows(self, state: dict[str, Tensor]) -> None:
        for shadow, name in zip(self.shadows, self.trained):
            shadow.copy_(state[name])


def _are_finite(parameters: Sequence[Tensor]) -> bool:
    return bool(torch.stack([parameter.isfinite().all() for parameter in parameters]).all())


def _explain_lack(n_forward: int, error: Exception) -> torch.OutOfMemoryError:
    """Under a sharded base, where nothing is tried with fewer images."""
    return torch.OutOfMemoryError(
        f"{n_forward} images in a forward are too many, and over a sharded base they are not halved by "
        f"themselves; set inner.micro_batch_size={max(1, n_forward // 2)} ({str(error).splitlines()[0]})"
    )


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
