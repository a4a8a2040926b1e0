"""Encoded captions: without padding on disk where the denoiser masks it, and as long as a study says."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from small_pipelines import build
from test_export import finished_run

import memcontrol.model.encoded as encoded
from memcontrol.commands.export import describe_loading, export
from memcontrol.config.base import BaseConfig
from memcontrol.config.load import load_config
from memcontrol.config.spec import read_spec
from memcontrol.core.errors import MemControlError
from memcontrol.core.run_folder import RunFolder
from memcontrol.data.split import load_parts
from memcontrol.model.base import load_base
from memcontrol.model.encoded import EncodingTask, MaskedTokens, load_encoded
from memcontrol.model.source import find_source, open_pipeline

CAPTIONS = ["a red face", "a", "photo of a blue face of a red digit", "a digit", "a red face", "of"]
N_TOKENS = {  # of the empty caption and each distinct one: words and </s>, or "a" and what is between
    "pixart": [1, 4, 2, 10, 3, 2],
    "sana": [1, 5, 2, 8, 3, 2],
}
MASKED, UNMASKED = ("pixart", "sana"), ("sd3", "flux")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of a small pipeline, by its name."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = str(build(name, tmp_path_factory.mktemp("bases") / name))
        return made[name]

    return make


@pytest.fixture(scope="module")
def images():
    config = load_config({"name": "a", "data": {"path": "digits", "train": 8, "holdout": 8, "test": 8}})
    found = load_parts(config.data, 32, 0).parts["train"]
    records = (replace(record, caption=caption) for record, caption in zip(found.records, CAPTIONS))
    return replace(found, records=tuple(records))


def encode_plainly(path, captions, **length):
    """prompt_embeds by diffusers' own pipeline, and what else it returns."""
    encode = open_pipeline(path).encode_prompt
    given = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False, **length}
    with torch.no_grad():
        return encode(
            captions, **{key: given[key] for key in given if key in inspect.signature(encode).parameters}
        )


@pytest.mark.parametrize("name", MASKED)
def test_a_file_has_the_tokens_that_the_mask_has(name, place, images, tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "_CHUNKS", {"captions": 4, "images": 4})
    base = load_base(place(name))
    data, n_tokens = load_encoded(base, images, tmp_path), N_TOKENS[name]
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        assert stored.get_slice("text.prompt_embeds").get_shape() == [sum(n_tokens), 32]
    n_latents = data.mean.numel() + data.deviation.numel()
    n_bytes = 4 * 32 * sum(n_tokens) + 8 * 300 * 6 + 4 * n_latents + 8 * len(CAPTIONS)
    with open(file, "rb") as opened:
        n_head = int.from_bytes(opened.read(8), "little")
    assert file.stat().st_size == 8 + n_head + n_bytes

    distinct = list(dict.fromkeys(["", *CAPTIONS]))
    wanted, mask, *_ = encode_plainly(place(name), distinct)
    rows = torch.tensor([3, 0, 3, 5])
    text = data.texts(rows)
    assert torch.equal(text["prompt_attention_mask"], mask[rows]) and mask.sum(1).tolist() == n_tokens
    assert torch.allclose(text["prompt_embeds"], wanted[rows] * mask[rows, :, None], atol=1e-5)
    assert data.text["prompt_embeds"].shape == wanted.shape == (6, 300, 32)


def test_tokens_come_back_wherever_the_mask_has_them():
    whole, mask = torch.randn(5, 7, 3).bfloat16(), torch.rand(5, 7).round().long()
    mask[:, 3] = 1
    kept = MaskedTokens(whole[mask.bool()], mask)
    for rows in (torch.arange(5), torch.tensor([4, 2, 4]), torch.tensor([2])):
        assert torch.equal(kept[rows], whole[rows] * mask[rows, :, None])


@pytest.mark.parametrize("name", MASKED)
def test_padding_changes_nothing_under_a_mask(name, place, images, tmp_path, monkeypatch):
    """Neither the prediction nor a gradient, bit for bit; without the mask it would. Of a caption whose mask
    is empty the denoiser sees all, and it is kept whole."""
    base = load_base(place(name))
    whole = base.encode_captions(["", *CAPTIONS[:4]])
    whole["prompt_attention_mask"][4] = 0
    monkeypatch.setattr(base, "encode_captions", lambda captions: whole)
    data = load_encoded(base, images.take(range(4)), tmp_path)
    assert data.caption_rows.tolist() == [1, 2, 3, 4]
    text, bare = {key: each[1:] for key, each in whole.items()}, data.texts(data.caption_rows)
    noised = base.add_noise(torch.randn(4, 4, 16, 16), torch.Generator().manual_seed(1))
    weights = [p for p in base.denoiser.requires_grad_(True).parameters()]

    def learn(text):
        losses, predicted = base.denoise(noised, text)
        return predicted.detach(), torch.autograd.grad(losses.sum(), weights, allow_unused=True)

    is_padding = (bare["prompt_embeds"] == 0).all(2)
    assert is_padding.sum(1).tolist() == [*(300 - n for n in N_TOKENS[name][1:4]), 0]
    (one, gradients), (other, others) = learn(text), learn(bare)
    assert torch.equal(one, other)
    pairs = [(a, b) for a, b in zip(gradients, others) if a is not None]
    assert len(pairs) > 20 and all(torch.equal(a, b) for a, b in pairs)
    seen = torch.ones_like(text["prompt_attention_mask"])
    found = [learn({**each, "prompt_attention_mask": seen})[0] for each in (text, bare)]
    assert not torch.allclose(*found, atol=1e-5)


