"""Owns how pipelines differ: for each family, how captions are encoded, what the denoiser is called with, and
how it samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memcontrol.config.base import BaseConfig
from memcontrol.core.errors import MemControlError

Text = dict[str, Tensor]  # a caption's encodings by the name of the pipeline's argument, each [N, ...]


class Family:
    """A latent text-to-image pipeline with one text encoder, as Stable Diffusion 1.x and 2.x."""

    denoiser = "unet"
    flow = False  # rectified flow: x_t = (1 - s) x + s noise, and the denoiser predicts noise - x
    packing = 1  # latents that the denoiser takes as one
    guides_late = True  # the pipeline reads its guidance scale anew in every step
    longest: int | None = None  # tokens, where the pipeline lets a caption's length be chosen
    # the encoding that says to which tokens of prompt_embeds the denoiser attends, where it is not all
    mask: str | None = None

    def __init__(self, max_sequence_length: int | None = None):
        """Captions take that many tokens; None: the pipeline's own default."""
        self.length = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}

    def encode(self, pipeline, captions: Sequence[str], device: torch.device) -> Text:
        embeddings, _ = pipeline.encode_prompt(list(captions), device, 1, False)
        return {"prompt_embeds": embeddings}

    def predict(self, denoiser, noisy: Tensor, time: Tensor, text: Text) -> Tensor:
        """What the denoiser makes of latents [B, C, h, w] at times [B]: schedule steps 0..999, for a flow
        1000 s."""
        return denoiser(noisy, time, text["prompt_embeds"]).sample

    def make_call(self, pipeline, text: Text, empty: Text, guidance: float) -> dict:
        """Arguments of the pipeline's call; `empty` are encodings of the empty caption, as many."""
        return {
            **text,
            **{f"negative_{name}": tensor for name, tensor in empty.items()},
            "guidance_scale": guidance,
        }

    def describe_call(self, config, guidance: float) -> dict[str, Any]:
        """Arguments of the pipeline's call on a caption itself that give what `make_call` gives on its
        encodings; `config` is the denoiser's."""
        # an explicit empty caption: SDXL takes zeros where none is given
        guided = {"negative_prompt": ""} if guidance > 1 else {}
        return {**guided, "guidance_scale": guidance, **self.length}

    def pack_latents(self, noise: Tensor) -> Tensor:
        """Noise [N, C, h, w] in the form in which the pipeline takes it."""
        return noise

    def unpack_latents(self, packed: Tensor, height: int, width: int) -> Tensor:
        """Latents [N, C, h, w] from the form in which the pipeline gives them."""
        return packed

    def list_text_shapes(self, config) -> dict[str, tuple[int, ...]]:
        """Shapes of one caption's encodings, as the full-size models have them."""
        return {"prompt_embeds": (77, config.cross_attention_dim)}


class _StableDiffusionXL(Family):
    """Two text encoders, and the image's size as a condition."""

    pixels_per_latent = 8

    def encode(self, pipeline, captions: Sequence[str], device: torch.device) -> Text:
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            list(captions), device=device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def predict(self, denoiser, noisy: Tensor, time: Tensor, text: Text) -> Tensor:
        factor = self.pixels_per_latent
        height, width = noisy.shape[2] * factor, noisy.shape[3] * factor
        # original, crop, target
        sizes = noisy.new_tensor([height, width, 0, 0, height, width]).expand(len(noisy), -1)
        added = {"text_embeds": text["pooled_prompt_embeds"], "time_ids": sizes}
        return denoiser(noisy, time, text["prompt_embeds"], added_cond_kwargs=added).sample

    def list_text_shapes(self, config) -> dict[str, tuple[int, ...]]:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {"prompt_embeds": (77, config.cross_attention_dim), "pooled_prompt_embeds": (pooled,)}


