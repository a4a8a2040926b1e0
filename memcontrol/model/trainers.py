"""Owns what other trainers are told: a choice's layers by their own filters and names, its settings by their
own keys.

Each rule is read from the trainer's own code, which the function that follows it names. What a trainer cannot
hold is refused: an approximation of a mask is another mask.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import yaml
from torch import nn

from memcontrol.core.errors import MemControlError
from memcontrol.model.parts import Target

_Parts = tuple[tuple[str, ...], ...]  # of names, each with its options
_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


@dataclass(frozen=True)
class Plan:
    """A choice as another trainer must know it: the base, its layers, what is trained of them, and how
    long."""

    architecture: str  # a key of ARCHITECTURES
    base: str  # a Hub id, a folder or a file
    names: Mapping[str, bool]  # every module of the denoiser, and whether it is a Linear or a Conv2d
    targets: tuple[Target, ...]
    steps: int
    batch_size: int
    n_images: int  # that the steps go over
    warmup_steps: int = 0
    schedule: str = "cosine"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    resolution: int | None = None
    name: str = "memcontrol"
    widths: tuple[int, ...] = ()  # of a U-Net's blocks
    notes: tuple[str, ...] = ()  # what whoever trains must know beside

    @property
    def modules(self) -> dict[str, Target]:
        return {target.module: target for target in self.targets}

    @property
    def method(self) -> str:
        return self.targets[0].method

    @property
    def epochs(self) -> int:
        """Passes over the images, for trainers that count nothing else."""
        return max(1, round(self.steps * self.batch_size / self.n_images))


def name_architecture(denoiser: nn.Module) -> str:
    """Which of `ARCHITECTURES` it is, or the class's name for one that no trainer here knows."""
    kind, config = type(denoiser).__name__, cast(Any, denoiser).config
    if kind == "UNet2DConditionModel":
        if config.addition_embed_type == "text_time":
            return "sdxl"
        return "sd2" if config.cross_attention_dim == 1024 else "sd15"
    return {
        "SD3Transformer2DModel": "sd3",
        "FluxTransformer2DModel": "flux",
        "PixArtTransformer2DModel": "pixart",
        "SanaTransformer2DModel": "sana",
    }.get(kind, kind)


ARCHITECTURES = {
    "sd15": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux.1",
    "pixart": "PixArt",
    "sana": "Sana",
}


def list_names(denoiser: nn.Module) -> dict[str, bool]:
    """Every module of the denoiser, and whether it is one that trainers put an adapter on."""
    return {
        name: isinstance(module, (nn.Linear, nn.Conv2d)) for name, module in denoiser.named_modules() if name
    }


def write_recipe(plan: Plan, trainer: str) -> dict[str, str]:
    """File name to text: the plan as that trainer's own config. The first file is the main one. Raises
    MemControlError: the trainer cannot express the plan; what, why, and which can."""
    if trainer not in TRAINERS:
        raise MemControlError(f"trainer '{trainer}' is unknown; allowed: {', '.join(TRAINERS)}")
    try:
        return TRAINERS[trainer](plan)
    except MemControlError as error:
        able = [name for name, write in TRAINERS.items() if _can(write, plan)]
        cure = f"{' and '.join(able)} can" if able else "none of them can: use `retrain` and `export`"
        raise MemControlError(f"no recipe for {trainer}: {error}; {cure}") from None


def _can(write: Callable[[Plan], dict[str, str]], plan: Plan) -> bool:
    try:
        write(plan)
    except MemControlError:
        return False
    return True


# What several trainers have in common.


def _check(plan: Plan, known: Collection[str], methods: Collection[str]) -> None:
    """Raises MemControlError: the trainer does not know the base, or has not the method."""
    if plan.architecture not in known:
        name = ARCHITECTURES.get(plan.architecture, f"a {plan.architecture}")
        raise MemControlError(f"it does not train {name} by parts")
    used = list(dict.fromkeys(target.method for target in plan.targets))
    if len(used) > 1:
        raise MemControlError(f"it trains by one method at a time, and the choice has {' and '.join(used)}")
    if used[0] not in methods:
        raise MemControlError(f"it has no method {used[0]}; here it has {', '.join(methods)}")


