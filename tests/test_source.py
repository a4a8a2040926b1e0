"""Where bases come from: single files, variants, adapters to start from, the Hub's cache. What plain
diffusers makes of the same files is the reference."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from single_files import write_checkpoint
from small_pipelines import build
from test_adapters import disturb, make_space
from test_export import MEASURED, REWARDS

from memcontrol.commands.export import COMFYUI_FILE, LORA_FILE, describe_loading, export
from memcontrol.commands.init import init
from memcontrol.config.base import BaseConfig, parse_base
from memcontrol.config.differing import find_differing_keys
from memcontrol.config.load import load_config
from memcontrol.config.spec import Spec
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import read_json, write_json
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.model.base import load_base
from memcontrol.model.precision import Precision
from memcontrol.model.source import TINY, find_source, make_empty_denoiser, open_pipeline
from memcontrol.model.variants import choose_variant, find_variants
from memcontrol.trial.loaded import LoadedModels
from memcontrol.trial.prepare import prepare_study
from memcontrol.trial.tuned import inject_choice

COMMITS = ("1" * 40, "2" * 40)
PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMCONTROL_CACHE", str(tmp_path / "cache"))


def are_equal(first, second, tolerance=0.0):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(
        torch.allclose(tensor.float(), second[name].float(), atol=tolerance, rtol=0)
        for name, tensor in first.items()
    )


# One file


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_a_single_file_is_converted_once(tmp_path, dtype):
    pipeline = open_pipeline("tiny").to(dtype)
    file = write_checkpoint(pipeline, tmp_path / "model.safetensors")
    base = BaseConfig(id=str(file), config=str(TINY))
    source = find_source(base)
    found = source.open()
    for part in PARTS:
        assert are_equal(getattr(pipeline, part), getattr(found, part)), part
        kinds = {tensor.dtype for tensor in load_weights(source.folder, part).values()}
        assert kinds - {torch.int64} == {dtype}
    assert {tensor.dtype for tensor in found.unet.state_dict().values()} == {torch.float32}
    made = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert [str(path) for path in made] == [source.folder] and source.folder == find_source(base).folder

    shutil.copy(file, tmp_path / "copy.safetensors")
    copy = find_source(BaseConfig(id=str(tmp_path / "copy.safetensors"), config=str(TINY)))
    assert copy.folder == source.folder
    pipeline.unet.conv_in.weight.data += 1
    write_checkpoint(pipeline, file)
    changed = find_source(base)
    assert changed.folder != source.folder and changed.digest != source.digest
    assert are_equal(changed.open().unet, pipeline.unet)


def load_weights(folder, part):
    name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    return load_file(f"{folder}/{part}/{name}.safetensors")


def test_plain_diffusers_reads_the_same_from_the_file(tmp_path):
    file = write_checkpoint(open_pipeline("tiny"), tmp_path / "model.safetensors")
    plain = StableDiffusionPipeline.from_single_file(
        str(file), config=str(TINY), safety_checker=None, requires_safety_checker=False
    )
    assert are_equal(plain.unet, open_pipeline(BaseConfig(id=str(file), config=str(TINY))).unet)


def test_a_single_file_is_a_base_everywhere(tmp_path, photographs, monkeypatch):
    file = write_checkpoint(open_pipeline("tiny"), tmp_path / "model.safetensors")
    base = f"{{id: {file}, config: {TINY}}}"
    assert len(make_empty_denoiser(parse_base(base)).state_dict()) == len(
        make_empty_denoiser("tiny").state_dict()
    )
    study = tmp_path / "study.yaml"
    init(photographs(40), study, base=base)
    config = load_config(study)
    assert config.base == BaseConfig(id=str(file), config=str(TINY)) and config.space == "sd15-blocks"
    study.write_text("{name: a, data: digits, base: {id: model.safetensors, config: .}}")
    assert load_config(study).base == BaseConfig(id=str(file), config=str(tmp_path))


def test_files_that_are_no_base_are_refused(tmp_path):
    pickle, lora, other, text = (
        tmp_path / name for name in ("a.ckpt", "lora.safetensors", "b.safetensors", "c.safetensors")
    )
    pickle.write_bytes(b"")
    text.write_text("no tensors")
    save_file({"lora_unet_mid_block.lora_down.weight": torch.zeros(1)}, lora)
    save_file({"weight": torch.zeros(1)}, other)
    file = write_checkpoint(open_pipeline("tiny"), tmp_path / "model.safetensors")
    narrow, pixart = tmp_path / "narrow.safetensors", build("pixart", tmp_path / "pixart")
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}, narrow)
    for base, words in (
        (BaseConfig(id=str(pickle)), "is a pickle, which may run code"),
        (BaseConfig(id=str(lora)), "is a LoRA, not a whole model; give it as base.adapter"),
        (BaseConfig(id=str(other)), "no checkpoint that diffusers knows; single files are read of v1"),
        (BaseConfig(id=str(text)), "is no safetensors file"),
        (BaseConfig(id=str(tmp_path / "none.safetensors")), "no such file"),
        (BaseConfig(id=str(file)), "taken for a checkpoint of upscale; .* as base.config"),
        (BaseConfig(id=str(file), config="owner/none"), "owner/none"),
        (BaseConfig(id=str(file), config=str(pixart)), "is of a PixArtSigmaPipeline; single files are read"),
        (BaseConfig(id=str(narrow)), r"are not in the Hub's cache \(stable-diffusion-v1-5/"),
        (
            BaseConfig(id=str(file), variant="fp16"),
            "base.variant is fp16, which belongs to a Hub id or a fol",
        ),
        (
            BaseConfig(id="tiny", revision="main"),
            "base.revision is main, which belongs to a Hub id, and base",
        ),
        (BaseConfig(id="tiny", config="x"), "base.config is x, which belongs to a file"),
    ):
        with pytest.raises(MemControlError, match=words) as found:
            find_source(base)
        assert "\n" not in str(found.value)


# Variants


def test_a_folder_of_one_variant_is_opened_by_itself(tmp_path):
    pipeline = open_pipeline("tiny")
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    names = {path.name for path in (tmp_path / "half" / "unet").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.fp16.safetensors"}
    plain = DiffusionPipeline.from_pretrained(tmp_path / "half", variant="fp16", dtype=torch.float32)
    found = find_source(str(tmp_path / "half"))
    assert found.variant == "fp16"
    opened = found.open()
    assert all(are_equal(getattr(plain, part), getattr(opened, part)) for part in PARTS)
    assert opened.unet.dtype == torch.float32
    base = load_base(str(tmp_path / "half"), Precision(torch.float16, torch.float16))
    with base.hold_encoders():
        assert base.pipeline.text_encoder.dtype == torch.float16


def test_one_of_two_variants_is_asked_for(tmp_path):
    pipeline = open_pipeline("tiny")
    pipeline.save_pretrained(tmp_path / "both")
    pipeline.unet.conv_in.weight.data += 1
    pipeline.unet.save_pretrained(tmp_path / "both" / "unet", variant="ema")
    plain, ema = (BaseConfig(id=str(tmp_path / "both"), variant=name) for name in (None, "ema"))
    assert are_equal(open_pipeline(ema).unet, pipeline.unet)
    assert not are_equal(open_pipeline(plain).unet, pipeline.unet)
    assert find_source(ema).digest != find_source(plain).digest
    with pytest.raises(
        MemControlError, match="no weights of variant 'int4'; there are: those without .*, ema"
    ):
        open_pipeline(BaseConfig(id=str(tmp_path / "both"), variant="int4"))
    shutil.rmtree(tmp_path / "both" / "vae")
    with pytest.raises(MemControlError, match="has no weights of vae"):
        open_pipeline(plain)


def test_variants_are_read_from_names():
    names = (
        "unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",  # as diffusers wrote it until 0.28
        "unet/diffusion_pytorch_model.bf16-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder/openvino_model.bin",
        "unet/model.onnx",
        "model.safetensors",
    )
    found = find_variants(names, PARTS)
    assert found == {"unet": {"fp16", "bf16"}, "vae": {""}, "text_encoder": {"", "fp16"}}
    assert [choose_variant("a", found, asked) for asked in (None, "bf16")] == ["fp16", "bf16"]
    with pytest.raises(MemControlError, match="do not fit together: unet bf16, vae fp16"):
        choose_variant("a", {"unet": {"bf16"}, "vae": {"fp16"}}, None)


def test_sharded_variants_are_seen(tmp_path):
    pipeline = open_pipeline("tiny").to(torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    shutil.rmtree(tmp_path / "half" / "unet")
    pipeline.unet.save_pretrained(tmp_path / "half" / "unet", variant="fp16", max_shard_size="100KB")
    assert len(list((tmp_path / "half" / "unet").glob("*.safetensors"))) > 2
    assert are_equal(open_pipeline(str(tmp_path / "half")).unet, pipeline.unet)


# Adapters to start from


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A run's LoRA, exported; and the denoiser that it is fused into."""
    folder = tmp_path_factory.mktemp("lora")
    pipeline = open_pipeline("tiny")
    finish_run(folder / "run", pipeline, "lora")
    export(folder / "run", folder / "out")
    plain = DiffusionPipeline.from_pretrained(TINY)
    plain.load_lora_weights(folder / "out")
    plain.fuse_lora()
    plain.unload_lora_weights()
    return folder, plain.unet


