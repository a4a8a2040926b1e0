"""Recipes, resolved as their trainers resolve them: rules are written anew from the trainers' code, names of
original models come from diffusers' own conversions, files are read by their formats' parsers."""

import argparse
import ast
import contextlib
import functools
import io
import json
import random
import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from commands import run
from torch import nn

import memcontrol
from memcontrol.cli.parser import make_parser
from memcontrol.config.load import load_config
from memcontrol.config.settings import load_study_space
from memcontrol.core.choice import Choice, Setting
from memcontrol.core.errors import MemControlError
from memcontrol.core.space_yaml import list_shipped_spaces, load_space, parse_space
from memcontrol.model.adapter import find_targets
from memcontrol.model.source import make_empty_denoiser
from memcontrol.recipes.plan import RecipePlan
from memcontrol.recipes.planning import list_names, name_architecture
from memcontrol.recipes.planning import make_plan as plan_of_study
from memcontrol.recipes.trainers import TRAINERS, write_recipe

ARCHITECTURES = Path(__file__).parent / "architectures"
BASES = {name: name.removesuffix("-blocks") for name in list_shipped_spaces()} | {"digits": "tiny"}
UNETS = ("sd15", "sd2", "sdxl")
list_all = functools.cache(list_names)


@functools.cache
def open_base(name):
    return make_empty_denoiser(name if name == "tiny" else str(ARCHITECTURES / name))


def make_plan(space, choice):
    name = BASES.get(space.name, "sd15")
    denoiser = open_base(name if name == "tiny" or (ARCHITECTURES / name).is_dir() else "sd15")
    targets = find_targets(denoiser, space, choice)
    widths = tuple(getattr(denoiser.config, "block_out_channels", None) or ())
    more = {"resolution": 512, "widths": widths, "warmup_steps": 5}
    kind, names = name_architecture(denoiser), list_all(denoiser)
    return denoiser, RecipePlan(kind, "owner/base", names, tuple(targets), 100, 4, 50, **more)


@functools.cache
def plan_mask(name, groups):
    space = load_space(name)
    return make_plan(space, space.choice(groups, "lora", 0.5))


def list_masks(space):
    """Each group alone, all, and pairs drawn at random."""
    able, draw = space.select_groups("lora"), random.Random(0)
    pairs = [tuple(sorted(draw.sample(able, 2))) for _ in range(3)]
    return [*((group,) for group in able), able, *pairs]


# The names that original models have, as diffusers reads them.


class Checkpoint(dict):
    """Has what is asked for."""

    def __missing__(self, key):
        return torch.zeros(2)

    def pop(self, key, default=None):
        return super().pop(key) if key in self else torch.zeros(2)


@functools.cache
def map_original(architecture):
    """Original layer to the diffusers modules that it becomes, read off diffusers' conversion of a checkpoint
    whose weights are the layers' numbers."""
    from diffusers.loaders import single_file_utils

    if architecture == "flux":
        sides = [f"{side}_{part}" for side in ("img", "txt") for part in ("mod.lin", "mlp.0", "mlp.2")]
        sides += [f"{side}_attn.{part}" for side in ("img", "txt") for part in ("qkv", "proj")]
        layers = [f"double_blocks.{i}.{part}" for i in range(19) for part in sides]
        single = ("linear1", "linear2", "modulation.lin")
        layers += [f"single_blocks.{i}.{part}" for i in range(38) for part in single]
        rows, convert = 21504, single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    else:
        parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        layers = [
            f"joint_blocks.{i}.{side}.{part}"
            for i in range(24)
            for side in ("x_block", "context_block")
            for part in parts
            if (i, side) != (23, "context_block") or not part.startswith(("attn.proj", "mlp"))
        ]
        rows, convert = 12, single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers
    checkpoint = Checkpoint()
    for number, layer in enumerate(layers, 1):
        weight = torch.tensor(float(number)).expand(rows)
        checkpoint |= {f"{layer}.weight": weight, f"{layer}.bias": weight}
    found = {layer: set() for layer in layers}
    for name, tensor in convert(checkpoint).items():
        number = int(tensor.flatten()[0])
        if number and name.endswith(".weight"):
            found[layers[number - 1]].add(name.removesuffix(".weight"))
    return found