def _take_rate(plan: Plan) -> float:
    rates = _list_values(target.rate for target in plan.targets)
    if len(rates) > 1:
        raise MemControlError(f"it has one learning rate for all layers, and the choice has {_say(rates)}")
    return rates[0]


def _take_rank(plan: Plan) -> int:
    ranks = _list_values(target.rank for target in plan.targets)
    if len(ranks) > 1:
        raise MemControlError(f"it has one rank for all layers, and the choice has {_say(ranks)}")
    return ranks[0]


def _take_alpha(plan: Plan) -> float:
    """The alpha that all adapters share."""
    alphas = _list_values(measure_alpha(target) for target in plan.targets)
    if len(alphas) > 1:
        raise MemControlError(f"it has one alpha for all layers, and the choice has {_say(alphas)}")
    return alphas[0]


def measure_alpha(target: Target) -> float:
    """As trainers count it: alpha / rank is the factor on the adapter's output."""
    return target.rank * target.alpha


def _list_values(values: Iterable[Any]) -> list[Any]:
    """Each once, the most frequent first."""
    found = list(values)
    return sorted(set(found), key=lambda value: (-found.count(value), value))


def _say(values: Iterable[Any]) -> str:
    return " and ".join(f"{value:g}" for value in values)


def merge_names(names: Iterable[str], dot: str = "[.]") -> list[str]:
    """Regular expressions that match exactly these names and share none: names that differ in one part become
    one. `dot` stands between parts. Trainers split at commas and `=`, and not every reader of TOML unescapes
    a key: none of these, no quote and no backslash is in them."""
    merged: set[_Parts] = {tuple((part,) for part in name.split(".")) for name in names}
    places = max((len(parts) for parts in merged), default=0)
    before = -1
    while len(merged) != before:
        before = len(merged)
        for place in reversed(range(places)):
            merged = _merge_at(merged, place)
    return [dot.join(map(_write_part, parts)) for parts in sorted(merged, key=_sort_naturally)]


def _merge_at(merged: Collection[_Parts], place: int) -> set[_Parts]:
    rest: dict[tuple, set[str]] = {}
    for parts in merged:
        options = parts[place] if place < len(parts) else ()
        rest.setdefault((parts[:place], parts[place + 1 :], bool(options)), set()).update(options)
    return {
        (*before, tuple(sorted(options, key=_split_numbers)), *after) if is_long else before
        for (before, after, is_long), options in rest.items()
    }


def _split_numbers(text: str) -> tuple:
    """So that 10 comes after 9."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text))


def _sort_naturally(parts: _Parts) -> tuple:
    return tuple(tuple(map(_split_numbers, options)) for options in parts)


def _write_part(options: tuple[str, ...]) -> str:
    escaped = [re.escape(option) for option in options]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def _group_by(plan: Plan, value: Callable[[Target], Any]) -> dict[Any, list[str]]:
    """Value to the names of its modules, the most frequent value first."""
    groups: dict[Any, list[str]] = {}
    for target in plan.targets:
        groups.setdefault(value(target), []).append(target.module)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def find_suffixes(plan: Plan) -> list[str]:
    """The shortest endings of the mask's names that no other module's name has: peft matches a list by
    endings (peft/tuners/tuners_utils.py, check_target_module_exists)."""
    mask = plan.modules
    outside = {ending for name in plan.names if name not in mask for ending in _list_endings(name)}
    found = dict.fromkeys(
        next((ending for ending in _list_endings(name) if ending not in outside), None) for name in mask
    )
    if None in found:
        raise MemControlError("it has a list of endings of names, which would take other layers too")
    return [ending for ending in found if ending]


def _list_endings(name: str) -> list[str]:
    """From the last part to the whole name."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


def _comment(*lines: str) -> str:
    return "".join(f"# {line}\n" for line in lines)


# kohya's sd-scripts.


def _write_kohya(plan: Plan) -> dict[str, str]:
    _check(plan, _KOHYA, ("lora", "dora", "loha", "lokr"))
    return _KOHYA[plan.architecture](plan)