def finish_run(folder, pipeline, method, base="tiny"):
    """A run folder with an adapter that changes much, as a trial leaves it; the adapter is fused."""
    space = make_space(pipeline.unet, [method])
    config = load_config({"name": "test", "base": base, "data": "digits"})
    spec = Spec(
        config, space, space.choice(("first", "second"), method, 0.5), folder.parent, "search", "holdout", 10
    )
    spec.write(folder)
    adapter = inject_choice(pipeline.unet, spec)
    disturb(adapter, adapter.state(), 1)
    adapter.save(folder, spec.description())
    adapter.fuse()
    result = {"state": "COMPLETE", "n_samples": 256, "rewards": REWARDS, "measured_with": MEASURED}
    write_json(RunFolder(folder).result_file, result)


@pytest.mark.parametrize("place", ("run", "out", f"out/{LORA_FILE}", f"out/{COMFYUI_FILE}"))
def test_an_adapter_is_fused_as_plain_diffusers_fuses_it(lora, place, tmp_path):
    folder, fused = lora
    source = find_source(BaseConfig(adapter=str(folder / place)))
    assert are_equal(source.open().unet, fused, 1e-6) and source.notes == ()
    assert are_equal(load_base(source.base).denoiser, fused, 1e-6)
    assert are_equal(source.open().vae, open_pipeline("tiny").vae)
    (made,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert {path.name for path in made.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert source.digest != find_source("tiny").digest


@pytest.mark.parametrize("family", ("sdxl", "sd3", "flux", "sana"))
def test_a_lora_of_diffusers_own_making_is_a_start(family, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict

    place = build(family, tmp_path / family)
    pipeline = DiffusionPipeline.from_pretrained(place)
    part = "unet" if family == "sdxl" else "transformer"
    denoiser = getattr(pipeline, part)
    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=["to_q", "to_out.0"])
    denoiser.add_adapter(config)
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(denoiser)}
    metadata = {f"{part}_lora_adapter_metadata": config.to_dict() | {"target_modules": ["to_q", "to_out.0"]}}
    type(pipeline).save_lora_weights(tmp_path / "lora", **layers, **metadata)
    plain = DiffusionPipeline.from_pretrained(place)
    plain.load_lora_weights(str(tmp_path / "lora"), weight_name=LORA_FILE)
    plain.fuse_lora(components=[part])
    plain.unload_lora_weights()
    found = open_pipeline(BaseConfig(id=str(place), adapter=str(tmp_path / "lora")))
    assert are_equal(getattr(found, part), getattr(plain, part), 1e-6)
    assert not are_equal(getattr(found, part), getattr(open_pipeline(str(place)), part))


def test_a_denoiser_that_was_exported_is_a_start(lora, tmp_path):
    folder, fused = lora
    export(folder / "run", tmp_path / "denoiser", "denoiser")
    assert are_equal(open_pipeline(BaseConfig(adapter=str(tmp_path / "denoiser"))).unet, fused, 1e-6)
    other = build("sdxl", tmp_path / "sdxl") / "vae"
    with pytest.raises(
        MemControlError, match="is a AutoencoderKL, and the denoiser of base 'tiny' a UNet2DCond"
    ):
        find_source(BaseConfig(adapter=str(other)))


def test_what_is_no_lora_is_a_start_too(tmp_path):
    pipeline = open_pipeline("tiny")
    finish_run(tmp_path / "run", pipeline, "svdiff")
    assert are_equal(open_pipeline(BaseConfig(adapter=str(tmp_path / "run"))).unet, pipeline.unet, 1e-6)


def test_parts_of_text_encoders_are_told_of(lora, tmp_path):
    folder, fused = lora
    state = load_file(folder / "out" / COMFYUI_FILE)
    ends = (("lora_down.weight", (2, 4)), ("lora_up.weight", (4, 2)), ("alpha", ()))
    layer = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    save_file(
        state | {f"{layer}.{end}": torch.ones(shape) for end, shape in ends}, tmp_path / "a.safetensors"
    )
    source = find_source(BaseConfig(adapter=str(tmp_path / "a.safetensors")))
    assert are_equal(source.open().unet, fused, 1e-6)
    assert source.notes == (
        "base.adapter a.safetensors also changes text encoders (3 tensors); they stay as the base has them",
    )


def test_adapters_that_do_not_fit_are_refused(lora, tmp_path):
    folder, _ = lora
    state = load_file(folder / "out" / LORA_FILE)
    first = next(iter(state))
    alone, wide, encoder = (tmp_path / f"{name}.safetensors" for name in ("alone", "wide", "encoder"))
    save_file(
        {
            "unet.none.there.lora_A.weight": torch.ones(2, 4),
            "unet.none.there.lora_B.weight": torch.ones(4, 2),
        },
        alone,
    )
    save_file(state | {first: torch.ones(2, 999)}, wide)
    save_file({"text_encoder.a.lora_A.weight": torch.ones(2, 4)}, encoder)
    scratch = tmp_path / "scratch"
    shutil.copytree(folder / "run", scratch)
    described = read_json(scratch / "spec.json")
    described["config"]["inner"]["from_scratch"] = True
    save_file(
        load_file(scratch / "adapter.safetensors"),
        scratch / "adapter.safetensors",
        {"memcontrol": json.dumps(described)},
    )
    for place, words in (
        (alone, "does not fit the base"),
        (wide, "does not fit the base"),
        (encoder, "it holds no LoRA of a unet"),
        (scratch, "was drawn anew; export that run with --format pipeline"),
        (TINY, "is a whole pipeline; give it as base.id"),
        (tmp_path, "holds no adapter"),
        (tmp_path / "none", "is not there"),
    ):
        with pytest.raises(MemControlError, match=words) as found:
            find_source(BaseConfig(adapter=str(place)))
        assert "\n" not in str(found.value)
    pixart = str(build("pixart", tmp_path / "pixart"))
    with pytest.raises(MemControlError, match="diffusers reads no LoRA for a PixArtSigmaPipeline"):
        find_source(BaseConfig(id=pixart, adapter=str(alone)))


def test_a_lora_over_a_start_is_exported_whole_or_with_code_that_loads(lora, tmp_path):
    folder, _ = lora
    shutil.copytree(folder / "out", tmp_path / "first")
    base = {"id": "tiny", "adapter": str(tmp_path / "first")}
    pipeline = open_pipeline(BaseConfig(**base))
    finish_run(tmp_path / "run", pipeline, "lora", base)
    whole = export(tmp_path / "run", tmp_path / "whole")
    assert are_equal(DiffusionPipeline.from_pretrained(whole).unet, pipeline.unet, 1e-6)
    small = export(tmp_path / "run", tmp_path / "small", "adapter")
    assert (small / LORA_FILE).is_file() and "README.md has the code" in describe_loading(
        tmp_path / "run", small
    )
    card = (small / "README.md").read_text()
    assert "tiny (adapter first)" in card and str(tmp_path) not in card
    assert are_equal(run_card(small, tmp_path), pipeline.unet, 1e-5)


def run_card(out, folder):
    """The denoiser that the card's code loads."""
    code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    code += "\nif hasattr(pipe, 'unload_lora_weights'): pipe.fuse_lora(); pipe.unload_lora_weights()\n"
    code += f"pipe.unet.save_pretrained({str(folder / 'by-card')!r})"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    return UNet2DConditionModel.from_pretrained(folder / "by-card")


def test_the_card_of_a_run_over_a_single_file_loads(tmp_path):
    file = write_checkpoint(open_pipeline("tiny"), tmp_path / "model.safetensors")
    shutil.copytree(TINY, tmp_path / "configs")
    base = {"id": str(file), "config": str(tmp_path / "configs")}
    pipeline = open_pipeline(BaseConfig(**base))
    finish_run(tmp_path / "run", pipeline, "lora", base)
    out = export(tmp_path / "run", tmp_path / "out")
    assert (
        'StableDiffusionPipeline.from_single_file("model.safetensors", config="configs")'
        in (out / "README.md").read_text()
    )
    assert are_equal(run_card(out, tmp_path), pipeline.unet, 1e-5)


# The Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub's cache with two commits of a base, as huggingface_hub lays it out; the second is main."""
    folder = tmp_path / "hub" / "models--owner--small"
    pipeline = open_pipeline("tiny")
    for commit in COMMITS:
        pipeline.unet.conv_in.weight.data += 1
        pipeline.save_pretrained(folder / "snapshots" / commit)
    for name, commit in (("main", COMMITS[1]), ("v1", COMMITS[0])):
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / name).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def test_a_revision_is_what_is_opened_and_cached_apart(hub):
    new, old, exact = (
        find_source(BaseConfig(id="owner/small", revision=revision)) for revision in (None, "v1", COMMITS[0])
    )
    assert [new.commit, old.commit, exact.commit] == [COMMITS[1], COMMITS[0], COMMITS[0]]
    assert old.digest == exact.digest != new.digest
    for source, commit in ((new, COMMITS[1]), (old, COMMITS[0])):
        expected = UNet2DConditionModel.from_pretrained(hub / "snapshots" / commit, subfolder="unet")
        assert are_equal(source.open().unet, expected)
    assert not are_equal(new.open().unet, old.open().unet)


