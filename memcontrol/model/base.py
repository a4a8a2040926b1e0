"""Owns the base: a diffusers pipeline behind noised(), denoised() and sample(), and its cached latents and
caption encodings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memcontrol.core.errors import MemControlError
from memcontrol.core.files import PACKAGE
from memcontrol.data.cache import load_or_make
from memcontrol.data.images import Images
from memcontrol.model.families import Family, Text, Unconditional, find_family

TINY = PACKAGE / "assets" / "tiny"
ENCODE_BATCH = 64


def find_base_path(name: str) -> str:
    return str(TINY) if name == "tiny" else name


def check_base_path(name: str) -> str:
    """Raises MemControlError for what is neither a folder nor looks like a Hub id: libraries would look for
    it on the Hub for half a minute."""
    path = find_base_path(name)
    if not os.path.isdir(path) and (path.startswith((".", "/")) or path.count("/") != 1):
        raise MemControlError(
            f"base '{name}': no such folder; give 'tiny', a folder in diffusers' format, or a Hub "
            "id (owner/name)"
        )
    return path


def load_base(name: str) -> Base:
    """`tiny`, a local folder or a Hub id in diffusers' format. Raises MemControlError."""
    pipeline = open_pipeline(name)
    from diffusers import DDIMPipeline, DDPMScheduler, DPMSolverMultistepScheduler

    family = find_family(type(pipeline).__name__, name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = pipeline.scheduler.config
    schedule = pipeline.scheduler if family.flow else DDPMScheduler.from_config(settings)
    if isinstance(family, Unconditional):
        # eta = 0: an image depends on its first noise alone
        pipeline = DDIMPipeline(pipeline.unet, pipeline.scheduler)
    elif not family.flow:
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(settings)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return Base(pipeline, family, schedule, device)


def open_pipeline(name: str):
    """The pipeline as plain diffusers reads it. Raises MemControlError."""
    quiet_libraries()
    from diffusers import DiffusionPipeline

    path = check_base_path(name)
    try:
        kind = DiffusionPipeline.load_config(path).get("_class_name", "")
        find_family(kind, name)
        unneeded = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return DiffusionPipeline.from_pretrained(
            path, **(unneeded if kind == "StableDiffusionPipeline" else {})
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MemControlError(f"base '{name}' cannot be loaded as a diffusers pipeline: {reason}") from None


def name_denoiser(pipeline) -> str:
    """The pipeline's component that is fine-tuned."""
    return "unet" if getattr(pipeline, "unet", None) is not None else "transformer"


def quiet_libraries() -> None:
    """Keeps the chatter of transformers and diffusers off the user's screen; must come before diffusers is
    imported."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Encoded:
    """A data set as the denoiser sees it: the latent posterior of each image and the encodings of each
    distinct caption."""

    mean: Tensor  # [N, C, h, w], scaled
    deviation: Tensor  # [N, C, h, w], scaled
    text: Text  # each [U, ...]; row 0 is the empty caption
    caption_rows: Tensor  # [N], into text

    def texts(self, rows: Tensor) -> Text:
        """Encodings of the captions in `rows` [B] of `text`."""
        return {name: tensor[rows] for name, tensor in self.text.items()}


@dataclass(frozen=True)
class Noised:
    """A batch that the denoiser can be asked about."""

    noisy: Tensor  # [B, C, h, w]
    target: Tensor  # [B, C, h, w]
    times: Tensor  # [B], as the denoiser takes them
    timesteps: Tensor  # [B], whole, 0..999

    def part(self, rows: slice) -> Noised:
        return Noised(self.noisy[rows], self.target[rows], self.times[rows], self.timesteps[rows])


@dataclass
class Base:
    """A frozen pipeline on one device; trials put their adapters into `denoiser` and take them out again."""

    pipeline: Any
    family: Family
    schedule: Any
    device: torch.device

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipeline, self.family.denoiser)

    @property
    def pixels_per_latent(self) -> int:
        return getattr(self.pipeline, "vae_scale_factor", 1)

    @property
    def resolution(self) -> int:
        """Pixels of a side of the images that the base was made for."""
        side = self.denoiser.config.get("sample_size") or self.pipeline.default_sample_size
        return side * self.pixels_per_latent

    @property
    def side_multiple(self) -> int:
        """Image sides must be a multiple of this many pixels: the autoencoder's factor times the
        denoiser's."""
        config = self.denoiser.config
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
        noise = torch.randn(clean.shape, generator=generator)
        n_times = self.schedule.config.num_train_timesteps
        if self.family.flow:
            normal = (
                torch.randn(len(clean), generator=generator)
                if quantile is None
                else torch.special.ndtri(torch.full((len(clean),), quantile))
            )
            share = torch.sigmoid(normal).to(self.device)
        elif quantile is None:
            timesteps = torch.randint(n_times, (len(clean),), generator=generator).to(self.device)
        else:
            timesteps = torch.full((len(clean),), int(quantile * n_times), device=self.device)
        if offset:
            noise = noise + offset * torch.randn(*clean.shape[:2], 1, 1, generator=generator)
        shown = (
            noise + perturbation * torch.randn(clean.shape, generator=generator) if perturbation else noise
        )
        noise, shown = noise.to(self.device), shown.to(self.device)
        if not self.family.flow:
            velocity = self.schedule.config.prediction_type == "v_prediction"
            target = self.schedule.get_velocity(clean, noise, timesteps) if velocity else noise
            return Noised(self.schedule.add_noise(clean, shown, timesteps), target, timesteps, timesteps)
        shift = self.schedule.config.get("shift") or self.schedule.config.get("flow_shift") or 1.0
        share = shift * share / (1 + (shift - 1) * share)
        level = share.view(-1, 1, 1, 1)
        return Noised(
            (1 - level) * clean + level * shown,
            noise - clean,
            1000 * share,
            (1000 * share).long().clamp(max=999),
        )

    def denoise(self, noised: Noised, text: Text) -> tuple[Tensor, Tensor]:
        """The denoising loss of each latent, unreduced [B], and the prediction [B, C, h, w]."""
        predicted = self.family.predict(self.denoiser, noised.noisy, noised.times, text)
        return (predicted.float() - noised.target.float()).square().mean(dim=(1, 2, 3)), predicted

    @torch.no_grad()
    def encode_images(self, images: Images) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latent posterior, scaled as the denoiser expects: each [N, C, h, w]."""
        means, deviations = zip(
            *(
                self.encode_posterior(
                    torch.from_numpy(
                        images.take(range(start, min(start + ENCODE_BATCH, len(images)))).pixels()
                    )
                )
                for start in range(0, len(images), ENCODE_BATCH)
            )
        )
        return torch.cat(means), torch.cat(deviations)

    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Of uint8 pixels [B, 3, H, W]; without an autoencoder the pixels themselves, in -1..1."""
        scaled, vae = pixels.to(self.device).float() / 127.5 - 1, getattr(self.pipeline, "vae", None)
        if vae is None:
            return scaled, torch.zeros_like(scaled)
        encoded, scale = vae.encode(scaled), vae.config.scaling_factor
        if not hasattr(encoded, "latent_dist"):
            return encoded.latent * scale, torch.zeros_like(encoded.latent)
        shift = vae.config.get("shift_factor") or 0.0
        return (encoded.latent_dist.mean - shift) * scale, encoded.latent_dist.std * scale

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Text:
        """Encodings by name, each [N, ...]."""
        chunks = [
            self.family.encode(self.pipeline, captions[start : start + ENCODE_BATCH])
            for start in range(0, len(captions), ENCODE_BATCH)
        ]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

    @torch.no_grad()
    def sample(
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
    ) -> np.ndarray:
        """One image for each seed, from encodings [N, ...] and those of the empty caption [1, ...]. uint8 [N,
        3, H, W].

        The noise of an image follows from its own seed. Diffusion: DPM-Solver++(2M), without captions DDIM;
        flow: the pipeline's own solver. Guidance acts after the share `guidance_from` of the steps (Jain et
        al. 2024, arXiv 2411.16738).
        """
        images = []
        for start in range(0, len(seeds), ENCODE_BATCH):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + ENCODE_BATCH]]
            own = {
                name: tensor[start : start + ENCODE_BATCH].to(self.device) for name, tensor in text.items()
            }
            none = {
                name: tensor.expand(len(generators), *tensor.shape[1:]).to(self.device)
                for name, tensor in empty.items()
            }
            call = (
                self.make_unconditional_call(generators)
                if not text
                else self.make_conditional_call(generators, own, none, guidance, resolution)
            )
            if guidance_from and guidance > 1:
                call |= _delay_guidance(guidance, round(guidance_from * steps))
            images.append(self.pipeline(**call, num_inference_steps=steps, output_type="np").images)
            progress(start + len(generators), len(seeds))
        return (np.concatenate(images).transpose(0, 3, 1, 2) * 255 + 0.5).astype(np.uint8)

    def make_conditional_call(
        self, generators: Sequence[torch.Generator], text: Text, empty: Text, guidance: float, resolution: int
    ) -> dict:
        side = resolution // self.pixels_per_latent
        channels = self.denoiser.config.in_channels // self.family.packing
        noise = torch.stack(
            [torch.randn(channels, side, side, generator=generator) for generator in generators]
        )
        call = self.family.make_call(self.pipeline, text, empty, guidance)
        return {
            **call,
            "latents": self.family.pack_latents(noise).to(self.device),
            "height": resolution,
            "width": resolution,
        }

    def make_unconditional_call(self, generators: Sequence[torch.Generator]) -> dict:
        return {"batch_size": len(generators), "generator": list(generators)}

    def load_encoded(self, images: Images, cache: Path, base_name: str) -> Encoded:
        """The images' latents and encodings, computed once per content and base and kept under `cache`."""
        path = cache / f"latents-{images.digest}-{digest_base(base_name)}.safetensors"
        stored = load_or_make(path, lambda: self.encode(images))
        text = {
            name.removeprefix("text."): stored.pop(name) for name in list(stored) if name.startswith("text.")
        }
        return Encoded(text=text, **stored)

    def encode(self, images: Images) -> dict[str, Tensor]:
        """The fields of Encoded, each encoding of captions under text.NAME."""
        mean, deviation = self.encode_images(images)
        captions = list(dict.fromkeys(["", *images.captions]))
        row_of = {caption: row for row, caption in enumerate(captions)}
        rows = torch.tensor([row_of[caption] for caption in images.captions])
        text = {f"text.{name}": tensor for name, tensor in self.encode_captions(captions).items()}
        return {"mean": mean, "deviation": deviation, "caption_rows": rows, **text}