def _write_kohya_config(
    plan: Plan, script: str, module: str, args: list[str], rate: float, size: tuple[int, float]
) -> str:
    """A --config_file of sd-scripts (library/train_util.py, read_config_from_file): keys are options."""
    values = {
        "pretrained_model_name_or_path": plan.base,
        **({"v2": True} if plan.architecture == "sd2" else {}),
        "output_name": plan.name,
        "network_module": module,
        "network_dim": size[0],
        "network_alpha": size[1],
        "network_args": args,
        "network_train_unet_only": True,
        "learning_rate": rate,
        "unet_lr": rate,
        "optimizer_type": "AdamW",
        "optimizer_args": [f"weight_decay={plan.weight_decay}"],
        "max_grad_norm": plan.max_grad_norm,
        "max_train_steps": plan.steps,
        "train_batch_size": plan.batch_size,
        **_name_schedule(plan),
        "save_model_as": "safetensors",
    }
    call = f"accelerate launch {script} --config_file recipe.toml --dataset_config DATASET.toml"
    head = _comment(call, *plan.notes)
    return head + _write_toml(values)


def _name_schedule(plan: Plan) -> dict[str, Any]:
    """As diffusers.optimization calls it, which sd-scripts, SimpleTuner and diffusers' scripts use."""
    constant = "constant_with_warmup" if plan.warmup_steps else "constant"
    name = "cosine" if plan.schedule == "cosine" else constant
    return {"lr_scheduler": name, "lr_warmup_steps": plan.warmup_steps}


