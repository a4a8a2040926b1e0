"""Owns the recipe for kohya's sd-scripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from memcontrol.core.errors import MemControlError
from memcontrol.model.parts import Target
from memcontrol.recipes.original_names import name_flux_layer, name_sd3_layer, name_sdxl_layer
from memcontrol.recipes.patterns import merge_names
from memcontrol.recipes.plan import UNET_WIDTHS, RecipePlan, group_modules, list_values, measure_alpha
from memcontrol.recipes.refusals import check_plan, take_alpha, take_rank, take_rate
from memcontrol.recipes.wording import name_schedule, write_comment


def write_kohya(plan: RecipePlan) -> dict[str, str]:
    check_plan(plan, _KOHYA, ("lora", "dora", "loha", "lokr"))
    return _KOHYA[plan.architecture](plan)


def _write_kohya_config(
    plan: RecipePlan, script: str, module: str, args: list[str], rate: float, size: tuple[int, float]
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
        **name_schedule(plan),
        "save_model_as": "safetensors",
    }
    call = f"accelerate launch {script} --config_file recipe.toml --dataset_config DATASET.toml"
    head = write_comment(call, *plan.notes)
    return head + _write_toml(values)


def _write_toml(values: Mapping[str, Any]) -> str:
    """JSON's texts, numbers and lists are TOML's."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def _write_kohya_flux(plan: RecipePlan) -> dict[str, str]:
    """networks/lora_flux.py: `network_reg_dims` and `network_reg_lrs` are searched for in names such as
    lora_unet_double_blocks_0_img_attn_qkv; a rank of 0 leaves a layer out. `split_qkv` gives q, k and v their
    own factors."""
    check_plan(plan, ("flux",), ("lora",))
    layers = _fuse(plan, name_flux_layer)
    rank, *other_ranks = list_values(target.rank for target in layers.values())
    rate, *other_rates = list_values(target.rate for target in layers.values())
    pairs = [f"^(?!lora_unet_({'|'.join(merge_names(layers, '_'))})$)=0"]
    for own in other_ranks:
        pairs += _pair([layer for layer, target in layers.items() if target.rank == own], own)
    args = ["split_qkv=True", f"network_reg_dims={','.join(pairs)}"]
    pairs = []
    for own in other_rates:
        pairs += _pair([layer for layer, target in layers.items() if target.rate == own], own)
    args += [f"network_reg_lrs={','.join(pairs)}"] if pairs else []
    size = rank, take_alpha(plan)
    text = _write_kohya_config(plan, "flux_train_network.py", "networks.lora_flux", args, rate, size)
    return {"recipe.toml": text}


def _pair(layers: Iterable[str], value: float) -> list[str]:
    return [f"^lora_unet_{pattern}$={value}" for pattern in merge_names(layers, "_")]


def _fuse(plan: RecipePlan, name_layer: Callable[[str], str | None]) -> dict[str, Target]:
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


def _write_kohya_sd3(plan: RecipePlan) -> dict[str, str]:
    """networks/lora_sd3.py: a rank for each kind of layer (0 leaves it out) and a list of blocks for all
    kinds; so the mask must be their product."""
    check_plan(plan, ("sd3",), ("lora",))
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
    size = max(target.rank for target in plan.targets), take_alpha(plan)
    rate = take_rate(plan)
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


def _find_sd3_kind(layer: str) -> str:
    return next(kind for kind, words in _SD3_KINDS.items() if all(word in layer for word in words))


def _write_kohya_unet(plan: RecipePlan) -> dict[str, str]:
    """networks/lora.py has ranks by block alone, and no filter of names; lycoris.kohya, the module that
    sd-scripts loads for LyCORIS, has: a preset's names are matched from their beginning, and may have sizes
    of their own (lycoris/kohya.py, create_modules). LoHa and LoKr of SDXL are in sd-scripts itself."""
    if plan.widths != UNET_WIDTHS[plan.architecture]:
        raise MemControlError("it knows U-Nets of the original width only")
    if plan.architecture == "sdxl" and plan.method in ("loha", "lokr") and _has_one_size(plan):
        return _write_kohya_patterns(plan)
    rename = name_sdxl_layer if plan.architecture == "sdxl" else str
    sizes = group_modules(plan, lambda target: (target.rank, measure_alpha(target)))
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
    text = _write_kohya_config(plan, script, "lycoris.kohya", args, take_rate(plan), usual)
    return {"recipe.toml": text, "lycoris_preset.toml": preset}


def _has_one_size(plan: RecipePlan) -> bool:
    return len(group_modules(plan, lambda target: (target.rank, target.alpha))) == 1


def _match_whole(names: Iterable[str]) -> list[str]:
    return [f"{pattern}$" for pattern in merge_names(names)]


def _write_kohya_patterns(plan: RecipePlan) -> dict[str, str]:
    """networks/network_base.py: a layer is left out where an exclude pattern matches its whole name and no
    include pattern does."""
    names = merge_names(map(name_sdxl_layer, plan.modules))
    rank, alpha = take_rank(plan), take_alpha(plan)
    args = ["exclude_patterns=['.*']", f"include_patterns={names!r}"]
    if any(not name.split(".")[2].startswith("attentions") for name in plan.modules):
        args += [f"conv_dim={rank}", f"conv_alpha={alpha}"]
    by_rate = group_modules(plan, lambda target: target.rate)
    rate, *others = by_rate
    if others:
        pairs = [
            f"{name}={own}" for own in others for name in merge_names(map(name_sdxl_layer, by_rate[own]))
        ]
        args.append(f"network_reg_lrs={','.join(pairs)}")
    script, module = "sdxl_train_network.py", f"networks.{plan.method}"
    return {"recipe.toml": _write_kohya_config(plan, script, module, args, rate, (rank, alpha))}


_KOHYA: dict[str, Callable[[RecipePlan], dict[str, str]]] = {
    "sd15": _write_kohya_unet,
    "sd2": _write_kohya_unet,
    "sdxl": _write_kohya_unet,
    "sd3": _write_kohya_sd3,
    "flux": _write_kohya_flux,
}
