"""A user's own rewards, limits, and what a search makes of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from commands import run
from PIL import Image, ImageFilter

from memcontrol.config.load import load_config
from memcontrol.core.errors import MemControlError
from memcontrol.data.features import pixel_features
from memcontrol.scoring.evidence import Descriptors, Evidence
from memcontrol.scoring.extractors import load_extractor
from memcontrol.scoring.measures import measure_extraction
from memcontrol.scoring.own_rewards import check_rewards, load_own_reward
from memcontrol.scoring.score import score_evidence

OWN = '''
"""Rewards of a user."""
def brightness(evidence):
    return abs(evidence.generated.pixels.mean() - evidence.holdout.pixels.mean())

def broken(evidence):
    return "very good"
'''


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(OWN)
    return path


def views(n, seed):
    pixels = np.random.default_rng(seed).random((n, 3072)).astype(np.float32)
    return Descriptors(pixels, pixels[:, :32])


EVIDENCE = Evidence(views(40, 0), views(20, 1), views(30, 2))


def test_short_forms_name_the_objectives(own):
    study = own.parent / "s.yaml"
    for written, names in (
        ("my_rewards.py:brightness", ("brightness",)),
        (["kid", "my_rewards.py:brightness"], ("kid", "brightness")),
    ):
        study.write_text(yaml.safe_dump({"name": "s", "data": "digits", "rewards": written}))
        rewards = load_config(study).rewards
        assert rewards.names == names and rewards.functions == {"brightness": f"{own}:brightness"}
        check_rewards(rewards, 64)
        assert load_config(load_config(study).model_dump(mode="json")).rewards == rewards


def test_a_users_reward_is_a_number_of_the_evidence(own):
    expected = abs(EVIDENCE.generated.pixels.mean() - EVIDENCE.holdout.pixels.mean())
    assert score_evidence(EVIDENCE, {"brightness": f"{own}:brightness"})["brightness"] == pytest.approx(
        float(expected)
    )
    with pytest.raises(MemControlError, match="gave 'very good'; it must give a finite number"):
        score_evidence(EVIDENCE, {"broken": f"{own}:broken"})


def small_clip(folder):
    """A CLIP model with random weights and the embedded base's tokenizer, as transformers writes one."""
    import torch
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from memcontrol.model.source import TINY

    tokenizer = AutoTokenizer.from_pretrained(TINY / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        **small,
        **ends,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
    }
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(
            text_config=text, vision_config={**small, "image_size": 28, "patch_size": 14}, projection_dim=12
        )
    ).save_pretrained(folder)
    CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), tokenizer
    ).save_pretrained(folder)
    return folder


def test_clip_score_is_that_of_the_model_itself(tmp_path):
    import torch
    from transformers import AutoProcessor, CLIPModel

    from memcontrol.scoring.extractors import load_clip

    images, captions = (
        np.random.default_rng(0).integers(0, 256, (70, 3, 40, 40), dtype=np.uint8),
        ["one", "two three"] * 35,
    )
    folder = small_clip(tmp_path / "clip")
    pictures, texts = load_clip(str(folder))(images, captions)
    with torch.no_grad():
        processed = AutoProcessor.from_pretrained(folder)(
            images=list(images), text=captions, return_tensors="pt", padding=True, truncation=True
        )
        model = CLIPModel.from_pretrained(folder).eval()
        cosines = model(**processed).logits_per_image.diagonal() / model.logit_scale.exp()
    assert float(score_evidence(replace(EVIDENCE, clip=(pictures, texts)))["clip_score"]) == pytest.approx(
        100 * float(cosines.clamp(min=0).mean()), abs=1e-3
    )


