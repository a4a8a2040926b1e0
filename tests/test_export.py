"""What leaves MemControl: plain diffusers, in a process where memcontrol cannot be imported, gives the same
outputs."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_pipelines import build
from test_adapters import disturb, make_space

from memcontrol import load_adapter
from memcontrol.commands.export import COMFYUI_FILE, LORA_FILE, describe_loading, export
from memcontrol.config.load import load_config
from memcontrol.config.spec import Spec, read_spec
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import read_json, write_json
from memcontrol.core.run_folder import RunFolder
from memcontrol.core.space_yaml import parse_space
from memcontrol.model.source import find_base_path, open_pipeline
from memcontrol.trial.tuned import inject_choice

PLAIN_DIFFUSERS = """
import sys, json
sys.modules["memcontrol"] = None  # importing it now fails
import numpy as np, torch
from diffusers import DiffusionPipeline
for job in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(job["pipeline"])
    pipe.set_progress_bar_config(disable=True)
    if job["lora"]:
        pipe.load_lora_weights(job["lora"])
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    call = {"batch_size": 2} if job["call"] is None else {"prompt": ["a digit"] * 2, **job["call"]}
    np.save(job["out"], pipe(**call, generator=generators, num_inference_steps=2, output_type="np").images)
"""
BY_MEMCONTROL = """
import sys
from dataclasses import replace
import numpy as np, torch
from diffusers import DiffusionPipeline
from memcontrol import load_adapter
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
load_adapter(pipe, sys.argv[2])
generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
np.save(sys.argv[3], pipe(prompt=["a digit"] * 2, generator=generators, **settings).images)
"""
REWARDS = {
    "fid": 21.5,
    "fid_error": 1.2,
    "memorization": 0.04,
    "memorization_error": 0.02,
    "memorization_p": 0.2,
    "copy_rate": 0.0117,
    "copy_rate_low": 0.004,
    "copy_rate_high": 0.034,
    "copy_rate_line": 0.01,
    "copy_rate_p": 0.48,
    "clear_copy_rate": 0.0,
    "trained_fraction": 0.034,
}
CALLS = {
    "ddpm": None,
    "pixart": {"height": 32, "width": 32, "use_resolution_binning": False},
    "sana": {"height": 32, "width": 32, "use_resolution_binning": False},
}
CALL = {"height": 32, "width": 32}


MEASURED = {"resolution": 32, "extractor": "tiny 0123", "sampling": {"sampling_steps": 20, "guidance": 1.0}}


def finished_run(folder, base_name, method, mix=()):
    """A run folder with an adapter that changes much, as a trial leaves it."""
    pipeline = open_pipeline(base_name)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    space = make_space(denoiser, [method, *mix], mix=bool(mix))
    config = load_config({"name": "test", "base": base_name, "data": "digits"})
    choice = space.choice(("first", "second"), method, 0.5, methods={"second": mix[0]} if mix else None)
    spec = Spec(config, space, choice, folder.parent, "search", "holdout", 10)
    spec.write(folder)
    adapter = inject_choice(denoiser, spec)
    disturb(adapter, adapter.state(), 1)
    adapter.save(folder, spec.description())
    adapter.fuse()
    write_json(
        RunFolder(folder).result_file,
        {"state": "COMPLETE", "n_samples": 256, "rewards": REWARDS, "measured_with": MEASURED},
    )
    return pipeline


def draw_images(pipeline, call):
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    call = {"batch_size": 2} if call is None else {"prompt": ["a digit"] * 2, **call}
    return pipeline(**call, generator=generators, num_inference_steps=2, output_type="np").images


def in_plain_diffusers(jobs):
    subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS, json.dumps(jobs)], check=True, capture_output=True)


def test_fused_pipelines_of_every_family_and_lora_files_load_in_plain_diffusers(tmp_path):
    jobs, expected = [], []
    fused = {
        "tiny": "difffit",
        "sd-v": "svdiff",
        "sdxl": "loha",
        "sd3": "svdiff",
        "flux": "attention",
        "pixart": "bias",
        "sana": "lokr",
        "ddpm": "difffit",
    }
    for family, method in fused.items():
        base = "tiny" if family == "tiny" else str(build(family, tmp_path / family))
        call = CALLS.get(family, CALL)
        expected.append(draw_images(finished_run(tmp_path / f"{family}-run", base, method), call))
        out = export(tmp_path / f"{family}-run", tmp_path / f"{family}-out", "pipeline")
        jobs.append(
            {"pipeline": str(out), "lora": None, "call": call, "out": str(tmp_path / f"{len(jobs)}.npy")}
        )
    for family, method in {
        "tiny": "lora",
        "sdxl": "lora",
        "sd3": "lora",
        "flux": "lora",
        "sd-v": "dora",
    }.items():
        base = "tiny" if family == "tiny" else str(tmp_path / family)
        expected.append(draw_images(finished_run(tmp_path / f"{family}-lora-run", base, method), CALL))
        # ranks and alphas differ by group
        out = export(tmp_path / f"{family}-lora-run", tmp_path / f"{family}-lora")
        jobs.append(
            {
                "pipeline": find_base_path(base),
                "lora": str(out),
                "call": CALL,
                "out": str(tmp_path / f"{len(jobs)}.npy"),
            }
        )
    in_plain_diffusers(jobs)
    for job, images in zip(jobs, expected):
        assert np.abs(np.load(job["out"]) - images).max() < 2 / 255, job


@pytest.mark.parametrize("method, mix", [("lora", ()), ("svdiff", ()), ("oft", ()), ("difffit", ("lora",))])
def test_an_exported_adapter_loads_by_memcontrol(tmp_path, method, mix):
    expected = draw_images(finished_run(tmp_path / "run", "tiny", method, mix), CALL)
    out = export(tmp_path / "run", tmp_path / "out", "adapter")
    pipeline = open_pipeline("tiny")
    before = draw_images(pipeline, CALL)
    adapter = load_adapter(pipeline, out)
    assert np.abs(draw_images(pipeline, CALL) - expected).max() < 2 / 255 < np.abs(before - expected).max()
    adapter.remove()
    assert np.array_equal(draw_images(pipeline, CALL), before)


def test_an_exported_adapter_loads_in_a_new_process(tmp_path):
    expected = draw_images(finished_run(tmp_path / "run", "tiny", "difffit", ("svdiff",)), CALL)
    out = export(tmp_path / "run", tmp_path / "out", "adapter")
    command = [
        sys.executable,
        "-c",
        BY_MEMCONTROL,
        find_base_path("tiny"),
        str(out),
        str(tmp_path / "images.npy"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert np.abs(np.load(tmp_path / "images.npy") - expected).max() < 2 / 255


def test_peft_reads_the_other_adapters(tmp_path):
    from peft import PeftModel

    fused = finished_run(tmp_path / "run", "tiny", "loha")
    export(tmp_path / "run", tmp_path / "out", "adapter")
    model = PeftModel.from_pretrained(open_pipeline("tiny").unet, tmp_path / "out").merge_and_unload()
    for name, tensor in fused.unet.state_dict().items():
        assert torch.allclose(model.state_dict()[name], tensor, atol=1e-5)


def test_the_denoiser_alone(tmp_path):
    from diffusers import UNet2DConditionModel

    fused = finished_run(tmp_path / "run", "tiny", "svdiff")
    loaded = UNet2DConditionModel.from_pretrained(export(tmp_path / "run", tmp_path / "out", "denoiser"))
    assert all(
        torch.equal(tensor, fused.unet.state_dict()[name]) for name, tensor in loaded.state_dict().items()
    )


def test_the_files_describe_themselves(tmp_path):
    from safetensors import safe_open

    finished_run(tmp_path / "run", "tiny", "lora")
    out = export(tmp_path / "run", tmp_path / "out")
    with safe_open(out / LORA_FILE, "pt") as file:
        described, settings = (
            json.loads(file.metadata()[key]) for key in ("memcontrol", "lora_adapter_metadata")
        )
    assert described["choice"]["groups"] == ["first", "second"] and described["config"]["name"] == "test"
    assert parse_space(described["space"], "test").groups["second"].alpha == 2.0
    assert settings["unet.rank_pattern"] and settings["unet.alpha_pattern"]
    with safe_open(out / COMFYUI_FILE, "pt") as file:
        names = [name for name in file.keys() if "mid_block" in name and "to_q" in name]
        by_end = {name.partition(".")[2]: file.get_tensor(name) for name in names if "attn1" in name}
    assert set(by_end) == {"lora_down.weight", "lora_up.weight", "alpha"} and names[0].startswith(
        "lora_unet_mid_block_attentions_0_"
    )
    assert float(by_end["alpha"]) == len(by_end["lora_down.weight"]) * (
        2.0 if len(by_end["lora_down.weight"]) == 2 else 1.0
    )


def test_refusals(tmp_path):
    finished_run(tmp_path / "run", "tiny", "bias")
    with pytest.raises(MemControlError, match="allowed: adapter, pipeline, denoiser"):
        export(tmp_path / "run", tmp_path / "out", "onnx")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    with pytest.raises(MemControlError, match="not an empty folder"):
        export(tmp_path / "run", tmp_path / "used")
    with pytest.raises(MemControlError, match="holds no adapter"):
        load_adapter(open_pipeline("tiny"), tmp_path / "used")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(MemControlError, match="has not finished"):
        export(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize(
    "method, format", [("lora", None), ("svdiff", None), ("difffit", "adapter"), ("bias", "denoiser")]
)
def test_the_model_card_tells_what_was_measured_and_its_code_runs(tmp_path, method, format):
    from huggingface_hub import ModelCard

    finished_run(tmp_path / "run", "tiny", method)
    export(tmp_path / "run", tmp_path / "my-model", format)
    text = (tmp_path / "my-model" / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert (
        data["library_name"] == "diffusers"
        and data["pipeline_tag"] == "text-to-image"
        and "memcontrol" in data["tags"]
    )
    assert ("lora" in data["tags"]) == (method == "lora") and "base_model" not in data
    assert (
        "32 pixels" in text
        and "20 steps, guidance 1" in text
        and "`tiny 0123`" in text
        and "full fine-tuning |" not in text
    )
    assert (
        "| FID | 21.50 ± 1.20 |" in text
        and "1.2% (0.4%-3.4%)" in text
        and "No copying is visible" in text
        and "not smaller parts" in text
    )
    assert str(tmp_path) not in text  # a path of this machine is nobody's business
    code = text.partition("```python\n")[2].partition("```")[0]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


def test_the_card_sets_full_fine_tuning_beside_the_pick(tmp_path):
    from memcontrol.view.model_card import License, Shown, compose_body

    finished_run(tmp_path / "retrain" / "a", "tiny", "bias")
    spec, result = (
        read_spec(tmp_path / "retrain" / "a"),
        read_json(tmp_path / "retrain" / "a" / "result.json"),
    )
    spec = replace(spec, study_folder=tmp_path, reference="test")
    write_json(tmp_path / "retrain" / "a" / "result.json", {**result, "choice": spec.choice.as_dict()})
    full = {**result, "choice": {"method": "full"}, "rewards": {**REWARDS, "fid": 33.0}}
    write_json(tmp_path / "retrain" / "b" / "result.json", full)
    text = compose_body(spec, result, Shown(""), License("mit"))
    assert (
        "| FID | 21.50 ± 1.20 | 33.00 ± 1.20 | minimize | Frechet distance to test images" in text
        and "held-out" not in text
    )
    write_json(tmp_path / "retrain" / "b" / "result.json", {**full, "measured_with": {}})
    assert "33.00" not in compose_body(spec, result, Shown(""), License("mit"))


def test_the_card_names_a_base_of_the_hub_and_no_folder(tmp_path):
    from memcontrol.core.space_yaml import load_space
    from memcontrol.view.model_card import License, Shown, make_metadata

    space = load_space("digits")
    for base, known in (
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", True),
        (str(tmp_path), False),
        ("tiny", False),
    ):
        spec = Spec(
            load_config({"name": "a", "base": base, "data": "digits"}),
            space,
            space.choice(("mid_attention",), "lora", 0.5),
            tmp_path,
            "retrain",
            "test",
            10,
        )
        assert make_metadata(spec, Shown(""), License()).get("base_model") == (base if known else None)


@pytest.mark.parametrize("precision", ("bfloat16", "float16"))
def test_a_fused_model_is_saved_in_the_precision_that_is_asked_for(precision, tmp_path):
    """What was learned is added in float32; then all is rounded once."""
    fused = finished_run(tmp_path / "run", "tiny", "attention").unet.state_dict()
    out = export(tmp_path / "run", tmp_path / "half", "denoiser", precision)
    half = load_file(next(out.glob("*.safetensors")))
    kind = getattr(torch, precision)
    assert {tensor.dtype for tensor in half.values()} == {kind} and half.keys() == fused.keys()
    assert all(torch.equal(half[name], tensor.to(kind)) for name, tensor in fused.items())
    with pytest.raises(MemControlError, match="'int8' is unknown; allowed: float32, bfloat16, float16"):
        export(tmp_path / "run", tmp_path / "other", "denoiser", "int8")


@pytest.mark.parametrize("format, precision", [(None, "float32"), ("pipeline", "bfloat16")])
def test_what_is_stored_in_half_is_loaded_in_one_type_by_the_cards_code(format, precision, tmp_path):
    """Else transformers takes the file's type and diffusers float32, and they meet in a product."""
    pipeline = open_pipeline(str(build("sd3", tmp_path / "full")))
    pipeline.to(dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    finished_run(tmp_path / "run", str(tmp_path / "half"), "lora")
    out = export(tmp_path / "run", tmp_path / "model", format, precision)
    kind = f"torch_dtype=torch.{precision}"
    code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert kind in code and kind in describe_loading(tmp_path / "run", out)
    code += "\npipe('a digit', height=32, width=32, num_inference_steps=1, output_type='np')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
