"""Half precision: bases that were saved in it, of every family; what is held in which type while a trial
runs; quantised bases where a library does it on a CPU."""

import gc
import json
import warnings

import pytest
import torch
from small_pipelines import SMALL, build
from test_families import write_family_study

from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.space_yaml import load_space
from memcontrol.model.adapter import inject_adapter
from memcontrol.model.base import load_base
from memcontrol.model.precision import Precision, choose_precision
from memcontrol.model.source import open_pipeline

pytestmark = pytest.mark.slow
BF16 = Precision(torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    "base, inner, device, expected",
    [
        ("auto", "float32", "cpu", Precision()),
        ("auto", "float32", "cuda", BF16),
        ("auto", "float16", "cpu", Precision(torch.float32, torch.float16)),
        ("float32", "bfloat16", "cuda", Precision(torch.float32, torch.bfloat16)),
        ("float16", "bfloat16", "cuda", Precision(torch.float16, torch.float16)),
        ("nf4", "float32", "cuda", Precision(torch.bfloat16, torch.bfloat16, "nf4")),
        ("int8", "float32", "cpu", Precision(torch.float32, torch.float32, "int8")),
    ],
)
def test_one_place_decides(base, inner, device, expected):
    assert choose_precision(base, inner, torch.device(device)) == expected


@pytest.mark.parametrize("capability, kind", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_card_without_bfloat16_computes_in_float16(capability, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_precision("auto", "float32", torch.device("cuda")) == Precision(kind, kind)


def save_in_half(name, folder):
    pipeline = open_pipeline(str(build(name, folder / "full")))
    pipeline.to(dtype=torch.bfloat16)
    pipeline.save_pretrained(folder / "half")
    return str(folder / "half")


def list_float32():
    """All such tensors that are alive."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lazy modules that are looked at
        found = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    return [each for each in found if each.dtype == torch.float32 and each.device.type == "cpu"]


def find_float32_copies(base, others):
    """Float32 tensors with the values of a frozen 16-bit weight, but for `others`: of tests before."""
    frozen = {}
    for parameter in getattr(base.pipeline, base.family.denoiser).parameters():
        if parameter.dtype == torch.bfloat16 and parameter.ndim > 1:
            frozen.setdefault(parameter.shape, []).append(parameter)
    known = {id(each) for each in others}
    return [
        each.shape
        for each in list_float32()
        if id(each) not in known
        for weight in frozen.get(each.shape, [])
        if torch.equal(each, weight.float())
    ]


IN_FLOAT32 = ("sd3", "flux")  # the others in tests/nightly/precisions.py


@pytest.mark.parametrize(
    "name, held", [*((name, "bfloat16") for name in SMALL), *((name, "float32") for name in IN_FLOAT32)]
)
def test_a_base_saved_in_half_is_searched(name, held, tmp_path, photographs, monkeypatch):
    """Two trials, in either precision; in bfloat16 no frozen weight has a copy in float32."""
    import memcontrol
    import memcontrol.trial.loaded as loaded

    copies, found, others = [], [], list_float32()
    real = loaded.load_base
    monkeypatch.setattr(loaded, "load_base", lambda *given: found.append(real(*given)) or found[-1])
    step = torch.optim.AdamW.step

    def stepping(self, *given, **more):
        copies.extend(find_float32_copies(found[-1], others))
        return step(self, *given, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    base = save_in_half(name, tmp_path)
    study = write_family_study(tmp_path, base, name, photographs, base_precision=held, method="lora")
    memcontrol.search(study)
    results = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "t").glob("*/result.json")]
    assert len(results) == 2 and {result["state"] for result in results} == {"COMPLETE"}
    assert len(found) == 1 and (held == "float32" or copies == [])
    kinds = {parameter.dtype for parameter in found[0].denoiser.parameters()}
    assert kinds == {getattr(torch, held)}
    with_precision = {result["measured_with"].get("precision") for result in results}
    assert with_precision == {None if held == "float32" else held}


@pytest.mark.parametrize("method", ("lora", "svdiff", "difffit", "attention", "full", "dora", "loha", "bias"))
def test_what_is_trained_is_float32_over_a_half_base_that_comes_back_bit_for_bit(method, tmp_path):
    base = load_base("tiny", BF16)
    before = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    space = load_space("digits")
    if method == "full":
        choice = space.list_anchors()["full"][0]
    else:
        choice = Choice(
            ("up_attention", "mid_attention"), method, 1e-3, 2 if method in ("lora", "dora", "loha") else None
        )
    adapter = inject_adapter(base.denoiser, space, choice, 0)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    clean = torch.randn(2, 4, 8, 8)
    noised = base.add_noise(clean, torch.Generator().manual_seed(0))
    text = base.encode_captions(["a", "b"])
    loss = base.denoise(noised, text)[0].sum()
    loss.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in adapter.parameters())
    torch.optim.AdamW(adapter.groups()).step()
    with adapter.fold(), torch.no_grad():
        folded = base.denoise(noised, text)[0]
    with torch.no_grad():
        plain = base.denoise(noised, text)[0]
    assert torch.allclose(folded, plain, rtol=2e-2)
    adapter.remove()
    after = base.denoiser.state_dict()
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype
        for name, tensor in before.items()
    )


def test_bfloat16_gives_nearly_the_losses_of_float32():
    losses = []
    for precision in (Precision(), BF16):
        base = load_base("tiny", precision)
        noised = base.add_noise(
            torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
            torch.Generator().manual_seed(0),
        )
        with torch.no_grad():
            losses.append(base.denoise(noised, base.encode_captions(["a", "b", "c", "d"]))[0])
    assert torch.allclose(*losses, rtol=2e-2) and not torch.equal(*losses)


def test_quantisation_without_its_library_is_one_line():
    import importlib.util

    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(MemControlError, match="base_precision is nf4, which needs bitsandbytes; pip install"):
        load_base("tiny", Precision(quantized="nf4"))


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_a_quantised_base_of_every_family_is_searched(name, tmp_path, photographs):
    """int8 by torchao, which runs on a CPU: LoRA is trained beside it. Not among what tests install:
    diffusers would import it, for two seconds, in every worker."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    import memcontrol

    base = str(build(name, tmp_path / "base"))
    study = write_family_study(tmp_path, base, name, photographs, base_precision="int8", method="lora")
    memcontrol.search(study)
    results = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "t").glob("*/result.json")]
    assert len(results) == 2 and {result["state"] for result in results} == {"COMPLETE"}
    assert {result["measured_with"]["precision"] for result in results} == {"int8+float32"}


@pytest.mark.parametrize(
    "method, keys, word",
    [
        ("svdiff", {}, "method svdiff changes the weight of .* itself, which is quantised"),
        (
            "lora",
            {"search": {"trials": 1, "executor": "inline"}},
            "search.anchors asks for .* set .none, all.",
        ),
    ],
)
def test_what_a_quantised_base_cannot_take_is_refused_by_name(method, keys, word, tmp_path, photographs):
    pytest.importorskip("torchao", reason="torchao is not installed")
    import memcontrol

    base = str(build("sd3", tmp_path / "base"))
    study = write_family_study(
        tmp_path, base, "sd3", photographs, base_precision="int8", method=method, **keys
    )
    with pytest.raises(MemControlError, match=word):
        memcontrol.search(study)
