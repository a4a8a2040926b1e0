"""Random-weight models and data of a stated size, so that a benchmark measures the code and not a
download."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from memcontrol.config.base import BaseConfig
from memcontrol.model.base import Base
from memcontrol.model.encoded import Encoded
from memcontrol.model.families import Family
from memcontrol.model.precision import Precision
from memcontrol.model.source import TINY, Source
from memcontrol.training.shard import Material


def unet(widths: tuple[int, int, int, int], side: int) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's structure at other widths."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=widths,
        cross_attention_dim=768,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=8,
        norm_num_groups=32 if widths[0] % 32 == 0 else 8,
    )


def stable_diffusion(device: str = "cpu") -> str:
    """The folder of a pipeline of Stable Diffusion 1.5's size with random weights, drawn on a device, made
    once for each boot of the machine."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = Path(tempfile.gettempdir()) / "memcontrol-random-sd15"
    if (folder / "model_index.json").is_file():
        return str(folder)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer", model_max_length=77)
    schedule = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    with torch.device(device):
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        )
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (128, 256, 512, 512),
        }
        vae = AutoencoderKL(latent_channels=4, layers_per_block=2, sample_size=512, **blocks)
        denoiser = unet((320, 640, 1280, 1280), 64)
    StableDiffusionPipeline(
        vae, text, tokenizer, denoiser, schedule, None, None, requires_safety_checker=False
    ).save_pretrained(folder)
    return str(folder)


def make_base(denoiser: UNet2DConditionModel, device: str) -> Base:
    denoiser.to(device).requires_grad_(False).eval()
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    source = Source(BaseConfig(id="random"), "random")
    return Base(
        SimpleNamespace(unet=denoiser), Family(), schedule, torch.device(device), source, Precision(), "none"
    )


def random_material(n: int, side: int) -> Material:
    """n latents [4, side, side] and ten captions."""
    generator = torch.Generator().manual_seed(0)
    mean, text = (
        torch.randn(n, 4, side, side, generator=generator),
        torch.randn(11, 77, 768, generator=generator),
    )
    data = Encoded(mean, torch.zeros_like(mean), {"prompt_embeds": text}, torch.arange(n) % 10 + 1)
    return Material(
        data, [""] * n, lambda rows: np.zeros((len(rows), 3, 8 * side, 8 * side), np.uint8), lambda: data
    )