@functools.cache
def map_sdxl():
    """The same for the blocks of SDXL, from the names that are written."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    from memcontrol.recipes.original_names import name_sdxl_layer

    denoiser = open_base("sdxl")
    inside = [name for name in list_adapted(denoiser) if re.match("(down|up|mid)_block", name)]
    layers = [name_sdxl_layer(name) for name in inside]
    number = {
        f"model.diffusion_model.{layer}.{kind}": torch.tensor(i)
        for i, layer in enumerate(layers)
        for kind in ("weight", "bias")
    }
    number["model.diffusion_model.input_blocks.0.0.weight"] = None  # counted, not converted
    converted = convert_ldm_unet_checkpoint(number, {"layers_per_block": 2})
    inner = {name: i for name, i in converted.items() if i is not None}
    return {layers[i]: name.rpartition(".")[0] for name, i in inner.items()}


def test_names_of_sdxl_are_those_that_diffusers_reads():
    inside = {name for name in list_adapted(open_base("sdxl")) if re.match("(down|up|mid)_block", name)}
    assert len(map_sdxl()) == len(inside) and set(map_sdxl().values()) == inside


# What each trainer makes of a config: module to (rank, alpha).


@functools.cache
def list_adapted(denoiser):
    return {name: part for name, part in denoiser.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))}


def is_pointwise(part):
    return isinstance(part, nn.Linear) or part.kernel_size == (1, 1)


def split_pairs(text):
    """As sd-scripts does it."""
    return [(key, float(value)) for key, value in (pair.split("=", 1) for pair in text.split(","))]


def resolve_kohya(files, denoiser, plan):
    config = tomllib.loads(files["recipe.toml"])
    args = dict(text.split("=", 1) for text in config["network_args"])
    size = config["network_dim"], config["network_alpha"]
    check_training(config["learning_rate"], config["max_train_steps"], config["train_batch_size"])
    assert config["network_train_unet_only"] is True
    if config["network_module"] == "networks.lora_flux":
        found = resolve_flux(args, size)
    elif config["network_module"] == "networks.lora_sd3":
        found = resolve_sd3(args, size)
    else:
        original = {name: name for name in list_adapted(denoiser)}
        if plan.architecture == "sdxl":
            original = map_sdxl()
        if config["network_module"] == "lycoris.kohya":
            preset = tomllib.loads(files[args["preset"]])
            return resolve_lycoris(preset, args, size, original, denoiser)
        return resolve_patterns(args, size, original, denoiser)
    assert args["split_qkv"] == "True"  # else q, k and v would share a factor
    return {name: own for layer, own in found.items() for name in map_original(plan.architecture)[layer]}


def resolve_flux(args, size):
    """networks/lora_flux.py: the first expression that is found in the underscored name."""
    found = {}
    for layer in map_original("flux"):
        name = f"lora_unet.{layer}".replace(".", "_")
        ranks = [rank for pattern, rank in split_pairs(args["network_reg_dims"]) if re.search(pattern, name)]
        assert len(ranks) <= 1  # its page says that the last one counts, its code the first
        if rank := int((ranks or size)[0]):
            found[layer] = rank, size[1]
    return found


def resolve_sd3(args, size):
    """networks/lora_sd3.py: kinds by two words in the name, then the list of blocks."""
    kinds = ("context_block attn", "context_block mlp", "context_block adaLN_modulation")
    kinds += ("x_block attn", "x_block mlp", "x_block adaLN_modulation")
    keys = [f"{kind}_dim" for kind in "context_attn context_mlp context_mod x_attn x_mlp x_mod".split()]
    blocks = args["train_block_indices"].split(",")
    found = {}
    for layer in map_original("sd3"):
        name = f"lora_unet.{layer}".replace(".", "_")
        kind = next(i for i, words in enumerate(kinds) if all(word in name for word in words.split()))
        rank = int(args[keys[kind]])
        if rank and name.split("_")[4] in blocks:
            found[layer] = rank, size[1]
    return found


def resolve_lycoris(preset, args, size, original, denoiser):
    """lycoris/kohya.py: names matched from their beginning, with sizes of their own or those of all."""
    assert preset["unet_target_module"] == [] and not preset["use_fnmatch"]
    own, adapted, found = preset.get("name_algo_map", {}), list_adapted(denoiser), {}
    usual = {True: size, False: (int(args["conv_dim"]), float(args["conv_alpha"]))}
    for layer, name in original.items():
        if any(re.match(pattern, layer) for pattern in preset["unet_target_name"]):
            sizes = [(at["dim"], at["alpha"]) for pattern, at in own.items() if re.match(pattern, layer)]
            found[name] = sizes[0] if sizes else usual[is_pointwise(adapted[name])]
    return found


def resolve_patterns(args, size, original, denoiser):
    """networks/network_base.py."""
    without, within = (ast.literal_eval(args[f"{kind}_patterns"]) for kind in ("exclude", "include"))
    adapted, found = list_adapted(denoiser), {}
    for layer, name in original.items():
        is_out = any(re.fullmatch(pattern, layer) for pattern in without)
        if is_out and not any(re.fullmatch(pattern, layer) for pattern in within):
            continue
        if is_pointwise(adapted[name]):
            found[name] = size
        elif "conv_dim" in args:
            found[name] = int(args["conv_dim"]), float(args["conv_alpha"])
    return found


def resolve_ai_toolkit(files, denoiser, plan):
    """toolkit/lora_special.py."""
    job = yaml.safe_load(files["recipe.yaml"])["config"]["process"][0]
    network, train = job["network"], job["train"]
    check_training(train["lr"], train["steps"], train["batch_size"])
    roots, is_unet = {type(denoiser).__name__}, plan.architecture in UNETS
    if is_unet:
        roots = {"Transformer2DModel"}
        roots |= {"ResnetBlock2D", "Downsample2D", "Upsample2D"} if "conv" in network else set()
    seen = {
        f"{name}.{inside}".strip(".")
        for name, part in denoiser.named_modules()
        if type(part).__name__ in roots
        for inside, _ in part.named_modules()
    }
    found = {}
    for name, part in list_adapted(denoiser).items():
        whole = f"{'lora_unet' if is_unet else 'transformer'}.{name}"
        if name in seen and any(word in whole for word in network["network_kwargs"]["only_if_contains"]):
            kind = "linear" if is_pointwise(part) else "conv"
            if kind in network:
                rank = network[kind]
                found[name] = rank, network[f"{kind}_alpha"] if is_unet else rank
    return found


def resolve_onetrainer(files, denoiser, plan):
    """modules/util/ModuleFilter.py; a filter that matches nothing is an error."""
    config = json.loads(files["recipe.json"])
    assert config["layer_filter_regex"] is True and config["epochs"] == 9  # of 12 full batches
    check_training(config["learning_rate"], 100, config["batch_size"])
    filters = [text.strip() for text in config["layer_filter"].split(",")]
    taken = {text: [name for name in list_adapted(denoiser) if re.search(text, name)] for text in filters}
    assert all(taken.values())
    size = config["lora_rank"], config["lora_alpha"]
    return {name: size for names in taken.values() for name in names}


def resolve_endings(denoiser, endings, size):
    """peft/tuners/tuners_utils.py, of any module: one that is no layer would be refused."""
    names = [name for name, _ in denoiser.named_modules()]
    return {name: size for name in names if any(name == end or name.endswith(f".{end}") for end in endings)}


def resolve_simpletuner(files, denoiser, plan):
    config = json.loads(files["config.json"])
    check_training(config["learning_rate"], config["max_train_steps"], config["train_batch_size"])
    size = config["lora_rank"], config["lora_alpha"]
    return resolve_endings(denoiser, config["peft_lora_target_modules"], size)


def resolve_diffusers(files, denoiser, plan):
    words = shlex.split(files["recipe.sh"].replace("\\\n", ""), comments=True)
    parser = argparse.ArgumentParser(allow_abbrev=False)  # with the scripts' own options
    for name in "rank train_batch_size max_train_steps lr_warmup_steps resolution lora_alpha".split():
        parser.add_argument(f"--{name}", type=int)
    for name in ("learning_rate", "adam_weight_decay", "max_grad_norm"):
        parser.add_argument(f"--{name}", type=float)
    for name in ("pretrained_model_name_or_path", "lr_scheduler", "lora_layers"):
        parser.add_argument(f"--{name}")
    given = parser.parse_args(words[3:])
    check_training(given.learning_rate, given.max_train_steps, given.train_batch_size)
    fixed = "to_k,to_q,to_v,to_out.0"  # of the scripts that have no --lora_layers
    size = given.rank, given.lora_alpha or given.rank
    return resolve_endings(denoiser, (given.lora_layers or fixed).split(","), size)


def resolve_peft(files, denoiser, plan):
    """By peft itself on the base's own modules, without weights."""
    config = run_peft(files)["config"]
    found = {}
    for name in list_adapted(denoiser):
        if re.fullmatch(config.target_modules, name):
            ranks, alphas = (
                [value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)]
                for pattern in (config.rank_pattern, config.alpha_pattern)
            )
            found[name] = (ranks or [config.r])[0], (alphas or [config.lora_alpha])[0]
    return found


