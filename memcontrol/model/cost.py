"""Owns what a choice costs: parameters, FLOPs and memory of a training step, counted in one pass of one
image; on the meta device from shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from memcontrol.core.choice import Choice
from memcontrol.core.space import SearchSpace
from memcontrol.model.adapter import Adapter, inject_adapter, list_trainable_modules
from memcontrol.model.families import FAMILIES_BY_DENOISER, Family, Text

_aten = torch.ops.aten
_BYTES = 4  # of a float32
# diffusers' U-Nets register the middle block last
_LATE = {"mid_block": 1, "up_blocks": 2, "conv_norm_out": 3, "conv_out": 3}


@dataclass(frozen=True)
class Cost:
    """Trained parameters, 10^9 floating-point operations of a training step per image, and MiB that the step
    holds."""

    parameters: int
    step_gflops: float
    memory_mib: float


def measure_cost(
    denoiser: nn.Module,
    space: SearchSpace,
    choice: Choice,
    family: Family,
    latents: Sequence[int],
    text: Mapping[str, Sequence[int]],
    batch: int = 1,
    shared_a: bool = False,
) -> Cost:
    """The cost of a choice on a denoiser without an adapter; see `measure_step_cost`."""
    adapter = inject_adapter(denoiser, space, choice, 0, shared_a=shared_a)
    try:
        return measure_step_cost(denoiser, adapter, family, latents, text, batch)
    finally:
        adapter.remove()


def measure_step_cost(
    denoiser: nn.Module,
    adapter: Adapter,
    family: Family,
    latents: Sequence[int],
    text: Mapping[str, Sequence[int]],
    batch: int = 1,
) -> Cost:
    """The cost of a step of `batch` images with an injected adapter, from one image's latents [C, h, w] and
    encodings.

    Backward stops at the first trained module, so a choice that begins late is cheaper. Memory counts the
    weights, for trained ones gradient and two moments of AdamW, and what forward keeps for backward.
    """
    n_trained, n_base = adapter.n_trained(), sum(parameter.numel() for parameter in denoiser.parameters())
    counter, kept = _FlopCounter(), _KeptBytes(denoiser)
    if n_trained:
        device = next(denoiser.parameters()).device
        noisy, time = torch.zeros(1, *latents, device=device), torch.zeros(1, device=device)
        encodings: Text = {name: torch.zeros(1, *shape, device=device) for name, shape in text.items()}
        with counter:
            with (
                _FusedAttention(),
                torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor),
            ):
                predicted = family.predict(denoiser, noisy, time, encodings)
            predicted.sum().backward()
        for parameter in adapter.parameters():
            parameter.grad = None
    memory = _BYTES * (n_base + 3 * n_trained) + batch * kept.n_bytes
    return Cost(n_trained, counter.n_flops / 1e9, memory / 2**20)


def _count_attention(query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _count_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs
) -> int:
    """Twice forward, as the mathematics has it: what a kernel computes again to save memory is no work
    done."""
    return 2 * _count_attention(query, key, value)


class _FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of matrix products, convolutions and attention by torch's formulas. Torch's own
    counter takes every other operation apart too, for ten times the time."""

    formulas: Mapping[Any, Any] = flop_registry | {
        _aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_attention_backward,
        _aten._scaled_dot_product_flash_attention_backward: _count_attention_backward,
        _aten._scaled_dot_product_efficient_attention_backward: _count_attention_backward,
        _aten._scaled_dot_product_cudnn_attention_backward: _count_attention_backward,
    }

    def __init__(self):
        super().__init__()
        self.n_flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := self.formulas.get(func.overloadpacket):
            self.n_flops += formula(*args, **kwargs, out_val=out)
        return out


