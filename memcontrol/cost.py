"""Owns what a choice costs before it is trained: parameters, FLOPs and memory of a training step, from shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memcontrol.adapters import Adapter, inject, trainable_modules
from memcontrol.families import FAMILIES_BY_DENOISER, Family, Text
from memcontrol.space import Choice, SearchSpace

BYTES = 4  # of a float32
LATE = {"mid_block": 1, "up_blocks": 2, "conv_norm_out": 3, "conv_out": 3}  # diffusers' U-Nets register the middle block last


@dataclass(frozen=True)
class Cost:
    """Trained parameters, 10^9 floating-point operations of a training step per image, and MiB that the step holds."""

    parameters: int
    step_gflops: float
    memory_mib: float


def cost_of(
    denoiser: nn.Module, space: SearchSpace, choice: Choice, family: Family, latents: Sequence[int], text: Mapping[str, Sequence[int]],
    batch: int = 1, shared_a: bool = False,
) -> Cost:  # fmt: skip
    """The cost of a choice on a denoiser on the meta device, from the shapes of one image's latents [C, h, w] and encodings.

    Backward stops at the first trained module, so a choice that begins late is cheaper. Memory counts the weights, for
    trained ones gradient and two moments of AdamW, and what forward keeps for backward.
    """
    from torch.utils.flop_counter import FlopCounterMode

    adapter = inject(denoiser, space, choice, 0, shared_a=shared_a)
    try:
        n_trained = adapter.n_trained()
        kept = Kept(denoiser)
        if n_trained:
            noisy = torch.zeros(batch, *latents, device="meta")
            encodings: Text = {name: torch.zeros(batch, *shape, device="meta") for name, shape in text.items()}
            with FlopCounterMode(display=False) as counter:
                with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor):
                    predicted = family.predict(denoiser, noisy, torch.zeros(batch, device="meta"), encodings)
                predicted.sum().backward()
        n_base = sum(parameter.numel() for parameter in denoiser.parameters())
        memory = BYTES * (n_base + 3 * n_trained) + kept.n_bytes
        return Cost(n_trained, counter.get_total_flops() / batch / 1e9 if n_trained else 0.0, memory / 2**20)
    finally:
        for parameter in adapter.parameters():
            parameter.grad = None
        adapter.remove()


class Kept:
    """Adds up what autograd keeps for backward, beside parameters; each storage once."""

    def __init__(self, denoiser: nn.Module):
        self.seen = {parameter.untyped_storage()._cdata for parameter in denoiser.parameters()}
        self.alive: list[Tensor] = []  # so that no storage's address is used again
        self.n_bytes = 0

    def note(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage()._cdata
        if address not in self.seen:
            self.seen.add(address)
            self.alive.append(tensor)
            self.n_bytes += tensor.untyped_storage().nbytes()
        return tensor


def survey(denoiser: nn.Module, space: SearchSpace) -> dict:
    """What `spaces check` prints: the denoiser's parameters, each method's with all groups on and off, each group's by method.

    A group's count is what it adds to what the space always trains. Raises MemControlError where the space does not fit.
    """
    modules = space.module_names(trainable_modules(denoiser))
    owner = {name: group for group, names in modules.items() for name in names}
    found: dict[str, Any] = {
        "space": space.name, "total": sum(parameter.numel() for parameter in denoiser.parameters()), "methods": {},
        "groups": [{"name": group, "modules": names, "parameters": {}} for group, names in modules.items()],
    }  # fmt: skip
    for method in space.methods:
        groups = space.groups_for(method)
        always = counts(denoiser, space, space.choice((), method, 0.5))
        everything = counts(denoiser, space, space.choice(groups, method, 0.5))
        found["methods"][method] = {"all_on": sum(everything.values()), "all_off": sum(always.values())}
        for group in found["groups"]:
            if group["name"] in groups:
                group["parameters"][method] = sum(
                    n for name, n in everything.items() if name not in always and owner_of(name, owner) == group["name"]
                )
        cost = typical_cost(denoiser, space, space.choice(groups, method, 0.5))
        found["methods"][method] |= {"cost": cost and asdict(cost)}
    return found


def blocks_of(denoiser: nn.Module, space: SearchSpace) -> list[dict]:
    """The denoiser's blocks in the order of a forward pass: their parameters, and how many of these lie in each group's modules."""
    owner = {name: group for group, names in space.module_names(trainable_modules(denoiser)).items() for name in names}
    found: dict[str, dict] = {}
    for name, parameter in denoiser.named_parameters():
        block = found.setdefault(block_of(name), {"name": block_of(name), "parameters": 0, "groups": Counter()})
        block["parameters"] += parameter.numel()
        if group := owner_of(name, owner):
            block["groups"][group] += parameter.numel()
    return sorted(found.values(), key=lambda block: LATE.get(block["name"].partition(".")[0], 0))


def block_of(parameter: str) -> str:
    """Of "down_blocks.1.attentions.0.norm.weight", "down_blocks.1"; of "conv_in.weight", "conv_in"."""
    first, _, rest = parameter.partition(".")
    second = rest.partition(".")[0]
    return f"{first}.{second}" if second.isdigit() else first


def counts(denoiser: nn.Module, space: SearchSpace, choice: Choice) -> dict[str, int]:
    adapter: Adapter = inject(denoiser, space, choice, 0)
    found = {name: parameter.numel() for name, parameter in adapter.named_parameters().items()}
    adapter.remove()
    return found


def owner_of(parameter: str, owner: dict[str, str]) -> str | None:
    """The group of the module that a parameter's name begins with."""
    name = parameter
    while "." in name:
        name = name.rpartition(".")[0]
        if name in owner:
            return owner[name]
    return None


def typical_cost(denoiser: nn.Module, space: SearchSpace, choice: Choice) -> Cost | None:
    """At the size that the denoiser was made for; None where its family is not known."""
    config: Any = denoiser.config
    family = FAMILIES_BY_DENOISER.get(type(denoiser).__name__, lambda config: None)(config)
    if family is None:
        return None
    side = config.get("sample_size") or 128
    channels = config.in_channels // family.packing
    return cost_of(denoiser, space, choice, family, (channels, side, side), family.text_shapes(config))
