"""Twins are found by content, whatever was done to them; others are not; and what becomes of them."""

import io
import json

import numpy as np
import pytest
from commands import run
from PIL import Image, ImageEnhance

from memcontrol.config.load import load_config
from memcontrol.core.errors import MemControlError
from memcontrol.data.split import load_parts
from memcontrol.data.twins import find_twins, shrink_to_thumbnail


def draw(seed, size=96):
    """A smooth picture with some detail."""
    rng = np.random.default_rng(seed)
    layers = [
        np.asarray(Image.fromarray(rng.normal(size=(k, k)).astype("f4")).resize((size, size), Image.BICUBIC))
        * s
        for k, s in ((3, 1.0), (6, 0.7), (12, 0.5), (24, 0.3))
    ]
    whole = np.sum(layers, axis=0)
    return Image.fromarray((255 * (whole - whole.min()) / np.ptp(whole)).astype(np.uint8))


def encode(image, quality=60):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


CHANGES = {
    "JPEG": encode,
    "half the size": lambda image: image.resize((48, 48), Image.BICUBIC),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned": lambda image: image.rotate(90),
    "turned and mirrored": lambda image: image.rotate(270).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "cropped": lambda image: image.crop((3, 3, 93, 93)),
    "cropped at a corner": lambda image: image.crop((0, 0, 92, 92)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
}


def find(images):
    images = [image.convert("RGB") for image in images]
    thumbnails = np.stack([shrink_to_thumbnail(image) for image in images])
    return find_twins(thumbnails, [str(row) for row in range(len(images))], lambda row: images[row].copy())


def test_twins_of_every_kind_are_found_and_no_others():
    images = [draw(seed) for seed in range(300)]
    planted = {}
    for number, (kind, change) in enumerate(CHANGES.items()):
        for row in range(10 * number, 10 * number + 6):
            planted[row, len(images)] = kind
            images.append(change(images[row]))
    found = find(images)
    assert set(found.pairs) == set(planted) and min(found.covered.values()) > 0.9


def test_few_flat_and_black_images_are_no_twins_of_each_other():
    black = [Image.fromarray(np.full((64, 64), grey, np.uint8)) for grey in (0, 1, 2, 3)]
    assert find(black[:1]).pairs == () and find(black).n_plain == 4
    assert find([*black, *(draw(seed) for seed in range(20))]).pairs == ()


def load(path, warn=lambda line: None, **keys):
    config = load_config({"name": "a", "data": {"path": str(path), **keys}})
    return load_parts(config.data, 32, 0, warn)


def test_a_pool_keeps_twins_in_one_part_and_records_them(tmp_path):
    for seed in range(60):
        draw(seed).save(tmp_path / f"{seed:02}.png")
    for seed in range(0, 60, 3):
        encode(draw(seed)).save(tmp_path / f"{seed:02}.jpg", quality=80)
    split = load(tmp_path)
    homes = {record.name: part for part, images in split.parts.items() for record in images.records}
    assert (
        all(homes.get(f"{seed:02}.png") == homes.get(f"{seed:02}.jpg") for seed in range(0, 60, 3))
        and len(set(homes.values())) == 3
    )
    assert len(split.found["twins"]["pairs"]) == 20
    groups = [group for images in split.parts.values() for group in images.groups]
    assert len(set(groups)) == len(groups) - sum(f"{seed:02}.jpg" in homes for seed in range(0, 60, 3))


def fill_parts(root):
    for number, part in enumerate(("train", "holdout", "test")):
        (root / part).mkdir(parents=True)
        for seed in range(12):
            draw(100 * number + seed).save(root / part / f"{seed:02}.png")
    encode(draw(3), 90).save(root / "holdout" / "again.jpg", quality=90)


def test_given_parts_that_share_twins_are_refused_or_lose_the_held_out_one(tmp_path):
    fill_parts(tmp_path)
    with pytest.raises(MemControlError, match="'holdout/again.jpg' and 'train/03.png'; copying could"):
        load(tmp_path)
    said = []
    split = load(tmp_path, said.append, twins="drop")
    parts = split.parts
    assert split.found["twins"]["dropped"] == ["holdout/again.jpg"]
    assert "holdout/again.jpg" not in [record.name for record in parts["holdout"].records]
    assert len(parts["train"]) == 12 and "left out" in said[1] and "again.jpg" in said[1]
    kept = load(tmp_path, twins="keep").parts
    assert len(kept["holdout"]) == 13 and not set(kept["train"].groups) & set(kept["holdout"].groups)


def test_an_audit_leaves_twins_out_or_refuses_them(tmp_path):
    """With two of 40 held-out images that are training images, half of what is copied would hide."""
    for name, seeds in (("train", range(40)), ("holdout", range(100, 138))):
        (tmp_path / name).mkdir()
        for seed in seeds:
            draw(seed).save(tmp_path / name / f"{seed:03}.png")
    (tmp_path / "made").mkdir()
    for seed in range(40):
        noise = np.random.default_rng(seed).normal(0, 4, (96, 96))
        image = np.asarray(draw(seed if seed % 2 else 1000 + seed)) + noise
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(tmp_path / "made" / f"{seed}.png")
    for seed in (0, 1):
        draw(seed).save(tmp_path / "holdout" / f"twin{seed}.jpg", quality=90)
    sets = [word for name in ("train", "holdout") for word in (f"--{name}", tmp_path / name)]
    words = ["audit", "--images", tmp_path / "made", *sets, "--out", tmp_path / "out", "--json"]
    done = run(*words)
    assert done.returncode == 1 and "'train/001.png' and 'holdout/twin1.jpg'" in done.stderr
    done = run(*words, "--twins", "drop", check=True)
    found = json.loads(done.stdout)
    assert found["sizes"]["holdout"] == 38 and found["rewards"]["copy_rate"] == pytest.approx(0.5, abs=0.05)
    copied = {(one["generated"], one["training"]) for one in found["copies"] if one["copy"]}
    assert {(f"{seed}.png", f"{seed:03}.png") for seed in range(1, 40, 2)} <= copied
    assert found["rewards"]["copied_images"] == found["rewards"]["copied_groups"] >= 20
