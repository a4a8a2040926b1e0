"""One contract for what is exported: whoever reads a file computes the weights that were measured, by its own
rule, written here anew from what it publishes."""

import functools
import json
import math
import re
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_pipelines import build
from test_adapters import disturb, make_space
from test_export import MEASURED, REWARDS, finished_run

from memcontrol.commands.export import COMFYUI_FILE, KOHYA_FILE, LORA_FILE, export
from memcontrol.config.load import load_config
from memcontrol.config.spec import Spec
from memcontrol.core.choice import SEARCHED_METHODS
from memcontrol.core.files import write_json
from memcontrol.core.run_folder import RunFolder
from memcontrol.model.source import open_pipeline
from memcontrol.trial.tuned import inject_choice

OWN_FILE, PEFT_FILE = "adapter.safetensors", "adapter_model.safetensors"
OF_PEFT = ("loha", "lokr", "oft", "ia3", "ln_tuning")


def add_product(weight, up, down, scale):
    """Low-rank factors as kohya's sd-scripts merge them (networks/lora.py, merge_to)."""
    if down.ndim == 4 and down.shape[2:] != (1, 1):
        change = torch.nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
    else:
        change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return weight + scale * change


def norm_rows(weight):
    return weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))


def group_by_module(state, *ends):
    """By module what it has: names are split before the first of `ends`."""
    found = {}
    for name, tensor in state.items():
        module, end = re.fullmatch(rf"(.*?)\.((?:{'|'.join(ends)}).*)", name).groups()
        found.setdefault(module, {})[end] = tensor.double()
    return found


def read_kohya(folder, plain, file=KOHYA_FILE, rename=str):
    """networks/lora.py: W + alpha / rank (up @ down). LyCORIS (functional/general.py, weight_decompose, on
    the output): then scaled by dora_scale over the norms of the changed rows."""

    def change(weight, own):
        changed = add_product(
            weight,
            own["lora_up.weight"],
            own["lora_down.weight"],
            own["alpha"] / len(own["lora_down.weight"]),
        )
        if "dora_scale" not in own:
            return changed
        assert own["dora_scale"].shape == (len(weight), *[1] * (weight.ndim - 1))
        return changed * (own["dora_scale"] / (norm_rows(changed) + torch.finfo(torch.float32).eps))

    own = group_by_module(load_file(folder / file), "lora_", "alpha", "dora_scale")
    return change_weights(plain, own, lambda name: f"lora_unet_{rename(name).replace('.', '_')}", change)


def read_comfyui(folder, plain):
    """comfy/weight_adapter/lora.py and base.py (0.3.77), at full strength: dora_scale over the norms of the
    base's own rows. A U-Net's modules by kohya's names, a transformer's by diffusers' own (comfy/lora.py)."""

    def change(weight, own):
        up, down = (
            own.get(kohya, own.get(plain))
            for kohya, plain in (("lora_up.weight", "lora_B.weight"), ("lora_down.weight", "lora_A.weight"))
        )
        product = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        changed = weight + own["alpha"] / len(down) * product
        if "dora_scale" not in own:
            return changed
        assert own["dora_scale"].shape == (len(weight), *[1] * (weight.ndim - 1))
        return changed * (own["dora_scale"] / (norm_rows(weight) + torch.finfo(torch.float32).eps))

    own = group_by_module(
        load_file(folder / COMFYUI_FILE), "lora_[AB]", "lora_up", "lora_down", "alpha", "dora_scale"
    )
    is_unet = next(iter(own)).startswith("lora_unet_")
    return change_weights(
        plain,
        own,
        lambda name: f"lora_unet_{name.replace('.', '_')}" if is_unet else f"transformer.{name}",
        change,
    )