def test_a_base_that_is_not_in_the_cache_is_named(hub):
    for base, words in (
        (
            BaseConfig(id="owner/other"),
            "base 'owner/other' is not, or not all, in .*hf download owner/other`",
        ),
        (
            BaseConfig(id="owner/small", revision="v2"),
            "at v2 is not, .*hf download owner/small --revision v2`",
        ),
    ):
        with pytest.raises(MemControlError, match=words) as found:
            find_source(base)
        assert "\n" not in str(found.value)
    assert len(make_empty_denoiser("owner/small").state_dict()) == len(
        make_empty_denoiser("tiny").state_dict()
    )
    with pytest.raises(MemControlError, match="base 'owner/other' is not, or not all, in"):
        make_empty_denoiser("owner/other")
    shutil.rmtree(hub / "snapshots" / COMMITS[1] / "vae")
    with pytest.raises(MemControlError, match="has no weights of vae"):
        load_base("owner/small")


def test_an_adapter_starts_on_a_base_of_the_hub(hub, lora):
    source = find_source(BaseConfig(id="owner/small", adapter=str(lora[0] / "out")))
    assert source.pins.keys() == {"commit", "adapter"}
    assert source.notes == (
        "base.adapter pytorch_lora_weights.safetensors was trained over tiny, and is fused into owner/small",
    )
    assert not are_equal(source.open().unet, lora[1])


