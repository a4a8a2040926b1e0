"""What an audit tells of a model that it can open: the same weights are told alike in whatever form."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image
from safetensors.torch import load_file, save_file
from test_export import finished_run

from memcontrol.commands.audit import audit
from memcontrol.commands.export import COMFYUI_FILE, LORA_FILE, export
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import read_json
from memcontrol.core.run_folder import locate_study_folder

SAMPLING = {"samples": 16, "steps": 1}
N = 24


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A run over the embedded base, its exports, and folders of images."""
    root = tmp_path_factory.mktemp("attack")
    finished_run(root / "run", "tiny", "lora")
    export(root / "run", root / "lora")
    export(root / "run", root / "fused", "pipeline")
    for part, first in (("train", 0), ("holdout", 500)):
        (root / part).mkdir()
        for i in range(N):
            cells = np.random.default_rng(first + i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
            image = Image.fromarray(cells).resize((32, 32), Image.Resampling.BICUBIC)
            image.save(root / part / f"{i:02}.png")
            (root / part / f"{i:02}.txt").write_text(f"a pattern {i % 3}")
    return root


def tell(files, model="tiny", **given):
    return audit(None, files / "train", files / "holdout", model=str(model), **given, **SAMPLING)["rewards"]


def write_kohya(files, scale=1.0):
    """As kohya's sd-scripts write it: underscores, down and up, alpha as a tensor, half the rank in it."""
    state, found = load_file(files / "lora" / LORA_FILE), {}
    alphas = load_file(files / "lora" / COMFYUI_FILE)
    for name, tensor in state.items():
        module, _, end = name.removeprefix("unet.").partition(".lora_")
        kohya = f"lora_unet_{module.replace('.', '_')}"
        down = end == "A.weight"
        found[f"{kohya}.lora_{'down' if down else 'up'}.weight"] = tensor / (1 if down else 2)
        found[f"{kohya}.alpha"] = 2 * scale * alphas[f"{kohya}.alpha"]
    path = files / f"kohya-{scale}.safetensors"
    save_file(found, path, {"ss_network_module": "networks.lora"})
    return path


def write_bare(files):
    """As `PeftModel.save_pretrained` names what wraps a pipeline's part, without its config, alpha being the
    rank."""
    state, found = load_file(files / "lora" / LORA_FILE), {}
    alphas = load_file(files / "lora" / COMFYUI_FILE)
    for name, tensor in state.items():
        module, _, end = name.removeprefix("unet.").partition(".lora_")
        scale = alphas[f"lora_unet_{module.replace('.', '_')}.alpha"] / len(
            state[f"unet.{module}.lora_A.weight"]
        )
        found[f"base_model.model.{module}.lora_{end}"] = tensor * (scale if end == "B.weight" else 1)
    (files / "bare").mkdir()
    save_file(found, files / "bare" / "style.safetensors")
    return files / "bare" / "style.safetensors"


@pytest.fixture(scope="module")
def whole(files):
    """Of the fused pipeline beside its base."""
    return tell(files, files / "fused", base="tiny")


def test_a_lora_is_told_as_the_same_weights_are_in_any_form(files, whole):
    assert whole["membership_auc"] != 0.5
    for lora in (
        write_kohya(files),
        files / "lora" / LORA_FILE,
        files / "lora" / COMFYUI_FILE,
        files / "run",
    ):
        found = tell(files, lora=lora)
        assert found["membership_auc"] == pytest.approx(whole["membership_auc"], abs=1e-6), lora
        for name in ("fid", "memorization", "copy_rate", "membership_base_auc", "membership_tpr"):
            assert found[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-6), (lora, name)


def test_strength_scales_it_and_none_is_the_base(files):
    lora = files / "lora" / LORA_FILE
    half = tell(files, lora=lora, strength=0.5)
    by_alpha = tell(files, lora=write_kohya(files, 0.5))
    assert half["membership_auc"] == pytest.approx(by_alpha["membership_auc"], abs=1e-6)
    assert half["fid"] == pytest.approx(by_alpha["fid"], rel=1e-3)
    nothing = tell(files, lora=lora, strength=0.0)
    assert (
        nothing["membership_auc"] == 0.5 and nothing["membership_tpr"] == 1 / N
    )  # what one false alarm of 24 gives
    assert "epsilon_low" not in nothing  # the folders were a person's


@pytest.fixture
def find_run(shown, tmp_path):
    """A finished run of a study, by its method."""
    folder = Path(shutil.copytree(locate_study_folder(shown, "seen"), tmp_path / "seen"))

    def find(method):
        for place in folder.glob("*/result.json"):
            if read_json(place)["choice"]["method"] == method:
                return place.parent

    return find


def test_a_run_is_told_by_its_own_images(find_run, tmp_path):
    out = tmp_path / "audit"
    said = run("audit", "--model", find_run("full"), "--out", out, check=True).stdout
    found = json.loads((out / "audit.json").read_text())
    assert found["audited"] == {"model": find_run("full").name}
    assert found["rewards"]["epsilon_guesses"] == 2 * 11  # a third of 32 members, of as many others
    assert "An attacker who has the model and the base tells" in found["membership"]
    assert found["membership"] in said and found["membership"][:40] in (out / "audit.html").read_text()
    boxes = [one["unlike_base"] for one in found["copies"] if "unlike_base" in one]
    assert len(boxes) == 12 and all(0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1 for box in boxes)


def test_a_run_is_told_on_images_of_folders_as_its_lora_is(find_run, files):
    place = find_run("lora")
    own = audit(None, files / "train", files / "holdout", model=place)["rewards"]
    as_lora = tell(files, lora=place)
    for name in ("membership_auc", "membership_tpr", "membership_base_auc"):
        assert own[name] == pytest.approx(as_lora[name], abs=1e-6), name


@pytest.mark.parametrize(
    "given, words",
    [
        ({"base": "tiny", "lora": "a.safetensors"}, "--lora is put on --model"),
        ({"strength": 0.5}, "give it with --lora"),
        ({"lora": "a.safetensors", "strength": 3.0}, "allowed: 0 to 2"),
        ({"lora": "a.safetensors"}, "is not there"),
    ],
)
def test_what_cannot_be_is_said(files, given, words):
    with pytest.raises(MemControlError, match=words):
        tell(files, **given)


def test_images_alone_have_no_base(files):
    with pytest.raises(MemControlError, match="--base belongs to a pipeline, and images have none"):
        audit(files / "train", files / "train", files / "holdout", base="tiny")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda name, tensor: {f"unet.no.such.{name}": tensor}, "does not fit the base"),
        (lambda name, tensor: {name: tensor[..., :1]}, "its layers have other shapes"),
        (lambda name, tensor: {name: tensor * torch.nan}, "holds values that are not finite"),
        (lambda name, tensor: {name.replace("unet.", "text_encoder."): tensor}, "it holds no LoRA of a unet"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_in_a_line(files, change, words, caplog):
    changed = {}
    for name, tensor in load_file(files / "lora" / LORA_FILE).items():
        changed |= change(name, tensor.clone())
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, files / "other.safetensors")
    with pytest.raises(MemControlError, match=f"--lora .*other.safetensors .*{words}"):
        tell(files, lora=files / "other.safetensors")
    assert caplog.text == ""