def run_peft(files):
    values = {}
    exec(compile(files["recipe.py"], "recipe.py", "exec"), values)
    check_training(values["learning_rate"], values["steps"], values["batch_size"])
    return values


RATE = []


def check_training(rate, steps, batch_size):
    assert (steps, batch_size) == (100, 4) and rate == pytest.approx(RATE[-1])


RULES = {name: globals()[f"resolve_{name.replace('-', '_')}"] for name in TRAINERS}
UNKNOWN = {  # what a trainer does not train by parts
    "kohya": {"pixart", "sana", "UNet2DModel"},
    "ai-toolkit": {"sana", "UNet2DModel"},
    "onetrainer": {"UNet2DModel"},
    "simpletuner": {"pixart", "UNet2DModel"},
    "diffusers": {"pixart", "UNet2DModel"},
    "peft": set(),
}


def is_expressible(trainer, denoiser, plan):
    """By brute force over what the trainer can say."""
    mask, kind = {target.module for target in plan.targets}, plan.architecture
    if kind in UNKNOWN[trainer]:
        return False
    if trainer == "kohya" and kind in ("flux", "sd3"):
        layers = {layer: names for layer, names in map_original(kind).items() if names & mask}
        is_whole = all(names <= mask for names in layers.values())
        if kind == "flux" or not is_whole:
            return is_whole
        split = {(layer.split(".")[1], ".".join(layer.split(".")[2:4])) for layer in layers}
        blocks, kinds = map(set, zip(*split))
        exists = {(layer.split(".")[1], ".".join(layer.split(".")[2:4])) for layer in map_original(kind)}
        return split == {(block, own) for block, own in exists if block in blocks and own in kinds}
    if trainer == "kohya":
        return denoiser is not open_base("tiny")  # narrower than any that it loads
    if trainer == "diffusers" and kind in UNETS:
        return mask == set(resolve_endings(denoiser, ("to_k", "to_q", "to_v", "to_out.0"), 0))
    return True


