"""Owns the base: a diffusers text-to-image pipeline behind losses() and sample(), and its cached latents and embeddings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memcontrol.data import Images
from memcontrol.errors import MemControlError
from memcontrol.files import replacing

TINY = Path(__file__).parent / "assets" / "tiny"
ENCODE_BATCH = 64


def base_path(name: str) -> str:
    return str(TINY) if name == "tiny" else name


def load_base(name: str) -> Base:
    """`tiny`, a local folder or a Hub id in diffusers' format. Raises MemControlError."""
    pipeline = open_pipeline(name)
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

    pipeline.set_progress_bar_config(disable=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.to(device)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    return Base(pipeline, schedule, device)


def open_pipeline(name: str):
    """The pipeline as plain diffusers reads it. Raises MemControlError."""
    quiet_libraries()
    from diffusers import StableDiffusionPipeline

    path = base_path(name)
    if not os.path.isdir(path) and (path.startswith((".", "/")) or path.count("/") != 1):
        raise MemControlError(f"base '{name}': no such folder; give 'tiny', a folder in diffusers' format, or a Hub id (owner/name)")
    try:
        return StableDiffusionPipeline.from_pretrained(path, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MemControlError(f"base '{name}' cannot be loaded as a Stable Diffusion pipeline: {reason}") from None


def quiet_libraries() -> None:
    """Keeps the chatter of transformers and diffusers off the user's screen; must come before diffusers is imported."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Encoded:
    """A data set as the denoiser sees it: the latent posterior of each image and the embedding of each distinct caption."""

    mean: Tensor  # [N, C, h, w], scaled
    deviation: Tensor  # [N, C, h, w], scaled
    embeddings: Tensor  # [U, L, D]; row 0 is the empty caption
    caption_rows: Tensor  # [N], into embeddings


@dataclass
class Base:
    """A frozen pipeline on one device; trials put their adapters into `denoiser` and take them out again."""

    pipeline: object
    schedule: object
    device: torch.device

    @property
    def denoiser(self) -> torch.nn.Module:
        return self.pipeline.unet

    @property
    def resolution(self) -> int:
        """Pixels of a side of the images that the base was made for."""
        return self.denoiser.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def side_multiple(self) -> int:
        """Image sides must be a multiple of this many pixels: the autoencoder's factor times the denoiser's."""
        return self.pipeline.vae_scale_factor * 2 ** (len(self.denoiser.config.block_out_channels) - 1)

    def losses(self, clean: Tensor, embeddings: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The denoising loss of each latent [B, C, h, w], unreduced [B], and the timesteps [B] drawn (DDPM, Ho et al. 2020, eq. 14)."""
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        timesteps = torch.randint(self.schedule.config.num_train_timesteps, (len(clean),), generator=generator).to(self.device)
        noisy = self.schedule.add_noise(clean, noise, timesteps)
        predicted = self.denoiser(noisy, timesteps, embeddings).sample
        target = noise
        if self.schedule.config.prediction_type == "v_prediction":
            target = self.schedule.get_velocity(clean, noise, timesteps)
        return (predicted.float() - target.float()).square().mean(dim=(1, 2, 3)), timesteps

    @torch.no_grad()
    def encode_images(self, images: Images) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latent posterior, scaled as the denoiser expects: each [N, C, h, w]."""
        vae, means, deviations = self.pipeline.vae, [], []
        for start in range(0, len(images), ENCODE_BATCH):
            pixels = torch.from_numpy(images.take(range(start, min(start + ENCODE_BATCH, len(images)))).pixels())
            posterior = vae.encode(pixels.to(self.device).float() / 127.5 - 1).latent_dist
            means.append(posterior.mean * vae.config.scaling_factor)
            deviations.append(posterior.std * vae.config.scaling_factor)
        return torch.cat(means), torch.cat(deviations)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Text embeddings [N, L, D]."""
        tokenizer = self.pipeline.tokenizer
        chunks = []
        for start in range(0, len(captions), ENCODE_BATCH):
            texts = list(captions[start : start + ENCODE_BATCH])
            tokens = tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
            chunks.append(self.pipeline.text_encoder(tokens.input_ids.to(self.device))[0])
        return torch.cat(chunks)

    @torch.no_grad()
    def sample(
        self, embeddings: Tensor, empty: Tensor, *, seeds: Sequence[int], steps: int, guidance: float, resolution: int, progress: Callable
    ) -> np.ndarray:
        """One image for each text embedding [N, L, D] by DPM-Solver++(2M), its noise drawn from its own seed. uint8 [N, 3, H, W]."""
        side = resolution // self.pipeline.vae_scale_factor
        shape = (self.denoiser.config.in_channels, side, side)
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        images = []
        for start in range(0, len(embeddings), ENCODE_BATCH):
            rows = slice(start, start + ENCODE_BATCH)
            text = embeddings[rows].to(self.device)
            images.append(
                self.pipeline(
                    prompt_embeds=text, negative_prompt_embeds=empty.to(self.device).expand_as(text), latents=noise[rows].to(self.device),
                    num_inference_steps=steps, guidance_scale=guidance, height=resolution, width=resolution, output_type="np",
                ).images
            )  # fmt: skip
            progress(min(start + ENCODE_BATCH, len(embeddings)), len(embeddings))
        return (np.concatenate(images).transpose(0, 3, 1, 2) * 255 + 0.5).astype(np.uint8)

    def encoded(self, images: Images, cache: Path, base_name: str) -> Encoded:
        """The images' latents and embeddings, computed once per content and base and kept under `cache`."""
        from filelock import FileLock
        from safetensors.torch import load_file, save_file

        path = cache / f"latents-{images.digest}-{base_digest(base_name)}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                mean, deviation = self.encode_images(images)
                texts = list(dict.fromkeys(["", *images.captions]))
                row_of = {text: row for row, text in enumerate(texts)}
                rows = torch.tensor([row_of[caption] for caption in images.captions])
                tensors = {"mean": mean, "deviation": deviation, "embeddings": self.encode_captions(texts), "caption_rows": rows}
                with replacing(path) as part:
                    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part)
        return Encoded(**load_file(path))


def base_digest(name: str) -> str:
    """Names the base's content: its files' names, sizes and, where small, bytes; for a Hub id its name."""
    root = Path(base_path(name))
    digest = hashlib.sha256(name.encode())
    for file in sorted(root.rglob("*")) if root.is_dir() else ():
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.relative_to(root)} {size}".encode())
            digest.update(file.read_bytes() if size < 2**26 else str(file.stat().st_mtime_ns).encode())
    return digest.hexdigest()[:16]


def empty_denoiser(name: str) -> torch.nn.Module:
    """The base's denoiser without its weights, on the meta device: names and shapes only. Raises MemControlError."""
    quiet_libraries()
    from diffusers import UNet2DConditionModel

    try:
        config = UNet2DConditionModel.load_config(base_path(name), subfolder="unet")
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MemControlError(f"base '{name}': its unet cannot be read: {reason}") from None
