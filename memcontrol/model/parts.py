"""Owns how single modules are trained: plain weights, SV-Diff's spectral shifts and DiffFit's scales; peft's
are in peft_parts."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from memcontrol.core.choice import RANKED
from memcontrol.data.cache import load_or_make

State = dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """One module that a method trains."""

    module: str
    method: str
    rate: float
    rank: int = 0  # of methods that have one
    alpha: float = 1.0  # alpha / rank


def is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None


def _is_layer(module: nn.Module) -> bool:
    """Linear and ordinary Conv2d; peft cannot merge adapters of grouped convolutions."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def find_last_linear(module: nn.Module) -> str | None:
    """For an attention or feed-forward block, the name inside it of the Linear that gives its output."""
    inside = (
        "to_out"
        if hasattr(module, "to_out") and hasattr(module, "to_q")
        else "net"
        if type(module).__name__ == "FeedForward"
        else None
    )
    if inside is None:
        return None
    names = [
        name for name, part in module.get_submodule(inside).named_modules() if isinstance(part, nn.Linear)
    ]
    return f"{inside}.{names[-1]}" if names and names[-1] else None


def suits(method: str, module: nn.Module) -> bool:
    """Whether the method has anything to train in the module itself."""
    own = dict(module.named_parameters(recurse=False))
    if method == "oft":  # peft's rotation of kernels larger than 1 x 1 ignores their padding
        return isinstance(module, nn.Linear) or (_is_layer(module) and module.kernel_size == (1, 1))
    if method in RANKED or method in ("ia3", "attention"):
        return _is_layer(module)
    if method in ("norm", "ln_tuning"):
        return is_norm(module)
    if method == "bias":
        return own.get("bias") is not None
    if method == "svdiff":
        return is_norm(module) or isinstance(module, (nn.Linear, nn.Conv2d))
    if method == "difffit":
        return is_norm(module) or _is_layer(module) or find_last_linear(module) is not None
    return bool(own)  # full


def find_output_layer(denoiser: nn.Module, name: str) -> str:
    """The module itself, or the last Linear of an attention or feed-forward block: the layer whose weight a
    scale acts on."""
    inner = find_last_linear(denoiser.get_submodule(name))
    return f"{name}.{inner}" if inner else name


class Tuner(ABC):
    """Targets of one mechanism in one denoiser: its parameters and their learning rates by name. Injected, it
    changes no output."""

    learned: dict[str, nn.Parameter]
    rates: dict[str, float]

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer changes; the rest of `learned` stays as it began, and is saved with it."""
        return self.learned

    @abstractmethod
    def fuse(self) -> None:
        """Moves what was learned into plain weights."""

    @abstractmethod
    def remove(self) -> None:
        """Restores the base bit for bit."""

    def average(self, mean: State, states: Sequence[State], weights: Sequence[float]) -> State:
        """What must differ from the plain mean of the states so that the change of every weight is the mean
        of theirs."""
        return {}

    @abstractmethod
    def begin(self) -> State:
        """`learned` as it was when it was injected."""

    def weaken(self, mean: State, start: State, state: State, strength: float) -> State:
        """What must differ from the plain mean of the beginning and a state, weighted 1 - s and s, so that
        the change of every weight is s times the state's."""
        return self.average(mean, [start, state], [1 - strength, strength])

    def load(self, state: State) -> None:
        """Takes in what a state holds beside `learned`."""

    def fold(self) -> AbstractContextManager:
        """What was learned lies in plain weights as long as it lasts."""
        return nullcontext()


class Weights(Tuner):
    """Trains existing parameters."""

    def __init__(self, parameters: dict[str, nn.Parameter], rates: dict[str, float], as_float32: bool = True):
        self.learned, self.rates = parameters, rates
        # on the CPU: they are looked at once, when the trial is over
        self.original = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in parameters.items()
            if not parameter.is_meta
        }
        self.kinds = {name: parameter.dtype for name, parameter in parameters.items()}
        for parameter in parameters.values() if as_float32 else ():
            parameter.data = parameter.data.float()

    def begin(self) -> State:
        return {name: tensor.float() for name, tensor in self.original.items()}

    def fuse(self) -> None:
        pass

    @torch.no_grad()
    def remove(self) -> None:
        for name, parameter in self.learned.items():
            parameter.data = parameter.data.to(self.kinds[name])
            if not parameter.is_meta:
                parameter.copy_(self.original[name])


