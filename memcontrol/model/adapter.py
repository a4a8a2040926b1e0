"""Owns what a choice trains in one denoiser: injects it, and saves, loads, averages, fuses and removes it as
a whole."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from memcontrol.core.choice import EVERYTHING, Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.run_folder import RunFolder
from memcontrol.core.seeds import derive_seed
from memcontrol.core.space import SearchSpace
from memcontrol.data.cache import save_tensors
from memcontrol.model.parts import (
    DiffFit,
    State,
    SvDiff,
    Target,
    Tuner,
    Weights,
    find_last_linear,
    find_output_layer,
    is_norm,
    suits,
)
from memcontrol.model.peft_parts import PEFT, Peft
from memcontrol.model.sharding import is_sharded


def list_trainable_modules(denoiser: nn.Module) -> list[str]:
    """Names that a space's patterns are matched against: modules with parameters of their own, attention and
    feed-forward blocks."""
    return [
        name
        for name, module in denoiser.named_modules()
        if name and (next(module.parameters(recurse=False), None) is not None or find_last_linear(module))
    ]


def find_targets(denoiser: nn.Module, space: SearchSpace, choice: Choice) -> list[Target]:
    """What a choice trains: first what the space always trains, then its groups.

    Raises MemControlError: an unknown group, or a method with nothing to train in a group.
    """
    if choice.method == "none":
        return []
    space.check_choice(choice)
    names = list_trainable_modules(denoiser)

    def suited(modules: Sequence[str], method: str) -> list[str]:
        return [name for name in modules if suits(method, denoiser.get_submodule(name))]

    found = [
        Target(name, method, choice.learning_rate)
        for method, always in space.match_always(names)
        for name in suited(always, method)
    ]
    modules = space.match_modules(names)
    for group in choice.groups:
        setting = choice.setting(group)
        own = suited(modules[group], setting.method)
        if not own:
            raise MemControlError(
                f"space '{space.name}': method {setting.method} finds nothing to train in group '{group}'"
            )
        found += [
            Target(name, setting.method, setting.learning_rate, setting.rank or 0, space.groups[group].alpha)
            for name in own
        ]
    return found


def check_space(denoiser: nn.Module, space: SearchSpace, will_shard: bool = False) -> None:
    """Raises MemControlError where a pattern matches nothing, groups share a module, a method suits no
    module of its group, or it changes weights that are quantised or, in trials, sharded."""
    for method in space.methods:
        targets = find_targets(denoiser, space, space.choice(space.select_groups(method), method, 0.5))
        _check_ownership(denoiser, targets, space)
        _refuse_quantized(denoiser, targets)
        if will_shard:
            _refuse_sharded(targets)


def _name_mechanism(method: str) -> str | None:
    """What changes a weight under a method; biases are changed by nothing else."""
    if method == "bias":
        return None
    return method if method in _WRAPPING else "weights"


def _check_ownership(denoiser: nn.Module, targets: Sequence[Target], space: SearchSpace) -> None:
    """Raises MemControlError where two mechanisms would change one weight, whose changes could then not be
    told apart."""
    owners: dict[str, str] = {}
    for target in targets:
        scaled = target.method == "difffit" and not is_norm(denoiser.get_submodule(target.module))
        mechanism = "scales" if scaled else _name_mechanism(target.method)
        name = find_output_layer(denoiser, target.module) if scaled else target.module
        if mechanism and owners.setdefault(name, mechanism) != mechanism:
            raise MemControlError(
                f"space '{space.name}': module '{name}' is trained as {owners[name]} and as {mechanism} in "
                "one choice; take it out of one group or of 'always'"
            )


def is_quantized(module: nn.Module) -> bool:
    """Whether its weight is one of bitsandbytes (packed integers) or torchao (a tensor class of its own)."""
    if not isinstance(module, nn.Linear):
        return False
    weight = module.weight
    is_other_class = type(weight.data) is not torch.Tensor and not is_sharded(weight)
    return not weight.is_floating_point() or is_other_class


def _refuse_quantized(denoiser: nn.Module, targets: Sequence[Target]) -> None:
    """Raises MemControlError where a method would change a quantised weight itself."""
    for target in targets:
        layer = denoiser.get_submodule(find_output_layer(denoiser, target.module))
        if is_quantized(layer) and target.method not in _BESIDE_QUANTIZED:
            raise MemControlError(
                f"method {target.method} changes the weight of '{target.module}' itself, which is quantised "
                f"(base_precision); allowed there: {', '.join(_BESIDE_QUANTIZED)}; take {target.method} out "
                "of the space, or set base_precision=bfloat16"
            )


def _refuse_sharded(targets: Sequence[Target]) -> None:
    """Raises MemControlError where a method would change a frozen weight, of which no process has the
    whole."""
    for target in targets:
        if target.method not in _BESIDE_SHARDED:
            raise MemControlError(
                f"method {target.method} changes weights of '{target.module}' itself, which are sharded "
                f"(search.gpus_per_trial, base_offload=all); allowed there: {', '.join(_BESIDE_SHARDED)}; "
                f"take {target.method} out of the space, or set search.gpus_per_trial=1 and "
                "base_offload=encoders"
            )


def _select_parameters(denoiser: nn.Module, target: Target) -> dict[str, nn.Parameter]:
    """The existing parameters that a target trains as they are."""
    module = denoiser.get_submodule(target.module)
    own = dict(module.named_parameters(recurse=False))
    if target.method in _WRAPPING:
        own = {}
    elif target.method == "bias" or (target.method == "difffit" and not is_norm(module)):
        own = {name: parameter for name, parameter in own.items() if name == "bias"}
    return {f"{target.module}.{name}": parameter for name, parameter in own.items()}


_WRAPPING = (*PEFT, "svdiff")
_BESIDE_QUANTIZED = ("lora", "bias", "norm", "ln_tuning")  # which leave the weight as it is
_BESIDE_SHARDED = ("lora", "loha", "lokr", "ia3")  # which leave all that is frozen as it is


class Adapter:
    """What a choice trains in one denoiser. Injecting changes no output; removing restores the base bit for
    bit."""

    def __init__(self, denoiser: nn.Module, parts: Sequence[Tuner], is_low_memory: bool = False):
        self.denoiser, self.parts, self.is_low_memory = denoiser, list(parts), is_low_memory
        denoiser.requires_grad_(False)
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        norms = [module for module in denoiser.modules() if isinstance(module, nn.GroupNorm)]
        self.hooks = [
            norm.register_forward_pre_hook(_make_input_contiguous)
            for norm in norms
            if any(p.requires_grad for p in norm.parameters())
        ]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All that a state holds by name, parameters that stay fixed included."""
        return {name: parameter for part in self.parts for name, parameter in part.learned.items()}

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for part in self.parts for name, parameter in part.trained().items()}

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return list(self.trained().values())

    def n_trained(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def n_added(self) -> int:
        """Parameters that were put beside the denoiser's own."""
        added = (part.learned.values() for part in self.parts if not isinstance(part, Weights))
        return sum(parameter.numel() for learned in added for parameter in learned)

    def groups(self) -> list[dict]:
        """Optimizer groups: parameters that share a learning rate, which is also kept under `rate`."""
        by_rate: dict[float, list[nn.Parameter]] = {}
        for part in self.parts:
            for name, parameter in part.trained().items():
                by_rate.setdefault(part.rates[name], []).append(parameter)
        return [{"params": parameters, "lr": rate, "rate": rate} for rate, parameters in by_rate.items()]

    def said_rates(self) -> str:
        return ", ".join(f"{group['rate']:g}" for group in self.groups())

    def state(self) -> State:
        """Copies of all that was learned; the base is not part of it."""
        return {
            name: parameter.detach().clone() for name, parameter in self.named_parameters().items()
        } | self.offsets()

    def offsets(self) -> State:
        """Dense changes of weights under factors that could not hold a mean."""
        return {
            name: offset
            for part in self.parts
            if isinstance(part, Peft)
            for name, offset in part.offsets().items()
        }

    @torch.no_grad()
    def load_state(self, state: State) -> None:
        """Raises MemControlError where the state belongs to another choice, base or space."""
        held = self.named_parameters()
        learned = {name: tensor for name, tensor in state.items() if not name.endswith(".offset")}
        wrong = [name for name in held.keys() ^ learned.keys()]
        wrong += [name for name in held.keys() & learned.keys() if held[name].shape != learned[name].shape]
        if wrong:
            raise MemControlError(
                f"the saved adapter does not fit this choice (for one, '{min(wrong)}'); it belongs "
                "to another base or space"
            )
        for name, parameter in held.items():
            parameter.copy_(learned[name])
        for part in self.parts:
            part.load(state)

    def average(self, states: Sequence[State], weights: Sequence[float]) -> State:
        """The state whose change of every weight is the weighted mean of the states' changes; weights are
        normalised.

        Exact for every method (to rounding): where parameters do not average, the mean change is kept as an
        offset or folded into factors. Spectral shifts average the singular values after relu.
        """
        total = sum(weights)
        weights = [weight / total for weight in weights]
        names = {name for state in states for name in state}
        mean: dict[str, Any] = {
            name: sum(w * state[name] for w, state in zip(weights, states) if name in state)
            for name in sorted(names)
        }
        for part in self.parts:
            mean |= part.average(mean, states, weights)
        return mean

    @torch.no_grad()
    def weaken(self, strength: float) -> None:
        """Leaves W0 + s (W - W0) of every weight (WiSE-FT: Wortsman et al. 2022, arXiv 2109.01903), exact for
        every method; where parameters cannot hold that, the change is kept as an offset."""
        if strength == 1:
            return
        state = self.state()
        begun = {name: tensor for part in self.parts for name, tensor in part.begin().items()}
        start = {name: tensor.to(state[name]) for name, tensor in begun.items()}
        mean: State = {
            name: (1 - strength) * start[name] + strength * tensor if name in start else tensor
            for name, tensor in state.items()
        }
        for part in self.parts:
            mean |= part.weaken(mean, start, state, strength)
        self.load_state(mean)

    def save(self, folder: Path, description: dict) -> None:
        """Writes what was learned to folder/adapter.safetensors, what it is in the header."""
        self.write(RunFolder(folder).adapter_file, {"memcontrol": format_header(description)}, published=True)

    def write(self, path: Path, header: dict[str, str], published: bool = False) -> None:
        save_tensors(path, dict(self.named_parameters()) | self.offsets(), header, published=published)

    def load(self, folder: Path) -> None:
        self.read(RunFolder(folder).adapter_file)

    def read(self, path: Path) -> None:
        """What `write` wrote. Raises MemControlError as `load_state` does."""
        from safetensors.torch import load_file

        self.load_state(load_file(path))

    @contextlib.contextmanager
    def fold(self) -> Iterator[None]:
        """For many forward passes without training: every changed weight is computed once. Outputs change by
        rounding; the weights come back bit for bit."""
        with contextlib.ExitStack() as stack, torch.no_grad(), parametrize.cached():
            for part in self.parts:
                stack.enter_context(part.fold())
            yield

    def fuse(self) -> None:
        """Moves what was learned into the denoiser's own weights and leaves a plain diffusers model."""
        for part in reversed(self.parts):
            part.fuse()
        self.end()

    def remove(self) -> None:
        for part in reversed(self.parts):
            part.remove()
        self.end()

    def end(self) -> None:
        # weights trained as they are would keep their gradients in memory
        self.denoiser.requires_grad_(False).zero_grad()
        for hook in self.hooks:
            hook.remove()


def _make_input_contiguous(norm: nn.GroupNorm, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
    """Torch's CPU backward of a GroupNorm crashes where only its weight or bias is trained and the input is
    in channels-last order."""
    (hidden,) = inputs
    return (hidden.contiguous(),) if torch.is_grad_enabled() and not hidden.requires_grad else None


@contextlib.contextmanager
def undo_on_failure(denoiser: nn.Module) -> Iterator[None]:
    """Where the block fails, the denoiser's modules and what of them is trained are as they were: layers that
    were put around them go, also of an adapter that was only half injected."""
    modules = dict(denoiser.named_modules())
    wrapped = {name for name, module in modules.items() if parametrize.is_parametrized(module)}
    flags = [(parameter, parameter.requires_grad) for parameter in denoiser.parameters()]
    had_config = hasattr(denoiser, "peft_config")
    try:
        yield
    except BaseException:
        for name, module in modules.items():
            if name and denoiser.get_submodule(name) is not module:
                denoiser.set_submodule(name, module)
            if name not in wrapped and parametrize.is_parametrized(module):
                for parameter in list(module.parametrizations):
                    parametrize.remove_parametrizations(module, parameter, leave_parametrized=False)
        if not had_config and hasattr(denoiser, "peft_config"):
            del denoiser.peft_config
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def format_header(description: dict) -> str:
    return json.dumps(description, sort_keys=True)


def inject_adapter(
    denoiser: nn.Module,
    space: SearchSpace,
    choice: Choice,
    seed: int,
    *,
    cache: Path | None = None,
    norm_shift_rate: float | None = None,
    shared_a: bool = False,
    low_memory_full: bool = False,
) -> Adapter:
    """Freezes the denoiser and makes trainable what the choice names.

    `norm_shift_rate` is the learning rate of SV-Diff's shifts of norm layers, None for the choice's own.
    `cache` keeps singular value decompositions. `shared_a` trains only B of a LoRA. `low_memory_full` leaves
    the weights of full fine-tuning in the base's own type. Raises MemControlError.
    """
    shards = any(is_sharded(parameter) for parameter in denoiser.parameters())
    if EVERYTHING in choice.groups:
        if shards:
            raise MemControlError(
                "full fine-tuning changes weights that are sharded (search.gpus_per_trial, "
                "base_offload=all); leave it out with search.anchors=[none, all]"
            )
        if any(is_quantized(module) for module in denoiser.modules()):
            raise MemControlError(
                "full fine-tuning changes weights that are quantised (base_precision); leave it out with "
                "search.anchors=[none, all], or set base_precision=bfloat16"
            )
        whole = dict(denoiser.named_parameters())
        rates_of_all = dict.fromkeys(whole, choice.learning_rate)
        part = Weights(whole, rates_of_all, as_float32=not low_memory_full)
        return Adapter(denoiser, [part], is_low_memory=low_memory_full)
    targets = find_targets(denoiser, space, choice)
    _check_ownership(denoiser, targets, space)
    _refuse_quantized(denoiser, targets)
    if shards:
        _refuse_sharded(targets)
    plain: dict[str, nn.Parameter] = {}
    rates: dict[str, float] = {}
    for target in targets:  # before anything is wrapped: names and parameters are the base's own
        found = _select_parameters(denoiser, target)
        plain |= found
        rates |= dict.fromkeys(found, target.rate)
    parts: list[Tuner] = [Weights(plain, rates)] if plain else []
    for method, size in dict.fromkeys(
        (target.method, target.rank if target.method == "oft" else None) for target in targets
    ):
        own = [
            target
            for target in targets
            if target.method == method and (method != "oft" or target.rank == size)
        ]
        own = list({target.module: target for target in own}.values())
        if method in PEFT:
            parts.append(Peft(denoiser, method, own, derive_seed(seed, method), shared_a))
        elif method == "svdiff":
            parts.append(SvDiff(denoiser, own, norm_shift_rate, cache))
        elif method == "difffit":
            scaled = [target for target in own if not is_norm(denoiser.get_submodule(target.module))]
            parts += [DiffFit(denoiser, scaled)] if scaled else []
    return Adapter(denoiser, parts)