class _FusedAttention(TorchFunctionMode):
    """On the meta device attention as real devices have it: there it would keep [heads, n, n] for
    backward."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_attention = func is nn.functional.scaled_dot_product_attention
        return _attend_fused(*args, **kwargs) if is_attention else func(*args, **kwargs)


def _attend_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.device.type != "meta" or enable_gqa:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


class _KeptBytes:
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


def survey_space(denoiser: nn.Module, space: SearchSpace) -> dict:
    """What `spaces check` prints: the denoiser's parameters, each method's with all groups on and off, each
    group's by method.

    A group's count is what it adds to what the space always trains. Raises MemControlError where the space
    does not fit.
    """
    modules = space.match_modules(list_trainable_modules(denoiser))
    methods: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {
        name: {"name": name, "modules": members, "parameters": {}} for name, members in modules.items()
    }
    for method in space.methods:
        everything_on = space.choice(space.select_groups(method), method, 0.5)
        always = _count_parameters(denoiser, space, space.choice((), method, 0.5))
        everything = _count_parameters(denoiser, space, everything_on)
        cost = measure_typical_cost(denoiser, space, everything_on)
        methods[method] = {
            "all_on": sum(everything.values()),
            "all_off": sum(always.values()),
            "cost": cost and asdict(cost),
        }
        added = {name: n for name, n in everything.items() if name not in always}
        by_group = _sum_by_group(added, _find_owners(modules))
        for name in space.select_groups(method):
            groups[name]["parameters"][method] = by_group[name]
    return {
        "space": space.name,
        "total": sum(parameter.numel() for parameter in denoiser.parameters()),
        "methods": methods,
        "groups": list(groups.values()),
    }


def _find_owners(modules: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The group of each module."""
    return {name: group for group, names in modules.items() for name in names}


def _sum_by_group(parameters: Mapping[str, int], owners: Mapping[str, str]) -> Counter[str]:
    """How many of the parameters, which are counted by name, lie in each group's modules."""
    sums: Counter[str] = Counter()
    for name, n in parameters.items():
        if group := _find_owner(name, owners):
            sums[group] += n
    return sums


def list_blocks(denoiser: nn.Module, space: SearchSpace) -> list[dict]:
    """The denoiser's blocks in the order of a forward pass: their parameters, and how many of these lie in
    each group's modules."""
    owners = _find_owners(space.match_modules(list_trainable_modules(denoiser)))
    by_block: dict[str, dict[str, int]] = {}
    for name, parameter in denoiser.named_parameters():
        by_block.setdefault(_name_block(name), {})[name] = parameter.numel()
    blocks = [
        {"name": block, "parameters": sum(counts.values()), "groups": _sum_by_group(counts, owners)}
        for block, counts in by_block.items()
    ]
    return sorted(blocks, key=lambda block: _LATE.get(block["name"].partition(".")[0], 0))


def _name_block(parameter: str) -> str:
    """Of "down_blocks.1.attentions.0.norm.weight", "down_blocks.1"; of "conv_in.weight", "conv_in"."""
    first, _, rest = parameter.partition(".")
    second = rest.partition(".")[0]
    return f"{first}.{second}" if second.isdigit() else first


def _count_parameters(denoiser: nn.Module, space: SearchSpace, choice: Choice) -> dict[str, int]:
    adapter: Adapter = inject_adapter(denoiser, space, choice, 0)
    counts = {name: parameter.numel() for name, parameter in adapter.named_parameters().items()}
    adapter.remove()
    return counts


def _find_owner(parameter: str, owners: Mapping[str, str]) -> str | None:
    """The group of the module that a parameter's name begins with."""
    name = parameter
    while "." in name:
        name = name.rpartition(".")[0]
        if name in owners:
            return owners[name]
    return None


def measure_typical_cost(denoiser: nn.Module, space: SearchSpace, choice: Choice) -> Cost | None:
    """At the size that the denoiser was made for; None where its family is not known."""
    config: Any = denoiser.config
    family = FAMILIES_BY_DENOISER.get(type(denoiser).__name__, lambda config: None)(config)
    if family is None:
        return None
    side = config.get("sample_size") or 128
    channels = config.in_channels // family.packing
    return measure_cost(
        denoiser, space, choice, family, (channels, side, side), family.list_text_shapes(config)
    )
