"""Owns the base: a diffusers pipeline behind add_noise(), denoise(), encode(), decode() and sample(), each as
many images at a time as memory holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memcontrol.config.base import BaseConfig
from memcontrol.data.images import Images
from memcontrol.model.batches import (
    MOST_AT_A_TIME,
    Found,
    choose_batch,
    halve_until_it_fits,
    release_memory,
)
from memcontrol.model.counting import (
    PeakBytes,
    count_decoding_bytes,
    count_encoding_bytes,
    make_bare_copy,
    pass_shapes,
)
from memcontrol.model.families import Family, Text, Unconditional
from memcontrol.model.precision import Precision
from memcontrol.model.sharding import Ranks, join_alone, shard_denoiser
from memcontrol.model.source import Source, find_source

_TEXT_BATCH = 64


def load_base(
    base: BaseConfig | str,
    precision: Precision | None = None,
    offload: str = "encoders",
    waits_for_ranks: bool = False,
) -> Base:
    """A base, or one by its id alone, without its text encoders, which come when they are asked for. float32
    unless another precision is given. `waits_for_ranks`: the denoiser comes to no device before it is shared.
    Raises MemControlError."""
    from diffusers import DDIMPipeline, DDPMScheduler, DPMSolverMultistepScheduler

    source, precision = find_source(base), precision or Precision()
    pipeline = source.open(precision, with_encoders=False)
    family, settings = source.family, pipeline.scheduler.config
    schedule = pipeline.scheduler if family.flow else DDPMScheduler.from_config(settings)
    if isinstance(family, Unconditional):
        # eta = 0: an image depends on its first noise alone
        pipeline = DDIMPipeline(pipeline.unet, pipeline.scheduler)
    elif not family.flow:
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(settings)
    pipeline.set_progress_bar_config(disable=True)
    return Base(pipeline, family, schedule, find_device(), source, precision, offload, waits_for_ranks)


def find_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class NoiseDraw:
    """What latents are noised with: the `noise` that is the target's, the noise that is `shown`, and whole
    timesteps, or for a flow shares of the way before the schedule's shift."""

    noise: Tensor  # [B, C, h, w]
    shown: Tensor  # [B, C, h, w]; the same tensor without perturbation
    times: Tensor  # [B]

    def to(self, device: torch.device) -> NoiseDraw:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> NoiseDraw:
        """In memory from which a card copies while it computes."""
        return self.map(torch.Tensor.pin_memory)

    def map(self, change: Callable[[Tensor], Tensor]) -> NoiseDraw:
        noise = change(self.noise)
        shown = noise if self.shown is self.noise else change(self.shown)
        return NoiseDraw(noise, shown, change(self.times))


@dataclass(frozen=True)
class Noised:
    """A batch that the denoiser can be asked about."""

    noisy: Tensor  # [B, C, h, w]
    target: Tensor  # [B, C, h, w]
    times: Tensor  # [B], as the denoiser takes them
    timesteps: Tensor  # [B], whole, 0..999

    def part(self, rows: slice | Tensor) -> Noised:
        return Noised(self.noisy[rows], self.target[rows], self.times[rows], self.timesteps[rows])


