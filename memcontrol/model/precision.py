"""Owns in what a base is held and computed: types of weights and of autocast, and quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from memcontrol.core.errors import MemControlError

_QUANTIZED = ("int8", "nf4")


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
    """Of the keys base_precision and inner.precision. `auto` is bfloat16 on a card, float16 on one that has
    none, and float32 on a CPU, where 16-bit products are many times slower; under quantized weights the rest
    is held as `auto` says."""
    quantized = base_precision if base_precision in _QUANTIZED else None
    automatic = "float32" if device.type == "cpu" else _choose_16_bits()
    name = automatic if quantized or base_precision == "auto" else base_precision
    held, asked = getattr(torch, name), getattr(torch, inner_precision)
    return Precision(held, asked if held == torch.float32 else held, quantized)


def _choose_16_bits() -> str:
    """Cards before Ampere have no bfloat16 of their own."""
    lacks = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
    return "float16" if lacks else "bfloat16"


def make_quantization_config(precision: Precision) -> Any:
    """Of diffusers, from the library that is installed: bitsandbytes for nf4, torchao or bitsandbytes for
    int8. Raises MemControlError where there is none."""
    has_torchao, has_bitsandbytes = (find_spec(name) is not None for name in ("torchao", "bitsandbytes"))
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


def find_stored_type(path: Path) -> str:
    """Of the first tensor of a safetensors file, as its header calls it ("F32", "BF16"); empty of none."""
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        name = next(iter(opened.keys()), None)
        return opened.get_slice(name).get_dtype() if name else ""