def _write_toml(values: Mapping[str, Any]) -> str:
    """JSON's texts, numbers and lists are TOML's."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def _write_kohya_flux(plan: Plan) -> dict[str, str]:
    """networks/lora_flux.py: `network_reg_dims` and `network_reg_lrs` are searched for in names such as
    lora_unet_double_blocks_0_img_attn_qkv; a rank of 0 leaves a layer out. `split_qkv` gives q, k and v their
    own factors."""
    _check(plan, ("flux",), ("lora",))
    layers = _fuse(plan, name_flux_layer)
    rank, *other_ranks = _list_values(target.rank for target in layers.values())
    rate, *other_rates = _list_values(target.rate for target in layers.values())
    pairs = [f"^(?!lora_unet_({'|'.join(merge_names(layers, '_'))})$)=0"]
    for own in other_ranks:
        pairs += _pair([layer for layer, target in layers.items() if target.rank == own], own)
    args = ["split_qkv=True", f"network_reg_dims={','.join(pairs)}"]
    pairs = []
    for own in other_rates:
        pairs += _pair([layer for layer, target in layers.items() if target.rate == own], own)
    args += [f"network_reg_lrs={','.join(pairs)}"] if pairs else []
    size = rank, _take_alpha(plan)
    text = _write_kohya_config(plan, "flux_train_network.py", "networks.lora_flux", args, rate, size)
    return {"recipe.toml": text}


def _pair(layers: Iterable[str], value: float) -> list[str]:
    return [f"^lora_unet_{pattern}$={value}" for pattern in merge_names(layers, "_")]


def _fuse(plan: Plan, name_layer: Callable[[str], str | None]) -> dict[str, Target]:
    """The original model's layers, of which some hold several of diffusers'. Raises MemControlError where the
    mask has a part of one, or a layer that the trainer does not reach."""
    members: dict[str, list[str]] = {}
    for name in plan.names:
        if layer := name_layer(name):
            members.setdefault(layer, []).append(name)
    found: dict[str, Target] = {}
    for name, target in plan.modules.items():
        layer = name_layer(name)
        if layer is None:
            raise MemControlError(f"it does not reach layer '{name}'")
        for other in members[layer]:
            own = plan.modules.get(other)
            if own is None or (own.rank, own.alpha, own.rate) != (target.rank, target.alpha, target.rate):
                raise MemControlError(
                    f"it trains '{layer}' as one layer, and the choice treats '{name}' and '{other}' in it "
                    "differently"
                )
        found[layer] = target
    return found


_FLUX_DOUBLE = {
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
}
_FLUX_SINGLE = {
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
}


def name_flux_layer(name: str) -> str | None:
    """What the original Flux calls the layer that diffusers' module is, or is a part of; None: outside of
    the blocks."""
    block, _, rest = name.partition(".")
    number, _, part = rest.partition(".")
    if block == "transformer_blocks" and part in _FLUX_DOUBLE:
        return f"double_blocks.{number}.{_FLUX_DOUBLE[part]}"
    if block == "single_transformer_blocks" and part in _FLUX_SINGLE:
        return f"single_blocks.{number}.{_FLUX_SINGLE[part]}"
    return None


def _write_kohya_sd3(plan: Plan) -> dict[str, str]:
    """networks/lora_sd3.py: a rank for each kind of layer (0 leaves it out) and a list of blocks for all
    kinds; so the mask must be their product."""
    _check(plan, ("sd3",), ("lora",))
    layers = _fuse(plan, name_sd3_layer)
    reachable = {layer for name in plan.names if (layer := name_sd3_layer(name))}
    ranks: dict[str, set[int]] = {kind: set() for kind in _SD3_KINDS}
    for layer, target in layers.items():
        ranks[_find_sd3_kind(layer)].add(target.rank)
    blocks = {int(layer.split(".")[1]) for layer in layers}
    product = {
        layer for layer in reachable if int(layer.split(".")[1]) in blocks and ranks[_find_sd3_kind(layer)]
    }
    if product != set(layers):
        raise MemControlError("it has one list of blocks for all kinds of layers, and the choice has several")
    if any(len(own) > 1 for own in ranks.values()):
        raise MemControlError("it has one rank for each kind of layer, and the choice has several")
    args = [f"{kind}={max(own, default=0)}" for kind, own in ranks.items()]
    args += [f"train_block_indices={','.join(map(str, sorted(blocks)))}", "split_qkv=True"]
    size = max(target.rank for target in plan.targets), _take_alpha(plan)
    rate = _take_rate(plan)
    text = _write_kohya_config(plan, "sd3_train_network.py", "networks.lora_sd3", args, rate, size)
    return {"recipe.toml": text}


_SD3_KINDS = {
    "context_attn_dim": ("context_block", "attn"),
    "context_mlp_dim": ("context_block", "mlp"),
    "context_mod_dim": ("context_block", "adaLN_modulation"),
    "x_attn_dim": ("x_block", "attn"),
    "x_mlp_dim": ("x_block", "mlp"),
    "x_mod_dim": ("x_block", "adaLN_modulation"),
}
_SD3_PARTS = {
    "attn.to_q": "x_block.attn.qkv",
    "attn.to_k": "x_block.attn.qkv",
    "attn.to_v": "x_block.attn.qkv",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.add_q_proj": "context_block.attn.qkv",
    "attn.add_k_proj": "context_block.attn.qkv",
    "attn.add_v_proj": "context_block.attn.qkv",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_q": "x_block.attn2.qkv",
    "attn2.to_k": "x_block.attn2.qkv",
    "attn2.to_v": "x_block.attn2.qkv",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
}


def name_sd3_layer(name: str) -> str | None:
    """What the original Stable Diffusion 3 calls the layer that diffusers' module is, or is a part of."""
    block, _, rest = name.partition(".")
    number, _, part = rest.partition(".")
    if block != "transformer_blocks" or part not in _SD3_PARTS:
        return None
    return f"joint_blocks.{number}.{_SD3_PARTS[part]}"


def _find_sd3_kind(layer: str) -> str:
    return next(kind for kind, words in _SD3_KINDS.items() if all(word in layer for word in words))


_UNET_WIDTHS = {"sd15": (320, 640, 1280, 1280), "sd2": (320, 640, 1280, 1280), "sdxl": (320, 640, 1280)}


