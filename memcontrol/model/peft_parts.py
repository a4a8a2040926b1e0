"""Owns the methods that the peft library implements: their configs, their places in a denoiser, and exact
means of them."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memcontrol.model.parts import State, Target, Tuner
from memcontrol.model.sharding import is_sharded, show_whole


def _make_lora_config(targets: Sequence[Target], **settings):
    from peft import LoraConfig

    return LoraConfig(**_match_targets(targets), **_match_sizes(targets, "r", "lora_alpha"), **settings)


def _make_dora_config(targets: Sequence[Target]):
    return _make_lora_config(targets, use_dora=True)


def _make_loha_config(targets: Sequence[Target]):
    from peft import LoHaConfig

    return LoHaConfig(**_match_targets(targets), **_match_sizes(targets, "r", "alpha"))


def _make_lokr_config(targets: Sequence[Target]):
    from peft import LoKrConfig

    return LoKrConfig(**_match_targets(targets), **_match_sizes(targets, "r", "alpha"))


def _make_oft_config(targets: Sequence[Target]):
    from peft import OFTConfig

    return OFTConfig(**_match_targets(targets), oft_block_size=targets[0].rank, r=0, use_cayley_neumann=False)


def _make_ia3_config(targets: Sequence[Target]):
    from peft import IA3Config

    return IA3Config(**_match_targets(targets), feedforward_modules=[])


def _make_ln_tuning_config(targets: Sequence[Target]):
    from peft import LNTuningConfig

    return LNTuningConfig(**_match_targets(targets))


def _match_targets(targets: Sequence[Target]) -> dict[str, Any]:
    # a string: peft shortens long lists to suffixes
    return {"target_modules": "|".join(re.escape(target.module) for target in targets)}


def _match_sizes(targets: Sequence[Target], rank: str, alpha: str) -> dict[str, Any]:
    """The most frequent rank and alpha, and patterns for the targets that have others."""
    sizes = [(target.rank, target.rank * target.alpha) for target in targets]
    usual = max(sizes, key=sizes.count)
    differing = [
        (f"^{re.escape(target.module)}", size) for target, size in zip(targets, sizes) if size != usual
    ]
    return {
        rank: usual[0],
        alpha: usual[1],
        "rank_pattern": {name: size[0] for name, size in differing},
        "alpha_pattern": {name: size[1] for name, size in differing},
    }


def _cast_to_float32(layer: Any) -> None:
    """The adapter's parameters, which peft makes in the type of the base's weights. Over 16-bit weights a
    pass runs under autocast, which casts inputs itself, and keeps no float32 copy of them for backward."""
    weight = layer.get_base_layer().weight
    layer.cast_input_dtype_enabled = weight.dtype not in (torch.bfloat16, torch.float16)
    for name, parameter in layer.named_parameters():
        if not name.startswith("base_layer."):
            parameter.data = parameter.data.float()


PEFT = {
    "lora": _make_lora_config,
    "dora": _make_dora_config,
    "loha": _make_loha_config,
    "lokr": _make_lokr_config,
    "oft": _make_oft_config,
    "ia3": _make_ia3_config,
    "ln_tuning": _make_ln_tuning_config,
}


def _set_values(weight: Tensor, values: Tensor) -> None:
    """In place, where the type stays; a 16-bit weight that an offset was added to becomes float32."""
    if weight.dtype == values.dtype:
        weight.copy_(values)
    else:
        weight.data = values


# bytes of weights that are kept beside the changed ones: above that, adapters stay as they are
_MOST_TO_FOLD = 2**28
_LINEAR = ("ia3", "ln_tuning")  # the weight is linear in the parameters, so their mean is exact
# the change of the weight is linear in each of these by itself
_FACTORS = {"lora": (".lora_B.weight",), "loha": (".hada_w2_a",), "lokr": (".lokr_w2", ".lokr_w2_a")}


class Peft(Tuner):
    """Adapters of the peft library: LoRA (arXiv 2106.09685), DoRA (2402.09353), LoHa and LoKr (LyCORIS,
    2309.14859), OFT (2306.07280), IA3 (2205.05638) and LN tuning (2312.11420)."""

    def __init__(
        self, denoiser: nn.Module, method: str, targets: Sequence[Target], seed: int, shared_a: bool = False
    ):
        from peft import inject_adapter_in_model

        self.denoiser, self.method, self.shared_a = denoiser, method, shared_a and method == "lora"
        self.config = PEFT[method](targets)
        if hasattr(denoiser, "peft_config"):
            del denoiser.peft_config  # another method's, on other modules; its layers stay
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), show_whole(denoiser):
            # of norms for LN tuning, of block sizes that must divide a width
            warnings.simplefilter("ignore", UserWarning)
            torch.manual_seed(seed)  # peft draws its start from the global generator
            inject_adapter_in_model(self.config, denoiser)
            for target in targets:
                _cast_to_float32(denoiser.get_submodule(target.module))
        self.layers: dict[str, Any] = {
            target.module: denoiser.get_submodule(target.module) for target in targets
        }
        self.learned = {
            f"{name}.{inside.replace('.default', '')}": parameter
            for name, layer in self.layers.items()
            for inside, parameter in layer.named_parameters()
            if not inside.startswith("base_layer.")
        }
        rates = {target.module: target.rate for target in targets}
        self.rates = {
            name: next(rates[module] for module in self.layers if name.startswith(f"{module}."))
            for name in self.learned
        }
        self.start = {name: parameter.detach().clone() for name, parameter in self.learned.items()}
        self.original: dict[str, Tensor] = {}  # weights of the base that an offset has been added to
        self.added: State = {}  # the offsets

    def begin(self) -> State:
        return self.start

    def weaken(self, mean: State, start: State, state: State, strength: float) -> State:
        """As factors of the same size where one of them is linear, such as LoRA's B, so that the method's
        standard file holds the weaker adapter."""
        if self.method not in _FACTORS:
            return super().weaken(mean, start, state, strength)
        offsets = {f"{name}.offset" for name in self.layers}
        linear = (*_FACTORS[self.method], ".offset")
        return {
            name: strength * tensor if name.endswith(linear) else tensor
            for name, tensor in state.items()
            if name in self.learned or name in offsets
        }

    def trained(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self.learned.items()
            if not (self.shared_a and ".lora_A." in name)
        }

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Adds the state's offsets, dense changes of weights that the adapters cannot hold, to the base's
        weights."""
        for name, layer in self.layers.items():
            offset, weight = state.get(f"{name}.offset"), layer.get_base_layer().weight
            if offset is not None:
                original = self.original.setdefault(name, weight.clone())
                _set_values(weight, original.float() + offset.to(weight.device, torch.float32))
            elif name in self.original:
                _set_values(weight, self.original.pop(name))
        self.added = {
            key: offset for key, offset in state.items() if key.removesuffix(".offset") in self.original
        }

    def offsets(self) -> State:
        return self.added

    @torch.no_grad()
    def average(self, mean: State, states: Sequence[State], weights: Sequence[float]) -> State:
        if self.method in _LINEAR:
            return {}
        found: State = {}
        for name, layer in self.layers.items():
            own = [key for key in self.learned if key.startswith(f"{name}.")]
            if self.method == "lora":
                found |= self.refactor_mean(
                    name, layer, [{key: state[key] for key in own} for state in states], mean, weights
                )
            else:
                found |= self.restart_mean(name, layer, own, states, weights)
        return found

    def refactor_mean(
        self, name: str, layer: Any, states: Sequence[State], mean: State, weights: Sequence[float]
    ) -> State:
        """The mean of the products BA: its best factors of the same rank, and what they leave over as an
        offset."""
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        if all(torch.equal(state[down], states[0][down]) for state in states):
            return {down: states[0][down]}  # a shared A: the mean of B is exact
        scaling, rank = layer.scaling["default"], len(mean[down])
        # [out, K r]
        tall = torch.cat([w * state[up].flatten(1) for w, state in zip(weights, states)], 1).double()
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

    def restart_mean(
        self, name: str, layer: Any, own: Sequence[str], states: Sequence[State], weights: Sequence[float]
    ) -> State:
        """The mean change of the weight as an offset, under an adapter that starts anew: no factors of this
        kind hold a mean."""
        kept, base = {key: self.learned[key].clone() for key in own}, layer.get_base_layer().weight
        # merging may move the weight, and results depend on where it lies
        home, before = base.data, base.detach().clone()
        original = self.original.get(name, before).float()
        total, merged = torch.zeros_like(original), home if home.dtype == torch.float32 else original.clone()
        for state, weight in zip(states, weights):
            base.data = merged
            merged.copy_(original + torch.as_tensor(state.get(f"{name}.offset", 0.0)).to(original))
            for key in own:
                self.learned[key].copy_(state[key])
            layer.merge()
            total += weight * (base - original)
            layer.merged_adapters.clear()
        base.data = home.copy_(before)
        for key, tensor in kept.items():
            self.learned[key].copy_(tensor)
        found = {key: self.start[key] for key in own} | {f"{name}.offset": total}
        magnitude = f"{name}.lora_magnitude_vector.weight"
        if magnitude in own:
            found[magnitude] = torch.linalg.norm((original + total).flatten(1), dim=1).view_as(
                self.start[magnitude]
            )
        return found

    @contextlib.contextmanager
    def fold(self) -> Iterator[None]:
        layers = (
            []
            if self.method in _LINEAR
            else [
                (layer, layer.get_base_layer().weight)
                for layer in self.layers.values()
                # 16 bits would lose a small change, and a quantised or sharded weight takes none
                if layer.get_base_layer().weight.dtype == torch.float32
                and not is_sharded(layer.get_base_layer().weight)
            ]
        )
        n_bytes = sum(weight.nbytes for _, weight in layers)
        if n_bytes > _MOST_TO_FOLD:
            layers = []
        before = [(weight.data, weight.detach().clone()) for _, weight in layers]
        try:
            for layer, _ in layers:
                layer.merge()
            yield
        finally:
            for (layer, weight), (home, kept) in zip(layers, before):
                weight.data = home.copy_(kept)
                layer.merged_adapters.clear()

    def fuse(self) -> None:
        for layer in self.layers.values():
            layer.merge()
        self.original.clear()
        self.added = {}
        self.remove()

    def remove(self) -> None:
        self.load({})
        for name, layer in self.layers.items():
            self.denoiser.set_submodule(name, layer.get_base_layer())
        if hasattr(self.denoiser, "peft_config"):
            del self.denoiser.peft_config
