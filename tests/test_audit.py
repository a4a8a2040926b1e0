"""The audit: planted copies are found, ranked first and shown; what cannot be judged is named; a run and a
pipeline are audited too."""

import json
import re
import shutil
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image

from memcontrol.auditing.judge import judge_images
from memcontrol.commands.audit import audit
from memcontrol.core.errors import MemControlError
from memcontrol.core.run_folder import StudyFolder
from memcontrol.data.pictures import read_folder_pictures, wrap_samples
from memcontrol.scoring.extractor_table import find_photo_package
from memcontrol.view.audit_page import write_audit
from memcontrol.view.words import NETWORK_DOUBT, describe_missed


@pytest.fixture
def folders(tmp_path):
    """150 training and 150 held-out images, 200 generated, of which n are training images with a little
    noise."""

    def picture(seed):
        cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(cells).resize((80, 60), Image.Resampling.BICUBIC)

    def make(n_copies):
        for part, seeds in (
            ("train", range(150)),
            ("holdout", range(1000, 1150)),
            ("generated", range(2000, 2200 - n_copies)),
        ):
            (tmp_path / part).mkdir(exist_ok=True)
            for seed in seeds:
                picture(seed).save(tmp_path / part / f"{seed}.png")
        for i in range(n_copies):
            noisy = np.asarray(picture(9 * i % 150)) + np.random.default_rng(i).normal(0, 4, (60, 80, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(tmp_path / "generated" / f"copy{i}.png")
        return tmp_path

    return make


def found_in(root):
    parts = [read_folder_pictures(part, root / part, print) for part in ("generated", "train", "holdout")]
    return judge_images(*parts, "tiny", lambda *_: None)


class Texture(torch.nn.Module):
    """What changes from one pixel to the next, in the middle of 128 x 128."""

    def forward(self, images):
        grey = images.mean(1, keepdim=True)
        smooth = torch.nn.functional.avg_pool2d(grey, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
        return (grey - smooth)[..., 32:96, 32:96].flatten(1)


def paint(contents, textures):
    """Pictures of 128 pixels: smooth ones, each with a texture that two pixels cancel."""

    def draw(content, texture):
        cells = np.random.default_rng(content).integers(60, 196, (6, 6, 3), dtype=np.uint8)
        smooth = Image.fromarray(cells).resize((128, 128), Image.Resampling.BICUBIC)
        signs = np.random.default_rng(texture).choice([-12, 12], (64, 64))
        marks = np.kron(signs, [[1, -1], [-1, 1]])[..., None]
        return (np.asarray(smooth, int) + marks).clip(0, 255).astype(np.uint8).transpose(2, 0, 1)

    return np.stack([draw(*pair) for pair in zip(contents, textures)])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_copies_that_thumbnails_would_have_missed_are_counted(tmp_path):
    """Ten of sixty generated images have the texture of a training image, which 64 pixels do not show, and
    five are whole copies, which they do."""
    torch.jit.script(Texture()).save(tmp_path / "net.pt")
    own = [range(first, first + 60) for first in (0, 100, 200)]
    whole, of_texture = own[0][:5], own[0][5:15]
    made = paint([*whole, *own[2][5:]], [*whole, *of_texture, *own[2][15:]])
    sets = [
        replace(wrap_samples(pixels), title=title, groups=tuple(f"{title} {i}" for i in range(60)))
        for title, pixels in (
            ("generated", made),
            ("train", paint(own[0], own[0])),
            ("holdout", paint(own[1], own[1])),
        )
    ]
    network = f"torchscript:{tmp_path / 'net.pt'},side=128,normalize=unit"
    found = judge_images(*sets, network, lambda *_: None)
    assert found["rewards"]["clear_copy_rate"] * 60 == pytest.approx(15)
    assert found["missed_when_small"] == 10
    assert describe_missed(found) == "In images of 64 pixels 10 of these 15 would have been missed."


def test_planted_copies_are_found_first_and_shown(folders):
    root = folders(7)
    picture = Image.open(root / "train" / "3.png")
    picture.resize((82, 61)).save(root / "train" / "twin.png")
    done = run(
        "audit",
        "--images",
        root / "generated",
        "--train",
        root / "train",
        "--holdout",
        root / "holdout",
        "--out",
        root / "out",
        "--extractor",
        "tiny",
        "--json",
    )
    assert done.returncode == 0 and done.stderr.count("Copying is visible") == 1
    assert "warning: the feature network is tiny, which knows printed characters" in done.stderr
    found = json.loads((root / "out" / "audit.json").read_text())
    assert json.loads(done.stdout) == found
    first = found["copies"][:7]
    assert {(one["generated"], one["training"]) for one in first} == {
        (f"copy{i}.png", f"{9 * i}.png") for i in range(7)
    }
    assert (
        all(one["copy"] and one["of_holdout"] < 0.1 for one in first)
        and found["copies"][7]["of_holdout"] > 0.5
    )
    assert found["rewards"]["copy_rate_low"] <= 0.035 <= found["rewards"]["copy_rate_high"]
    assert [pair["images"] for pair in found["duplicates"]] == [["3.png", "twin.png"]]
    page = (root / "out" / "audit.html").read_text()
    assert page.count("<img") == 2 * 24 and page.count('class="copy"') >= 7 and "copy6.png" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "privacy guarantee" in page


def test_an_audit_takes_the_network_that_suits_its_images_and_says_why(photographs, tmp_path, monkeypatch):
    from memcontrol.auditing import judge

    sets = {
        part: photographs(12, folder=part, first=100 * number)
        for number, part in enumerate(("images", "train", "holdout"))
    }
    found = audit(**sets)
    if find_photo_package():
        assert found["extractor"].startswith("efficientnet-lite0-sha256:") and not found["extractor_doubt"]
        assert found["extractor_reason"] == "the images look like photographs"
    monkeypatch.setattr(judge, "find_photo_package", lambda: None)
    found = audit(**sets)
    assert found["extractor"].startswith("tiny-sha256:")
    assert "not installed: pip install 'memcontrol[photos]'" in found["extractor_reason"]
    assert found["extractor_doubt"] == NETWORK_DOUBT
    write_audit(found, [], tmp_path)
    page = unescape((tmp_path / "audit.html").read_text())
    assert f"Warning: {NETWORK_DOUBT}." in page and found["extractor_reason"] in page
    found = audit(**sets, extractor="pixels")
    assert (found["extractor"], found["extractor_reason"], found["extractor_doubt"]) == (
        "pixels-32",
        "asked for",
        "",
    )
    for path in (path for folder in sets.values() for path in folder.iterdir()):
        page = Image.new("RGB", (40, 30), "white")
        page.paste(Image.open(path).resize((12, 9)), (int(path.stem) % 5, 4))
        page.save(path)
    found = audit(**sets)
    assert found["extractor_reason"] == "the images look like characters or drawings"
    assert found["extractor"].startswith("tiny-sha256:") and found["extractor_doubt"] == ""


def test_without_copies_none_are_seen(folders):
    found = found_in(folders(0))
    assert (
        found["verdict"].startswith("No copying is visible at this sample size")
        and found["rewards"]["copy_rate_low"] < 0.01
    )


@pytest.mark.parametrize("n, share", [(10, 0.05), (40, 0.2), (200, 1.0)])
def test_the_copy_rate_recovers_what_was_planted(folders, n, share):
    rewards = found_in(folders(n))["rewards"]
    assert rewards["copy_rate_low"] - 0.01 <= share <= rewards["copy_rate_high"] + 1e-9


def test_what_cannot_be_judged_is_named(folders, tmp_path):
    root = folders(0)
    for seed in range(150):
        Image.new("RGB", (80, 60), (seed, 9, 9)).save(root / "generated" / f"{2000 + seed}.png")
    with pytest.raises(MemControlError, match="75% of the generated images are one flat colour"):
        found_in(root)
    (root / "holdout" / "same.png").write_bytes((root / "train" / "5.png").read_bytes())
    sets = [word for part in ("train", "holdout") for word in (f"--{part}", root / part)]
    words = ["audit", "--images", root / "generated", *sets]
    assert "train and holdout share an image: '5.png' and 'same.png'" in run(*words).stderr
    (tmp_path / "few").mkdir()
    with pytest.raises(MemControlError, match="few: .* holds no images"):
        judge_images(
            read_folder_pictures("few", tmp_path / "few", print),
            *(read_folder_pictures("x", root / "train", print),) * 2,
            "tiny",
            print,
        )
    assert "give --train DIR and --holdout DIR" in run("audit", "--images", root / "generated").stderr
    (root / "train" / "broken.png").write_bytes(b"")
    refused = run(
        "audit", "--images", root / "generated", "--train", root / "train", "--holdout", root / "train"
    )
    assert refused.returncode == 1 and "broken.png cannot be decoded" in refused.stderr


def test_a_pipeline_is_sampled_and_audited(folders, tmp_path):
    from memcontrol.model.source import TINY

    root = folders(0)
    (root / "train" / "metadata.csv").write_text("file_name,text\n5.png,a printed digit 3\n")
    done = run(
        "audit",
        "--model",
        TINY,
        "--train",
        root / "train",
        "--holdout",
        root / "holdout",
        "--out",
        tmp_path / "out",
        "--samples",
        16,
        "--steps",
        2,
        "--attacked",
        1,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert 0 <= found["rewards"]["extraction_clique"] <= found["rewards"]["extraction_component"] <= 1
    assert found["sizes"] == {"generated": 16, "train": 150, "holdout": 150} and "sample 0" in {
        one["generated"] for one in found["copies"]
    }


def test_a_clean_model_is_not_accused_because_held_out_images_are_few(folders):
    """Twenty held-out images cannot show where 1 % lies; the verdict knows."""
    root = folders(0)
    held = sorted((root / "holdout").iterdir())
    for start in (0, 20, 40, 60, 80, 100):
        few = root / f"few{start}"
        few.mkdir()
        for path in held[start : start + 20]:
            (few / path.name).write_bytes(path.read_bytes())
        parts = [read_folder_pictures(part, root / part, print) for part in ("generated", "train", few.name)]
        found = judge_images(*parts, "tiny", lambda *_: None)
        assert (
            "Copying is visible" not in found["verdict"]
            and "4.8% is expected without copying" in found["verdict"]
        )


def test_held_out_images_that_are_audited_themselves_are_refused(folders):
    root = folders(0)
    generated, train = (read_folder_pictures(part, root / part, print) for part in ("generated", "train"))
    with pytest.raises(MemControlError, match="100% of the generated images are held-out images themselves"):
        judge_images(generated, train, generated, "tiny", lambda *_: None)


def test_sampling_options_without_a_pipeline_and_an_attack_without_captions_are_refused(folders):
    root = folders(0)
    parts = ("--train", root / "train", "--holdout", root / "holdout")
    refused = run("audit", "--images", root / "generated", *parts, "--attacked", 3)
    assert refused.returncode == 1 and "--attacked say how a pipeline is sampled" in refused.stderr
    from memcontrol.model.source import TINY

    refused = run("audit", "--model", TINY, *parts, "--attacked", 3, "--samples", 8, "--steps", 1)
    assert refused.returncode == 1 and "--train has no captions" in refused.stderr


def test_an_image_in_both_parts_is_dropped_or_kept_as_twins_are(folders):
    root = folders(20)
    (root / "holdout" / "same.png").write_bytes((root / "train" / "5.png").read_bytes())
    sets = {part: root / part for part in ("train", "holdout")}
    dropped = audit(root / "generated", **sets, twins="drop")
    assert dropped["dropped"] == ["same.png"] and dropped["sizes"]["holdout"] == 150
    kept = audit(root / "generated", **sets, twins="keep")
    assert kept["dropped"] == [] and kept["sizes"]["holdout"] == 151


def test_further_real_images_draw_the_line(folders, shown, tmp_path):
    """Of folders that are given, and a run's own."""
    root = folders(20)
    (root / "third").mkdir()
    for path in sorted((root / "generated").glob("2*.png"))[:60]:
        path.rename(root / "third" / path.name)
    sets = {part: root / part for part in ("train", "holdout")}
    found = audit(root / "generated", **sets, calibration=root / "third")
    assert found["rewards"]["copy_rate_n_real"] == found["sizes"]["calibration"] == 60
    (root / "third" / "same.png").write_bytes((root / "train" / "5.png").read_bytes())
    with pytest.raises(MemControlError, match="train and calibration share an image"):
        audit(root / "generated", **sets, calibration=root / "third")

    study = tmp_path / "study"
    shutil.copytree(shown.parent / "runs" / "seen", study)
    folder = StudyFolder(study)
    split = folder.read_split()
    split["parts"]["calibration"] = split["parts"]["test"][:40]
    folder.split_file.write_text(json.dumps(split))
    first = next(one for one in folder.list_runs() if one.is_complete and one.samples_file.is_file())
    spec = json.loads(first.spec_file.read_text()) | {"study_folder": str(study)}
    first.spec_file.write_text(json.dumps(spec))
    assert audit(model=first.path)["rewards"]["copy_rate_n_real"] == 40


def test_a_folder_of_parts_is_not_taken_for_one_set(folders, tmp_path):
    root = folders(0)
    whole = tmp_path / "whole"
    for name in ("Train", "val", "test"):
        shutil.copytree(root / "holdout", whole / "data" / name)
    sets = {"train": root / "train", "holdout": root / "holdout"}
    for name in ("images", "train", "holdout", "calibration"):
        given = {"images": root / "generated", **sets, name: whole}
        with pytest.raises(
            MemControlError, match="has data/Train/, data/test/, data/val/, which are parts"
        ) as one:
            audit(**given)
        assert f"--train {whole}/data/Train --holdout {whole}/data/val" in str(one.value)
        assert "\n" not in str(one.value)
    rows = [
        f"{path.name},{['train', 'test'][i % 2]}" for i, path in enumerate((root / "train").glob("*.png"))
    ]
    (root / "train" / "metadata.csv").write_text("\n".join(["file_name,split", *rows]))
    with pytest.raises(MemControlError, match="has the parts test, train in column 'split' of metadata.csv"):
        audit(root / "generated", **sets)


def test_the_folder_that_says_no_group_is_named(folders):
    root = folders(0)
    rows = [f"{path.name},{path.stem}" for path in (root / "train").glob("*.png")]
    (root / "train" / "metadata.csv").write_text("\n".join(["file_name,PatientID", *rows]))
    with pytest.raises(MemControlError, match="holdout: data.group is 'PatientID', and no image says one"):
        audit(root / "generated", root / "train", root / "holdout", group="PatientID")