def _write_kohya_unet(plan: Plan) -> dict[str, str]:
    """networks/lora.py has ranks by block alone, and no filter of names; lycoris.kohya, the module that
    sd-scripts loads for LyCORIS, has: a preset's names are matched from their beginning, and may have sizes
    of their own (lycoris/kohya.py, create_modules). LoHa and LoKr of SDXL are in sd-scripts itself."""
    if plan.widths != _UNET_WIDTHS[plan.architecture]:
        raise MemControlError("it knows U-Nets of the original width only")
    if plan.architecture == "sdxl" and plan.method in ("loha", "lokr") and _has_one_size(plan):
        return _write_kohya_patterns(plan)
    rename = name_sdxl_layer if plan.architecture == "sdxl" else str
    sizes = _group_by(plan, lambda target: (target.rank, measure_alpha(target)))
    patterns = {size: _match_whole(map(rename, names)) for size, names in sizes.items()}
    usual, *others = patterns
    preset = _write_toml(
        {
            "enable_conv": True,
            "unet_target_module": [],
            "unet_target_name": [pattern for own in patterns.values() for pattern in own],
            "text_encoder_target_module": [],
            "text_encoder_target_name": [],
            "use_fnmatch": False,
        }
    )
    algo = "lora" if plan.method == "dora" else plan.method
    for size in others:
        for pattern in patterns[size]:
            own = _write_toml({"algo": algo, "dim": size[0], "alpha": size[1]})
            preset += f"\n[name_algo_map.'{pattern}']\n{own}"
    args = [f"algo={algo}", "preset=lycoris_preset.toml", *(["dora_wd=True"] * (plan.method == "dora"))]
    args += [f"conv_dim={usual[0]}", f"conv_alpha={usual[1]}"]
    script = "sdxl_train_network.py" if plan.architecture == "sdxl" else "train_network.py"
    text = _write_kohya_config(plan, script, "lycoris.kohya", args, _take_rate(plan), usual)
    return {"recipe.toml": text, "lycoris_preset.toml": preset}


def _has_one_size(plan: Plan) -> bool:
    return len(_group_by(plan, lambda target: (target.rank, target.alpha))) == 1


def _match_whole(names: Iterable[str]) -> list[str]:
    return [f"{pattern}$" for pattern in merge_names(names)]


def _write_kohya_patterns(plan: Plan) -> dict[str, str]:
    """networks/network_base.py: a layer is left out where an exclude pattern matches its whole name and no
    include pattern does."""
    names = merge_names(map(name_sdxl_layer, plan.modules))
    rank, alpha = _take_rank(plan), _take_alpha(plan)
    args = ["exclude_patterns=['.*']", f"include_patterns={names!r}"]
    if any(not name.split(".")[2].startswith("attentions") for name in plan.modules):
        args += [f"conv_dim={rank}", f"conv_alpha={alpha}"]
    by_rate = _group_by(plan, lambda target: target.rate)
    rate, *others = by_rate
    if others:
        pairs = [
            f"{name}={own}" for own in others for name in merge_names(map(name_sdxl_layer, by_rate[own]))
        ]
        args.append(f"network_reg_lrs={','.join(pairs)}")
    script, module = "sdxl_train_network.py", f"networks.{plan.method}"
    return {"recipe.toml": _write_kohya_config(plan, script, module, args, rate, (rank, alpha))}


_SDXL_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def name_sdxl_layer(name: str) -> str:
    """What the original SDXL, whose names sd-scripts keeps (library/sdxl_original_unet.py), calls diffusers'
    module. Raises MemControlError for what lies outside of the blocks."""
    if found := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
        side, block, kind, number, part = found.groups()
        place = 3 * int(block) + int(number) + (side == "down")
        where = f"{'input' if side == 'down' else 'output'}_blocks.{place}.{int(kind == 'attentions')}"
    elif found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, number, part = found.groups()
        where = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
    elif found := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv", name):
        return f"input_blocks.{3 * int(found[1]) + 3}.0.op"
    elif found := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv", name):
        return f"output_blocks.{3 * int(found[1]) + 2}.2.conv"
    else:
        raise MemControlError(f"it does not reach layer '{name}'")
    return f"{where}.{_SDXL_RESNET.get(part, part) if kind == 'resnets' else part}"


