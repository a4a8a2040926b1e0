"""The shipped spaces on full-size architectures, from their configurations alone: MemControl's published
counts, and fits."""

import functools
import math
from pathlib import Path

import pytest
import torch
import yaml

from memcontrol.core.space_yaml import load_space, parse_space
from memcontrol.model.adapter import check_space, inject_adapter
from memcontrol.model.cost import (
    StepSettings,
    measure_cost,
    measure_step_cost,
    measure_typical_cost,
    survey_space,
)
from memcontrol.model.derive_space import derive_space
from memcontrol.model.families import Family
from memcontrol.model.precision import choose_precision
from memcontrol.model.source import make_empty_denoiser

ARCHITECTURES = Path(__file__).parent / "architectures"
SD15 = 859_520_964
FITS = {
    "sdxl-blocks": ("sdxl", 2_567_463_684),
    "sd3-blocks": ("sd3", None),
    "flux-blocks": ("flux", None),
    "pixart-blocks": ("pixart", None),
    "sana-blocks": ("sana", None),
    "ddpm-cifar10": ("ddpm-cifar10", 35_746_307),
    "ddpm-celebahq": ("ddpm-celebahq", 113_673_219),
}


@pytest.fixture(scope="module")
def architecture():
    """Name to denoiser on the meta device, built once."""
    return functools.cache(lambda name: make_empty_denoiser(str(ARCHITECTURES / name)))


