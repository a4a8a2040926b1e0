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
from memcontrol.model.base import make_empty_denoiser
from memcontrol.model.cost import measure_cost, measure_step_cost, measure_typical_cost, survey_space
from memcontrol.model.derive_space import derive_space
from memcontrol.model.families import Family

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


def test_what_is_kept_for_backward_is_counted_once():
    """Two trained layers by hand: forward keeps the input of each, [B, 8] and [B, 16] floats."""
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)).to("meta")

    class Plain(Family):
        def predict(self, denoiser, noisy, time, text):
            return denoiser(noisy)

    space = parse_space(
        {"groups": {"a": r"\d"}, "methods": ["full"], "learning_rate": {"full": [1e-4, 1e-2]}}, "plain"
    )
    cost = measure_cost(layers, space, space.choice(("a",), "full", 0.5), Plain(), (8,), {}, batch=32)
    n = 8 * 16 + 16 + 16 * 4 + 4
    assert cost.parameters == n
    assert cost.memory_mib * 2**20 == pytest.approx(4 * (4 * n + 32 * (8 + 16)))
    # forward, both weights, the second's input
    assert cost.step_gflops * 1e9 == 2 * (8 * 16 + 16 * 4) * 2 + 2 * 16 * 4
    assert math.isclose(
        measure_cost(layers, space, space.choice(("a",), "full", 0.5), Plain(), (8,), {}).step_gflops,
        cost.step_gflops,
    )


@pytest.mark.parametrize("groups", [("down_attention", "up_resnet"), ("up_attention",)])
def test_a_step_costs_the_same_by_shapes_and_by_running_it(base, material, groups):
    """The operations are those that torch's own counter sees in a step with attention written out, but that
    fused attention also makes gradients of frozen keys and values."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from memcontrol.model.base import make_empty_denoiser

    space = load_space("digits")
    choice, text = (
        space.choice(groups, "lora", 0.5, 4),
        {name: tensor.shape[1:] for name, tensor in material.data.text.items()},
    )
    by_shapes = measure_cost(
        make_empty_denoiser("tiny"), space, choice, base.family, material.data.mean.shape[1:], text, batch=8
    )
    adapter = inject_adapter(base.denoiser, space, choice, 0)
    try:
        assert (
            measure_step_cost(
                base.denoiser, adapter, base.family, material.data.mean.shape[1:], text, batch=8
            )
            == by_shapes
        )
        assert not any(parameter.grad is not None for parameter in base.denoiser.parameters())
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            base.family.predict(
                base.denoiser, material.data.mean[:1], torch.zeros(1), material.data.texts(torch.tensor([0]))
            ).sum().backward()
        assert 1 <= by_shapes.step_gflops * 1e9 / counter.get_total_flops() < 1.02
    finally:
        adapter.remove()
