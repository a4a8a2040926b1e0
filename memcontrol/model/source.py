"""Owns where a base comes from and how its parts are read: paths, precisions, and the content that a digest
names."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from memcontrol.core.errors import MemControlError
from memcontrol.core.files import PACKAGE
from memcontrol.model.families import find_family

TINY = PACKAGE / "assets" / "tiny"
_UNNEEDED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
_QUANTIZED = ("int8", "nf4")


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


@dataclass(frozen=True)
class Precision:
    """In what a base is held and computed: `weights`, the type of what is frozen; `compute`, of forward and
    backward, by autocast where it is a 16-bit one; `quantized`: int8 or nf4, of the denoiser's Linear
    weights."""

    weights: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    quantized: str | None = None

    @property
    def is_plain(self) -> bool:
        """float32 throughout."""
        return self == Precision()

    def __str__(self) -> str:
        names = [str(kind).removeprefix("torch.") for kind in (self.weights, self.compute)]
        return "+".join(dict.fromkeys([*([self.quantized] if self.quantized else []), *names]))


def choose_precision(base_precision: str, inner_precision: str, device: torch.device) -> Precision:
    """Of the keys base_precision and inner.precision. `auto` is bfloat16 on a card and float32 on a CPU,
    where 16-bit products are many times slower; under quantized weights the rest is held as `auto` says."""
    quantized = base_precision if base_precision in _QUANTIZED else None
    automatic = "float32" if device.type == "cpu" else "bfloat16"
    name = automatic if quantized or base_precision == "auto" else base_precision
    held, asked = getattr(torch, name), getattr(torch, inner_precision)
    return Precision(held, asked if held == torch.float32 else held, quantized)


@dataclass(frozen=True)
class Source:
    """A base by its name, and where its parts lie: a folder in diffusers' format, or a Hub id."""

    name: str
    path: str
    options: dict[str, Any] = field(default_factory=dict)  # of from_pretrained: revision, variant

    @property
    def index(self) -> dict[str, Any]:
        """model_index.json. Raises MemControlError."""
        from diffusers import DiffusionPipeline

        with _explain_failure(self.name):
            return DiffusionPipeline.load_config(self.path, **_select(self.options, "revision"))

    def list_encoders(self) -> list[str]:
        """Names of the pipeline's text encoders."""
        return [name for name, kind in self.index.items() if name.startswith("text_encoder") and kind[0]]

    def open(self, precision: Precision = Precision(), with_encoders: bool = True) -> Any:
        """The pipeline as diffusers reads it, on the CPU or, where it is quantized, on the device that its
        library wants. Raises MemControlError."""
        from diffusers import DiffusionPipeline

        index = self.index
        kind = index.get("_class_name", "")
        family = find_family(kind, self.name)
        given: dict[str, Any] = dict(_UNNEEDED) if kind == "StableDiffusionPipeline" else {}
        if not with_encoders:
            given |= dict.fromkeys(self.list_encoders())
        with _explain_failure(self.name):
            if precision.quantized:
                given[family.denoiser] = self.load_quantized(family.denoiser, index, precision)
            if precision.weights == torch.float16 and "vae" in index:
                # the autoencoders of Stable Diffusion overflow in float16
                given["vae"] = self.load_part("vae", index, torch.bfloat16)
            return DiffusionPipeline.from_pretrained(
                self.path, dtype=precision.weights, **self.options, **given
            )

    def load_part(self, part: str, index: dict[str, Any], dtype: torch.dtype, **settings: Any) -> Any:
        """One model of the pipeline, on the CPU."""
        library, kind = index[part]
        # of a remote pipeline's own classes there is none here
        cls = getattr(importlib.import_module(library), kind)
        return cls.from_pretrained(self.path, subfolder=part, dtype=dtype, **self.options, **settings)

    def load_encoder(self, part: str, dtype: torch.dtype) -> Any:
        """A text encoder. Raises MemControlError."""
        with _explain_failure(self.name):
            return self.load_part(part, self.index, dtype)

    def load_quantized(self, part: str, index: dict[str, Any], precision: Precision) -> Any:
        """The denoiser with its Linear weights quantized by diffusers' own `quantization_config`."""
        config = make_quantization_config(precision)
        try:
            return self.load_part(part, index, precision.weights, quantization_config=config)
        except RuntimeError as error:
            raise MemControlError(
                f"base_precision is {precision.quantized}, which its library cannot do here: {error}; choose "
                "bfloat16 or float32"
            ) from None

    @property
    def digest(self) -> str:
        """Names the base's content: its files' names, sizes and, where small, bytes; for a Hub id its
        name."""
        root = Path(self.path)
        digest = hashlib.sha256(self.name.encode())
        for file in sorted(root.rglob("*")) if root.is_dir() else ():
            if file.is_file():
                size = file.stat().st_size
                digest.update(f"{file.relative_to(root)} {size}".encode())
                digest.update(file.read_bytes() if size < 2**26 else str(file.stat().st_mtime_ns).encode())
        return digest.hexdigest()[:16]


def find_source(name: str) -> Source:
    """`tiny`, a local folder or a Hub id in diffusers' format. Raises MemControlError."""
    return Source(name, check_base_path(name))


def open_pipeline(name: str) -> Any:
    """The whole pipeline as plain diffusers reads it, in float32. Raises MemControlError."""
    return find_source(name).open()


def _select(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}


@contextlib.contextmanager
def _explain_failure(name: str) -> Iterator[None]:
    """Turns what libraries raise where a base cannot be read into a MemControlError."""
    quiet_libraries()
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MemControlError(f"base '{name}' cannot be loaded as a diffusers pipeline: {reason}") from None


def make_quantization_config(precision: Precision) -> Any:
    """Of diffusers, from the library that is installed: bitsandbytes for nf4, torchao or bitsandbytes for
    int8. Raises MemControlError where there is none."""
    has_torchao, has_bitsandbytes = (
        importlib.util.find_spec(name) is not None for name in ("torchao", "bitsandbytes")
    )
    if precision.quantized == "nf4" and has_bitsandbytes:
        from diffusers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=precision.weights
        )
    if precision.quantized == "int8" and has_torchao:
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if precision.quantized == "int8" and has_bitsandbytes:
        from diffusers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True)
    wanted = "bitsandbytes" if precision.quantized == "nf4" else "torchao (or bitsandbytes)"
    raise MemControlError(
        f"base_precision is {precision.quantized}, which needs {wanted}; pip install "
        "'memcontrol[quantized]', or choose bfloat16"
    )


def quiet_libraries() -> None:
    """Keeps the chatter of transformers and diffusers off the user's screen; must come before diffusers is
    imported."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()


def import_libraries() -> None:
    """What opening a base imports, so that its own memory can be told from theirs."""
    quiet_libraries()
    for name in ("peft", "diffusers.models.unets.unet_2d_condition", "diffusers.pipelines.pipeline_utils"):
        importlib.import_module(name)


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