class _StableDiffusion3(Family):
    """MMDiT with up to three text encoders and rectified flow (arXiv 2403.03206)."""

    denoiser, flow, longest = "transformer", True, 512

    def encode(self, pipeline, captions: Sequence[str], device: torch.device) -> Text:
        captions = list(captions)
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            captions, None, None, device=device, do_classifier_free_guidance=False, **self.length
        )
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def predict(self, denoiser, noisy: Tensor, time: Tensor, text: Text) -> Tensor:
        return denoiser(
            hidden_states=noisy,
            timestep=time,
            encoder_hidden_states=text["prompt_embeds"],
            pooled_projections=text["pooled_prompt_embeds"],
        ).sample

    def list_text_shapes(self, config) -> dict[str, tuple[int, ...]]:
        return {
            "prompt_embeds": (77 + 256, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }


class _Flux(Family):
    """A flow transformer on packed 2 x 2 latents; the guidance of distilled models is an input, as in
    sampling."""

    denoiser, flow, packing, guides_late, longest = "transformer", True, 4, False, 512
    trained_guidance = 1.0  # as in diffusers' own fine-tuning of distilled models

    def encode(self, pipeline, captions: Sequence[str], device: torch.device) -> Text:
        embeddings, pooled, _ = pipeline.encode_prompt(list(captions), None, device=device, **self.length)
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def predict(self, denoiser, noisy: Tensor, time: Tensor, text: Text) -> Tensor:
        height, width = noisy.shape[2:]
        places = torch.stack(
            torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij"), -1
        ).reshape(-1, 2)
        image_ids = torch.nn.functional.pad(places, (1, 0)).to(noisy)  # [h w / 4, 3]
        text_ids = noisy.new_zeros(text["prompt_embeds"].shape[1], 3)
        guidance = (
            noisy.new_full((len(noisy),), self.trained_guidance) if denoiser.config.guidance_embeds else None
        )
        packed = denoiser(
            hidden_states=self.pack_latents(noisy),
            timestep=time / 1000,
            guidance=guidance,
            pooled_projections=text["pooled_prompt_embeds"],
            encoder_hidden_states=text["prompt_embeds"],
            txt_ids=text_ids,
            img_ids=image_ids,
        ).sample  # [B, h w / 4, 4 C]
        return self.unpack_latents(packed, height, width)

    def make_call(self, pipeline, text: Text, empty: Text, guidance: float) -> dict:
        if pipeline.transformer.config.guidance_embeds or guidance == 1:
            return {**text, "guidance_scale": guidance}
        return {**super().make_call(pipeline, text, empty, 1.0), "true_cfg_scale": guidance}

    def describe_call(self, config, guidance: float) -> dict[str, Any]:
        if config.guidance_embeds or guidance == 1:
            return {"guidance_scale": guidance, **self.length}
        own = {"negative_prompt": "", "guidance_scale": 1.0, "true_cfg_scale": guidance}
        return {**own, **self.length}

    def pack_latents(self, noise: Tensor) -> Tensor:
        tiles = noise.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [N, C, h/2, 2, w/2, 2]
        return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [N, h w / 4, 4 C]

    def unpack_latents(self, packed: Tensor, height: int, width: int) -> Tensor:
        # [N, h/2, w/2, C, 2, 2]
        tiles = packed.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))
        return tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(packed), -1, height, width)

    def list_text_shapes(self, config) -> dict[str, tuple[int, ...]]:
        return {
            "prompt_embeds": (512, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }


class _PixArt(Family):
    """A diffusion transformer with a masked T5 caption; half of its output may be a learned variance (arXiv
    2310.00426)."""

    denoiser, guides_late = "transformer", False
    longest = 300  # that PixArt Sigma and Sana were trained with; diffusers itself knows no bound
    mask = "prompt_attention_mask"  # padding has a bias of -10,000 in cross-attention, and is nowhere else

    def encode(self, pipeline, captions: Sequence[str], device: torch.device) -> Text:
        embeddings, mask, _, _ = pipeline.encode_prompt(
            list(captions), do_classifier_free_guidance=False, device=device, **self.length
        )
        return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}

    def predict(self, denoiser, noisy: Tensor, time: Tensor, text: Text) -> Tensor:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if denoiser.use_additional_conditions:  # PixArt alpha at 1024 pixels
            height, width = noisy.shape[2:]
            sizes = noisy.new_tensor([8 * height, 8 * width]).expand(len(noisy), -1)
            added = {"resolution": sizes, "aspect_ratio": noisy.new_full((len(noisy), 1), height / width)}
        predicted = denoiser(
            noisy,
            encoder_hidden_states=text["prompt_embeds"],
            encoder_attention_mask=text["prompt_attention_mask"],
            timestep=time,
            added_cond_kwargs=added,
        ).sample
        return predicted[:, : noisy.shape[1]]

    def make_call(self, pipeline, text: Text, empty: Text, guidance: float) -> dict:
        return {
            **super().make_call(pipeline, text, empty, guidance),
            "negative_prompt": None,
            "use_resolution_binning": False,
        }

    def describe_call(self, config, guidance: float) -> dict[str, Any]:
        plain = {"clean_caption": False, "use_resolution_binning": False}
        return {**super().describe_call(config, guidance), **plain}

    def list_text_shapes(self, config) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (300, config.caption_channels), "prompt_attention_mask": (300,)}


