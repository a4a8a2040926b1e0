"""Pipelines of the sizes that people have, with random weights, in diffusers' own format on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SD15_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
SDXL_UNET = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
AUTOENCODER = {  # of Stable Diffusion
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}


def make_autoencoder(**settings: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**{**AUTOENCODER, **settings})


def make_clip(width: int, layers: int, heads: int, projected: bool = False) -> tuple[Any, Any]:
    """A tokenizer of the embedded base and a text encoder of the real size."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from memcontrol.assets.build import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 77
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def write_sd15(folder: Path, kind: torch.dtype = torch.float32) -> Path:
    """Of Stable Diffusion 1.5's size: 860 million parameters in the U-Net."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer, encoder = make_clip(768, 12, 12)
    StableDiffusionPipeline(
        make_autoencoder().to(kind),
        encoder.to(kind),
        tokenizer,
        UNet2DConditionModel(**SD15_UNET).to(kind),
        DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        None,
        None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_sdxl(folder: Path, kind: torch.dtype = torch.float32) -> Path:
    """Of Stable Diffusion XL's size: 2.6 billion parameters in the U-Net."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer, first = make_clip(768, 12, 12)
    _, second = make_clip(1280, 32, 20, projected=True)
    StableDiffusionXLPipeline(
        make_autoencoder(sample_size=1024, scaling_factor=0.13025).to(kind),
        first.to(kind),
        second.to(kind),
        tokenizer,
        tokenizer,
        UNet2DConditionModel(**SDXL_UNET).to(kind),
        EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


BASES = {"sd15": write_sd15, "sdxl": write_sdxl}
