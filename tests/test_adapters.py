"""One contract for every way of training, over every family of denoisers, and what may not be trained
together."""

import itertools

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

FAMILIES = ("tiny", *SMALL)
SPACE = load_space("digits")
# half of these transformers has no norm with a weight
NOTHING_TO_TRAIN = {*itertools.product(("sd3", "pixart", "sana"), ("norm", "ln_tuning"))}
MIXES = {
    "lora and svdiff": ("lora", "svdiff"),
    "difffit and loha": ("difffit", "loha"),
    "oft and bias": ("oft", "bias"),
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Family name to its base, built and loaded once."""
    loaded = {}

    def open_base(family):
        if family not in loaded:
            loaded[family] = load_base(
                "tiny" if family == "tiny" else str(build(family, tmp_path_factory.mktemp("bases") / family))
            )
        return loaded[family]

    return open_base


def make_space(denoiser, methods, mix=False):
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


def make_choice(space, methods):
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


def copy_weights(denoiser):
    return {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}


def fuse_state(base, space, choice, state):
    """The plain weights that a state stands for; the base is put back."""
    before = copy_weights(base.denoiser)
    adapter = inject_adapter(base.denoiser, space, choice, 7)
    adapter.load_state(state)
    adapter.fuse()
    fused = copy_weights(base.denoiser)
    base.denoiser.load_state_dict(before)
    return fused


@torch.no_grad()
def disturb(adapter, start, seed):
    """The adapter's state after a random step from the start."""
    adapter.load_state(start)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return adapter.state()


class Life:
    """What is seen of a choice in its base, from its injection until it is fused; the base is as before. Its
    tests say what must be seen: to inject takes far longer than to look."""

    def __init__(self, base, space, choice, folder):
        self.base, self.space, self.choice = base, space, choice
        self.plain, self.before = copy_weights(base.denoiser), output(base)
        adapter = inject_adapter(base.denoiser, space, choice, 0)
        self.see_start(adapter)
        self.see_training(adapter)
        self.see_average(adapter)
        self.see_end(adapter, folder)
        self.see_another(folder)
        kept = [*self.states[:2], self.mean]
        first, second, self.mean_weights = (fuse_state(base, space, choice, state) for state in kept)
        self.weights = [first, second, self.fused_weights]
        self.weak_weights = fuse_state(base, space, choice, self.weak)

    def see_start(self, adapter):
        denoiser, self.at_start = self.base.denoiser, output(self.base)
        self.weights_at_start = {
            f"{name}.{kind}": getattr(module, kind).detach()
            for name, module in denoiser.named_modules()
            if parametrize.is_parametrized(module)
            for kind in module.parametrizations
        }
        self.n_parameters, self.n_added = count_parameters(denoiser), adapter.n_added()
        self.trainable = {id(parameter) for parameter in denoiser.parameters() if parameter.requires_grad}
        self.named = {id(parameter) for parameter in adapter.parameters()}
        self.grouped = [id(parameter) for group in adapter.groups() for parameter in group["params"]]

    def see_training(self, adapter):
        start = adapter.state()
        self.states = [disturb(adapter, start, seed) for seed in (1, 2, 3)]
        self.changed = output(self.base)
        with adapter.fold():
            self.folded = output(self.base)
        self.unfolded = output(self.base)

    def see_average(self, adapter):
        self.mean = adapter.average(self.states, [1, 2, 1])
        adapter.load_state(self.mean)
        self.averaged, self.averaged_names = output(self.base), adapter.state().keys()
        adapter.load_state(self.states[2])
        self.after_average = output(self.base)

    def see_end(self, adapter, folder):
        denoiser = self.base.denoiser
        adapter.save(folder, {"what": "test"})
        for parameter in adapter.parameters():
            parameter.grad = torch.zeros_like(parameter)
        adapter.remove()
        self.left, self.removed = copy_weights(denoiser), output(self.base)
        self.still_trainable = [p for p in denoiser.parameters() if p.requires_grad or p.grad is not None]

    def see_another(self, folder):
        another = inject_adapter(self.base.denoiser, self.space, self.choice, 5)
        another.load(folder)
        self.loaded = output(self.base)
        another.load_state(self.mean)
        self.loaded_average = output(self.base)
        another.load_state(self.states[2])
        another.weaken(0.3)
        self.weak, self.weakened = another.state(), output(self.base)
        another.load_state(self.states[2])
        another.fuse()
        self.fused, self.fused_weights = output(self.base), copy_weights(self.base.denoiser)
        self.base.denoiser.load_state_dict(self.plain)


def count_parameters(denoiser):
    return sum(parameter.numel() for parameter in denoiser.parameters())


def list_cases():
    """What the contract holds for: (family, methods), and full fine-tuning of everything."""
    for method in SEARCHED_METHODS:
        for family in FAMILIES:
            if (family, method) not in NOTHING_TO_TRAIN:
                yield pytest.param((family, (method,)), id=f"{method}-{family}")
    for name, methods in MIXES.items():
        for family in ("tiny", "flux"):
            yield pytest.param((family, methods), id=f"{name}-{family}")
    yield pytest.param(("tiny", ()), id="anchor full")


@pytest.fixture(scope="module", params=list_cases())
def life(request, bases, tmp_path_factory):
    (family, methods), folder = request.param, tmp_path_factory.mktemp("adapter")
    base = bases(family)
    if not methods:
        return Life(base, SPACE, SPACE.list_anchors()["full"][1], folder)
    space = make_space(base.denoiser, methods, mix=len(methods) > 1)
    choice = make_choice(space, methods)
    assert set(choice.methods) == set(methods)
    return Life(base, space, choice, folder)


class TestContract:
    def test_injecting_changes_no_output(self, life):
        # A weight made anew lies elsewhere in memory, where a product of equal numbers may round otherwise;
        # rotations are solved for.
        if {"svdiff", "difffit", "oft"} & set(life.choice.methods):
            assert torch.allclose(life.at_start, life.before, atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(life.at_start, life.before)

    def test_injecting_changes_no_weight(self, life):
        for name, weight in life.weights_at_start.items():
            assert torch.equal(weight, life.plain[name]), name

    def test_parameters_alone_are_trainable_and_each_is_in_one_group(self, life):
        assert life.trainable == life.named != set()
        assert sorted(life.grouped) == sorted(life.trainable)

    def test_what_is_added_is_what_the_denoiser_has_more_of(self, life):
        assert life.n_added == life.n_parameters - count_parameters(life.base.denoiser)

    def test_training_changes_the_output(self, life):
        assert not torch.allclose(life.changed, life.before, atol=1e-4)

    def test_folding_gives_the_same_output_and_leaves_nothing_behind(self, life):
        assert torch.allclose(life.folded, life.changed, atol=1e-4, rtol=1e-4)
        assert torch.equal(life.unfolded, life.changed)

    def test_average_is_a_state_and_leaves_no_offset_in_the_next(self, life):
        assert life.averaged_names == life.mean.keys()
        assert torch.allclose(life.after_average, life.changed, atol=1e-5)

    def test_average_changes_each_weight_by_the_mean_of_the_changes(self, life):
        for name, found in life.mean_weights.items():
            first, second, third = (weights[name].double() for weights in life.weights)
            assert (0.25 * first + 0.5 * second + 0.25 * third - found).abs().max() < 1e-6, name

    def test_weakening_leaves_a_share_of_the_change_of_each_weight(self, life):
        assert not torch.allclose(life.weakened, life.changed, atol=1e-4)
        for name, found in life.weak_weights.items():
            plain, full = life.plain[name].double(), life.fused_weights[name].double()
            assert (plain + 0.3 * (full - plain) - found).abs().max() < 1e-6, name
        if set(life.choice.methods) <= {"lora", "loha", "lokr"}:  # whose files hold no offsets
            assert life.weak.keys() == life.states[2].keys()

    def test_saved_file_and_average_are_taken_by_another_adapter_of_the_choice(self, life):
        assert torch.allclose(life.loaded, life.changed, atol=1e-5)
        assert torch.allclose(life.loaded_average, life.averaged, atol=1e-5)

    def test_fused_weights_have_the_bases_names_and_give_the_same_output(self, life):
        for weights in (*life.weights, life.mean_weights):
            assert weights.keys() == life.plain.keys()
        assert torch.allclose(life.fused, life.changed, atol=1e-5, rtol=1e-5)

    def test_removing_restores_the_base_bit_for_bit(self, life):
        assert life.left.keys() == life.plain.keys()
        assert all(torch.equal(life.left[name], plain) for name, plain in life.plain.items())
        assert torch.equal(life.removed, life.before) and not life.still_trainable


@pytest.mark.parametrize("family, method", sorted(NOTHING_TO_TRAIN))
def test_method_that_finds_nothing_in_a_group_is_named(bases, family, method):
    denoiser = bases(family).denoiser
    space = make_space(denoiser, [method])
    with pytest.raises(
        MemControlError, match=f"method {method} finds nothing to train in group '(first|second)'"
    ):
        inject_adapter(denoiser, space, make_choice(space, (method,)), 0)


def test_full_fine_tuning_trains_every_parameter(bases):
    denoiser = bases("tiny").denoiser
    adapter = inject_adapter(denoiser, SPACE, SPACE.list_anchors()["full"][1], 0)
    assert adapter.n_trained() == sum(parameter.numel() for parameter in denoiser.parameters())
    adapter.remove()


@pytest.mark.parametrize("choice", (Choice((), "none", 0.0), Choice((), "lora", 1e-3, 4)))
def test_choice_without_groups_trains_nothing(bases, choice, tmp_path):
    adapter = inject_adapter(bases("tiny").denoiser, SPACE, choice, 0)
    assert adapter.parameters() == [] and adapter.groups() == []
    adapter.save(tmp_path, {})
    adapter.load(tmp_path)
    adapter.remove()


@pytest.mark.parametrize("method", ("lora", "dora", "loha", "lokr", "oft"))
def test_the_start_depends_on_the_seed_alone(bases, method):
    base, starts = bases("tiny"), []
    space = make_space(base.denoiser, [method])
    for seed in (1, 1, 2):
        torch.manual_seed(len(starts))
        adapter = inject_adapter(base.denoiser, space, make_choice(space, (method,)), seed)
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
    space = make_space(base.denoiser, ["difffit"])
    adapter = inject_adapter(base.denoiser, space, make_choice(space, ("difffit",)), 0)
    disturb(adapter, adapter.state(), 1)
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
