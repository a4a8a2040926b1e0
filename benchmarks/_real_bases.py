"""Pipelines of the sizes that people have, with random weights, in diffusers' own format on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = Path(__file__).parent.parent / "tests" / "architectures"
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


def make_schedule(name: str, **settings: Any) -> Any:
    """Of diffusers; on the CPU, where its class computes with numpy."""
    import diffusers

    with torch.device("cpu"):
        return getattr(diffusers, name)(**settings)


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
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    tokenizer, encoder = make_clip(768, 12, 12)
    StableDiffusionPipeline(
        make_autoencoder().to(kind),
        encoder.to(kind),
        tokenizer,
        UNet2DConditionModel(**SD15_UNET).to(kind),
        make_schedule("DDPMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        None,
        None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_sdxl(folder: Path, kind: torch.dtype = torch.float32) -> Path:
    """Of Stable Diffusion XL's size: 2.6 billion parameters in the U-Net."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer, first = make_clip(768, 12, 12)
    _, second = make_clip(1280, 32, 20, projected=True)
    StableDiffusionXLPipeline(
        make_autoencoder(sample_size=1024, scaling_factor=0.13025).to(kind),
        first.to(kind),
        second.to(kind),
        tokenizer,
        tokenizer,
        UNet2DConditionModel(**SDXL_UNET).to(kind),
        make_schedule(
            "EulerDiscreteScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


# less of the same kind: fewer layers of the real width; and what takes seconds on a CPU
FEWER = {"sd3": {"num_layers": 6}, "flux": {"num_layers": 4, "num_single_layers": 8}}
TOY_AUTOENCODER = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
TOYS: dict[str, dict[str, Any]] = {
    "sd3": {
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 64,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 32,
    },
    "flux": {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 4, 8),
    },
}


def make_transformer(name: str, changes: dict[str, Any]) -> Any:
    """Of a real configuration in tests/architectures, some of it changed."""
    import diffusers

    config = {**json.loads((ARCHITECTURES / name / "config.json").read_text()), **changes}
    return getattr(diffusers, config["_class_name"]).from_config(config)


def make_t5(width: int) -> tuple[Any, Any]:
    """A tokenizer of a few words and one layer of a T5 encoder: of its size only the width matters here."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "picture"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    config = T5Config(
        vocab_size=32, d_model=width, d_kv=64, d_ff=2 * width, num_layers=1, num_heads=max(1, width // 64)
    )
    return tokenizer, T5EncoderModel(config).eval()


def write_sd3(folder: Path, kind: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Of Stable Diffusion 3's size unless its configuration is changed: 2 billion parameters in 24 blocks."""
    from diffusers import StableDiffusion3Pipeline

    transformer = make_transformer("sd3", changes)
    pooled = transformer.config.pooled_projection_dim
    widths = (768, 1280) if pooled == 2048 else (pooled // 2, pooled // 2)
    tokenizer, first = make_clip(widths[0], 2, widths[0] // 16, projected=True)
    _, second = make_clip(widths[1], 2, widths[1] // 16, projected=True)
    third_tokenizer, third = make_t5(transformer.config.joint_attention_dim)
    autoencoder = make_autoencoder(
        latent_channels=16, shift_factor=0.0609, scaling_factor=1.5305, **choose_autoencoder(changes)
    )
    StableDiffusion3Pipeline(
        transformer.to(kind),
        make_schedule("FlowMatchEulerDiscreteScheduler", shift=3.0),
        autoencoder.to(kind),
        first.to(kind),
        tokenizer,
        second.to(kind),
        tokenizer,
        third.to(kind),
        third_tokenizer,
    ).save_pretrained(folder)
    return folder


def write_flux(folder: Path, kind: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Of Flux's size unless its configuration is changed: 12 billion parameters in 19 double and 38 single
    blocks."""
    from diffusers import FluxPipeline

    transformer = make_transformer("flux", changes)
    pooled = transformer.config.pooled_projection_dim
    tokenizer, first = make_clip(pooled, 2, max(1, pooled // 64))
    second_tokenizer, second = make_t5(transformer.config.joint_attention_dim)
    autoencoder = make_autoencoder(
        latent_channels=16, shift_factor=0.1159, scaling_factor=0.3611, **choose_autoencoder(changes)
    )
    FluxPipeline(
        make_schedule("FlowMatchEulerDiscreteScheduler", shift=3.0),
        autoencoder.to(kind),
        first.to(kind),
        tokenizer,
        second.to(kind),
        second_tokenizer,
        transformer.to(kind),
    ).save_pretrained(folder)
    return folder


def choose_autoencoder(changes: dict[str, Any]) -> dict[str, Any]:
    """The real one, but for a toy."""
    return TOY_AUTOENCODER if "joint_attention_dim" in changes else {}


BASES = {"sd15": write_sd15, "sdxl": write_sdxl, "sd3": write_sd3, "flux": write_flux}