def test_the_extraction_attack_counts_what_agrees_and_matches_a_training_image():
    """Of four prompts' images that agree, two are a training image; one prompt makes one grey picture only;
    the rest are like any others."""
    rng = np.random.default_rng(0)
    train, holdout = (rng.integers(0, 256, (60, 3, 32, 32), dtype=np.uint8) for _ in range(2))
    apart = rng.integers(0, 256, (8, 4, 3, 32, 32), dtype=np.uint8)
    for prompt in (0, 1):
        apart[prompt] = train[prompt]
    apart[2], apart[3] = apart[2, :1], 127
    references = Evidence(
        *(Descriptors(pixel_features(one), np.ones((60, 2))) for one in (train, train, holdout))
    )
    found = measure_extraction(apart, holdout, references.space("pixels"))
    for kind in ("clique", "component"):
        assert found[f"extraction_{kind}"].value == 0.25 and found[f"extraction_{kind}"].high < 0.65
        assert found[f"agreement_{kind}"].value == 0.5 and found[f"agreement_{kind}_holdout"].value == 0
    assert 0 < found["extraction_threshold"] < 1


def test_large_images_are_shrunk_some_at_a_time_and_as_one_would(monkeypatch):
    from memcontrol.data.images import count_at_once

    images = np.random.default_rng(0).integers(0, 255, (23, 3, 512, 512), dtype=np.uint8)
    whole = torch.nn.functional.interpolate(
        torch.from_numpy(images).float() / 255, (32, 32), mode="bilinear", antialias=True, align_corners=False
    )
    sizes, shrink = [], torch.nn.functional.interpolate

    def see(pixels, *given, **settings):
        sizes.append(len(pixels))
        return shrink(pixels, *given, **settings)

    monkeypatch.setattr(torch.nn.functional, "interpolate", see)
    assert np.array_equal(pixel_features(images), whole.flatten(1).numpy())
    assert max(sizes) * images[0].nbytes <= 2**24 and sum(sizes) == len(images)
    assert count_at_once(512) * 3 * 512 * 512 <= 2**26 and count_at_once(32) == 256


def test_features_of_the_data_are_kept_on_disk_by_content(study_file):
    from memcontrol.config.load import load_config
    from memcontrol.config.spec import Spec
    from memcontrol.core.run_folder import locate_study_folder
    from memcontrol.core.space_yaml import load_space
    from memcontrol.trial.loaded import LoadedModels
    from memcontrol.trial.prepare import prepare_study
    from memcontrol.trial.samples import gather_evidence

    study = study_file()
    config, folder = load_config(study), locate_study_folder(study, "small")
    prepare_study(config.model_dump(mode="json"), folder, LoadedModels(), print)
    space = load_space(config.space)
    spec = Spec(config, space, space.list_anchors()["none"][0], folder, "search", "holdout", 32)
    samples = {
        "images": np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8),
        "rows": np.arange(8),
    }
    first = gather_evidence(samples, spec, LoadedModels())
    files = sorted(folder.glob("cache/features-*.safetensors"))
    assert len(files) == 2
    written = [path.stat().st_mtime_ns for path in files]
    again = gather_evidence(samples, spec, LoadedModels())
    assert [path.stat().st_mtime_ns for path in files] == written
    assert all(
        np.array_equal(getattr(getattr(first, part), key), getattr(getattr(again, part), key))
        for part in ("train", "holdout")
        for key in ("pixels", "features")
    )
    assert (
        first.captions == tuple(LoadedModels().train_images(spec).captions[:8])
        and first.images is samples["images"]
    )


