"""One contract for every way of training, over every family of denoisers, and what may not be trained
together."""

import numpy as np
import pytest
import torch
import yaml
from small_pipelines import SMALL, build
from torch.nn.utils import parametrize

from memcontrol.core.choice import SEARCHED_METHODS, Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.space_yaml import load_space, parse_space
from memcontrol.model.adapter import inject_adapter, list_trainable_modules
from memcontrol.model.base import load_base
from memcontrol.model.derive_space import derive_space
from memcontrol.model.parts import suits

FAMILIES = ("tiny", *SMALL)
SPACE = load_space("digits")
MIXES = {
    "lora and svdiff": ("lora", "svdiff"),
    "difffit and loha": ("difffit", "loha"),
    "oft and bias": ("oft", "bias"),
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Family name to its base, built and loaded once."""
    loaded = {}

    def base_of(family):
        if family not in loaded:
            loaded[family] = load_base(
                "tiny" if family == "tiny" else str(build(family, tmp_path_factory.mktemp("bases") / family))
            )
        return loaded[family]

    return base_of


def space_of(denoiser, methods, mix=False):
    """Two groups: the first half of the denoiser's layers, and the second with another rank and alpha."""
    values = yaml.safe_load(derive_space(denoiser, "test"))
    names = list(values["groups"].values())
    half = len(names) // 2
    groups = {
        "first": {"patterns": names[:half]},
        "second": {"patterns": names[half:], "rank": [2], "alpha": 2.0},
    }
    rates = dict.fromkeys([*methods, "full"], [1e-4, 1e-2])
    return parse_space(
        {
            "groups": groups,
            "methods": list(dict.fromkeys(methods)),
            "mix": mix,
            "learning_rate": rates,
            "rank": [4],
        },
        "test",
    )


def choice_of(space, methods):
    first, second = methods if len(methods) == 2 else methods * 2
    return space.choice(("first", "second"), first, 0.5, methods={"second": second})


@torch.no_grad()
def output(base):
    generator = torch.Generator().manual_seed(0)
    shape = base.encode_posterior(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0].shape[1:]
    text = base.encode_captions(["a photo of a digit", "a red face"])
    return base.family.predict(
        base.denoiser, torch.randn(2, *shape, generator=generator), torch.tensor([3, 700]), text
    )


@torch.no_grad()
def disturbed(adapter, seed):
    """The adapter's state after a random step from where it is."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return adapter.state()


def fused_weights(base, space, choice, state):
    """The plain weights that a state stands for; the base is put back."""
    before = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    adapter = inject_adapter(base.denoiser, space, choice, 7)
    adapter.load_state(state)
    adapter.fuse()
    fused = {name: tensor.double().clone() for name, tensor in base.denoiser.state_dict().items()}
    assert fused.keys() == before.keys()
    base.denoiser.load_state_dict(before)
    return fused


def check_contract(base, space, choice, tmp_path):
    denoiser = base.denoiser
    plain, before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}, output(base)
    adapter = inject_adapter(denoiser, space, choice, 0)
    # A weight made anew lies elsewhere in memory, where a product of equal numbers may round otherwise;
    # rotations are solved for.
    rounds = {"svdiff", "difffit", "oft"} & set(choice.methods)
    at_start = output(base)
    assert (
        torch.allclose(at_start, before, atol=1e-6, rtol=1e-6) if rounds else torch.equal(at_start, before)
    ), "injecting changed the output"
    for name, module in denoiser.named_modules():
        if parametrize.is_parametrized(module):
            assert all(
                torch.equal(getattr(module, kind), plain[f"{name}.{kind}"])
                for kind in module.parametrizations
            )
    trainable = {id(parameter) for parameter in denoiser.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in adapter.parameters()} and trainable
    grouped = [id(parameter) for group in adapter.groups() for parameter in group["params"]]
    assert sorted(grouped) == sorted(trainable)
    start = adapter.state()
    states = []
    for seed in (1, 2, 3):
        adapter.load_state(start)
        states.append(disturbed(adapter, seed))
    changed = output(base)
    assert not torch.allclose(changed, before, atol=1e-4)
    with adapter.fold():
        assert torch.allclose(output(base), changed, atol=1e-4, rtol=1e-4), "folded weights are others"
    assert torch.equal(output(base), changed), "folding left something behind"
    mean = adapter.average(states, [1, 2, 1])
    adapter.load_state(mean)
    averaged = output(base)
    assert adapter.state().keys() == mean.keys()
    adapter.load_state(states[2])
    assert torch.allclose(output(base), changed, atol=1e-5), "an offset stayed behind"
    adapter.save(tmp_path, {"what": "test"})
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adapter.remove()
    after = denoiser.state_dict()
    assert after.keys() == plain.keys() and all(torch.equal(after[name], plain[name]) for name in plain)
    assert torch.equal(output(base), before) and not any(
        parameter.requires_grad or parameter.grad is not None for parameter in denoiser.parameters()
    )

    again = inject_adapter(denoiser, space, choice, 5)
    again.load(tmp_path)
    assert torch.allclose(output(base), changed, atol=1e-5)
    again.load_state(mean)
    assert torch.allclose(output(base), averaged, atol=1e-5)
    again.load_state(states[2])
    again.fuse()
    assert torch.allclose(output(base), changed, atol=1e-5, rtol=1e-5)
    denoiser.load_state_dict(plain)

    weights = [fused_weights(base, space, choice, state) for state in states]
    expected = {
        name: 0.25 * weights[0][name] + 0.5 * weights[1][name] + 0.25 * weights[2][name] for name in plain
    }
    found = fused_weights(base, space, choice, mean)
    assert max((expected[name] - found[name]).abs().max() for name in plain) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", SEARCHED_METHODS)
def test_contract(bases, family, method, tmp_path):
    base = bases(family)
    space = space_of(base.denoiser, [method])
    for modules in space.match_modules(list_trainable_modules(base.denoiser)).values():
        if not any(suits(method, base.denoiser.get_submodule(name)) for name in modules):
            pytest.skip(f"a group of {family} has nothing that {method} trains")
    check_contract(base, space, choice_of(space, (method,)), tmp_path)


@pytest.mark.parametrize("methods", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("family", ("tiny", "flux"))
def test_contract_of_mixed_choices(bases, family, methods, tmp_path):
    base = bases(family)
    space = space_of(base.denoiser, methods, mix=True)
    choice = choice_of(space, methods)
    assert set(choice.methods) == set(methods)
    check_contract(base, space, choice, tmp_path)


def test_full_and_none(bases, tmp_path):
    base = bases("tiny")
    full = SPACE.list_anchors()["full"][1]
    check_contract(base, SPACE, full, tmp_path)
    assert inject_adapter(base.denoiser, SPACE, full, 0).n_trained() == sum(
        parameter.numel() for parameter in base.denoiser.parameters()
    )
    for choice in (Choice((), "none", 0.0), Choice((), "lora", 1e-3, 4)):
        adapter = inject_adapter(base.denoiser, SPACE, choice, 0)
        assert adapter.parameters() == [] and adapter.groups() == []
        adapter.save(tmp_path / choice.method, {})
        adapter.load(tmp_path / choice.method)
        adapter.remove()


@pytest.mark.parametrize("method", ("lora", "dora", "loha", "lokr", "oft"))
def test_the_start_depends_on_the_seed_alone(bases, method):
    base, starts = bases("tiny"), []
    space = space_of(base.denoiser, [method])
    for seed in (1, 1, 2):
        torch.manual_seed(len(starts))
        adapter = inject_adapter(base.denoiser, space, choice_of(space, (method,)), seed)
        starts.append(adapter.state())
        adapter.remove()
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    if method != "oft":  # a rotation starts at the identity
        assert any(not torch.equal(starts[0][name], starts[2][name]) for name in starts[0])


def test_spectral_shifts_by_hand(bases, tmp_path):
    """W' = U diag(relu(s + d)) V' with numpy; the decomposition is kept on disk; norms have one value and a
    rate of their own."""
    base = bases("tiny")
    layer, norm = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.norm"
    values = {
        "groups": {"a": [layer.replace(".", r"\."), norm.replace(".", r"\.")]},
        "methods": ["svdiff"],
        "learning_rate": dict.fromkeys(["svdiff", "full"], [1e-4, 1e-2]),
    }
    space = parse_space(values, "test")
    weight, scale = (
        base.denoiser.get_submodule(name).weight.detach().numpy().copy() for name in (layer, norm)
    )
    adapter = inject_adapter(
        base.denoiser, space, space.choice(("a",), "svdiff", 0.5), 0, cache=tmp_path, norm_shift_rate=1e-6
    )
    assert sorted(group["rate"] for group in adapter.groups()) == [1e-6, 1e-3]
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    shift = np.linspace(-2 * s.max(), s.max(), len(s)).astype(np.float32)  # relu bites on the first
    state = {f"{layer}.delta": torch.from_numpy(shift), f"{norm}.delta": torch.tensor([0.25])}
    adapter.load_state(state)
    assert np.allclose(
        base.denoiser.get_submodule(layer).weight.detach(), (u * np.maximum(s + shift, 0)) @ vh, atol=1e-5
    )
    length = np.linalg.norm(scale)
    assert np.allclose(
        base.denoiser.get_submodule(norm).weight.detach(), scale * (length + 0.25) / length, atol=1e-5
    )
    assert len(list((tmp_path / "svd").glob("*.safetensors"))) == 2
    mean = adapter.average(
        [state, {f"{layer}.delta": torch.zeros(len(s)), f"{norm}.delta": torch.tensor([0.75])}], [1, 1]
    )
    assert np.allclose(mean[f"{layer}.delta"], (np.maximum(s + shift, 0) + s) / 2 - s, atol=1e-5)
    adapter.remove()


@pytest.mark.parametrize("method", ("norm", "svdiff"))
def test_a_norm_that_is_trained_first_takes_any_memory_layout(bases, method):
    """An attention block hands its output on in channels-last order, and torch's CPU kernel crashes the
    process on that."""
    base = bases("ddpm")
    values = {
        "groups": {"a": r"up_blocks\.0\.resnets\.0\.norm1"},
        "methods": [method],
        "learning_rate": dict.fromkeys([method, "full"], [1e-4, 1e-2]),
    }
    space = parse_space(values, "test")
    adapter = inject_adapter(base.denoiser, space, space.choice(("a",), method, 0.5), 0)
    base.denoiser(torch.randn(2, 3, 16, 16), torch.tensor([3, 5])).sample.square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())
    adapter.remove()
    assert not base.denoiser.up_blocks[0].resnets[0].norm1._forward_pre_hooks


def test_decay_pulls_difffits_scales_to_one(bases):
    base = bases("tiny")
    space = space_of(base.denoiser, ["difffit"])
    adapter = inject_adapter(base.denoiser, space, choice_of(space, ("difffit",)), 0)
    disturbed(adapter, 1)
    shifts = [
        parameter for name, parameter in adapter.named_parameters().items() if name.endswith("gamma_shift")
    ]
    before = torch.cat([shift.detach().clone() for shift in shifts])
    optimizer = torch.optim.AdamW(adapter.groups(), weight_decay=0.1)
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # gamma = 1 + shift
    assert torch.allclose(torch.cat([shift.detach() for shift in shifts]), before * (1 - 0.1 * 1e-3))
    adapter.remove()


def test_two_mechanisms_on_one_weight_are_refused(bases):
    values = {
        "groups": {"a": r"mid_block\..*attn1\.to_q"},
        "always": [{"method": "full", "patterns": r"mid_block\..*"}],
        "methods": ["lora"],
        "learning_rate": dict.fromkeys(["lora", "full"], [1e-4, 1e-2]),
    }
    space = parse_space(values, "mine")
    with pytest.raises(MemControlError, match="to_q' is trained as weights and as lora"):
        inject_adapter(bases("tiny").denoiser, space, space.choice(("a",), "lora", 0.5), 0)
    values |= {"always": [], "groups": {"a": r"mid_block\..*norm\d?"}}
    space = parse_space(values, "mine")
    with pytest.raises(MemControlError, match="method lora finds nothing to train in group 'a'"):
        inject_adapter(bases("tiny").denoiser, space, space.choice(("a",), "lora", 0.5), 0)


def test_another_choices_file_is_refused(bases, tmp_path):
    base = bases("tiny")
    adapter = inject_adapter(base.denoiser, SPACE, Choice(("mid_attention",), "lora", 1e-3, 4), 0)
    adapter.save(tmp_path, {})
    adapter.remove()
    for other in (Choice(("up_attention",), "lora", 1e-3, 4), Choice(("mid_attention",), "lora", 1e-3, 8)):
        adapter = inject_adapter(base.denoiser, SPACE, other, 0)
        with pytest.raises(MemControlError, match="another base or space"):
            adapter.load(tmp_path)
        adapter.remove()


def test_counts_by_hand(bases):
    base = bases("tiny")
    adapter = inject_adapter(
        base.denoiser, SPACE, Choice(("down_attention", "up_attention"), "attention", 1e-3), 0
    )
    wanted = sum(
        p.numel()
        for name, p in base.denoiser.named_parameters()
        if ".attn" in name and name.startswith(("down_blocks", "up_blocks"))
    )
    assert adapter.n_trained() == wanted
    adapter.remove()
    names = SPACE.match_modules(list_trainable_modules(base.denoiser))["mid_attention"]
    layers = [base.denoiser.get_submodule(name) for name in names]
    adapter = inject_adapter(base.denoiser, SPACE, Choice(("mid_attention",), "lora", 1e-3, 4), 0)
    assert adapter.n_trained() == sum(4 * (layer.in_features + layer.out_features) for layer in layers)
    adapter.remove()
