"""Owns checkpoints in one file, as ComfyUI and Civitai have them: which pipeline one is, and its conversion
into a folder in diffusers' format."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from memcontrol.core.errors import MemControlError
from memcontrol.data.cache import digest_file, find_cache_folder, make_folder

# by diffusers' name of what it finds in a file
_PIPELINES = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "playground-v2-5": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
}
# of Stable Diffusion, which diffusers takes a file for where nothing else fits
_FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"
UNNEEDED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def identify_checkpoint(path: Path) -> tuple[str, str]:
    """Its pipeline's class, and the Hub id whose configs and tokenizers belong to it. Raises
    MemControlError."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type

    shapes = _read_shapes(path)
    if any("lora_" in name for name in shapes):
        raise MemControlError(
            f"base '{path}' is a LoRA, not a whole model; give it as base.adapter, beside its base"
        )
    kind = infer_diffusers_model_type(shapes)
    if kind not in _PIPELINES or (kind == "v1" and _FIRST_LAYER not in shapes):
        said = "no checkpoint that diffusers knows" if kind == "v1" else f"a checkpoint of kind {kind}"
        raise MemControlError(
            f"base '{path}' is {said}; single files are read of {', '.join(_PIPELINES)}; give a folder in "
            "diffusers' format"
        )
    return _PIPELINES[kind], fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]


def _read_shapes(path: Path) -> dict[str, torch.Tensor]:
    """Its tensors without their content."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise MemControlError(f"base '{path}' is no safetensors file ({error}); give one") from None
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def convert_checkpoint(path: Path, config: str | None) -> tuple[Path, str]:
    """The folder in diffusers' format, made once in the user's cache, and what names the content that it was
    made from. Every part keeps the type that the file has it in. Raises MemControlError."""
    kind, repository = identify_checkpoint(path)
    content = hashlib.sha256(f"{digest_file(path)} {_digest_config(config or repository)}".encode())
    digest = content.hexdigest()[:16]

    def convert(place: Path) -> None:
        _write_converted(path, kind, config or repository, place)

    return make_folder(find_cache_folder() / f"checkpoint-{digest}", convert), digest


def _digest_config(place: str) -> str:
    """Of a Hub id its name, of a folder its content."""
    root = Path(place)
    if not root.is_dir():
        return place
    files = (file for file in sorted(root.rglob("*")) if file.is_file())
    return " ".join(f"{file.relative_to(root)} {digest_file(file)}" for file in files)


def _write_converted(path: Path, kind: str, config: str, place: Path) -> None:
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from huggingface_hub.errors import LocalEntryNotFoundError

    given: dict[str, Any] = dict(UNNEEDED) if kind == "StableDiffusionPipeline" else {}
    try:
        pipeline = getattr(diffusers, kind).from_single_file(str(path), config=config, **given)
        _check_complete(pipeline)
    except LocalEntryNotFoundError:
        raise MemControlError(
            f"base '{path}' is a {kind}, whose configs and tokenizers are not in the Hub's cache ({config}) "
            "and the Hub cannot be asked; give a folder in diffusers' format that has them as base.config"
        ) from None
    except (
        SingleFileComponentError,
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        reason = " ".join(str(getattr(error, "message", error)).split())[:200]
        raise MemControlError(
            f"base '{path}' cannot be read as a {kind} with the configs of {config}: {reason}; give what "
            "belongs to it, and has what it lacks, as base.config"
        ) from None
    pipeline.save_pretrained(place)


def _check_complete(pipeline: Any) -> None:
    """Raises ValueError where a part's weights were in neither place."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and any(tensor.is_meta for tensor in part.parameters()):
            raise ValueError(f"weights of {name} are missing")
