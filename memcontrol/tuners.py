"""Owns how single modules are trained: peft's adapters, SV-Diff's spectral shifts, DiffFit's scales, and plain weights."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from memcontrol.files import replacing
from memcontrol.space import RANKED

State = dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """One module that a method trains."""

    module: str
    method: str
    rate: float
    rank: int | None = None
    alpha: float = 1.0  # alpha / rank


def is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None


def is_layer(module: nn.Module) -> bool:
    """Linear and ordinary Conv2d; peft cannot merge adapters of grouped convolutions."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def last_linear(module: nn.Module) -> str | None:
    """For an attention or feed-forward block, the name inside it of the Linear that gives its output."""
    inside = "to_out" if hasattr(module, "to_out") and hasattr(module, "to_q") else "net" if type(module).__name__ == "FeedForward" else None
    if inside is None:
        return None
    names = [name for name, part in module.get_submodule(inside).named_modules() if isinstance(part, nn.Linear)]
    return f"{inside}.{names[-1]}" if names and names[-1] else None


def suits(method: str, module: nn.Module) -> bool:
    """Whether the method has anything to train in the module itself."""
    own = dict(module.named_parameters(recurse=False))
    if method == "oft":  # peft's rotation of kernels larger than 1 x 1 ignores their padding
        return isinstance(module, nn.Linear) or (is_layer(module) and module.kernel_size == (1, 1))
    if method in RANKED or method in ("ia3", "attention"):
        return is_layer(module)
    if method in ("norm", "ln_tuning"):
        return is_norm(module)
    if method == "bias":
        return own.get("bias") is not None
    if method == "svdiff":
        return is_norm(module) or isinstance(module, (nn.Linear, nn.Conv2d))
    if method == "difffit":
        return is_norm(module) or is_layer(module) or last_linear(module) is not None
    return bool(own)  # full


def output_layer(denoiser: nn.Module, name: str) -> str:
    """The module itself, or the last Linear of an attention or feed-forward block: the layer whose weight a scale acts on."""
    inner = last_linear(denoiser.get_submodule(name))
    return f"{name}.{inner}" if inner else name


class Part(ABC):
    """Targets of one mechanism in one denoiser: its parameters and their learning rates by name. Injected, it changes no output."""

    trained: dict[str, nn.Parameter]
    rates: dict[str, float]

    @abstractmethod
    def fuse(self) -> None:
        """Moves what was learned into plain weights."""

    @abstractmethod
    def remove(self) -> None:
        """Restores the base bit for bit."""

    def average(self, mean: State, states: Sequence[State], weights: Sequence[float]) -> State:
        """What must differ from the plain mean of the states so that the change of every weight is the mean of theirs."""
        return {}

    def load(self, state: State) -> None:
        """Takes in what a state holds beside `trained`."""


class Weights(Part):
    """Trains existing parameters."""

    def __init__(self, parameters: dict[str, nn.Parameter], rates: dict[str, float]):
        self.trained, self.rates = parameters, rates
        self.original = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def fuse(self) -> None:
        pass

    @torch.no_grad()
    def remove(self) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(self.original[name])


