"""One contract for every way of training: identity at start, removal bit for bit, save and load, fuse, and plain diffusers."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from memcontrol.adapters import LORA_FILE, adaptable_modules, inject
from memcontrol.errors import MemControlError
from memcontrol.models import open_pipeline
from memcontrol.space import Choice, load_space

SPACE = load_space("digits")
CHOICES = {
    "lora": Choice(("down_attention", "mid_attention", "up_resnet"), "lora", 1e-3, 4),
    "attention": Choice(("down_attention", "up_attention"), "attention", 1e-3),
    "full": Choice((), "full", 1e-3),
    "none": Choice((), "none", 0.0),
}


@pytest.fixture
def denoiser():
    return open_pipeline("tiny").unet.requires_grad_(False).eval()


@torch.no_grad()
def output(denoiser):
    generator = torch.Generator().manual_seed(0)
    noisy, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 48, generator=generator)
    return denoiser(noisy, torch.tensor([3, 700]), text).sample


def injected(denoiser, choice, seed=0):
    return inject(denoiser, SPACE.modules(adaptable_modules(denoiser), choice), choice, seed)


@torch.no_grad()
def disturb(adapter):
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("method", CHOICES)
class TestContract:
    def test_injecting_changes_nothing_and_removing_restores_every_bit(self, denoiser, method):
        before, state = output(denoiser), {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
        adapter = injected(denoiser, CHOICES[method])
        assert torch.equal(output(denoiser), before)
        disturb(adapter)
        assert method == "none" or not torch.allclose(output(denoiser), before, atol=1e-3)
        adapter.remove()
        after = denoiser.state_dict()
        assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)
        assert torch.equal(output(denoiser), before)
        assert not any(parameter.requires_grad for parameter in denoiser.parameters())

    def test_exactly_what_the_choice_names_is_trainable(self, denoiser, method):
        adapter = injected(denoiser, CHOICES[method])
        trainable = {id(parameter) for parameter in denoiser.parameters() if parameter.requires_grad}
        assert trainable == {id(parameter) for parameter in adapter.parameters()}
        assert adapter.n_trained() == sum(parameter.numel() for parameter in adapter.parameters())

    def test_a_second_injection_after_removal_works(self, denoiser, method):
        before = output(denoiser)
        for _ in range(2):
            adapter = injected(denoiser, CHOICES[method])
            disturb(adapter)
            adapter.remove()
        assert torch.equal(output(denoiser), before)

    def test_saved_and_loaded_it_gives_the_same_and_so_does_fused(self, denoiser, method, tmp_path):
        adapter = injected(denoiser, CHOICES[method])
        disturb(adapter)
        adapter.save(tmp_path, {"what": method})
        expected = output(denoiser)
        fresh = open_pipeline("tiny").unet.eval()
        again = injected(fresh, CHOICES[method], seed=5)
        again.load(tmp_path)
        assert torch.equal(output(fresh), expected)
        again.fuse()
        assert torch.allclose(output(fresh), expected, atol=2e-5)
        assert fresh.state_dict().keys() == open_pipeline("tiny").unet.state_dict().keys()

    def test_the_start_depends_on_the_seed_alone(self, method):
        states = []
        for seed in (1, 1, 2):
            torch.manual_seed(len(states))
            denoiser = open_pipeline("tiny").unet
            states.append({name: parameter.detach().clone() for name, parameter in injected(denoiser, CHOICES[method], seed).named_parameters().items()})
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        if method == "lora":
            assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_counts_by_hand(denoiser):
    assert injected(denoiser, CHOICES["full"]).n_trained() == sum(parameter.numel() for parameter in denoiser.parameters())
    attention = injected(denoiser, CHOICES["attention"])
    wanted = sum(p.numel() for name, p in denoiser.named_parameters() if ".attn" in name and name.startswith(("down_blocks", "up_blocks")))
    assert attention.n_trained() == wanted
    lora = injected(denoiser, Choice(("mid_attention",), "lora", 1e-3, 4))
    modules = SPACE.modules(adaptable_modules(open_pipeline("tiny").unet), Choice(("mid_attention",), "lora", 1e-3, 4))
    plain = open_pipeline("tiny").unet
    assert lora.n_trained() == sum(4 * (m.in_features + m.out_features) for m in map(plain.get_submodule, modules))


def test_another_choices_file_is_refused(denoiser, tmp_path):
    injected(denoiser, CHOICES["lora"]).save(tmp_path, {})
    injected(open_pipeline("tiny").unet, CHOICES["attention"]).save(tmp_path, {})
    for method in ("lora", "attention"):
        other = open_pipeline("tiny").unet
        adapter = injected(other, Choice(("mid_attention",), method, 1e-3, 4 if method == "lora" else None))
        with pytest.raises(MemControlError, match="another base or space"):
            adapter.load(tmp_path)


PLAIN_DIFFUSERS = """
import sys, json
sys.modules["memcontrol"] = None  # importing it now fails
import numpy as np, torch
from diffusers import StableDiffusionPipeline
base, lora, out = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
pipe.load_lora_weights(lora)
generator = torch.Generator().manual_seed(0)
noisy, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 48, generator=generator)
with torch.no_grad():
    np.save(out, pipe.unet(noisy, torch.tensor([3, 700]), text).sample.numpy())
"""


def test_plain_diffusers_reads_the_lora_file(denoiser, tmp_path):
    from memcontrol.models import TINY

    adapter = injected(denoiser, CHOICES["lora"])
    disturb(adapter)
    adapter.save(tmp_path, {"what": "test"})
    assert (tmp_path / LORA_FILE).is_file()
    subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS, str(TINY), str(tmp_path), str(tmp_path / "out.npy")], check=True, capture_output=True)
    assert np.abs(np.load(tmp_path / "out.npy") - output(denoiser).numpy()).max() < 1e-5