class Base:
    """A frozen pipeline; trials put their adapters into `denoiser` and take them out again.

    Only what is used lies on the device: the denoiser from its first use on; the autoencoder, and the text
    encoders, which are not even loaded before, while they encode or decode, unless `offload` is none. Where
    it is all, or several `ranks` share the base, frozen weights of the denoiser come together block by block.
    """

    def __init__(
        self,
        pipeline: Any,
        family: Family,
        schedule: Any,
        device: torch.device,
        source: Source,
        precision: Precision,
        offload: str,
        waits_for_ranks: bool = False,
    ):
        self.pipeline, self.family, self.schedule, self.device = pipeline, family, schedule, device
        self.source, self.precision, self.offload = source, precision, offload
        # apart, since a pipeline takes its device from whichever model it has first
        self.autoencoder: Any = getattr(pipeline, "vae", None)
        if self.autoencoder is not None:
            pipeline.vae = None
        self.n_holders = self.n_coding = 0  # users of the text encoders, of the autoencoder
        self.is_placed = self.is_sharded = False
        self.ranks, self.waits_for_ranks = Ranks(), waits_for_ranks
        self.counted: dict[tuple, int] = {}
        for part in (self.autoencoder, getattr(pipeline, family.denoiser)):
            if part is not None:
                part.requires_grad_(False).eval()
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it anyway

    @property
    def config(self) -> Any:
        """Of the denoiser."""
        return getattr(self.pipeline, self.family.denoiser).config

    @property
    def denoiser(self) -> Any:
        """On the device."""
        self.place_denoiser()
        return getattr(self.pipeline, self.family.denoiser)

    def place_denoiser(self) -> None:
        if self.is_placed or self.waits_for_ranks or self.device.type != "cuda":
            return
        if self.offload == "all":
            return self.share(join_alone(self.device))
        self.is_placed, found = True, getattr(self.pipeline, self.family.denoiser)
        if next(found.parameters()).device.type != "cuda":  # bitsandbytes has placed its weights itself
            found.to(self.device)
        if self.family.denoiser == "unet":
            found.to(memory_format=torch.channels_last)  # the order that tensor cores convolve in

    def share(self, ranks: Ranks) -> None:
        """The denoiser's frozen weights are held by all ranks together from now on, or in the CPU's memory,
        and nothing may be changed in them. Each rank computes its part of what goes through."""
        _ = self.bare_denoiser  # from a class of diffusers, which sharding replaces
        shard_denoiser(getattr(self.pipeline, self.family.denoiser), self.device, self.offload == "all")
        self.ranks, self.waits_for_ranks = ranks, False
        self.is_placed = self.is_sharded = True

    @contextlib.contextmanager
    def checkpoint_gradients(self, on: bool) -> Iterator[None]:
        """Activations are computed again in backward, as long as it lasts and where it is on."""
        denoisers = (self.denoiser, self.bare_denoiser) if on else ()
        for denoiser in denoisers:
            denoiser.enable_gradient_checkpointing()
        try:
            yield
        finally:
            for denoiser in denoisers:
                denoiser.disable_gradient_checkpointing()

    def autocast(self) -> contextlib.AbstractContextManager:
        """What every pass through the denoiser runs under, in training, sampling and probing alike."""
        kind = self.precision.compute
        return torch.autocast(self.device.type, kind, enabled=kind != torch.float32)

    @contextlib.contextmanager
    def hold_what_encodes(self, captions: bool, pixels: bool) -> Iterator[None]:
        """What a fine-tuning encodes with in every step stays on the device as long as it lasts."""
        with contextlib.ExitStack() as stack:
            if captions:
                stack.enter_context(self.hold_encoders())
            if pixels:
                stack.enter_context(self.hold_autoencoder())
            yield

    @contextlib.contextmanager
    def hold_encoders(self) -> Iterator[None]:
        """The text encoders lie on the device as long as it lasts, then go, unless `offload` is none."""
        names = [] if isinstance(self.family, Unconditional) else self.source.list_encoders()
        if not self.n_holders:
            self.load_encoders(names)
        self.n_holders += 1
        try:
            yield
        finally:
            self.n_holders -= 1
            if not self.n_holders and self.offload != "none":
                n_bytes = sum(count_bytes(getattr(self.pipeline, name)) for name in names)
                for name in names:
                    setattr(self.pipeline, name, None)
                release_memory(n_bytes)

    def load_encoders(self, names: Sequence[str]) -> None:
        for name in names:
            if getattr(self.pipeline, name) is None:
                encoder = self.source.load_encoder(name, self.precision.weights)
                setattr(self.pipeline, name, encoder.to(self.device).requires_grad_(False).eval())

    @contextlib.contextmanager
    def hold_autoencoder(self) -> Iterator[Any]:
        """The autoencoder, where there is one, lies on the device as long as it lasts."""
        if self.autoencoder is not None:
            self.autoencoder.to(self.device)
        self.n_coding += 1
        try:
            yield self.autoencoder
        finally:
            self.n_coding -= 1
            if self.autoencoder is not None and not self.n_coding and self.offload != "none":
                self.autoencoder.to("cpu")

    @property
    def pixels_per_latent(self) -> int:
        return getattr(self.pipeline, "vae_scale_factor", 1)

    @property
    def resolution(self) -> int:
        """Pixels of a side of the images that the base was made for."""
        side = self.config.get("sample_size") or self.pipeline.default_sample_size
        return side * self.pixels_per_latent

    @property
    def side_multiple(self) -> int:
        """Image sides must be a multiple of this many pixels: the autoencoder's factor times the
        denoiser's."""
        config = self.config
        inner = (
            2 ** (len(config.block_out_channels) - 1)
            if "block_out_channels" in config
            else max(2, config.get("patch_size", 1))
        )
        return self.pixels_per_latent * inner

    def add_noise(
        self,
        clean: Tensor,
        generator: torch.Generator,
        offset: float = 0.0,
        perturbation: float = 0.0,
        quantile: float | None = None,
    ) -> Noised:
        """Latents [B, C, h, w] with noise and times from the generator, and the target of each.

        Diffusion: uniform timesteps (DDPM, Ho et al. 2020). Flow: logit-normal times under the schedule's
        shift (Esser et al. 2024, arXiv 2403.03206, section 3.1). `offset` adds noise that is equal all over a
        channel, this many times as strong; `perturbation` noises with noise + perturbation * noise' where the
        target keeps noise (Ning et al. 2023, arXiv 2301.11706, eq. 7). `quantile`, in 0..1, gives all latents
        this quantile of the times instead of a draw.
        """
        drawn = self.draw_noise(clean.shape, generator, offset, perturbation, quantile)
        return self.mix(clean, drawn.to(self.device))

    def draw_noise(
        self,
        shape: Sequence[int],
        generator: torch.Generator,
        offset: float = 0.0,
        perturbation: float = 0.0,
        quantile: float | None = None,
    ) -> NoiseDraw:
        """What `add_noise` draws for latents of a shape [B, C, h, w], on the CPU."""
        n, noise = shape[0], torch.randn(tuple(shape), generator=generator)
        n_times = self.schedule.config.num_train_timesteps
        if self.family.flow:
            normal = (
                torch.randn(n, generator=generator)
                if quantile is None
                else torch.special.ndtri(torch.full((n,), quantile))
            )
            times = torch.sigmoid(normal)
        elif quantile is None:
            times = torch.randint(n_times, (n,), generator=generator)
        else:
            times = torch.full((n,), int(quantile * n_times))
        if offset:
            noise = noise + offset * torch.randn(*shape[:2], 1, 1, generator=generator)
        shown = (
            noise + perturbation * torch.randn(tuple(shape), generator=generator) if perturbation else noise
        )
        return NoiseDraw(noise, shown, times)

    def mix(self, clean: Tensor, drawn: NoiseDraw) -> Noised:
        """Latents [B, C, h, w] with the noise that was drawn for them, all on the device."""
        noise, shown = drawn.noise, drawn.shown
        if not self.family.flow:
            timesteps, velocity = drawn.times, self.schedule.config.prediction_type == "v_prediction"
            target = self.schedule.get_velocity(clean, noise, timesteps) if velocity else noise
            return Noised(self.schedule.add_noise(clean, shown, timesteps), target, timesteps, timesteps)
        shift = self.schedule.config.get("shift") or self.schedule.config.get("flow_shift") or 1.0
        share = shift * drawn.times / (1 + (shift - 1) * drawn.times)
        level = share.view(-1, 1, 1, 1)
        return Noised(
            (1 - level) * clean + level * shown,
            noise - clean,
            1000 * share,
            (1000 * share).long().clamp(max=999),
        )

    def denoise(self, noised: Noised, text: Text) -> tuple[Tensor, Tensor]:
        """The denoising loss of each latent, unreduced [B], and the prediction [B, C, h, w]. Where ranks
        share the base, both are complete on each, and gradients those of its own rows."""
        if self.ranks.size == 1:
            return self.denoise_alone(noised, text)
        n, rows = len(noised.noisy), torch.tensor(self.ranks.select_rows(len(noised.noisy)))
        own = noised.part(rows.to(self.device))
        loss, predicted = self.denoise_alone(own, {name: each[rows] for name, each in text.items()})
        # losses are gathered too: computed anew they might differ in a bit, and ranks then in what they skip
        return self.ranks.gather(loss, n), self.ranks.gather(predicted, n)

    def denoise_alone(self, noised: Noised, text: Text, denoiser: Any = None) -> tuple[Tensor, Tensor]:
        """The same, by this process, and by another callable in the denoiser's place where one is given."""
        with self.autocast():
            asked = self.denoiser if denoiser is None else denoiser
            predicted = self.family.predict(asked, noised.noisy, noised.times, self.cast(text))
        return (predicted.float() - noised.target.float()).square().mean(dim=(1, 2, 3)), predicted

    def cast(self, text: Text) -> Text:
        """Encodings on the device, in the type of the denoiser's frozen weights; masks keep theirs."""
        kind = self.precision.weights
        return {
            name: tensor.to(self.device, kind if tensor.is_floating_point() else None, non_blocking=True)
            for name, tensor in text.items()
        }

    def encode_images(self, images: Images) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latent posterior, scaled as the denoiser expects: each [N, C, h, w], on
        the CPU, in half precision where the base is."""
        numbers = range(len(images))
        return self.encode(len(images), images.resolution, lambda rows: images.take(numbers[rows]).pixels())

    def encode_pixels(self, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        """The same of uint8 [N, 3, H, W]."""
        return self.encode(len(pixels), pixels.shape[-1], lambda rows: pixels[rows])

    @torch.no_grad()
    def encode(self, n: int, side: int, read: Callable[[slice], np.ndarray]) -> tuple[Tensor, Tensor]:
        """Of n images of a side in pixels, which are read as they are needed."""
        kind = torch.float32 if self.precision.weights == torch.float32 else torch.float16

        def encode_part(rows: slice) -> list[Tensor]:
            return [each.to("cpu", kind) for each in self.encode_posterior(torch.from_numpy(read(rows)))]

        with self.hold_autoencoder():
            size = self.choose_batch("encode", side)
            parts = [part for _, part in halve_until_it_fits(n, size, encode_part, self.enable_tiling)]
        means, deviations = zip(*parts)
        return torch.cat(means), torch.cat(deviations)

    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Of uint8 pixels [B, 3, H, W]; without an autoencoder the pixels themselves, in -1..1."""
        scaled, vae = pixels.to(self.device).float() / 127.5 - 1, self.autoencoder
        if vae is None:
            return scaled, torch.zeros_like(scaled)
        encoded, scale = vae.encode(scaled.to(vae.dtype)), vae.config.scaling_factor
        if not hasattr(encoded, "latent_dist"):
            return encoded.latent * scale, torch.zeros_like(encoded.latent)
        shift = vae.config.get("shift_factor") or 0.0
        return (encoded.latent_dist.mean - shift) * scale, encoded.latent_dist.std * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Images of latents [N, C, h, w], scaled as the denoiser gives them: uint8 [N, 3, H, W]."""
        vae = self.autoencoder
        shift = vae.config.get("shift_factor") or 0.0
        size = self.choose_batch("decode", latents.shape[-1] * self.pixels_per_latent)

        def decode_part(rows: slice) -> np.ndarray:
            unscaled = latents[rows] / vae.config.scaling_factor + shift
            pixels = vae.decode(unscaled.to(vae.dtype), return_dict=False)[0].float()
            return _convert_to_bytes((pixels / 2 + 0.5).clamp(0, 1).cpu().numpy())

        with self.hold_autoencoder():
            parts = halve_until_it_fits(len(latents), size, decode_part, self.enable_tiling)
            return np.concatenate([part for _, part in parts])

    def enable_tiling(self) -> bool:
        """Of the autoencoder, where one image alone does not fit. Whether that was still off."""
        vae = self.autoencoder
        if vae is None or getattr(vae, "use_tiling", True):
            return False
        vae.enable_tiling()
        return True

    def choose_batch(self, stage: str, side: int) -> int:
        """How many images of a side in pixels the autoencoder takes at a time."""
        if self.autoencoder is None:
            return MOST_AT_A_TIME
        count = count_encoding_bytes if stage == "encode" else count_decoding_bytes
        if (stage, side) not in self.counted:
            self.counted[stage, side] = count(self.autoencoder, side, self.pixels_per_latent)
        return choose_batch(self.counted[stage, side], self.device)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Text:
        """Encodings by name, each [N, ...], on the CPU, in the type of the base."""
        if isinstance(self.family, Unconditional):
            return {}
        with self.hold_encoders():
            chunks = [
                {name: tensor.cpu() for name, tensor in text.items()}
                for _, text in halve_until_it_fits(
                    len(captions),
                    _TEXT_BATCH,
                    lambda rows: self.family.encode(self.pipeline, captions[rows], self.device),
                )
            ]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def sample(self, text: Text, empty: Text, **settings: Any) -> np.ndarray:
        """All images of `iterate_samples`, which takes the settings: uint8 [N, 3, H, W]."""
        return np.concatenate(list(self.iterate_samples(text, empty, **settings)))

    @torch.no_grad()
    def iterate_samples(
        self,
        text: Text,
        empty: Text,
        *,
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        resolution: int,
        progress: Callable,
        guidance_from: float = 0.0,
    ) -> Iterator[np.ndarray]:
        """One image for each seed, from encodings [N, ...] and those of the empty caption [1, ...], as many
        at a time as memory holds: each uint8 [n, 3, H, W].

        The noise of an image follows from its own seed. Diffusion: DPM-Solver++(2M), without captions DDIM;
        flow: the pipeline's own solver. Guidance acts after the share `guidance_from` of the steps (Jain et
        al. 2024, arXiv 2411.16738).
        """

        def sample_part(rows: slice) -> np.ndarray:
            n = rows.stop - rows.start
            own = [rows.start + row for row in self.ranks.select_rows(n)]
            images = torch.from_numpy(sample_alone(own))
            return self.ranks.gather(images, n).numpy()

        def sample_alone(rows: list[int]) -> np.ndarray:
            generators = [torch.Generator().manual_seed(seeds[row]) for row in rows]
            if not text:
                return self.sample_unconditional(generators, steps)
            own = self.cast({name: tensor[rows] for name, tensor in text.items()})
            none = self.cast(
                {name: tensor.expand(len(generators), *tensor.shape[1:]) for name, tensor in empty.items()}
            )
            call = self.make_conditional_call(generators, own, none, guidance, resolution)
            if guidance_from and guidance > 1:
                call |= delay_guidance(guidance, round(guidance_from * steps))
            return self.call_pipeline(call, steps, resolution)

        size = self.choose_sampling_batch(text, guidance, resolution)
        for rows, images in self.work_in_parts(len(seeds), size, sample_part):
            progress(rows.stop, len(seeds))
            yield images

    def work_in_parts(
        self, n: int, size: int, work: Callable[[slice], Found]
    ) -> Iterator[tuple[slice, Found]]:
        """`halve_until_it_fits`, for passes through the denoiser; of a sharded one all parts are of one size,
        on which ranks agree."""
        if not self.is_sharded:
            yield from halve_until_it_fits(n, size, work)
            return
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            yield rows, work(rows)

    def call_pipeline(self, call: dict, steps: int, resolution: int) -> np.ndarray:
        """uint8 [N, 3, H, W]."""
        self.place_denoiser()
        with self.autocast():
            found = self.pipeline(**call, num_inference_steps=steps, output_type="latent").images
        side = resolution // self.pixels_per_latent
        return self.decode(self.family.unpack_latents(found, side, side))

    def sample_unconditional(self, generators: Sequence[torch.Generator], steps: int) -> np.ndarray:
        """DDIM (arXiv 2010.02502) with eta = 0, as diffusers' DDIMPipeline, which would hold the images in
        the type of the weights. uint8 [N, 3, H, W]."""
        solver, side = self.pipeline.scheduler, self.config.sample_size
        noise = [torch.randn(self.n_channels, side, side, generator=each) for each in generators]
        images = torch.stack(noise).to(self.device)
        solver.set_timesteps(steps)
        for time in solver.timesteps:
            with self.autocast():
                predicted = self.family.predict(self.denoiser, images, time.to(self.device), {})
            images = solver.step(predicted.float(), time, images, eta=0.0).prev_sample
        return _convert_to_bytes((images / 2 + 0.5).clamp(0, 1).cpu().numpy())

    def choose_sampling_batch(self, text: Text, guidance: float, resolution: int) -> int:
        """How many images the denoiser takes at a time without gradients, on all ranks together, each twice
        where there is guidance."""
        side = resolution // self.pixels_per_latent
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in text.items()}
        n_bytes = self.count_forward_bytes((self.n_channels, side, side), shapes)
        each = self.ranks.agree(choose_batch(n_bytes * (1 if guidance == 1 else 2), self.device))
        return each * self.ranks.size

    def count_forward_bytes(self, latents: tuple[int, ...], text: Mapping[str, tuple[int, ...]]) -> int:
        """What one image's pass through the denoiser holds without gradients."""
        key, bare = ("forward", latents, tuple(sorted(text.items()))), self.bare_denoiser
        if key not in self.counted:
            compute, on_card = self.precision.compute, self.device.type == "cuda"
            with torch.no_grad(), PeakBytes() as held:
                pass_shapes(bare, self.family, latents, text, 1, compute, on_card)
            self.counted[key] = held.peak
        return self.counted[key]

    @cached_property
    def bare_denoiser(self) -> Any:
        """The denoiser without its weights, on the meta device."""
        return make_bare_copy(getattr(self.pipeline, self.family.denoiser), self.precision.weights)

    @cached_property
    def n_parameters(self) -> int:
        """Of the denoiser, unquantised."""
        return sum(parameter.numel() for parameter in self.bare_denoiser.parameters())

    @property
    def n_channels(self) -> int:
        """Of a latent."""
        return self.config.in_channels // self.family.packing

    def make_conditional_call(
        self, generators: Sequence[torch.Generator], text: Text, empty: Text, guidance: float, resolution: int
    ) -> dict:
        side = resolution // self.pixels_per_latent
        noise = torch.stack(
            [torch.randn(self.n_channels, side, side, generator=generator) for generator in generators]
        )
        call = self.family.make_call(self.pipeline, text, empty, guidance)
        return {
            **call,
            "latents": self.family.pack_latents(noise).to(self.device),
            "height": resolution,
            "width": resolution,
        }


def count_bytes(model: torch.nn.Module | None) -> int:
    """Of its parameters."""
    return sum(parameter.nbytes for parameter in model.parameters()) if model is not None else 0


def _convert_to_bytes(pixels: np.ndarray) -> np.ndarray:
    """0..1 to uint8."""
    return (pixels * 255 + 0.5).astype(np.uint8)


def delay_guidance(guidance: float, n_without: int) -> dict:
    """Arguments of a pipeline's call that leave the first steps without guidance."""

    def after(pipeline, step: int, timestep, tensors: dict) -> dict:
        if step + 1 >= n_without:
            pipeline._guidance_scale = guidance
        return tensors

    # Just above 1: at 1 the pipeline would not evaluate the empty caption at all, and could not begin to
    # later.
    return {"guidance_scale": guidance if n_without == 0 else 1 + 1e-6, "callback_on_step_end": after}


def redraw_weights(denoiser: Any, seed: int) -> None:
    """Replaces the denoiser's weights by random ones, as its class draws them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser.load_state_dict(type(denoiser).from_config(denoiser.config).state_dict())