_KOHYA: dict[str, Callable[[Plan], dict[str, str]]] = {
    "sd15": _write_kohya_unet,
    "sd2": _write_kohya_unet,
    "sdxl": _write_kohya_unet,
    "sd3": _write_kohya_sd3,
    "flux": _write_kohya_flux,
}


# ai-toolkit.


_AI_TOOLKIT = {
    "sd15": "sd1",
    "sd2": "sd2",
    "sdxl": "sdxl",
    "sd3": "sd3",
    "flux": "flux",
    "pixart": "pixart_sigma",
}


def _write_ai_toolkit(plan: Plan) -> dict[str, str]:
    """toolkit/lora_special.py: a layer is trained where an entry of `only_if_contains` is a part of its name,
    which begins with `transformer.` or `lora_unet.`; adapters of transformers have alpha = rank; kernels
    larger than 1 x 1 have a rank of their own, `conv`."""
    _check(plan, _AI_TOOLKIT, ("lora",))
    rank, alpha, rate = _take_rank(plan), _take_alpha(plan), _take_rate(plan)
    is_unet = plan.architecture in _UNET_WIDTHS
    if not is_unet and alpha != rank:
        raise MemControlError(
            f"it has adapters of transformers whose alpha = rank, and the choice has {_say([alpha, rank])}"
        )
    network: dict[str, Any] = {"type": "lora", "linear": rank, "linear_alpha": alpha}
    if any(".attentions." not in f".{name}" for name in plan.modules) and is_unet:
        network |= {"conv": rank, "conv_alpha": alpha}  # without it residual blocks are not looked at
    network |= {"transformer_only": False, "network_kwargs": {"only_if_contains": _list_contained(plan)}}
    train = {
        "batch_size": plan.batch_size,
        "steps": plan.steps,
        "lr": rate,
        "lr_scheduler": plan.schedule,
        "optimizer": "adamw",
        "optimizer_params": {"weight_decay": plan.weight_decay},
        "max_grad_norm": plan.max_grad_norm,
        "train_unet": True,
        "train_text_encoder": False,
    }
    process = {
        "type": "sd_trainer",
        "training_folder": "output",
        "network": network,
        "datasets": [_drop_empty({"folder_path": "IMAGES", "resolution": plan.resolution})],
        "train": train,
        "model": {"name_or_path": plan.base, "arch": _AI_TOOLKIT[plan.architecture]},
    }
    job = {"job": "extension", "config": {"name": plan.name, "process": [process]}}
    head = _comment("python run.py recipe.yaml; datasets.folder_path is yours to name", *plan.notes)
    return {"recipe.yaml": head + yaml.safe_dump(job, sort_keys=False, width=1000)}


def _drop_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _list_contained(plan: Plan) -> list[str]:
    """Whole names, without what the trainer may put before them. Raises MemControlError where one is a part
    of another layer's."""
    prefix = "unet." if plan.architecture in _UNET_WIDTHS else "transformer."
    outside = [
        f"{prefix}{name}" for name, adapted in plan.names.items() if adapted and name not in plan.modules
    ]
    for name in plan.modules:
        if longer := next((other for other in outside if f"{prefix}{name}" in other), None):
            raise MemControlError(
                f"it has filters by parts of names, and that for '{name}' would take '{longer}' too"
            )
    return [f"{prefix}{name}" for name in plan.modules]


# OneTrainer.


_ONETRAINER = {
    "sd15": "STABLE_DIFFUSION_15",
    "sd2": "STABLE_DIFFUSION_21",
    "sdxl": "STABLE_DIFFUSION_XL_10_BASE",
    "sd3": "STABLE_DIFFUSION_3",
    "flux": "FLUX_DEV_1",
    "pixart": "PIXART_SIGMA",
    "sana": "SANA",
}