@pytest.mark.parametrize("name", sorted(list_shipped_spaces()))
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_recipe_selects_the_masks_modules_and_no_other(trainer, name):
    space = load_space(name)
    if "lora" not in space.methods:
        choice = space.choice(list(space.groups), space.methods[0], 0.5)
        with pytest.raises(MemControlError, match=f"no recipe for {trainer}: it .*none of them can"):
            write_recipe(make_plan(space, choice)[1], trainer)
        return
    for groups in list_masks(space):
        denoiser, plan = plan_mask(name, groups)
        RATE.append(space.choice(groups, "lora", 0.5).learning_rate)
        if not is_expressible(trainer, denoiser, plan):
            with pytest.raises(MemControlError, match=rf"no recipe for {trainer}: it .*; .*peft can$"):
                write_recipe(plan, trainer)
            continue
        found = RULES[trainer](write_recipe(plan, trainer), denoiser, plan)
        assert found == {target.module: (target.rank, target.rank) for target in plan.targets}


MIXED = r"""
groups:
  mid: {patterns: 'mid_block\..*(to_[qkv]|to_out\.0)', rank: [4]}
  conv:
    patterns: 'up_blocks\.1\.resnets\.\d\.(conv1|conv2|conv_shortcut|time_emb_proj)'
    rank: [8]
    alpha: 2.0
methods: [lora, dora, loha, lokr]
learning_rate: {lora: [1.0e-5, 1.0e-3], dora: [1.0e-5, 1.0e-3], loha: [1.0e-5, 1.0e-3],
  lokr: [1.0e-5, 1.0e-3], full: [1.0e-6, 1.0e-4]}
rank: [4, 8]
"""


def plan_mixed(base, method="lora", groups=("mid", "conv"), **more):
    space = replace(parse_space(yaml.safe_load(MIXED), base), name=f"{base}-blocks")
    RATE.append(1e-4)
    return make_plan(space, Choice(groups, method, 1e-4, 4, **more))


RANKS = {"per_group": (("conv", Setting("lora", 1e-4, 8)),)}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_ranks_of_single_groups_are_kept_or_refused(trainer):
    denoiser, plan = plan_mixed("sd15", **RANKS)
    sizes = {target.module: (target.rank, target.rank * target.alpha) for target in plan.targets}
    assert set(sizes.values()) == {(4, 4.0), (8, 16.0)}
    if trainer in ("kohya", "peft"):
        assert RULES[trainer](write_recipe(plan, trainer), denoiser, plan) == sizes
    else:
        with pytest.raises(MemControlError, match="has one rank for all layers.* 8 .*|; kohya and peft can"):
            write_recipe(plan, trainer)