STUDY = {"name": "a", "data": {"path": "digits", "train": 32, "holdout": 40, "test": 48}, "space": "digits"}


def prepare(folder, base):
    config = load_config({**STUDY, "base": base, "rewards": {"force": True}})
    told = []
    return prepare_study(config.model_dump(mode="json"), folder, LoadedModels(), told.append)


def test_a_study_keeps_to_the_commit_that_it_began_with(hub, tmp_path):
    made = prepare(tmp_path / "study", "owner/small")["made_with"]
    assert made["base commit"] == COMMITS[1]
    assert read_json(tmp_path / "study" / "base.json") == {"id": "owner/small", "commit": COMMITS[1]}
    (hub / "refs" / "main").write_text(COMMITS[0])
    with pytest.raises(MemControlError) as found:
        prepare(tmp_path / "study", "owner/small")
    assert str(found.value) == (
        f"base 'owner/small' is at commit {COMMITS[0]}, and this study began with {COMMITS[1]}; write base: "
        f"{{id: owner/small, revision: {COMMITS[1]}}}, or choose another name"
    )
    prepare(tmp_path / "study", {"id": "owner/small", "revision": COMMITS[1]})
    (tmp_path / "study" / "base.json").unlink()  # of before
    prepare(tmp_path / "study", "owner/small")
    assert not (tmp_path / "study" / "base.json").exists()