PUBLISHED = {  # all-ones, all-zeros, what one site of width 320, 640, 1280 adds
    "memcontrol-sd15-svdiff": ("svdiff", 13, 222_805, 125_486, (3_203, 6_403, 11_779)),
    "memcontrol-sd15-difffit": ("difffit", 13, 581_124, 468_484, (11 * 320, 11 * 640, 11 * 1280)),
    "memcontrol-sd15-attention": (
        "attention",
        16,
        267_239_360,
        173_702_720,
        (1_106_560, 3_441_920, 11_799_040),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_memcontrols_spaces_train_what_its_code_trains(architecture, name):
    method, n_groups, all_on, all_off, sites = PUBLISHED[name]
    found = survey_space(architecture("sd15"), load_space(name))
    assert found["total"] == SD15 and len(found["groups"]) == n_groups
    assert (found["methods"][method]["all_on"], found["methods"][method]["all_off"]) == (all_on, all_off)
    width = {"down_0": 0, "down_1": 1, "down_2": 2, "mid": 2, "up_1": 2, "up_2": 1, "up_3": 0}
    for group in found["groups"]:
        site = next(index for start, index in width.items() if group["name"].startswith(start))
        assert group["parameters"][method] == sites[site], group["name"]


@pytest.mark.parametrize("name", ["sd15-sites-complete", "sd15-projections"])
def test_our_spaces_hide_nothing(architecture, name):
    space = load_space(name)
    found = survey_space(architecture("sd15"), space)
    assert all(counts["all_off"] == 0 for counts in found["methods"].values())
    for method, counts in found["methods"].items():
        assert counts["all_on"] == sum(group["parameters"].get(method, 0) for group in found["groups"]), (
            method
        )


@pytest.mark.parametrize("name", FITS)
def test_spaces_fit_their_architectures(architecture, name):
    kind, total = FITS[name]
    denoiser, space = architecture(kind), load_space(name)
    assert total in (None, sum(parameter.numel() for parameter in denoiser.parameters()))
    check_space(denoiser, space)
    group, method = next(iter(space.groups)), space.methods[0]
    cost = measure_typical_cost(denoiser, space, space.choice((group,), method, 0.5))
    assert cost.parameters > 0 and cost.step_gflops > 0


@pytest.mark.parametrize("name", sorted(path.name for path in ARCHITECTURES.iterdir()))
def test_a_space_can_be_derived_for_any(architecture, name):
    denoiser = architecture(name)
    space = parse_space(yaml.safe_load(derive_space(denoiser, name)), name)
    assert 2 <= len(space.groups) <= 20
    check_space(denoiser, space)


def test_a_steps_cost_falls_with_the_earliest_trained_block(architecture):
    """In forward passes, from each block's share of them: LoRA from down.0 on costs 2.0, at up.3 alone 1.25;
    full costs 3."""
    denoiser, space = architecture("sd15"), load_space("sd15-blocks")
    from torch.utils.flop_counter import FlopCounterMode

    text = torch.zeros(1, 77, 768, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(torch.zeros(1, 4, 64, 64, device="meta"), torch.zeros(1, device="meta"), text)
    forward = counter.get_total_flops() / 1e9
    assert 700 < forward < 900
    cost = {
        group: measure_typical_cost(denoiser, space, space.choice((group,), "lora", 0.5))
        for group in ("down_0", "up_1", "up_3")
    }
    assert cost["down_0"].step_gflops / forward == pytest.approx(2.0, abs=0.2)
    assert cost["up_3"].step_gflops / forward == pytest.approx(1.25, abs=0.15)
    assert cost["down_0"].memory_mib > cost["up_1"].memory_mib > cost["up_3"].memory_mib
    full = measure_typical_cost(denoiser, space, space.list_anchors()["full"][0])
    assert full.parameters == SD15 and full.step_gflops / forward == pytest.approx(3.0, abs=0.2)
    none = measure_typical_cost(denoiser, space, space.choice((), "lora", 0.5))
    assert (
        none.parameters == 0 and none.step_gflops == 0 and none.memory_mib == pytest.approx(4 * SD15 / 2**20)
    )


def test_a_step_of_two_layers_by_hand():
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)).to("meta")

    class Plain(Family):
        def predict(self, denoiser, noisy, time, text):
            return denoiser(noisy)

    space = parse_space(
        {"groups": {"a": r"\d"}, "methods": ["full"], "learning_rate": {"full": [1e-4, 1e-2]}}, "plain"
    )
    choice = space.choice(("a",), "full", 0.5)
    cost = measure_cost(layers, space, choice, Plain(), (8,), {}, StepSettings(forward=32))
    n = 8 * 16 + 16 + 16 * 4 + 4
    assert cost.parameters == n
    in_bytes = {name: mib * 2**20 for name, mib in cost.parts.items()}
    assert in_bytes["weights"] == 4 * n and in_bytes["moments"] == 8 * n and in_bytes["copies"] == 0
    # input, time, both outputs; then gradients of both layers, and of what lies between them
    forward = 4 * 32 * (8 + 1 + 16 + 4)
    assert forward + 4 * n <= in_bytes["activations and gradients"] <= forward + 4 * (n + 32 * 16 + 100)
    # forward, both weights, the second's input
    assert cost.step_gflops * 1e9 == 2 * (8 * 16 + 16 * 4) * 2 + 2 * 16 * 4
    alone, more = (
        measure_cost(layers, space, choice, Plain(), (8,), {}, settings)
        for settings in (StepSettings(), StepSettings(32, True, 0.5, 4.0))
    )
    assert math.isclose(alone.step_gflops, cost.step_gflops)
    assert more.parts["moments"] * 2**20 == 0.5 * n and more.parts["copies"] * 2**20 == 4 * n
    assert more.parts["activations and gradients"] > cost.parts["activations and gradients"]


def measure_allocations(run):
    """The most bytes that torch's allocator has given out at a time while `run` runs, by torch's profiler."""
    with torch.profiler.profile(profile_memory=True) as profiled:
        run()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("groups, method", [(("down_attention", "up_resnet"), "lora"), (("mid",), "full")])
@pytest.mark.parametrize("precision", ("float32", "bfloat16"))
def test_the_bytes_of_a_step_are_those_that_the_allocator_gives(base, material, groups, method, precision):
    space, text = load_space("digits"), material.data.texts(torch.zeros(8, dtype=torch.long))
    choice = space.choice(groups, "lora", 0.5, 4) if method == "lora" else space.list_anchors()["full"][1]
    held = choose_precision("float32", precision, torch.device("cpu"))
    shapes = {name: tensor.shape[1:] for name, tensor in text.items()}
    latents = material.data.mean.shape[1:]
    settings = StepSettings(8, precision=held)
    counted = measure_cost(base.bare_denoiser, space, choice, base.family, latents, shapes, settings)
    adapter = inject_adapter(base.denoiser, space, choice, 0)

    def step():
        with torch.autocast("cpu", held.compute, enabled=precision != "float32"):
            predicted = base.family.predict(base.denoiser, torch.zeros(8, *latents), torch.zeros(8), text)
        predicted.sum().backward()

    try:
        real = measure_allocations(step)
    finally:
        adapter.remove()
    assert counted.parts["activations and gradients"] * 2**20 == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("groups", [("down_attention", "up_resnet"), ("up_attention",)])
def test_a_step_costs_the_same_by_shapes_and_by_running_it(base, material, groups):
    """The operations are those that torch's own counter sees in a step with attention written out, but that
    fused attention also makes gradients of frozen keys and values."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from memcontrol.model.source import make_empty_denoiser

    space = load_space("digits")
    choice, text = (
        space.choice(groups, "lora", 0.5, 4),
        {name: tensor.shape[1:] for name, tensor in material.data.text.items()},
    )
    by_shapes = measure_cost(
        make_empty_denoiser("tiny"), space, choice, base.family, material.data.mean.shape[1:], text
    )
    adapter = inject_adapter(base.denoiser, space, choice, 0)
    try:
        by_running = measure_step_cost(
            base.denoiser, adapter, base.family, material.data.mean.shape[1:], text
        )
        assert by_running.step_gflops == by_shapes.step_gflops
        assert by_running.memory_mib == pytest.approx(by_shapes.memory_mib, rel=0.02)
        assert not any(parameter.grad is not None for parameter in base.denoiser.parameters())
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            base.family.predict(
                base.denoiser, material.data.mean[:1], torch.zeros(1), material.data.texts(torch.tensor([0]))
            ).sum().backward()
        assert 1 <= by_shapes.step_gflops * 1e9 / counter.get_total_flops() < 1.02
    finally:
        adapter.remove()