def read_diffusers(folder, plain):
    """peft's rule for what diffusers' load_lora_weights hands it (tuners/lora/layer.py, dora.py), with the
    sizes that the header says: W + alpha / r (B A), its rows scaled to the magnitudes."""
    with safe_open(folder / LORA_FILE, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    part = next(iter(settings)).partition(".")[0]
    settings = {key.partition(".")[2]: value for key, value in settings.items()}

    def change(weight, own, module):
        alpha, rank = (find_size(settings, module, key) for key in ("lora_alpha", "r"))
        assert rank == len(own["lora_A.weight"])
        changed = add_product(weight, own["lora_B.weight"], own["lora_A.weight"], alpha / rank)
        assert settings["use_dora"] == ("lora_magnitude_vector" in own)
        if not settings["use_dora"]:
            return changed
        return own["lora_magnitude_vector"].view_as(norm_rows(changed)) * changed / norm_rows(changed)

    own = group_by_module(load_file(folder / LORA_FILE), "lora_")
    return change_weights(plain, own, lambda name: f"{part}.{name}", change)


def find_size(settings, module, key):
    """peft's rank_pattern and alpha_pattern name modules by regular expressions (utils/other.py)."""
    patterns = settings["rank_pattern" if key == "r" else "alpha_pattern"]
    return next(
        (size for pattern, size in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)),
        settings[key],
    )


def change_weights(plain, own, name, change):
    """The weights of modules that `own` has something for; all of it must be used. `change` may want the
    module's name."""
    wanted, used, found = "module" in change.__code__.co_varnames, set(), dict(plain)
    for key, weight in plain.items():
        module = key.removesuffix(".weight")
        if key.endswith(".weight") and name(module) in own:
            used.add(name(module))
            given = (weight, own[name(module)], *([module] if wanted else []))
            found[key] = change(*given)
    assert used == own.keys()
    return found


def change_by_peft(method, settings, weight, own, module):
    """peft's tuners/loha, lokr, oft, ia3."""
    if method == "loha":
        rank, alpha = find_size(settings, module, "r"), find_size(settings, module, "alpha")
        product = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
        return weight + alpha / rank * product.reshape(weight.shape)
    if method == "lokr":
        rank, alpha = find_size(settings, module, "r"), find_size(settings, module, "alpha")
        left, right = (
            own[name] if name in own else own[f"{name}_a"] @ own[f"{name}_b"].flatten(1)
            for name in ("lokr_w1", "lokr_w2")
        )
        product = torch.einsum("ab,ce->acbe", left, right.flatten(1))  # Kronecker's
        return weight + alpha / rank * product.reshape(weight.shape)
    if method == "oft":  # Cayley's (I - Q) (I + Q)^-1 in blocks of the input, Q skew from its upper triangle
        packed = own["oft_R.weight"]
        side = round((1 + math.sqrt(1 + 8 * packed.shape[1])) / 2)
        skew = torch.zeros(len(packed), side, side, dtype=packed.dtype)
        skew[:, *torch.triu_indices(side, side, 1)] = packed
        skew = skew - skew.transpose(1, 2)
        turned = (torch.eye(side) - skew) @ torch.linalg.inv(torch.eye(side) + skew)
        return (weight.flatten(1) @ torch.block_diag(*turned).T).reshape(weight.shape)
    assert method == "ia3"
    return weight * own["ia3_l"].flatten().view(-1, *[1] * (weight.ndim - 1))