@pytest.mark.parametrize("method", ["dora", "loha", "lokr"])
@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_other_methods_go_to_who_has_them(method, base):
    denoiser, plan = plan_mixed(base, method, ("conv",))
    sizes = {target.module: (4, 8.0) for target in plan.targets}
    able = {"dora": {"kohya", "onetrainer", "simpletuner", "peft"}, "loha": {"kohya", "onetrainer", "peft"}}
    for trainer in TRAINERS:
        if trainer not in able.get(method, {"kohya", "peft"}):
            with pytest.raises(MemControlError, match=f"it has no method {method}; .* can"):
                write_recipe(plan, trainer)
        elif trainer != "peft":
            assert RULES[trainer](write_recipe(plan, trainer), denoiser, plan) == sizes
    if base == "sdxl" and method != "dora":
        config = tomllib.loads(write_recipe(plan, "kohya")["recipe.toml"])
        assert config["network_module"] == f"networks.{method}"


def test_learning_rates_of_single_groups_are_kohyas_of_flux():
    space = load_space("flux-blocks")
    slow = Setting("lora", 2e-5, 16)
    choice = Choice(
        ("double_1_attention", "double_2_attention"), "lora", 1e-4, 16, (("double_2_attention", slow),)
    )
    _, plan = make_plan(space, choice)
    config = tomllib.loads(write_recipe(plan, "kohya")["recipe.toml"])
    args = dict(text.split("=", 1) for text in config["network_args"])
    rates = {target.module: target.rate for target in plan.targets}
    for layer, names in map_original("flux").items():
        name = f"lora_unet.{layer}".replace(".", "_")
        own = [rate for key, rate in split_pairs(args["network_reg_lrs"]) if re.search(key, name)]
        for module in names & rates.keys():
            assert (own or [config["learning_rate"]])[0] == rates[module]
    for trainer in TRAINERS:
        if trainer not in ("kohya", "peft"):
            with pytest.raises(MemControlError, match="one learning rate for all .*; kohya and peft can"):
                write_recipe(plan, trainer)


def test_what_a_trainer_cannot_say_is_said_in_one_line():
    def refuse(trainer, plan):
        with pytest.raises(MemControlError) as error:
            write_recipe(plan, trainer)
        assert "\n" not in str(error.value)
        return str(error.value)

    flux = load_space("flux-blocks")
    _, plan = make_plan(flux, flux.choice(("single_1_attention",), "lora", 0.5))
    text = refuse("kohya", plan)
    assert (
        "'single_blocks.0.linear1' as one layer" in text and "'single_transformer_blocks.0.proj_mlp'" in text
    )
    assert text.endswith("ai-toolkit and onetrainer and simpletuner and diffusers and peft can")
    doubled = replace(plan, targets=tuple(replace(target, alpha=2.0) for target in plan.targets))
    assert "whose alpha = rank, and the choice has 32 and 16" in refuse("ai-toolkit", doubled)
    _, plan = make_plan(flux, flux.choice(("single_1_attention",), "svdiff", 0.5))
    assert "has no method svdiff" in refuse("peft", plan) and "`retrain` and `export`" in refuse("peft", plan)
    sd3 = load_space("sd3-blocks")
    _, plan = make_plan(sd3, sd3.choice(("q1_text", "q2_image"), "lora", 0.5))
    assert "one list of blocks for all kinds" in refuse("kohya", plan)
    assert "trainer 'comfy' is unknown; allowed: kohya" in refuse("comfy", plan)


METHODS = {"lora": "sd15-sites-complete", "dora": "pixart-blocks"}