class SpectralShift(nn.Module):
    """W + U diag(relu(s + delta) - s) V', exactly W at delta = 0 (SV-Diff: Han et al. 2023, arXiv 2303.11305, eq. 2-3).

    The decomposition is made at first use, or read from `cache`, where it is kept by the content of the weight.
    """

    def __init__(self, weight: Tensor, cache: Path | None):
        super().__init__()
        self.cache, self.factors = cache, None
        self.delta = nn.Parameter(torch.zeros(min(matrix(weight).shape), dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        if self.factors is None:
            self.factors = tuple(factor.to(weight) for factor in decomposed(weight.detach(), self.cache))
        left, values, right = self.factors
        return weight + ((left * (torch.relu(values + self.delta) - values)) @ right).view_as(weight)

    def mean(self, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The shift whose singular values are the mean of the shifted ones, after relu: exact, since a mean of them is never negative."""
        values = self.factors[1].to(deltas[0])
        return sum(w * torch.relu(values + delta) for w, delta in zip(weights, deltas)) - values


def matrix(weight: Tensor) -> Tensor:
    """A convolution's kernel as [out, in * h * w], a norm's scale as [1, C]."""
    return weight[None] if weight.ndim == 1 else weight.flatten(1)


def decomposed(weight: Tensor, cache: Path | None) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, k], s [k], V' [k, n] of the weight as a matrix, in float32."""
    flat = matrix(weight.float())
    if cache is None or flat.is_meta:
        return torch.linalg.svd(flat, full_matrices=False)
    from safetensors.torch import load_file, save_file

    content = hashlib.sha256(flat.cpu().numpy().tobytes()).hexdigest()[:24]
    path = cache / "svd" / f"{content}-{flat.shape[0]}x{flat.shape[1]}.safetensors"
    if not path.exists():
        left, values, right = torch.linalg.svd(flat, full_matrices=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            save_file({"u": left.contiguous().cpu(), "s": values.cpu(), "vh": right.contiguous().cpu()}, part)
    stored = load_file(path)
    return stored["u"], stored["s"], stored["vh"]


class SvDiff(Part):
    """Spectral shifts of Linear, Conv2d and norm weights; a norm has one value."""

    def __init__(self, denoiser: nn.Module, targets: Sequence[Target], norm_rate: float | None, cache: Path | None):
        self.modules = [denoiser.get_submodule(target.module) for target in targets]
        self.shifts, self.rates = {}, {}
        for target, module in zip(targets, self.modules):
            name = f"{target.module}.delta"
            self.rates[name] = norm_rate if is_norm(module) and norm_rate is not None else target.rate
            self.shifts[name] = SpectralShift(module.weight, cache)
            parametrize.register_parametrization(module, "weight", self.shifts[name], unsafe=True)  # unsafe: no trial run, it would decompose
        self.trained = {name: shift.delta for name, shift in self.shifts.items()}

    def average(self, mean: State, states: Sequence[State], weights: Sequence[float]) -> State:
        for module in self.modules:
            _ = module.weight  # its first use decomposes it
        return {name: shift.mean([state[name] for state in states], weights) for name, shift in self.shifts.items()}

    def fuse(self) -> None:
        self.end(leave_parametrized=True)

    def remove(self) -> None:
        self.end(leave_parametrized=False)

    def end(self, leave_parametrized: bool) -> None:
        for module in self.modules:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized)


class Scale(nn.Module):
    """Multiplies a layer's output by gamma = 1 + shift, as rows of its weight or bias; weight decay then pulls gamma to 1."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (1 + self.shift).view(-1, *[1] * (weight.ndim - 1))


class DiffFit(Part):
    """Scales gamma on the outputs of layers and of attention and feed-forward blocks (Xie et al. 2023, arXiv 2304.06648).

    A block's scale acts on its last Linear, which gives the same function. Biases and norms are trained as plain weights.
    """

    def __init__(self, denoiser: nn.Module, targets: Sequence[Target]):
        self.layers: dict[str, tuple[nn.Module, list[str]]] = {}  # layer name: the layer, names of its scales
        self.trained, self.rates = {}, {}
        for target in targets:
            name = output_layer(denoiser, target.module)
            layer, scales = self.layers.setdefault(name, (denoiser.get_submodule(name), []))
            scale = Scale(layer.weight)
            for tensor in ("weight", "bias"):
                if getattr(layer, tensor) is not None:
                    parametrize.register_parametrization(layer, tensor, scale, unsafe=True)
            scales.append(f"{target.module}.gamma_shift")
            self.trained[scales[-1]], self.rates[scales[-1]] = scale.shift, target.rate

    def average(self, mean: State, states: Sequence[State], weights: Sequence[float]) -> State:
        """The product of a layer's scales, and scale times bias, are what must be averaged; the last scale carries the rest."""
        found: State = {}
        for name, (_, scales) in self.layers.items():
            totals = [math.prod(1 + state[scale] for scale in scales) for state in states]
            total = sum(w * each for w, each in zip(weights, totals))
            others = math.prod((1 + mean[scale] for scale in scales[:-1]), start=torch.ones_like(total))
            found[scales[-1]] = total / others - 1
            bias = f"{name}.bias"
            if bias in mean:
                found[bias] = sum(w * each * state[bias] for w, each, state in zip(weights, totals, states)) / total
        return found

    def fuse(self) -> None:
        self.end(leave_parametrized=True)

    def remove(self) -> None:
        self.end(leave_parametrized=False)

    def end(self, leave_parametrized: bool) -> None:
        for layer, _ in self.layers.values():
            for tensor in list(layer.parametrizations):
                parametrize.remove_parametrizations(layer, tensor, leave_parametrized)


def lora_config(targets: Sequence[Target], **settings):
    from peft import LoraConfig

    return LoraConfig(**names_of(targets), **sizes_of(targets, "r", "lora_alpha"), **settings)


def dora_config(targets: Sequence[Target]):
    return lora_config(targets, use_dora=True)


def loha_config(targets: Sequence[Target]):
    from peft import LoHaConfig

    return LoHaConfig(**names_of(targets), **sizes_of(targets, "r", "alpha"))


def lokr_config(targets: Sequence[Target]):
    from peft import LoKrConfig

    return LoKrConfig(**names_of(targets), **sizes_of(targets, "r", "alpha"))


def oft_config(targets: Sequence[Target]):
    from peft import OFTConfig

    return OFTConfig(**names_of(targets), oft_block_size=targets[0].rank, r=0, use_cayley_neumann=False)


def ia3_config(targets: Sequence[Target]):
    from peft import IA3Config

    return IA3Config(**names_of(targets), feedforward_modules=[])


def ln_tuning_config(targets: Sequence[Target]):
    from peft import LNTuningConfig

    return LNTuningConfig(**names_of(targets))


def names_of(targets: Sequence[Target]) -> dict[str, str]:
    return {"target_modules": "|".join(re.escape(target.module) for target in targets)}  # a string: peft shortens long lists to suffixes


def sizes_of(targets: Sequence[Target], rank: str, alpha: str) -> dict:
    """The most frequent rank and alpha, and patterns for the targets that have others."""
    sizes = [(target.rank, target.rank * target.alpha) for target in targets]
    usual = max(sizes, key=sizes.count)
    differing = [(f"^{re.escape(target.module)}", size) for target, size in zip(targets, sizes) if size != usual]
    return {
        rank: usual[0], alpha: usual[1],
        "rank_pattern": {name: size[0] for name, size in differing}, "alpha_pattern": {name: size[1] for name, size in differing},
    }  # fmt: skip


PEFT = {
    "lora": lora_config, "dora": dora_config, "loha": loha_config, "lokr": lokr_config, "oft": oft_config,
    "ia3": ia3_config, "ln_tuning": ln_tuning_config,
}  # fmt: skip


class Peft(Part):
    """Adapters of the peft library: LoRA (arXiv 2106.09685), DoRA (2402.09353), LoHa and LoKr (LyCORIS, 2309.14859),
    OFT (2306.07280), IA3 (2205.05638) and LN tuning (2312.11420)."""

    def __init__(self, denoiser: nn.Module, method: str, targets: Sequence[Target], seed: int):
        from peft import inject_adapter_in_model

        self.denoiser, self.method = denoiser, method
        self.config = PEFT[method](targets)
        if hasattr(denoiser, "peft_config"):
            del denoiser.peft_config  # another method's, on other modules; its layers stay
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of norms for LN tuning, of block sizes that must divide a width
            torch.manual_seed(seed)  # peft draws its start from the global generator
            inject_adapter_in_model(self.config, denoiser)
        self.layers = {target.module: denoiser.get_submodule(target.module) for target in targets}
        self.trained = {
            f"{name}.{inside.replace('.default', '')}": parameter
            for name, layer in self.layers.items()
            for inside, parameter in layer.named_parameters()
            if not inside.startswith("base_layer.")
        }
        rates = {target.module: target.rate for target in targets}
        self.rates = {
            name: next(rates[module] for module in self.layers if name.startswith(f"{module}.")) for name in self.trained
        }
        self.start = {} if method in LINEAR else {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self.original: dict[str, Tensor] = {}  # weights of the base that an offset has been added to

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Adds the state's offsets, dense changes of weights that the adapters cannot hold, to the base's weights."""
        for name, layer in self.layers.items():
            offset, weight = state.get(f"{name}.offset"), layer.get_base_layer().weight
            if offset is not None:
                weight.copy_(self.original.setdefault(name, weight.clone()) + offset.to(weight))
            elif name in self.original:
                weight.copy_(self.original.pop(name))

    def offsets(self) -> State:
        return {f"{name}.offset": self.layers[name].get_base_layer().weight.detach() - weight for name, weight in self.original.items()}

    @torch.no_grad()
    def average(self, mean: State, states: Sequence[State], weights: Sequence[float]) -> State:
        if self.method in LINEAR:
            return {}
        found: State = {}
        for name, layer in self.layers.items():
            own = [key for key in self.trained if key.startswith(f"{name}.")]
            if self.method == "lora":
                found |= self.refactored(name, layer, [{key: state[key] for key in own} for state in states], mean, weights)
            else:
                found |= self.restarted(name, layer, own, states, weights)
        return found

    def refactored(self, name: str, layer: nn.Module, states: Sequence[State], mean: State, weights: Sequence[float]) -> State:
        """The mean of the products BA: its best factors of the same rank, and what they leave over as an offset."""
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        if all(torch.equal(state[down], states[0][down]) for state in states):
            return {}  # a shared A: the mean of B is exact
        scaling, rank = layer.scaling["default"], len(mean[down])
        tall = torch.cat([w * state[up].flatten(1) for w, state in zip(weights, states)], 1).double()  # [out, K r]
        wide = torch.cat([state[down].flatten(1) for state in states]).double()  # [K r, in]
        (q_tall, r_tall), (q_wide, r_wide) = torch.linalg.qr(tall), torch.linalg.qr(wide.T)
        left, values, right = torch.linalg.svd(r_tall @ r_wide.T)
        left, right, root = q_tall @ left, right @ q_wide.T, values.sqrt()
        rest = scaling * (left[:, rank:] * values[rank:]) @ right[rank:]
        offset = mean.get(f"{name}.offset", 0.0) + rest.to(mean[up]).view_as(layer.get_base_layer().weight)
        return {
            up: (left[:, :rank] * root[:rank]).to(mean[up]).view_as(mean[up]),
            down: (root[:rank, None] * right[:rank]).to(mean[down]).view_as(mean[down]),
            f"{name}.offset": offset,
        }

    def restarted(self, name: str, layer: nn.Module, own: Sequence[str], states: Sequence[State], weights: Sequence[float]) -> State:
        """The mean change of the weight as an offset, under an adapter that starts anew: no factors of this kind hold a mean."""
        kept, base = {key: self.trained[key].clone() for key in own}, layer.get_base_layer().weight
        home, before = base.data, base.detach().clone()  # merging may move the weight, and results depend on where it lies
        original = self.original.get(name, before)
        total = torch.zeros_like(before)
        for state, weight in zip(states, weights):
            home.copy_(original + state.get(f"{name}.offset", 0.0))
            for key in own:
                self.trained[key].copy_(state[key])
            layer.merge()
            total += weight * (base - original)
            base.data = home
            layer.merged_adapters.clear()
        home.copy_(before)
        for key, tensor in kept.items():
            self.trained[key].copy_(tensor)
        found = {key: self.start[key] for key in own} | {f"{name}.offset": total}
        magnitude = f"{name}.lora_magnitude_vector.weight"
        if magnitude in own:
            found[magnitude] = torch.linalg.norm((original + total).flatten(1), dim=1).view_as(self.start[magnitude])
        return found

    def fuse(self) -> None:
        for layer in self.layers.values():
            layer.merge()
        self.original.clear()
        self.remove()

    def remove(self) -> None:
        self.load({})
        for name, layer in self.layers.items():
            self.denoiser.set_submodule(name, layer.get_base_layer())
        if hasattr(self.denoiser, "peft_config"):
            del self.denoiser.peft_config


LINEAR = ("ia3", "ln_tuning")  # the weight is linear in the parameters, so their mean is exact
