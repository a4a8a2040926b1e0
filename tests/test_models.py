"""The base: the embedded one's shape and size, losses by hand, samples against the plain pipeline, caches."""

import numpy as np
import pytest
import torch

from memcontrol.config.load import load_config
from memcontrol.data.split import load_parts
from memcontrol.model.base import load_base
from memcontrol.model.encoded import load_encoded
from memcontrol.model.source import TINY, find_source


def test_the_embedded_base_has_stable_diffusions_structure_and_is_small(base):
    config = base.denoiser.config
    assert tuple(config.down_block_types) == ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    assert config.layers_per_block == 2 and len(config.block_out_channels) == 4
    sites = [name for name, _ in base.denoiser.named_modules() if name.endswith("transformer_blocks.0")]
    assert [sum(name.startswith(part) for name in sites) for part in ("down", "mid", "up")] == [6, 1, 9]
    assert {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler"} <= {
        path.name for path in TINY.iterdir()
    }
    assert sum(path.stat().st_size for path in TINY.parent.rglob("*") if path.is_file()) < 12e6


def test_losses_are_the_squared_error_of_the_noise_predicted(base):
    clean, text = (
        torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        base.encode_captions(["a", "b", "c"]),
    )
    with torch.no_grad():
        noised = base.add_noise(clean, torch.Generator().manual_seed(7))
        losses, _ = base.denoise(noised, text)
        generator = torch.Generator().manual_seed(7)
        noise = torch.randn(clean.shape, generator=generator)
        expected_timesteps = torch.randint(1000, (3,), generator=generator)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # Stable Diffusion's schedule
        kept = torch.cumprod(1 - betas, 0)[expected_timesteps].view(3, 1, 1, 1)
        predicted = base.denoiser(
            kept.sqrt() * clean + (1 - kept).sqrt() * noise, expected_timesteps, text["prompt_embeds"]
        ).sample
    assert torch.equal(noised.timesteps, expected_timesteps)
    assert torch.allclose(losses, ((predicted - noise) ** 2).flatten(1).mean(1), atol=1e-5)


def test_samples_are_those_of_the_plain_pipeline(base):
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    captions, seeds = ["a printed digit 3", "a printed letter k"], [11, 12]
    images = base.sample(
        base.encode_captions(captions),
        base.encode_captions([""]),
        seeds=seeds,
        steps=5,
        guidance=2.0,
        resolution=32,
        progress=lambda *_: None,
    )
    plain = StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None, requires_safety_checker=False)
    plain.scheduler = DPMSolverMultistepScheduler.from_config(plain.scheduler.config)
    plain.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    expected = plain(
        captions, generator=generators, num_inference_steps=5, guidance_scale=2.0, output_type="np"
    ).images
    assert images.dtype == np.uint8 and images.shape == (2, 3, 32, 32)
    assert np.abs(images.transpose(0, 2, 3, 1) / 255 - expected).max() < 1.01 / 255


def test_encoding_is_the_autoencoders_and_happens_once(base, tmp_path, monkeypatch):
    config = load_config({"name": "a", "data": {"path": "digits", "train": 20, "holdout": 20, "test": 20}})
    images = load_parts(config.data, 32, 0).parts["train"]
    encoded = load_encoded(base, images, tmp_path)
    with torch.no_grad():
        pixels = torch.from_numpy(images.pixels()).float() / 127.5 - 1
        expected = base.autoencoder.encode(pixels).latent_dist.mean * base.autoencoder.config.scaling_factor
    assert torch.allclose(encoded.mean, expected, atol=1e-5) and (encoded.deviation > 0).all()
    text = base.encode_captions(images.captions)["prompt_embeds"]
    assert torch.allclose(encoded.texts(encoded.caption_rows)["prompt_embeds"], text, atol=1e-5)
    assert torch.allclose(
        encoded.text["prompt_embeds"][0], base.encode_captions([""])["prompt_embeds"][0], atol=1e-5
    )
    monkeypatch.setattr(type(base), "encode_images", lambda *_: 1 / 0)
    assert torch.equal(load_encoded(base, images, tmp_path).mean, encoded.mean)
    reconstructed = base.autoencoder.decode(expected / base.autoencoder.config.scaling_factor).sample.detach()
    assert (reconstructed - pixels).abs().mean() < 0.1


def test_the_digest_follows_the_content(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = find_source(str(tmp_path / "a")).digest
    (tmp_path / "a" / "x").write_text("2")
    assert (
        find_source(str(tmp_path / "a")).digest != first
        and find_source("tiny").digest == find_source("tiny").digest
    )
    assert load_base("tiny").resolution == 32


@pytest.mark.parametrize("share, n_without", [(0.0, 0), (0.4, 2), (0.79, 4)])
def test_guidance_that_begins_late_by_hand(base, share, n_without):
    """The sampler written out: the caption alone in the first steps, then empty + g (caption - empty)."""
    from diffusers import DPMSolverMultistepScheduler

    text, empty = base.encode_captions(["a printed digit 3"]), base.encode_captions([""])
    images = base.sample(
        text,
        empty,
        seeds=[11],
        steps=5,
        guidance=3.0,
        resolution=32,
        progress=lambda *_: None,
        guidance_from=share,
    )
    solver = DPMSolverMultistepScheduler.from_config(base.pipeline.scheduler.config)
    solver.set_timesteps(5)
    latents = (
        torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(11))[None] * solver.init_noise_sigma
    )
    with torch.no_grad():
        for i, t in enumerate(solver.timesteps):
            caption, none = (
                base.denoiser(latents, t, each["prompt_embeds"]).sample for each in (text, empty)
            )
            predicted = caption if i < n_without else none + 3.0 * (caption - none)
            latents = solver.step(predicted, t, latents).prev_sample
        pixels = base.autoencoder.decode(latents / base.autoencoder.config.scaling_factor).sample
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round()
    assert np.abs(images[0].astype(float) - expected[0].numpy()).max() <= 1


def test_redrawn_weights_follow_from_the_seed(tmp_path):
    from small_pipelines import build

    from memcontrol.model.base import load_base, redraw_weights

    denoiser = load_base(str(build("ddpm", tmp_path / "ddpm"))).denoiser
    states = []
    for seed in (1, 1, 2):
        redraw_weights(denoiser, seed)
        states.append({name: tensor.clone() for name, tensor in denoiser.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["conv_in.weight"], states[2]["conv_in.weight"])