def read_peft(folder, plain, method):
    """adapter_config.json and adapter_model.safetensors."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["peft_type"].lower() == method and not settings.get("base_model_name_or_path")
    state = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in load_file(folder / PEFT_FILE).items()
    }
    return apply_peft(method, settings, state, plain)


def apply_peft(method, settings, state, plain):
    if method == "ln_tuning":  # a norm's own weight and bias in its place
        return {
            **plain,
            **{name.replace("ln_tuning_layers.", ""): own.double() for name, own in state.items()},
        }
    own = group_by_module(state, "hada_", "lokr_", "oft_R", "ia3_l")
    found = change_weights(
        plain,
        own,
        str,
        lambda weight, own, module: change_by_peft(method, settings, weight, own, module),
    )
    if method == "ia3":  # what a layer gives is scaled, with its bias
        for module in own:
            if f"{module}.bias" in plain:
                found[f"{module}.bias"] = plain[f"{module}.bias"] * own[module]["ia3_l"].flatten()
    return found


def read_own(folder, plain, method, denoiser):
    """adapter.safetensors: what the methods' papers do with it."""
    state = {name: tensor.double() for name, tensor in load_file(folder / OWN_FILE).items()}
    if method == "oft":  # blocks of two sizes are two configs of peft, and no file of its own
        return apply_peft(method, {}, state, plain)
    if method in OF_PEFT:
        return read_peft(folder, plain, method)
    if method == "svdiff":  # arXiv 2303.11305, eq. 2-3
        found = dict(plain)
        for name, shift in state.items():
            weight = plain[key := f"{name.removesuffix('.delta')}.weight"]
            left, values, right = torch.linalg.svd(
                weight[None] if weight.ndim == 1 else weight.flatten(1), full_matrices=False
            )
            found[key] = ((left * torch.relu(values + shift)) @ right).view_as(weight)
        return found
    found = {**plain, **{name: own for name, own in state.items() if not name.endswith(".gamma_shift")}}
    for name, shift in state.items():  # arXiv 2304.06648: what a layer, or a block's last layer, gives
        if name.endswith(".gamma_shift"):
            layer = find_last_layer(denoiser, name.removesuffix(".gamma_shift"))
            for key in {f"{layer}.weight", f"{layer}.bias"} & found.keys():
                found[key] = found[key] * (1 + shift).view(-1, *[1] * (found[key].ndim - 1))
    return found


def find_last_layer(denoiser, name):
    kind = type(denoiser.get_submodule(name)).__name__
    return f"{name}.to_out.0" if kind == "Attention" else f"{name}.net.2" if kind == "FeedForward" else name


def make_double(state):
    return {name: tensor.double() for name, tensor in state.items()}


def check_same(found, tuned, atol=2e-5):
    assert found.keys() == tuned.keys()
    for name, tensor in tuned.items():
        assert torch.allclose(found[name], tensor, atol=atol, rtol=1e-5), name


class TestEveryMethodAndFile:
    """Whatever is exported, and whoever reads it."""

    @pytest.mark.parametrize("method", SEARCHED_METHODS)
    def test_each_file_gives_the_weights_that_were_measured(self, tmp_path, method):
        tuned = make_double(finished_run(tmp_path / "run", "tiny", method).unet.state_dict())
        denoiser = open_pipeline("tiny").unet
        plain = make_double(denoiser.state_dict())
        assert max((tuned[name] - plain[name]).abs().max() for name in plain) > 1e-2
        out = export(tmp_path / "run", tmp_path / "out", "adapter")
        files = {file.relative_to(out).as_posix() for file in out.rglob("*.safetensors")}
        readers = {
            LORA_FILE: read_diffusers,
            COMFYUI_FILE: read_comfyui,
            # of a LoRA sd-scripts reads the same
            KOHYA_FILE if method == "dora" else COMFYUI_FILE + " ": functools.partial(
                read_kohya, file=KOHYA_FILE if method == "dora" else COMFYUI_FILE
            ),
        }
        if method not in ("lora", "dora"):
            readers = {OWN_FILE: functools.partial(read_own, method=method, denoiser=denoiser)}
            if method in OF_PEFT and method != "oft":
                readers[PEFT_FILE] = functools.partial(read_peft, method=method)
        assert files == {name.strip() for name in readers}
        for read in readers.values():
            check_same(read(out, plain), tuned)
        if read := choose_library(readers):
            check_same(make_double(read(out)), tuned)

    @pytest.mark.parametrize("method", SEARCHED_METHODS)
    def test_what_is_fused_is_what_was_measured(self, tmp_path, method):
        tuned = finished_run(tmp_path / "run", "tiny", method).unet.state_dict()
        for format, files in (("pipeline", "unet/*.safetensors"), ("denoiser", "*.safetensors")):
            out = export(tmp_path / "run", tmp_path / format, format)
            check_same(load_file(next(out.glob(files))), tuned, 1e-6)

    @pytest.mark.parametrize("family, method", [("flux", "lora"), ("sd3", "dora"), ("sdxl", "dora")])
    def test_over_other_families(self, tmp_path, family, method):
        base = str(build(family, tmp_path / family))
        pipeline, plain = finished_run(tmp_path / "run", base, method), open_pipeline(base)
        part = "unet" if family == "sdxl" else "transformer"
        tuned, plain = (make_double(getattr(one, part).state_dict()) for one in (pipeline, plain))
        out = export(tmp_path / "run", tmp_path / "out")
        for read in (read_diffusers, read_comfyui):
            check_same(read(out, plain), tuned)
        assert (out / KOHYA_FILE).exists() == (family == "sdxl")  # transformers have other layers there

    def test_blocks_of_one_size_are_one_file_of_peft(self, tmp_path):
        check_block_run(tmp_path, "tiny", "oft", ("first",), lambda out, plain: read_peft(out, plain, "oft"))

    @pytest.mark.parametrize("method", ("lora", "dora"))
    def test_sd_scripts_reads_sdxl_by_the_original_names(self, tmp_path, method):
        """library/sdxl_original_unet.py; of the small one's two blocks the second has attention."""
        base = str(build("sdxl", tmp_path / "sdxl"))
        names = {
            "down_blocks.1.attentions.0.": "input_blocks.4.1.",
            "mid_block.attentions.0.": "middle_block.1.",
            "down_blocks.1.resnets.0.conv1": "input_blocks.4.0.in_layers.2",
            "up_blocks.0.attentions.1.": "output_blocks.1.1.",
        }

        def rename(module):
            return next(
                (new + module[len(old) :] for old, new in names.items() if module.startswith(old)), module
            )

        check_block_run(
            tmp_path, base, method, tuple(names), lambda out, plain: read_kohya(out, plain, rename=rename)
        )
        assert not (
            export_block_run(tmp_path / "whole", base, method, ("time_embedding.",))[0] / KOHYA_FILE
        ).exists()