class _SpectralShift(nn.Module):
    """W + U diag(relu(s + delta) - s) V', exactly W at delta = 0 (SV-Diff: Han et al. 2023, arXiv 2303.11305,
    eq. 2-3).

    The decomposition is made at first use, or read from `cache`, where it is kept by the content of the
    weight.
    """

    def __init__(self, weight: Tensor, cache: Path | None):
        super().__init__()
        self.cache = cache
        self.factors: tuple[Tensor, ...] = ()
        self.delta = nn.Parameter(torch.zeros(min(_flatten_weight(weight).shape), device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        if not self.factors:
            found = _decompose_weight(weight.detach(), self.cache)
            self.factors = tuple(factor.to(weight.device) for factor in found)
        left, values, right = self.factors
        change = ((left * (torch.relu(values + self.delta) - values)) @ right).view_as(weight)
        return (weight + change).to(weight.dtype)

    def mean(self, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The shift whose singular values are the mean of the shifted ones, after relu: exact, since a mean
        of them is never negative."""
        values = self.factors[1].to(deltas[0])
        return sum(w * torch.relu(values + delta) for w, delta in zip(weights, deltas)) - values


def _flatten_weight(weight: Tensor) -> Tensor:
    """A convolution's kernel as [out, in * h * w], a norm's scale as [1, C]."""
    return weight[None] if weight.ndim == 1 else weight.flatten(1)


def _decompose_weight(weight: Tensor, cache: Path | None) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, k], s [k], V' [k, n] of the weight as a matrix, in float32."""
    flat = _flatten_weight(weight.float())
    if cache is None or flat.is_meta:
        return torch.linalg.svd(flat, full_matrices=False)
    content = hashlib.sha256(flat.cpu().numpy().tobytes()).hexdigest()[:24]
    path = cache / "svd" / f"{content}-{flat.shape[0]}x{flat.shape[1]}.safetensors"
    names = ("u", "s", "vh")
    stored = load_or_make(path, lambda: dict(zip(names, torch.linalg.svd(flat, full_matrices=False))))
    return stored["u"], stored["s"], stored["vh"]


class SvDiff(Tuner):
    """Spectral shifts of Linear, Conv2d and norm weights; a norm has one value."""

    def __init__(
        self, denoiser: nn.Module, targets: Sequence[Target], norm_rate: float | None, cache: Path | None
    ):
        self.modules: list[Any] = [denoiser.get_submodule(target.module) for target in targets]
        self.shifts, self.rates = {}, {}
        for target, module in zip(targets, self.modules):
            name = f"{target.module}.delta"
            self.rates[name] = norm_rate if is_norm(module) and norm_rate is not None else target.rate
            self.shifts[name] = _SpectralShift(module.weight, cache)
            # unsafe: no trial run, it would decompose
            parametrize.register_parametrization(module, "weight", self.shifts[name], unsafe=True)
        self.learned = {name: shift.delta for name, shift in self.shifts.items()}

    def begin(self) -> State:
        return {name: torch.zeros_like(delta) for name, delta in self.learned.items()}

    def average(self, mean: State, states: Sequence[State], weights: Sequence[float]) -> State:
        for module in self.modules:
            _ = module.weight  # its first use decomposes it
        return {
            name: shift.mean([state[name] for state in states], weights)
            for name, shift in self.shifts.items()
        }

    def fuse(self) -> None:
        self.end(leave_parametrized=True)

    def remove(self) -> None:
        self.end(leave_parametrized=False)

    def end(self, leave_parametrized: bool) -> None:
        for module in self.modules:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized)


class _OutputScale(nn.Module):
    """Multiplies a layer's output by gamma = 1 + shift, as rows of its weight or bias; weight decay then
    pulls gamma to 1."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(len(weight), device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return (weight * (1 + self.shift).view(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)


class DiffFit(Tuner):
    """Scales gamma on the outputs of layers and of attention and feed-forward blocks (Xie et al. 2023, arXiv
    2304.06648).

    A block's scale acts on its last Linear, which gives the same function. Biases and norms are trained as
    plain weights.
    """

    def __init__(self, denoiser: nn.Module, targets: Sequence[Target]):
        self.layers: dict[str, tuple[Any, list[str]]] = {}  # layer name: the layer, names of its scales
        self.learned, self.rates = {}, {}
        for target in targets:
            name = find_output_layer(denoiser, target.module)
            layer, scales = self.layers.setdefault(name, (denoiser.get_submodule(name), []))
            scale = _OutputScale(layer.weight)
            for tensor in ("weight", "bias"):
                if getattr(layer, tensor) is not None:
                    parametrize.register_parametrization(layer, tensor, scale, unsafe=True)
            scales.append(f"{target.module}.gamma_shift")
            self.learned[scales[-1]], self.rates[scales[-1]] = scale.shift, target.rate

    def begin(self) -> State:
        return {name: torch.zeros_like(shift) for name, shift in self.learned.items()}

    def average(self, mean: State, states: Sequence[State], weights: Sequence[float]) -> State:
        """The product of a layer's scales, and scale times bias, are what must be averaged; the last scale
        carries the rest."""
        found: State = {}
        for name, (_, scales) in self.layers.items():
            totals = [math.prod(1 + state[scale] for scale in scales) for state in states]
            total: Any = sum(w * each for w, each in zip(weights, totals))
            others = math.prod((1 + mean[scale] for scale in scales[:-1]), start=torch.ones_like(total))
            found[scales[-1]] = total / others - 1
            bias = f"{name}.bias"
            if bias in mean:
                found[bias] = (
                    sum(w * each * state[bias] for w, each, state in zip(weights, totals, states)) / total
                )
        return found

    def fuse(self) -> None:
        self.end(leave_parametrized=True)

    def remove(self) -> None:
        self.end(leave_parametrized=False)

    def end(self, leave_parametrized: bool) -> None:
        for layer, _ in self.layers.values():
            for tensor in list(layer.parametrizations):
                parametrize.remove_parametrizations(layer, tensor, leave_parametrized)