class _Sana(_PixArt):
    """A linear-attention flow transformer over a 32-fold autoencoder, captions by a language model (arXiv
    2410.10629)."""

    flow = True

    def describe_call(self, config, guidance: float) -> dict[str, Any]:
        return {**super().describe_call(config, guidance), "complex_human_instruction": None}

    def predict(self, denoiser, noisy: Tensor, time: Tensor, text: Text) -> Tensor:
        mask, scaled = text["prompt_attention_mask"], time * denoiser.config.timestep_scale
        return denoiser(
            noisy, encoder_hidden_states=text["prompt_embeds"], encoder_attention_mask=mask, timestep=scaled
        ).sample


class Unconditional(Family):
    """A denoiser of pixels without captions, as DDPM (arXiv 2006.11239)."""

    guides_late = False

    def encode(self, pipeline, captions: Sequence[str], device: torch.device) -> Text:
        return {}

    def describe_call(self, config, guidance: float) -> dict[str, Any]:
        return {}

    def predict(self, denoiser, noisy: Tensor, time: Tensor, text: Text) -> Tensor:
        return denoiser(noisy, time).sample

    def list_text_shapes(self, config) -> dict[str, tuple[int, ...]]:
        return {}


_FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": Family,
    "StableDiffusionXLPipeline": _StableDiffusionXL,
    "StableDiffusion3Pipeline": _StableDiffusion3,
    "FluxPipeline": _Flux,
    "PixArtAlphaPipeline": _PixArt,
    "PixArtSigmaPipeline": _PixArt,
    "SanaPipeline": _Sana,
    "DDPMPipeline": Unconditional,
    "DDIMPipeline": Unconditional,
}


def name_denoiser(pipeline) -> str:
    """The pipeline's component that is fine-tuned."""
    return "unet" if getattr(pipeline, "unet", None) is not None else "transformer"


def find_family(pipeline_class: str, base: BaseConfig) -> Family:
    """Raises MemControlError for a pipeline that no family knows, and for a max_sequence_length that it does
    not take."""
    if pipeline_class not in _FAMILIES:
        raise MemControlError(
            f"base '{base}' is a {pipeline_class}, which MemControl cannot train; it can train "
            f"{', '.join(_FAMILIES)}"
        )
    family = _FAMILIES[pipeline_class](base.max_sequence_length)
    if base.max_sequence_length:
        _check_length(base.max_sequence_length, family.longest, pipeline_class)
    return family


def _check_length(given: int, longest: int | None, pipeline_class: str) -> None:
    if longest is None:
        raise MemControlError(
            f"base.max_sequence_length is {given}, and the captions of a {pipeline_class} have no length to "
            "choose; take it out"
        )
    if given > longest:
        raise MemControlError(
            f"base.max_sequence_length is {given}, and a {pipeline_class} takes {longest} tokens at most; "
            "give fewer"
        )


FAMILIES_BY_DENOISER = {
    "UNet2DConditionModel": lambda config: (
        _StableDiffusionXL() if config.addition_embed_type == "text_time" else Family()
    ),
    "SD3Transformer2DModel": lambda config: _StableDiffusion3(),
    "FluxTransformer2DModel": lambda config: _Flux(),
    "PixArtTransformer2DModel": lambda config: _PixArt(),
    "SanaTransformer2DModel": lambda config: _Sana(),
    "UNet2DModel": lambda config: Unconditional(),
}