def test_the_way_on_is_no_other_config(hub, tmp_path):
    plain, pinned = (
        load_config({**STUDY, "base": base})
        for base in ("owner/small", {"id": "owner/small", "revision": COMMITS[1]})
    )
    assert find_differing_keys(plain, pinned) == []


def test_an_export_opens_and_names_the_commit_that_the_study_began_with(hub, tmp_path):
    pipeline = open_pipeline(BaseConfig(id="owner/small", revision="v1"))
    finish_run(tmp_path / "run", pipeline, "lora", "owner/small")
    write_json(StudyFolder(tmp_path).base_file, {"id": "owner/small", "commit": COMMITS[0]})
    card = (export(tmp_path / "run", tmp_path / "out") / "README.md").read_text()
    assert f'from_pretrained("owner/small", revision="{COMMITS[0]}")' in card
    assert f"owner/small (revision {COMMITS[0]})" in card and "base_model: owner/small" in card
    whole = export(tmp_path / "run", tmp_path / "whole", "pipeline")
    assert are_equal(DiffusionPipeline.from_pretrained(whole).unet, pipeline.unet, 1e-6)


# A whole search


def test_a_search_starts_from_an_adapter(lora, study_file):
    import memcontrol

    folder = study_file().parent
    shutil.copytree(lora[0] / "out", folder / "first")
    path = study_file(base={"id": "tiny", "adapter": "first"})
    memcontrol.search(path)
    (none, *others) = [run for run in StudyFolder(folder / "runs" / "small").list_runs() if run.has_result]
    assert others and none.has_result
    pins = StudyFolder(folder / "runs" / "small").read_pins()
    assert pins.keys() == {"id", "adapter"}
    shutil.copy(lora[0] / "out" / COMFYUI_FILE, folder / "first" / LORA_FILE)
    with pytest.raises(MemControlError, match="base.adapter .*first is not what this study began with"):
        memcontrol.search(path, trials=2)
