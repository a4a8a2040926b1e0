"""An export's card: its own code, run in plain diffusers in another process, draws the picture on it; the
Hub's metadata, and the license."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_pipelines import build
from test_adapters import disturb, make_space
from test_export import REWARDS, finished_run

from memcontrol.commands.export import LORA_FILE, export
from memcontrol.config.load import load_config
from memcontrol.config.spec import Spec, read_spec
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import write_json
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.core.space_yaml import load_space
from memcontrol.data.cache import save_tensors
from memcontrol.model.base import load_base
from memcontrol.model.source import find_base_path
from memcontrol.scoring.evidence import COPY_RATES
from memcontrol.trial.example import Withheld, choose_sample, find_instance_prompt
from memcontrol.trial.tuned import inject_choice
from memcontrol.view.model_card import (
    HUB_LICENSES,
    License,
    Shown,
    choose_license,
    make_metadata,
    parse_license,
)

PROMPT, N = "a red digit", 4
NEARNESS = ("memorization_pixels", "memorization_features")
STEPS = {"sampling_steps": 3}
CARDS = {  # by the folder's name: the base, the method, how it is exported and how it was sampled
    "lora": ("tiny", "lora", None, {"guidance": 3.0, "guidance_from": 0.5}),
    "without-captions": ("ddpm", "bias", None, {}),
}
MORE_CARDS = {
    "pipeline": ("tiny", "svdiff", None, {"guidance": 2.0}),
    "denoiser": ("tiny", "difffit", "denoiser", {}),
    "dora": ("sd-v", "dora", None, {"guidance": 2.0}),
    "sdxl": ("sdxl", "lora", None, {"guidance": 3.0}),
    "sdxl-loha": ("sdxl", "loha", "pipeline", {}),
    "sd3": ("sd3", "lora", None, {"guidance": 2.0}),
    "flux": ("flux", "attention", None, {"guidance": 3.5}),
    "pixart": ("pixart", "bias", None, {"guidance": 2.0}),
    "sana": ("sana", "lokr", None, {"guidance": 2.0}),
}
RUN_CARDS = """
import sys, json, builtins
sys.modules["memcontrol"] = None  # importing it now fails
for name, code in json.loads(sys.argv[1]).items():
    found = {}
    exec(compile(code, name, "exec"), found)
    found["image"].save(f"{name}.png")