def choose_library(files):
    """What reads the folder in the libraries themselves, and gives the denoiser's state."""
    if LORA_FILE in files:
        return fuse_by_diffusers
    return merge_by_peft if PEFT_FILE in files else None


def fuse_by_diffusers(out):
    pipeline = open_pipeline("tiny")
    pipeline.load_lora_weights(str(out))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline.unet.state_dict()


def merge_by_peft(out):
    from peft import PeftModel

    warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)  # of norms; pytest puts it back
    return PeftModel.from_pretrained(open_pipeline("tiny").unet, out).merge_and_unload().state_dict()


def check_block_run(folder, base, method, patterns, read):
    """Of a run whose mask is some modules alone."""
    out, plain, tuned = export_block_run(folder, base, method, patterns)
    check_same(read(out, plain), tuned)


def export_block_run(folder, base, method, patterns):
    """The export, and the denoiser's weights before and after."""
    pipeline = open_pipeline(base)
    plain, space = make_double(pipeline.unet.state_dict()), make_space(pipeline.unet, [method])
    if patterns != ("first",):
        space = narrow_space(method, patterns)
    config = load_config({"name": "test", "base": base, "data": "digits"})
    choice = space.choice((next(iter(space.groups)),), method, 0.5)
    spec = Spec(config, space, choice, folder, "search", "holdout", 10)
    spec.write(folder / "run")
    adapter = inject_choice(pipeline.unet, spec)
    disturb(adapter, adapter.state(), 1)
    adapter.save(folder / "run", spec.description())
    adapter.fuse()
    told = {"state": "COMPLETE", "n_samples": 8, "rewards": REWARDS, "measured_with": MEASURED}
    write_json(RunFolder(folder / "run").result_file, told)
    out = export(folder / "run", folder / "out", "adapter")
    return out, plain, make_double(pipeline.unet.state_dict())


def narrow_space(method, prefixes):
    from memcontrol.core.space_yaml import parse_space

    values = {
        "groups": {"some": {"patterns": [f"{prefix}*" for prefix in prefixes]}},
        "methods": [method],
        "learning_rate": {method: [1e-4, 1e-2], "full": [1e-4, 1e-2]},
        "rank": [4],
    }
    return parse_space(values, "test")