def _write_onetrainer(plan: Plan) -> dict[str, str]:
    """modules/util/ModuleFilter.py: `layer_filter` is split at commas, and each regular expression searched
    for in the names of Linear and Conv2d (modules/module/LoRAModule.py). Training ends after epochs."""
    _check(plan, _ONETRAINER, ("lora", "dora", "loha"))
    kind = {"dora": "LORA"}.get(plan.method, plan.method.upper())
    values = {
        "training_method": "LORA",
        "model_type": _ONETRAINER[plan.architecture],
        "base_model_name": plan.base,
        "output_model_destination": f"models/{plan.name}.safetensors",
        "output_model_format": "SAFETENSORS",
        "peft_type": kind,
        "lora_rank": _take_rank(plan),
        "lora_alpha": _take_alpha(plan),
        "lora_decompose": plan.method == "dora",
        "lora_decompose_output_axis": True,  # as published, and as peft
        "layer_filter": ",".join(f"(^|[.]){pattern}$" for pattern in merge_names(plan.modules)),
        "layer_filter_preset": "custom",
        "layer_filter_regex": True,
        "learning_rate": _take_rate(plan),
        "learning_rate_scheduler": plan.schedule.upper(),
        "learning_rate_warmup_steps": plan.warmup_steps,
        "batch_size": plan.batch_size,
        "epochs": plan.epochs,
        "clip_grad_norm": plan.max_grad_norm,
        "optimizer": {"optimizer": "ADAMW", "weight_decay": plan.weight_decay},
        **{part: {"train": False} for part in ("text_encoder", "text_encoder_2", "text_encoder_3")},
        **({"resolution": str(plan.resolution)} if plan.resolution else {}),
    }
    return {"recipe.json": f"{json.dumps(values, indent=2)}\n"}


# SimpleTuner.


