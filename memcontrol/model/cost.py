"""Owns what a choice costs: parameters, FLOPs and memory of a training step, counted on the meta device from
shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from memcontrol.core.choice import Choice
from memcontrol.core.space import SearchSpace
from memcontrol.model.adapter import Adapter, inject_adapter, list_trainable_modules
from memcontrol.model.counting import FlopCounter, PeakBytes, pass_shapes
from memcontrol.model.families import FAMILIES_BY_DENOISER, Family
from memcontrol.model.precision import Precision
from memcontrol.model.sharding import find_repeated_blocks

QUANTIZED_BITS = {"int8": 8.1, "nf4": 4.5}  # of a weight, with its scale
# diffusers' U-Nets register the middle block last
_LATE = {"mid_block": 1, "up_blocks": 2, "conv_norm_out": 3, "conv_out": 3}


@dataclass(frozen=True)
class StepSettings:
    """What a step's memory depends on beside the choice: images in a `forward`, whether several of these
    `accumulates` to a batch, bytes of the optimizer's `moments` and of `copies` (a moving average; on a CPU
    the base's own values) for each trained parameter, bytes of what lies `beside` the denoiser,
    the base's precision, whether it is on a card, and how many `ranks` share what is frozen, or whether that
    is offloaded to the CPU (`in_blocks` in both cases)."""

    forward: int = 1
    accumulates: bool = False
    moments: float = 8.0
    copies: float = 0.0
    beside: int = 0
    precision: Precision = Precision()
    on_card: bool = False
    ranks: int = 1
    in_blocks: bool = False


@dataclass(frozen=True)
class Cost:
    """Trained parameters, 10^9 floating-point operations of a training step per image, and MiB that training
    holds at its peak, the most of any step; `parts` says of what: weights, moments, copies, an autoencoder
    that stays, and activations with gradients."""

    parameters: int
    step_gflops: float
    memory_mib: float
    parts: Mapping[str, float] = field(default_factory=dict, compare=False)


def measure_cost(
    denoiser: nn.Module,
    space: SearchSpace,
    choice: Choice,
    family: Family,
    latents: Sequence[int],
    text: Mapping[str, Sequence[int]],
    settings: StepSettings = StepSettings(),
    shared_a: bool = False,
    low_memory_full: bool = False,
) -> Cost:
    """The cost of a choice on a denoiser without an adapter; see `measure_step_cost`."""
    adapter = inject_adapter(denoiser, space, choice, 0, shared_a=shared_a, low_memory_full=low_memory_full)
    try:
        return measure_step_cost(denoiser, adapter, family, latents, text, settings)
    finally:
        adapter.remove()


def measure_step_cost(
    denoiser: nn.Module,
    adapter: Adapter,
    family: Family,
    latents: Sequence[int],
    text: Mapping[str, Sequence[int]],
    settings: StepSettings = StepSettings(),
) -> Cost:
    """The cost of a step with an injected adapter, from one image's latents [C, h, w] and encodings.

    Backward stops at the first trained module, so a choice that begins late is cheaper.
    """
    n_trained, weights = adapter.n_trained(), _count_weight_bytes(denoiser, settings.precision)
    if settings.in_blocks:
        weights = _count_bytes_in_blocks(denoiser, settings.ranks, weights)
    n_flops = n_passing = 0
    if n_trained:
        compute = settings.precision.compute
        with FlopCounter() as counter:
            pass_shapes(denoiser, family, latents, text, 1, compute, settings.on_card, backward=True)
        n_flops = counter.n_flops
        _clear_gradients(adapter)
        with PeakBytes() as held:
            for _ in range(2 if settings.accumulates else 1):  # gradients are there from the second on
                pass_shapes(
                    denoiser,
                    family,
                    latents,
                    text,
                    settings.forward,
                    compute,
                    settings.on_card,
                    backward=True,
                )
        n_passing = held.peak
        _clear_gradients(adapter)
    parts = {
        "weights": weights,
        "moments": settings.moments * n_trained,
        "copies": settings.copies * n_trained,
        "autoencoder": settings.beside,
        "activations and gradients": n_passing,
    }
    in_mib = {name: n / 2**20 for name, n in parts.items()}
    return Cost(n_trained, n_flops / 1e9, sum(in_mib.values()), in_mib)


def _clear_gradients(adapter: Adapter) -> None:
    for parameter in adapter.parameters():
        parameter.grad = None


def _count_weight_bytes(denoiser: nn.Module, precision: Precision) -> int:
    """Of parameters and buffers, the frozen weights of Linear layers as they are quantised."""
    total = sum(each.nbytes for each in (*denoiser.parameters(), *denoiser.buffers()))
    if precision.quantized is None:
        return total
    linear = [
        module.weight
        for module in denoiser.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
    ]
    saved = sum(weight.nbytes - weight.numel() * QUANTIZED_BITS[precision.quantized] / 8 for weight in linear)
    # a layer's weight comes back to 16 bits while it computes
    return round(total - saved + max((weight.nbytes for weight in linear), default=0))


def _count_bytes_in_blocks(denoiser: nn.Module, ranks: int, whole: int) -> int:
    """Of a sharded or offloaded denoiser of so many bytes: a rank's own part, what is trained, and what comes
    together while it computes, which is the root's own weights, a block and the next one."""
    seen: set[nn.Parameter] = set()
    sizes = []
    for module in (*find_repeated_blocks(denoiser), denoiser):
        own = {parameter for parameter in module.parameters() if not parameter.requires_grad} - seen
        sizes.append(sum(parameter.nbytes for parameter in own))
        seen |= own
    trained = sum(parameter.nbytes for parameter in denoiser.parameters() if parameter.requires_grad)
    held = (whole - trained) // ranks if ranks > 1 else 0
    return held + trained + sizes[-1] + sum(sorted(sizes[:-1])[-2:])


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
            "cost": cost and {name: value for name, value in asdict(cost).items() if name != "parts"},
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
