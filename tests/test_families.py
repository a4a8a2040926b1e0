"""Every family of pipelines, from its on-disk format through a whole trial: losses by hand, samples against
plain diffusers."""

import numpy as np
import pytest
import torch
import yaml
from small_pipelines import SMALL, build

from memcontrol.config.load import load_config
from memcontrol.config.spec import Spec
from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.space_yaml import load_space
from memcontrol.model.base import load_base
from memcontrol.model.source import make_empty_denoiser, open_pipeline, read_denoiser_config
from memcontrol.trial.loaded import LoadedModels
from memcontrol.trial.prepare import check_mitigations, prepare_study
from memcontrol.trial.run import run_trial

RESOLUTION = {"sd-v": 32, "ddpm": 16}


@pytest.fixture(scope="module", params=SMALL)
def family(request, tmp_path_factory):
    return request.param, str(build(request.param, tmp_path_factory.mktemp("families") / request.param))


ALL_AT_ONCE = {
    "ensemble": {"shards": 2},
    "rounds": 2,
    "skip": {},
    "redistribution": {},
    "augmentation": {"rule": "kept", "retest": False},
    "ema": 0.9,
    "gradient_checkpointing": True,
    "noise_offset": 0.1,
    "input_perturbation": 0.1,
    "micro_batch_size": 2,
}
ON_TEXT = {"captions": {"add_words": 0.5, "repeat_word": 0.5}, "embedding_noise": 0.1, "norm_threshold": 1e6}


def write_family_space(folder, method):
    """Two groups that every family has."""
    space = folder / "space.yaml"
    groups = (
        "{a: '(down_blocks|transformer_blocks)\\..*', b: "
        "'(up_blocks|single_transformer_blocks|proj_out|norm_out)\\.?.*'}"
    )
    rates = f"{{{method}: [1.0e-3, 1.0e-2], full: [1.0e-5, 1.0e-4]}}"
    space.write_text(f"groups: {groups}\nmethods: [{method}]\nlearning_rate: {rates}\n")
    return space


def write_family_study(folder, base, name, photographs, method="svdiff", **keys):
    """A study file of a small base: one sampled trial beside no training."""
    space = write_family_space(folder, method)
    study = {
        "name": "t",
        "base": base,
        "space": str(space),
        "inner": {"budget_images": 8, "batch_size": 4, "rounds": 1},
        "data": {
            "path": str(photographs(30)),
            "train": 10,
            "holdout": 10,
            "test": 10,
            "resolution": RESOLUTION.get(name, 32),
        },
        "rewards": {"n_samples": 8, "sampling_steps": 2, "objectives": ["kid", "memorization"], "confirm": 0},
        "search": {"trials": 1, "anchors": ["none"], "executor": "inline"},
        **keys,
    }
    path = folder / "t.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


@pytest.mark.parametrize("inner", ("plain", "all at once"))
def test_a_trial_runs_on_every_family(family, inner, tmp_path, photographs):
    name, base = family
    settings = {} if inner == "plain" else ALL_AT_ONCE if name == "ddpm" else ALL_AT_ONCE | ON_TEXT
    space = write_family_space(tmp_path, "svdiff")
    config = load_config(
        {
            "name": "t",
            "base": base,
            "space": str(space),
            "inner": {"budget_images": 16, "batch_size": 4, **settings},
            "data": {
                "path": str(photographs(30)),
                "train": 10,
                "holdout": 10,
                "test": 10,
                "resolution": RESOLUTION.get(name, 32),
            },
            "rewards": {
                "n_samples": 8,
                "sampling_steps": 2,
                "objectives": ["kid", "memorization", "step_gflops"],
            },
        }
    )
    loaded = LoadedModels()
    assert prepare_study(config.model_dump(mode="json"), tmp_path, loaded, lambda text: None)["sizes"] == {
        "train": 10,
        "holdout": 10,
        "test": 10,
    }
    spec = Spec(
        config, load_space(str(space)), Choice(("a",), "svdiff", 5e-3), tmp_path, "search", "holdout", 10
    )
    spec.write(tmp_path / "run")
    found = run_trial(tmp_path / "run", loaded, lambda *_, **said: None)
    assert (
        found["state"] == "COMPLETE"
        and found["n_steps"] == 4
        and all(np.isfinite(value) for value in found["rewards"].values())
    )
    assert found["rewards"]["step_gflops"] > 0 and found["rewards"]["memory_mib"] > 0


@pytest.mark.parametrize(
    "name, key, value, word",
    [
        ("ddpm", "inner.captions.replace", 0.1, "inner.captions changes captions"),
        ("ddpm", "inner.norm_threshold", 1.0, "inner.norm_threshold changes captions"),
        ("ddpm", "rewards.random_words", 2, "has none; take it out"),
        ("ddpm", "data.label", "caption", "has no captions to say what class"),
        ("sd3", "inner.min_snr", 5.0, "is a flow; take it out"),
        ("pixart", "rewards.guidance_from", 0.2, "cannot begin guidance late"),
        ("flux", "rewards.guidance_from", 0.2, "cannot begin guidance late"),
        ("sana", "rewards.guidance_from", 0.2, "cannot begin guidance late"),
        ("sdxl", "rewards.guidance_from", 0.2, None),
        ("sd3", "rewards.guidance_from", 0.2, None),
    ],
)
def test_settings_that_mean_nothing_for_a_base_are_refused(name, key, value, word, tmp_path):
    base = load_base(str(build(name, tmp_path / name)))
    config = load_config({"name": "a", "base": name, "data": "digits"}, [f"{key}={value}"])
    if word:
        with pytest.raises(MemControlError, match=word):
            check_mitigations(config, base)
    else:  # and the pipeline really reads its scale anew in every step
        check_mitigations(config, base)
        text, empty = base.encode_captions(["a red face"]), base.encode_captions([""])
        late, always, never = (
            base.sample(
                text,
                empty,
                seeds=[1],
                steps=4,
                guidance=guidance,
                resolution=32,
                progress=lambda *_: None,
                guidance_from=share,
            )
            for guidance, share in ((9.0, 0.5), (9.0, 0.0), (1.0, 0.0))
        )
        assert not np.array_equal(late, always) and not np.array_equal(late, never)