def _delay_guidance(guidance: float, n_without: int) -> dict:
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


def digest_base(name: str) -> str:
    """Names the base's content: its files' names, sizes and, where small, bytes; for a Hub id its name."""
    root = Path(find_base_path(name))
    digest = hashlib.sha256(name.encode())
    for file in sorted(root.rglob("*")) if root.is_dir() else ():
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.relative_to(root)} {size}".encode())
            digest.update(file.read_bytes() if size < 2**26 else str(file.stat().st_mtime_ns).encode())
    return digest.hexdigest()[:16]


def make_empty_denoiser(name: str) -> torch.nn.Module:
    """The base's denoiser without its weights, on the meta device: names and shapes only. Raises
    MemControlError.

    A folder with nothing but config.json files will do: those of a pipeline (unet/ or transformer/), or the
    denoiser's own.
    """
    quiet_libraries()
    import diffusers

    config = read_denoiser_config(name)
    kind = config.get("_class_name", "")
    if not hasattr(diffusers, kind):
        raise MemControlError(
            f"base '{name}': its denoiser is a '{kind}', which this diffusers "
            f"({diffusers.__version__}) does not know"
        )
    with torch.device("meta"):
        return getattr(diffusers, kind).from_config(config)


def read_denoiser_config(name: str) -> dict:
    from diffusers import UNet2DConditionModel

    path, reason = check_base_path(name), ""
    places: tuple[str | None, ...] = ("unet", "transformer", None)
    if os.path.isdir(path):
        places = tuple(place for place in places if (Path(path) / (place or "") / "config.json").is_file())
    for place in places:
        try:
            return UNet2DConditionModel.load_config(path, subfolder=place)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
    raise MemControlError(
        (
            f"base '{name}': no unet/config.json, transformer/config.json or config.json can be read. "
            f"{reason}"
        ).strip()
    )
