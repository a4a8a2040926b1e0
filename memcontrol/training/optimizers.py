"""Owns the optimizers: torch's, 8-bit AdamW, and Adafactor on 16-bit weights, whose small steps are rounded
by chance instead of away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memcontrol.core.errors import MemControlError
from memcontrol.core.seeds import derive_seed


def _make_adamw_8bit(groups: list[dict], decay: float) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise MemControlError(
            "inner.optimizer is adamw8bit, which needs bitsandbytes and a GPU; pip install "
            "'memcontrol[quantized]', or choose adamw"
        ) from None
    return AdamW8bit(groups, weight_decay=decay)


OPTIMIZERS: dict[str, Callable] = {
    "adamw": lambda groups, decay: torch.optim.AdamW(groups, weight_decay=decay, fused=True),
    "adamw8bit": _make_adamw_8bit,
    "adam": lambda groups, decay: torch.optim.Adam(groups, weight_decay=decay, fused=True),
    "nadam": lambda groups, decay: torch.optim.NAdam(groups, weight_decay=decay, decoupled_weight_decay=True),
    "radam": lambda groups, decay: torch.optim.RAdam(groups, weight_decay=decay, decoupled_weight_decay=True),
    "adafactor": lambda groups, decay: torch.optim.Adafactor(groups, weight_decay=decay),
    "sgd": lambda groups, decay: torch.optim.SGD(groups, weight_decay=decay, momentum=0.9),
}
# bytes of an optimizer's state for each trained parameter
MOMENT_BYTES = {
    "adamw": 8.0,
    "adamw8bit": 2.1,
    "adam": 8.0,
    "nadam": 8.0,
    "radam": 8.0,
    "adafactor": 0.1,
    "sgd": 4.0,
}
FUSED = ("adamw", "adam")  # their counters lie on the device


class RoundedAdafactor:
    """Adafactor (arXiv 1804.04235) one parameter after the other, each in float32 for its own step only; a
    16-bit weight takes the result rounded up or down by chance, so that small steps add up in the mean."""

    def __init__(self, groups: list[dict], decay: float, seed: int):
        self.seed, self.n_steps = seed, 0
        self.param_groups = groups
        self.parts: dict[Tensor, torch.optim.Optimizer] = {
            parameter: torch.optim.Adafactor([parameter], weight_decay=decay)
            for group in groups
            for parameter in group["params"]
        }

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        return {parameter: part.state[parameter] for parameter, part in self.parts.items()}

    def zero_grad(self) -> None:
        for parameter in self.parts:
            parameter.grad = None

    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_one(parameter, group["lr"])
        self.n_steps += 1

    def step_one(self, parameter: Tensor, rate: float) -> None:
        part, kind, gradient = self.parts[parameter], parameter.dtype, parameter.grad
        part.param_groups[0]["lr"] = rate
        parameter.data, parameter.grad = parameter.data.float(), None
        parameter.grad = gradient.float() if gradient is not None else None
        part.step()
        parameter.grad = None
        if kind != torch.float32:
            parameter.data = round_by_chance(parameter.data, kind, self.make_generator(parameter))

    def make_generator(self, parameter: Tensor) -> torch.Generator:
        number = next(i for i, each in enumerate(self.parts) if each is parameter)
        seed = derive_seed(self.seed, "rounding", self.n_steps, number)
        return torch.Generator(parameter.device).manual_seed(seed)


def round_by_chance(values: Tensor, kind: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 as bfloat16, up or down with the chances that make the mean exact."""
    assert kind == torch.bfloat16, "only bfloat16 is the upper half of a float32"
    bits = values.contiguous().view(torch.int32)
    chance = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return ((bits + chance) & -(2**16)).view(torch.float32).to(kind)