def test_samples_are_those_of_the_plain_pipeline(family):
    name, path = family
    base = load_base(path)
    plain = open_pipeline(path)
    plain.scheduler = base.pipeline.scheduler
    plain.set_progress_bar_config(disable=True)
    side, seeds = RESOLUTION.get(name, 32), [3, 4]
    text = base.encode_captions(["a red face", "a digit"])
    empty = base.encode_captions([""])
    images = base.sample(
        text, empty, seeds=seeds, steps=2, guidance=1.0, resolution=side, progress=lambda *_: None
    )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if name == "ddpm":
        from diffusers import DDIMPipeline

        plain = DDIMPipeline(plain.unet, plain.scheduler)
        plain.set_progress_bar_config(disable=True)
        expected = plain(batch_size=2, generator=generators, num_inference_steps=2, output_type="np").images
    else:
        binned = {"use_resolution_binning": False} if name in ("pixart", "sana") else {}
        human = {"complex_human_instruction": None} if name == "sana" else {}
        expected = plain(
            ["a red face", "a digit"],
            generator=generators,
            num_inference_steps=2,
            guidance_scale=1.0,
            height=side,
            width=side,
            output_type="np",
            **binned,
            **human,
        ).images
    assert np.abs(images.transpose(0, 2, 3, 1) / 255 - expected).max() < 1.01 / 255


def test_the_loss_of_velocity_prediction_by_hand(tmp_path):
    base = load_base(str(build("sd-v", tmp_path / "sd-v")))
    clean, text = torch.randn(2, 4, 8, 8), base.encode_captions(["a", "b"])
    with torch.no_grad():
        losses, _ = base.denoise(base.add_noise(clean, torch.Generator().manual_seed(1)), text)
        generator = torch.Generator().manual_seed(1)
        noise, times = (
            torch.randn(clean.shape, generator=generator),
            torch.randint(1000, (2,), generator=generator),
        )
        kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[times].view(
            2, 1, 1, 1
        )
        predicted = base.denoiser(
            kept.sqrt() * clean + (1 - kept).sqrt() * noise, times, text["prompt_embeds"]
        ).sample
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean  # Salimans and Ho 2022, appendix D
    assert torch.allclose(losses, ((predicted - velocity) ** 2).flatten(1).mean(1), atol=1e-5)


def test_the_loss_of_a_flow_by_hand(tmp_path):
    base = load_base(str(build("sd3", tmp_path / "sd3")))
    clean, text = torch.randn(3, 4, 16, 16), base.encode_captions(["a", "b", "c"])
    with torch.no_grad():
        noised = base.add_noise(clean, torch.Generator().manual_seed(1))
        losses, _ = base.denoise(noised, text)
        generator = torch.Generator().manual_seed(1)
        noise, normal = torch.randn(clean.shape, generator=generator), torch.randn(3, generator=generator)
        level = 1 / (1 + torch.exp(-normal))
        level = 3 * level / (1 + 2 * level)  # the schedule's shift of 3
        noisy = (1 - level.view(3, 1, 1, 1)) * clean + level.view(3, 1, 1, 1) * noise
        predicted = base.denoiser(
            hidden_states=noisy,
            timestep=1000 * level,
            encoder_hidden_states=text["prompt_embeds"],
            pooled_projections=text["pooled_prompt_embeds"],
        ).sample
    assert torch.allclose(losses, ((predicted - (noise - clean)) ** 2).flatten(1).mean(1), atol=1e-5)
    assert noised.timesteps.tolist() == [int(1000 * share) for share in level]


def test_a_pipeline_that_no_family_knows_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "KandinskyPipeline", "_diffusers_version": "0.42.1"}'
    )
    with pytest.raises(
        MemControlError,
        match="is a KandinskyPipeline, which MemControl cannot train; it can train StableDiffusionPipeline",
    ):
        open_pipeline(str(tmp_path))
    with pytest.raises(MemControlError, match="no unet/config.json"):
        make_empty_denoiser(str(tmp_path))


def test_the_shapes_of_a_denoiser_come_from_its_config_alone(family, tmp_path):
    name, path = family
    config = read_denoiser_config(path)
    real = open_pipeline(path)
    real = getattr(real, "unet", None) or real.transformer
    empty = make_empty_denoiser(path)
    assert config["_class_name"] == type(real).__name__
    assert {key: tensor.shape for key, tensor in empty.state_dict().items()} == {
        key: tensor.shape for key, tensor in real.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in empty.parameters())
