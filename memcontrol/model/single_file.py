"""Owns checkpoints in one file, as ComfyUI and Civitai have them: which pipeline one is, and its conversion
into a folder in diffusers' format."""

from __future__ import annotations

import functools
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
# safetensors' names; eight bits, in which nothing computes, become sixteen
_TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.bfloat16,
    "F8_E5M2": torch.bfloat16,
}
UNNEEDED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def identify_checkpoint(path: Path, config: str | None = None) -> tuple[str, str]:
    """Its pipeline's class, and the folder or Hub id whose configs and tokenizers belong to it: the one
    given, or what diffusers finds. Raises MemControlError."""
    from diffusers import DiffusionPipeline
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type

    shapes = _read_shapes(path)
    if any("lora_" in name for name in shapes):
        raise MemControlError(
            f"base '{path}' is a LoRA, not a whole model; give it as base.adapter, beside its base"
        )
    if config:
        return _check_class(DiffusionPipeline.load_config(config).get("_class_name", ""), config), config
    kind = infer_diffusers_model_type(shapes)
    if kind not in _PIPELINES or (kind == "v1" and _FIRST_LAYER not in shapes):
        said = "no checkpoint that diffusers knows" if kind == "v1" else f"taken for a checkpoint of {kind}"
        raise MemControlError(
            f"base '{path}' is {said}; single files are read of {', '.join(_PIPELINES)}; give as base.config "
            "the folder that it belongs to, or a folder in diffusers' format"
        )
    return _PIPELINES[kind], fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]


def _check_class(kind: str, config: str) -> str:
    known = sorted(set(_PIPELINES.values()))
    if kind not in known:
        raise MemControlError(
            f"base.config {config} is of a {kind or 'nameless pipeline'}; single files are read of "
            f"{', '.join(known)}"
        )
    return kind


def _read_shapes(path: Path) -> dict[str, torch.Tensor]:
    """Its tensors without their content."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: torch.empty(
                    part.get_shape(), dtype=_TYPES.get(part.get_dtype(), torch.int64), device="meta"
                )
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise MemControlError(f"base '{path}' is no safetensors file ({error}); give one") from None


def _find_type(shapes: dict[str, torch.Tensor]) -> torch.dtype:
    """The smallest type that holds all weights as they are; constants of schedules and averages of weights,
    which are not read, do not count."""
    kinds = {
        tensor.dtype
        for name, tensor in shapes.items()
        if tensor.ndim > 1 and not name.startswith("model_ema")
    }
    known = kinds & {*_TYPES.values()}
    return functools.reduce(torch.promote_types, known) if known else torch.float32


def convert_checkpoint(path: Path, config: str | None) -> tuple[Path, str]:
    """The folder in diffusers' format, made once in the user's cache, and what names the content that it was
    made from. Weights lose nothing. Raises MemControlError."""
    kind, config = identify_checkpoint(path, config)
    content = hashlib.sha256(f"{digest_file(path)} {_digest_config(config)}".encode())
    digest = content.hexdigest()[:16]

    def convert(place: Path) -> None:
        _write_converted(path, kind, config, place)

    return make_folder(find_cache_folder() / f"checkpoint-{digest}", convert), digest


def _digest_config(place: str) -> str:
    """Of a Hub id its name, of a folder its files: by content, or by size where that is large."""
    root = Path(place)
    if not root.is_dir():
        return place
    files = (file for file in sorted(root.rglob("*")) if file.is_file())
    known = ((file.relative_to(root), file.stat().st_size, file) for file in files)
    return " ".join(f"{name} {size if size > 2**26 else digest_file(file)}" for name, size, file in known)


def _write_converted(path: Path, kind: str, config: str, place: Path) -> None:
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from huggingface_hub.errors import LocalEntryNotFoundError

    given: dict[str, Any] = dict(UNNEEDED) if kind == "StableDiffusionPipeline" else {}
    try:
        pipeline = getattr(diffusers, kind).from_single_file(
            str(path), config=config, dtype=_find_type(_read_shapes(path)), **given
        )
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