def test_files_with_padding_are_not_taken_for_those_without(place, images, tmp_path):
    names = {}
    for name in ("tiny", *MASKED, *UNMASKED):
        base = load_base(name if name == "tiny" else place(name))
        before = f"latents-{images.digest}-{base.source.digest}.safetensors"
        names[name] = EncodingTask(base, images, tmp_path).path.name == before
    assert names == {"tiny": True, "pixart": False, "sana": False, "sd3": True, "flux": True}


@pytest.mark.parametrize("name", (*MASKED, *UNMASKED))
def test_captions_take_as_many_tokens_as_the_study_says(name, place):
    plain = load_base(place(name))
    base = load_base(BaseConfig(id=place(name), max_sequence_length=12))
    wanted = encode_plainly(place(name), CAPTIONS, max_sequence_length=12)[0]
    found = base.encode_captions(CAPTIONS)["prompt_embeds"]
    assert torch.allclose(found, wanted, atol=1e-5)
    n_clip = 32 if name == "sd3" else 0  # of the small CLIP, before T5's
    assert found.shape[1] == n_clip + 12 < plain.encode_captions(["a"])["prompt_embeds"].shape[1]
    assert base.source.digest != plain.source.digest == find_source(place(name)).digest


@pytest.mark.parametrize("name", UNMASKED)
def test_samples_are_those_of_the_plain_pipeline_at_that_length(name, place):
    base = load_base(BaseConfig(id=place(name), max_sequence_length=12))
    settings = {"seeds": [3, 4], "steps": 2, "guidance": 1.0, "resolution": 32, "progress": lambda *_: None}
    images = base.sample(base.encode_captions(CAPTIONS[:2]), base.encode_captions([""]), **settings)
    plain = open_pipeline(place(name))
    plain.set_progress_bar_config(disable=True)

    def draw(**length):
        generator = [torch.Generator().manual_seed(seed) for seed in settings["seeds"]]
        call = {"generator": generator, "num_inference_steps": 2, "guidance_scale": 1.0, **length}
        return plain(CAPTIONS[:2], height=32, width=32, output_type="np", **call).images

    found = images.transpose(0, 2, 3, 1) / 255
    assert np.abs(found - draw(max_sequence_length=12)).max() < 1.01 / 255
    assert np.abs(found - draw()).max() > 1.01 / 255  # padding takes part


@pytest.mark.parametrize(
    "name, given, word",
    [
        ("tiny", 77, "the captions of a StableDiffusionPipeline have no length to choose; take it out"),
        ("ddpm", 77, "the captions of a DDPMPipeline have no length to choose"),
        ("sd3", 513, "a StableDiffusion3Pipeline takes 512 tokens at most; give fewer"),
        ("flux", 513, "a FluxPipeline takes 512 tokens at most"),
        ("pixart", 301, "a PixArtSigmaPipeline takes 300 tokens at most"),
        ("sana", 301, "a SanaPipeline takes 300 tokens at most"),
    ],
)
def test_lengths_that_a_base_does_not_take_are_refused(name, given, word, place):
    base = BaseConfig(id="tiny" if name == "tiny" else place(name), max_sequence_length=given)
    with pytest.raises(MemControlError, match=f"base.max_sequence_length is {given}, and {word}"):
        load_base(base)


def test_a_length_is_one_of_the_studys_keys():
    config = load_config({"name": "a", "base": "tiny", "data": "digits"}, ["base.max_sequence_length=64"])
    assert config.base.max_sequence_length == 64 and str(config.base) == "tiny (max_sequence_length 64)"
    with pytest.raises(MemControlError, match="base.max_sequence_length' is 0"):
        load_config({"name": "a", "base": {"id": "tiny", "max_sequence_length": 0}, "data": "digits"})


def test_an_export_says_which_length_belongs_to_the_call(place, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    finished_run(run, place("flux"), "lora")
    spec = read_spec(run)
    longer = spec.config.base.model_copy(update={"max_sequence_length": 12})
    RunFolder(run).spec_file.unlink()
    replace(spec, config=spec.config.replaced({"base": longer})).write(run)
    export(run, out, "pipeline")
    assert "call it as `pipe(prompt, max_sequence_length=12)`" in (out / "README.md").read_text()
    assert "call it with max_sequence_length=12; " in describe_loading(run, out)