@pytest.mark.parametrize("method", [*METHODS, "loha", "lokr", "oft", "ia3", "ln_tuning"])
def test_peft_wraps_what_its_recipe_names(method):
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    pattern = r"mid_block\..*norm.*" if method == "ln_tuning" else r"mid_block\..*(to_[qkv]|to_out\.0)"
    limits = {name: [1e-5, 1e-3] for name in (method, "full")}
    values = {"groups": {"mid": pattern, "up": pattern.replace("mid_block", "up_blocks.1")}}
    space = parse_space({**values, "methods": [method], "learning_rate": limits, "rank": [4, 8]}, "sd15")
    rank = 8 if method in ("lora", "dora", "loha", "lokr", "oft") else None
    up = (("up", Setting(method, 1e-4, 4)),) if rank and method != "oft" else ()
    RATE.append(1e-4)
    _, plan = make_plan(space, Choice(("mid", "up"), method, 1e-4, rank, up))
    config = run_peft(write_recipe(plan, "peft"))["config"]
    denoiser = make_empty_denoiser(str(ARCHITECTURES / "sd15"))
    with pytest.warns() if method == "ln_tuning" else contextlib.nullcontext():
        inject_adapter_in_model(config, denoiser, low_cpu_mem_usage=True)
    layers = {name: part for name, part in denoiser.named_modules() if isinstance(part, BaseTunerLayer)}
    assert set(layers) == {target.module for target in plan.targets}
    for target in plan.targets if rank and method != "oft" else ():
        layer = layers[target.module]
        alpha = (layer.lora_alpha if method in METHODS else layer.alpha)["default"]
        assert (layer.r["default"], alpha) == (target.rank, target.rank)
        assert not hasattr(layer, "use_dora") or layer.use_dora["default"] == (method == "dora")


def test_the_command_and_the_function_write_a_trials_recipe(shown, tmp_path):
    trial = next(record for record in memcontrol.status(shown) if record.finished and record.anchor == "all")
    found = memcontrol.recipe(shown, "peft", trial=trial.number)
    values = {}
    exec(found["recipe.py"], values)
    _, plan = make_plan(load_space("digits"), trial.chosen)
    assert values["learning_rate"] == trial.chosen.learning_rate
    wrapped = {name for name in plan.names if re.fullmatch(values["config"].target_modules, name)}
    assert wrapped == {target.module for target in plan.targets}
    printed = run("recipe", shown, "--for", "peft", "--trial", str(trial.number), check=True)
    assert printed.stdout == found["recipe.py"] and "inner.skip too" in printed.stderr
    out = tmp_path / "out"
    command = ("recipe", shown, "--for", "onetrainer", "--trial", str(trial.number), "--out", out)
    assert run(*command, check=True).stdout == f"{out}/recipe.json\n"
    assert json.loads((out / "recipe.json").read_text())["lora_rank"] == trial.chosen.rank
    refused = run(*command)
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 2  # the note and the refusal
    assert "recipe.json exists; give another folder with --out" in refused.stderr
    with pytest.raises(MemControlError, match="it knows U-Nets of the original width only; ai-toolkit and"):
        memcontrol.recipe(shown, "kohya", trial=trial.number)
    for anchor, words in (("none", "trains no group"), ("full", "is full fine-tuning")):
        number = next(record.number for record in memcontrol.status(shown) if record.anchor == anchor)
        with pytest.raises(MemControlError, match=words):
            memcontrol.recipe(shown, "peft", trial=number)


def test_settings_of_a_choice_are_in_its_recipe():
    over = {"inner.budget_images": [400, 1000], "inner.weight_decay": [0.01, 0.2]}
    search = {"train_fraction": 0.5, "over": over, "strengths": [1, 0.5], "checkpoints": [0.25, 1]}
    values = {"name": "a", "data": {"path": "digits"}, "space": "digits", "search": search}
    config = load_config({**values, "inner": {"budget_images": 1000, "batch_size": 10, "rounds": 4}})
    space = load_study_space(config)
    settings = {"inner.budget_images": 400, "inner.weight_decay": 0.2, "strength": 0.5, "checkpoint": 0.25}
    choice = space.choice(("mid_resnet",), "lora", 0.5).with_settings(settings)
    plan = plan_of_study(config, space, choice, 100)
    assert (plan.steps, plan.weight_decay, plan.epochs) == (80, 0.2, 8)
    with pytest.raises(MemControlError, match="there are 9 images for batches of 10"):
        _ = replace(plan, n_images=9).epochs
    text = write_recipe(plan, "peft")["recipe.py"]
    assert "the trial was trained with inner.caption_dropout 0.1 too" in text
    plain = plan_of_study(config.replaced({"inner.caption_dropout": 0.0}), space, choice, 100)
    assert not any("trained with" in note for note in plain.notes)
    assert "after 20 of 80 steps" in text and "at a strength of 0.5" in text
    assert {target.alpha for target in plan.targets} == {1.0}  # training itself is at full strength


def test_help_names_every_trainer():
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        make_parser().parse_args(["recipe", "--help"])
    assert all(name in text.getvalue() for name in TRAINERS)