def test_a_reward_may_be_better_the_more(own, study_file):
    """A user's, of images and captions as they are, beside CLIP's and the extraction attack's; with a lower
    bound."""
    import optuna

    own.write_text(
        "from memcontrol import reward\n\n@reward(direction='maximize')\ndef contrast(evidence):\n"
        "    assert len(evidence.captions) == len(evidence.images) and evidence.images.dtype == "
        "'uint8'\n    return evidence.images.std()\n"
    )
    rewards = {
        "objectives": ["kid", "extraction_clique", "clip_score", "my_rewards.py:contrast"],
        "limits": {"contrast": 1.0, "recall": 2.0},
        "n_samples": 16,
        "sampling_steps": 1,
        "confirm": 1,
        "clip": str(small_clip(own.parent / "clip")),
        "extraction": {"prompts": 3, "images": 3},
    }
    study = study_file(rewards=rewards, search={"trials": 0, "workers": 1, "executor": "inline"})
    assert run("search", study).returncode == 0
    inner = optuna.load_study(study_name="small", storage=f"sqlite:///{study.parent}/runs/small/study.db")
    assert [direction.name for direction in inner.directions] == [
        "MINIMIZE",
        "MINIMIZE",
        "MAXIMIZE",
        "MAXIMIZE",
    ]
    for trial in inner.trials:
        assert (
            trial.values[3] > 0
            and trial.constraints["contrast"] == pytest.approx(1.0 - trial.values[3])
            and trial.constraints["recall"] > 0.9
        )
    table = run("front", study).stdout
    assert "contrast" in table and "CLIP score" in table and "extracted, cliques" in table


def test_what_a_study_does_not_measure_is_no_objective():
    for name, key in (("clip_score", "rewards.clip"), ("extraction_clique", "rewards.extraction")):
        config = load_config({"name": "s", "data": "digits", "rewards": {"objectives": [name]}})
        with pytest.raises(MemControlError, match=f"'{name}' is measured only where {key} says how"):
            check_rewards(config.rewards, 64)


def test_a_model_that_makes_flat_images_is_pruned_by_name(study_file, monkeypatch):
    from memcontrol.config.load import load_config
    from memcontrol.config.spec import Spec
    from memcontrol.core.jobs import TrialJob
    from memcontrol.core.run_folder import locate_study_folder
    from memcontrol.core.space_yaml import load_space
    from memcontrol.execution.worker import attempt_trial
    from memcontrol.trial.loaded import LoadedModels
    from memcontrol.trial.prepare import prepare_study

    study, loaded = study_file(), LoadedModels()
    config, folder = load_config(study), locate_study_folder(study, "small")
    prepare_study(config.model_dump(mode="json"), folder, loaded, print)
    space = load_space(config.space)
    spec = Spec(config, space, space.list_anchors()["none"][0], folder, "search", "holdout", 32)
    spec.write(folder / "flat")
    monkeypatch.setattr(
        type(loaded.base(config)),
        "iterate_samples",
        lambda self, text, empty, *, seeds, **rest: iter([np.full((len(seeds), 3, 32, 32), 7, np.uint8)]),
    )
    attempt_trial(TrialJob(folder / "flat", spec.choice), loaded, lambda said: None)
    result = json.loads((folder / "flat" / "result.json").read_text())
    assert (
        result["state"] == "PRUNED" and "100% of the generated images are one flat colour" in result["reason"]
    )


def test_mistakes_in_a_users_file_are_named(own):
    other = own.with_suffix(".txt")
    other.touch()
    for place, words in (
        (f"{own}:beauty", "has no function 'beauty'"),
        (f"{own}x:brightness", "no such file"),
        (f"{other}:brightness", "no Python file"),
    ):
        with pytest.raises(MemControlError, match=words):
            load_own_reward(place)
    own.write_text("1 / 0")
    with pytest.raises(MemControlError, match="cannot be imported: ZeroDivisionError"):
        load_own_reward(f"{own}:brightness")
    config = load_config({"name": "s", "data": "digits", "rewards": {"limits": {"beauty": 1.0}}})
    with pytest.raises(MemControlError, match="rewards.limits: 'beauty' is unknown"):
        check_rewards(config.rewards, 64)