_SIMPLETUNER = {"sd15": "sd1x", "sd2": "sd2x", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux", "sana": "sana"}


def _write_simpletuner(plan: Plan) -> dict[str, str]:
    """simpletuner/helpers/models/common.py: `peft_lora_target_modules` is peft's list of endings, of names as
    in diffusers; one rank and one alpha. Its PixArt takes LyCORIS alone."""
    _check(plan, _SIMPLETUNER, ("lora", "dora"))
    values = {
        "model_type": "lora",
        "model_family": _SIMPLETUNER[plan.architecture],
        "pretrained_model_name_or_path": plan.base,
        "lora_type": "standard",
        "lora_rank": _take_rank(plan),
        "lora_alpha": _take_alpha(plan),
        "peft_lora_target_modules": find_suffixes(plan),
        "use_dora": plan.method == "dora",
        "learning_rate": _take_rate(plan),
        **_name_schedule(plan),
        "max_train_steps": plan.steps,
        "num_train_epochs": 0,
        "train_batch_size": plan.batch_size,
        "max_grad_norm": plan.max_grad_norm,
        **({"resolution": plan.resolution} if plan.resolution else {}),
    }
    return {"config.json": f"{json.dumps(values, indent=2)}\n"}


# diffusers' scripts.


_SCRIPTS = {
    "sd15": "text_to_image/train_text_to_image_lora.py",
    "sd2": "text_to_image/train_text_to_image_lora.py",
    "sdxl": "text_to_image/train_text_to_image_lora_sdxl.py",
    "sd3": "dreambooth/train_dreambooth_lora_sd3.py",
    "flux": "dreambooth/train_dreambooth_lora_flux.py",
    "sana": "dreambooth/train_dreambooth_lora_sana.py",
}
_WITH_ALPHA = ("flux", "sana")  # their --lora_alpha is 4 unless given; in the other scripts it is the rank


def _write_diffusers(plan: Plan) -> dict[str, str]:
    """A script of diffusers' examples: those of transformers split `--lora_layers` at commas into peft's list
    of endings; those of U-Nets train the attention projections of all blocks."""
    _check(plan, _SCRIPTS, ("lora",))
    rank, alpha, rate = _take_rank(plan), _take_alpha(plan), _take_rate(plan)
    options: dict[str, Any] = {"pretrained_model_name_or_path": plan.base, "rank": rank}
    if plan.architecture in _WITH_ALPHA and alpha == int(alpha):
        options["lora_alpha"] = int(alpha)
    elif alpha != rank:
        raise MemControlError(f"it has alpha = rank, and the choice has {_say([alpha, rank])}")
    if plan.architecture not in _UNET_WIDTHS:
        options["lora_layers"] = ",".join(find_suffixes(plan))
    elif {name for name in plan.names if f".{name}".endswith(_ATTENTION)} != plan.modules.keys():
        raise MemControlError("it trains the attention projections of all of a U-Net's blocks, no fewer")
    options |= {
        "learning_rate": rate,
        **_name_schedule(plan),
        "max_train_steps": plan.steps,
        "train_batch_size": plan.batch_size,
        "adam_weight_decay": plan.weight_decay,
        "max_grad_norm": plan.max_grad_norm,
        **({"resolution": plan.resolution} if plan.resolution else {}),
    }
    lines = [f"accelerate launch examples/{_SCRIPTS[plan.architecture]}"]
    lines += [f"--{key}={shlex.quote(str(value))}" for key, value in options.items()]
    head = _comment("to be completed by the options that name your images and the output", *plan.notes)
    return {"recipe.sh": head + " \\\n  ".join(lines) + "\n"}


# peft itself.


_PEFT_CLASSES = {
    "lora": "LoraConfig",
    "dora": "LoraConfig",
    "loha": "LoHaConfig",
    "lokr": "LoKrConfig",
    "oft": "OFTConfig",
    "ia3": "IA3Config",
    "ln_tuning": "LNTuningConfig",
}


def _write_peft(plan: Plan) -> dict[str, str]:
    """A config for `inject_adapter_in_model` or diffusers' `add_adapter`: `target_modules` as one regular
    expression for whole names, sizes of single layers by `rank_pattern` and `alpha_pattern`
    (peft/utils/other.py, get_pattern_key)."""
    _check(plan, [plan.architecture], tuple(_PEFT_CLASSES))
    rates = _group_by(plan, lambda target: target.rate)
    given = ", ".join(f"{key}={value!r}" for key, value in _list_peft_arguments(plan).items())
    name = _PEFT_CLASSES[plan.method]
    lines = [
        f"from peft import {name}\n",
        f"config = {name}({given})",
        f"base = {plan.base!r}",
        f"learning_rate = {next(iter(rates))}",
    ]
    if len(rates) > 1:
        others = {"|".join(merge_names(names)): rate for rate, names in list(rates.items())[1:]}
        lines.append(f"learning_rate_of_others = {others!r}  # by whole names")
    lines += [
        f"steps, batch_size = {plan.steps}, {plan.batch_size}",
        f"schedule, warmup_steps = {plan.schedule!r}, {plan.warmup_steps}",
        f"weight_decay, max_grad_norm = {plan.weight_decay}, {plan.max_grad_norm}",
    ]
    return {"recipe.py": _comment(*plan.notes) + "\n".join(lines) + "\n"}


def _list_peft_arguments(plan: Plan) -> dict[str, Any]:
    targets: dict[str, Any] = {"target_modules": "|".join(merge_names(plan.modules))}
    if plan.method == "ia3":
        return targets | {"feedforward_modules": []}
    if plan.method == "ln_tuning":
        return targets
    if plan.method == "oft":
        return targets | {"r": 0, "oft_block_size": _take_rank(plan), "use_cayley_neumann": False}
    sizes = _group_by(plan, lambda target: (target.rank, measure_alpha(target)))
    (rank, alpha), *others = sizes
    patterns = {size: "|".join(f"^{name}" for name in merge_names(sizes[size])) for size in others}
    has_alpha = "lora_alpha" if plan.method in ("lora", "dora") else "alpha"
    given = targets | {"r": rank, has_alpha: alpha}
    if patterns:
        given["rank_pattern"] = {name: size[0] for size, name in patterns.items()}
        given["alpha_pattern"] = {name: size[1] for size, name in patterns.items()}
    return given | ({"use_dora": True} if plan.method == "dora" else {})


TRAINERS: dict[str, Callable[[Plan], dict[str, str]]] = {
    "kohya": _write_kohya,
    "ai-toolkit": _write_ai_toolkit,
    "onetrainer": _write_onetrainer,
    "simpletuner": _write_simpletuner,
    "diffusers": _write_diffusers,
    "peft": _write_peft,
}