"""


def measured_run(folder, base_name, method, sampling=None, hits=(0,), captions=(PROMPT,) * 8, **more):
    """A run as a trial leaves it, sampled as it samples: `hits` are samples that a rule calls copies."""
    base = load_base(base_name)
    space = make_space(base.denoiser, [method])
    values = {"name": "test", "base": base_name, "data": "digits", "rewards": {**STEPS, **(sampling or {})}}
    config = load_config({**values, **more})
    spec = Spec(
        config, space, space.choice(("first", "second"), method, 0.5), folder.parent, "search", "holdout", 8
    )
    spec.write(folder)
    adapter = inject_choice(base.denoiser, spec)
    disturb(adapter, adapter.state(), 1)
    adapter.save(folder, spec.description())
    images = sample(base, spec)
    rows = [{"name": str(i), "caption": caption, "digest": str(i)} for i, caption in enumerate(captions)]
    StudyFolder(folder.parent).write_split({"source": "digits", "resolution": 32, "parts": {"train": rows}})
    seen = {"images": torch.from_numpy(images), "rows": torch.arange(N), "seeds": torch.arange(N) + 7}
    save_tensors(RunFolder(folder).samples_file, seen, {"model": "test"})
    flags = dict.fromkeys(COPY_RATES.values(), np.isin(np.arange(N), hits).astype(float))
    # the more so, the nearer to an unseen image
    nearness = {
        f"memorization_{name}": -np.arange(N, dtype=float)[::-1] - 0.1 for name in ("pixels", "features")
    }
    np.savez(RunFolder(folder).contributions_file, prompts=np.arange(N), **flags, **nearness)
    measured = {"resolution": images.shape[-1], "extractor": "tiny 0123"}
    rewards = config.rewards.model_dump(mode="json")
    told = {"state": "COMPLETE", "n_samples": N, "rewards": REWARDS}
    write_json(RunFolder(folder).result_file, {**told, "measured_with": {**measured, "sampling": rewards}})
    return images


def sample(base, spec):
    rewards = spec.config.rewards
    text, empty = base.encode_captions([PROMPT] * N), base.encode_captions([""])
    return base.sample(
        text,
        empty,
        seeds=range(7, 7 + N),
        steps=rewards.sampling_steps,
        guidance=rewards.guidance,
        resolution=base.resolution if not text else 32,
        progress=lambda *_: None,
        guidance_from=rewards.guidance_from,
    )


def read_card(folder):
    from huggingface_hub import ModelCard

    return ModelCard((folder / "README.md").read_text())


def read_code(folder):
    return (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]


def check_pictures(folder, cards):
    """Exports of runs over bases beside them, whose cards' code another process runs."""
    codes, expected = {}, {}
    for name, (family, method, format, sampling) in cards.items():
        base = folder / f"base-{family}"
        if not base.exists():
            shutil.copytree(find_base_path("tiny"), base) if family == "tiny" else build(family, base)
        images = measured_run(folder / "studies" / name / "run", str(base), method, sampling)
        export(folder / "studies" / name / "run", folder / name, format)
        codes[name], expected[name] = read_code(folder / name), images[1]
    command = [sys.executable, "-c", RUN_CARDS, json.dumps(codes)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    for name in cards:
        shown = np.asarray(Image.open(folder / name / "example.png"), dtype=float)
        drawn = np.asarray(Image.open(folder / f"{name}.png"), dtype=float)
        assert np.abs(shown - drawn).max() <= 1, name
        # which is the second sample: the first is a copy, and the others less far from the training images
        assert np.abs(drawn.transpose(2, 0, 1) - expected[name]).max() <= 1, name
        assert read_card(folder / name).data.to_dict()["widget"][0]["output"] == {"url": "example.png"}
        assert str(folder) not in (folder / name / "README.md").read_text()


def test_the_cards_own_code_draws_its_picture_in_another_process(tmp_path):
    check_pictures(tmp_path, CARDS)


def test_the_cards_own_code_draws_its_picture_over_every_family(tmp_path):
    check_pictures(tmp_path, MORE_CARDS)


# Which picture may be shown


def withheld(folder, **changes):
    """Why a run of eight training images shows none, once the given is changed; else what it shows."""
    images = np.zeros((N, 3, 8, 8), np.uint8)
    config = load_config({"name": "a", "data": "digits", **changes.pop("config", {})})
    spec = Spec(config, *SOME, folder, "search", "holdout", 8)
    rows = [{"name": str(i), "digest": str(i), **row} for i, row in enumerate(changes.pop("rows", ROWS))]
    parts = {"train": rows, "test": changes.pop("test", [])}
    StudyFolder(folder).write_split({"source": "", "resolution": 8, "parts": parts})
    run = RunFolder(folder / "run")
    seen = {"images": torch.from_numpy(images), "rows": torch.arange(N), "seeds": torch.arange(N)}
    save_tensors(run.samples_file, seen)
    told = dict.fromkeys([*COPY_RATES.values()], np.zeros(N)) | dict.fromkeys(NEARNESS, np.full(N, -0.1))
    found = {"prompts": np.arange(N), **told, **changes}
    np.savez(run.contributions_file, **{name: values for name, values in found.items() if values is not None})
    try:
        return choose_sample(run, spec, None)
    except Withheld as reason:
        return str(reason)


DIGITS_SPACE = load_space("digits")
SOME = (DIGITS_SPACE, DIGITS_SPACE.choice(("mid_attention",), "lora", 0.5))
ROWS = [{"caption": PROMPT}] * 8


def test_a_sample_that_any_rule_flags_or_that_is_near_to_a_training_image_is_not_shown(tmp_path):
    assert withheld(tmp_path).prompt == PROMPT
    assert withheld(tmp_path, **dict.fromkeys(NEARNESS, np.array([-0.1, -0.3, -0.2, -0.3]))).seed == 1
    for name in COPY_RATES.values():
        assert withheld(tmp_path, **{name: np.array([1.0, 1, 0, 1])}).seed == 2
        assert "called a copy" in withheld(tmp_path, **{name: np.ones(N)})
        assert "was not recorded" in withheld(tmp_path, **{name: None})
    for name in NEARNESS:
        assert withheld(tmp_path, **{name: np.array([0.0, 0.1, 0.1, -0.01])}).seed == 3
        assert "nearest to a training image" in withheld(tmp_path, **{name: np.full(N, 0.01)})
    assert "belongs to others" in withheld(tmp_path, prompts=np.arange(N) + 1)
    assert "noise on their encodings" in withheld(tmp_path, config={"rewards": {"embedding_noise": 0.1}})


def test_a_caption_of_few_images_or_of_one_person_is_not_shown(tmp_path):
    few = [{"caption": PROMPT}] * 4 + [{"caption": f"patient {i}"} for i in range(4)]
    assert "is shared by 5 images of the study" in withheld(tmp_path, rows=few)
    assert "is shared by 5 images of the study" in withheld(
        tmp_path, rows=[{"caption": PROMPT, "group": "p1"}] * 8
    )
    rows = [{"caption": "private"}] * 2 + [{"caption": PROMPT}] * 6
    assert withheld(tmp_path, rows=rows).seed == 2
    # images that were not trained on have it too, so that it tells nothing of who was
    others = [{"name": str(i), "digest": str(i), "caption": PROMPT} for i in range(4)]
    assert withheld(tmp_path, rows=[{"caption": str(i)} for i in range(3)] + ROWS[:1], test=others).seed == 3


def test_no_picture_where_the_model_draws_another_image_or_none_is_wanted(tmp_path):
    said = []
    measured_run(tmp_path / "run", "tiny", "lora")
    out = export(tmp_path / "run", tmp_path / "without", picture=False, tell=said.append)
    assert not said
    assert not (out / "example.png").exists() and "widget" not in read_card(out).data.to_dict()
    assert "There is no picture: it was exported without one" in read_card(out).text
    assert f'    "{PROMPT}",\n' in read_code(out) and "num_inference_steps=3" in read_code(out)
    samples = RunFolder(tmp_path / "run").samples_file
    other = np.random.default_rng(0).integers(0, 256, (N, 3, 32, 32), dtype=np.uint8)
    seen = {"images": torch.from_numpy(other), "rows": torch.arange(N), "seeds": torch.arange(N) + 7}
    save_tensors(samples, seen)
    out = export(tmp_path / "run", tmp_path / "other", tell=said.append)
    assert len(said) == 1 and "they draw example.png now" in said[0]
    assert not (out / "example.png").exists() and "draws another image" in read_card(out).text


# What the Hub reads


def make_spec(folder, base="owner/base", method="lora", **inner):
    space = load_space("digits")
    config = load_config({"name": "a", "base": base, "data": "digits", "inner": inner})
    return Spec(config, space, space.choice(("mid_attention",), method, 0.5), folder, "retrain", "test", 8)


@pytest.mark.parametrize("is_adapter, relation", [(True, "adapter"), (False, "finetune")])
def test_the_relation_to_the_base_is_the_hubs(tmp_path, is_adapter, relation):
    known = make_metadata(make_spec(tmp_path), Shown("", is_adapter=is_adapter), License("mit"))
    assert (known["base_model"], known["base_model_relation"]) == ("owner/base", relation)
    anew = make_metadata(make_spec(tmp_path, from_scratch=True), Shown(""), License("mit"))
    assert not anew.keys() & {"base_model", "base_model_relation"}  # none of its weights are the base's


def test_tags_widget_and_instance_prompt(tmp_path):
    from huggingface_hub import ModelCardData

    shown = Shown("", "a: [red] digit", "example.png", "", "a: [red] digit", True, True)
    values = make_metadata(make_spec(tmp_path), shown, License("mit"))
    data = ModelCardData(**yaml.safe_load(yaml.safe_dump(values))).to_dict()
    assert data["tags"] == ["diffusers", "text-to-image", "memcontrol", "lora", "template:sd-lora"]
    assert data["widget"] == [{"text": "a: [red] digit", "output": {"url": "example.png"}}]
    assert data["instance_prompt"] == "a: [red] digit" and data["license"] == "mit"
    plain = make_metadata(make_spec(tmp_path, method="attention"), replace(shown, is_lora=False), License())
    assert plain["tags"] == ["diffusers", "text-to-image", "memcontrol", "attention"]
    assert plain["license"] == "unknown"
    unconditional = make_metadata(make_spec(tmp_path), Shown("", is_conditional=False), License())
    assert unconditional["pipeline_tag"] == "unconditional-image-generation"


def test_only_a_caption_that_all_training_images_have_is_the_instance_prompt(tmp_path):
    for captions, expected in (((PROMPT,) * 8, PROMPT), ((PROMPT,) * 7 + ("b",), None), (("",) * 8, None)):
        rows = [{"name": str(i), "caption": one, "digest": ""} for i, one in enumerate(captions)]
        StudyFolder(tmp_path).write_split({"source": "", "resolution": 8, "parts": {"train": rows}})
        assert find_instance_prompt(make_spec(tmp_path)) == expected


# Licenses

OF_FLUX = "license: other\nlicense_name: flux-1-dev-non-commercial-license\nlicense_link: LICENSE.md"


@pytest.mark.parametrize(
    "head, expected",
    [
        ("license: creativeml-openrail-m", License("creativeml-openrail-m")),
        ("license: [mit]", License("mit")),
        ("license: [mit, apache-2.0]", License()),
        ("tags: [a]", License()),
        ("license: 'unclosed", License()),
        (OF_FLUX, License("other", "flux-1-dev-non-commercial-license", "https://hub/o/n/blob/c/LICENSE.md")),
        ("license: other\nlicense_link: https://a/b", License("other", "license-of-the-base", "https://a/b")),
        ("license: other", License("other", "license-of-the-base", "https://hub/o/n")),
        ("license: My Own v2", License("other", "my-own-v2", "https://hub/o/n")),
    ],
)
def test_the_bases_card_says_its_license(head, expected):
    card = f"---\n{head}\n---\n# A model\n\nlicense: gpl\n"
    assert parse_license(card, "https://hub/o/n/blob/c/", "https://hub/o/n") == expected
    assert expected.id in {*HUB_LICENSES, "other"}


def test_a_license_of_ones_own_has_a_link():
    assert choose_license("apache-2.0", None) == License("apache-2.0") and choose_license(None, None) is None
    assert choose_license("Our Terms", "https://a/b") == License("other", "our-terms", "https://a/b")
    with pytest.raises(MemControlError, match="license 'apache' is no identifier of the Hub's; give one"):
        choose_license("apache", None)
    with pytest.raises(MemControlError, match="without --license"):
        choose_license(None, "https://a/b")


def test_a_bases_license_goes_with_what_is_exported(tmp_path):
    base = shutil.copytree(find_base_path("tiny"), tmp_path / "base")
    (base / "README.md").write_text(f"---\n{OF_FLUX}\n---\n")
    (base / "LICENSE.md").write_text("terms")
    measured_run(tmp_path / "run", str(base), "bias")
    out = export(tmp_path / "run", tmp_path / "own", "denoiser")
    data = read_card(out).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "flux-1-dev-non-commercial-license")
    assert (out / data["license_link"]).read_text() == "terms"
    (base / "LICENSE.md").unlink()
    lost = export(tmp_path / "run", tmp_path / "lost", "denoiser", picture=False)
    assert "license_link" not in read_card(lost).data.to_dict()  # which would lead nowhere
    given = export(tmp_path / "run", tmp_path / "given", "denoiser", license="mit", picture=False)
    assert read_card(given).data.to_dict()["license"] == "mit" and not (given / "LICENSE.md").exists()


def test_one_lora_file_says_over_what_where_and_how_strong_it_is(tmp_path):
    from safetensors import safe_open

    finished_run(tmp_path / "run", "tiny", "dora")
    spec = read_spec(tmp_path / "run")
    weaker = replace(spec, choice=spec.choice.with_settings({"strength": 0.5}))
    (tmp_path / "run" / "spec.json").unlink()
    weaker.write(tmp_path / "run")
    out = export(tmp_path / "run", tmp_path / "out", picture=False)
    files = [out / LORA_FILE, *out.glob("*/*.safetensors")]
    assert len(files) == 3
    for file in files:
        with safe_open(file, "pt") as opened:
            told = opened.metadata()
        assert (told["base"], told["mask"], told["strength"]) == ("tiny", "first, second", "0.5")
        known = json.loads(told["memcontrol"])
        assert known["choice"]["groups"] == ["first", "second"] and known["config"]["base"] == "tiny"
        assert known["choice"]["settings"] == {"strength": 0.5} and str(tmp_path) not in json.dumps(told)