def test_a_search_with_a_users_reward_and_a_limit(own, study_file):
    """Three objectives, one the user's, and a limit that every trial of so short a training breaks or
    keeps."""
    import optuna

    rewards = {
        "objectives": ["fid", "memorization", "my_rewards.py:brightness"],
        "limits": {"fid": 1e-3, "copy_rate": 1.0},
        "n_samples": 32,
        "force": True,
        "sampling_steps": 1,
        "confirm": 0,
    }
    study = study_file(rewards=rewards)
    done = run("search", study)
    assert done.returncode == 0, done.stderr
    trials = json.loads(run("status", study, "--json").stdout)["trials"]
    assert all(
        list(trial["values"]) == ["fid", "memorization", "brightness"] and trial["values"]["brightness"] > 0
        for trial in trials
    )
    stored = optuna.load_study(
        study_name="small", storage=f"sqlite:///{study.parent}/runs/small/study.db"
    ).trials
    for trial in stored:
        assert trial.constraints == {
            "fid": pytest.approx(trial.values[0] - 1e-3),
            "copy_rate": pytest.approx(trial.system_attrs["memcontrol:result"]["rewards"]["copy_rate"] - 1.0),
        }
    assert json.loads(run("pick", study, "--json").stdout)["values"]["brightness"] > 0


def digit_images():
    from sklearn.datasets import load_digits

    order = np.random.default_rng(0).permutation(1797)
    pictures = (
        Image.fromarray((x * 255 / 16).astype(np.uint8))
        .resize((32, 32), Image.Resampling.BICUBIC)
        .convert("RGB")
        for x in load_digits().images[order]
    )
    return np.stack([np.asarray(picture) for picture in pictures]).transpose(0, 3, 1, 2)


def blurred(images, radius):
    return np.stack(
        [
            np.asarray(Image.fromarray(image.transpose(1, 2, 0)).filter(ImageFilter.GaussianBlur(radius)))
            for image in images
        ]
    ).transpose(0, 3, 1, 2)


@pytest.mark.slow
def test_real_images_blur_collapse_and_noise_do_not_count_as_copies():
    """And copies do, among real digits: M grows with their share, the copy rate's interval holds it, swapped
    labels change M's sign."""
    extract, images, rng = load_extractor("tiny").extract, digit_images(), np.random.default_rng(1)
    train, holdout, fresh = images[:300], images[300:600], images[600:850]

    def scored(generated, train=train, holdout=holdout):
        return score_evidence(
            Evidence(
                *(Descriptors(pixel_features(part), extract(part)) for part in (generated, train, holdout))
            )
        )

    flat, noise = (
        rng.integers(0, 256, (250, 3, 1, 1), dtype=np.uint8).repeat(32, 2).repeat(32, 3),
        rng.integers(0, 256, fresh.shape, dtype=np.uint8),
    )
    for generated in (fresh, blurred(fresh, 1), blurred(fresh, 3), flat, noise):
        found = scored(generated)
        assert all(
            abs(found[name].value) < 3 * found[name].error
            for name in ("memorization_pixels", "memorization_features")
        )
        assert found["copy_rate"].low < 0.01
    last = 0.0
    for n in (12, 50, 250):
        copied = np.concatenate([train[:n], fresh[n:]])
        found = scored(copied)
        assert (
            found["memorization"].value > max(last, 3 * found["memorization"].error)
            and found["memorization"].p < 0.01
        )
        assert found["copy_rate"].low <= n / 250 <= found["copy_rate"].high
        last = found["memorization"].value
    swapped = scored(copied, holdout, train)
    assert all(
        swapped[name].value == pytest.approx(-found[name].value, abs=1e-9)
        for name in ("memorization_pixels", "memorization_features")
    )
    shuffled = scored(
        copied[rng.permutation(250)], train[rng.permutation(300)], holdout[rng.permutation(300)]
    )
    assert all(
        float(shuffled[name]) == pytest.approx(float(found[name]), abs=1e-9)
        for name in ("memorization", "copy_rate", "fid", "kid", "mq", "authpct")
    )


def test_a_reward_that_breaks_is_named_before_anything_is_trained(own, study_file):
    own.write_text("def mine(evidence):\n    return 1 / 0\n")
    study = study_file(
        rewards={"objectives": ["kid", "my_rewards.py:mine"], "n_samples": 16, "sampling_steps": 1}
    )
    done = run("search", study)
    assert (
        done.returncode == 1
        and "my_rewards.py:mine failed: ZeroDivisionError: division by zero" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not list((study.parent / "runs" / "small").glob("*/spec.json"))
