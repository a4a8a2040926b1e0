"""Image folders as people have them: captions, odd files, splits, and each mistake in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from memcontrol.config.load import load_config
from memcontrol.core.errors import MemControlError
from memcontrol.data.split import dump_parts, format_ranges, load_parts, parse_parts
from memcontrol.reading.decode import decode_image

HALVES = {"train": 0.5, "holdout": 0.25, "test": 0.25}


def load(path, warn=lambda line: None, seed=0, **keys):
    config = load_config({"name": "a", "data": {"path": str(path), **HALVES, **keys}})
    return load_parts(config.data, 32, seed, warn).parts


def refused(path, words, **keys):
    with pytest.raises(MemControlError, match=words) as caught:
        load(path, **keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rows, said",
    [([], ""), ([4], "4"), ([0, 1, 2, 3, 7, 9, 10], "0-3, 7, 9-10"), (range(55_000), "0-54999")],
)
def test_row_numbers_are_said_in_ranges(rows, said):
    assert format_ranges(rows) == said


def test_the_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits, parts = load_digits(), load("digits", train=100, holdout=200, test=300)
    assert [len(part) for part in parts.values()] == [100, 200, 300]
    names = [{record.name for record in images.records} for images in parts.values()]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    few = parts["train"].take(range(5))
    for record, pixels in zip(few.records, few.pixels()):
        i = int(record.name)
        assert record.caption == f"a blurred handwritten digit {digits.target[i]}"
        reduced = pixels.mean(0).reshape(8, 4, 8, 4).mean((1, 3))
        assert np.corrcoef(reduced.ravel(), -digits.images[i].ravel())[0, 1] > 0.97


def test_a_folder_is_split_by_share_and_the_same_again(photographs):
    root = photographs(40)
    first, again, other = load(root), load(root), load(root, seed=1)
    assert [len(images) for images in first.values()] == [20, 10, 10]
    assert first == again != other
    assert first["train"].pixels().shape == (20, 3, 32, 32)
    stored = {"source": str(root), "resolution": 32, "parts": dump_parts(first)}
    assert parse_parts(json.loads(json.dumps(stored))) == first


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_captions_come_from_metadata(photographs, kind):
    root = photographs(32)
    if kind == "jsonl":
        (root / "metadata.jsonl").write_text(
            "".join(json.dumps({"file_name": f"{i:03}.png", "text": f"número {i}"}) + "\n" for i in range(32))
        )
    else:
        (root / "metadata.csv").write_text(
            "file_name,text\n" + "".join(f'{i:03}.png,"número {i}"\n' for i in range(32))
        )
    for images in load(root).values():
        assert all(record.caption == f"número {int(record.name[:3])}" for record in images.records)


def test_without_metadata_the_folder_is_the_caption(photographs):
    photographs(16, "pets/cat")
    photographs(16, "pets/dög", size=(41, 30))
    root = photographs(0, "pets")
    for images in load(root).values():
        assert all(record.caption == record.name.split("/")[0] for record in images.records)
    assert {caption for images in load(root).values() for caption in images.captions} == {"cat", "dög"}


def test_sub_folders_are_the_parts_with_metadata_in_each(photographs):
    for offset, part in enumerate(("train", "holdout", "test")):
        root = photographs(10, f"x/{part}", first=10 * offset)
        (root / "metadata.jsonl").write_text(json.dumps({"file_name": "003.png", "text": part}) + "\n")
    parts = load(photographs(0, "x"))
    assert {part: len(images) for part, images in parts.items()} == {"train": 10, "holdout": 10, "test": 10}
    for part, images in parts.items():
        assert sorted(images.captions) == [""] * 9 + [part]


def test_sub_folders_that_share_an_image_are_refused(photographs):
    for offset, part in enumerate(("train", "holdout", "test")):
        photographs(10, f"x/{part}", first=10 * offset)
    Image.open(photographs(0, "x") / "train/004.png").save(photographs(0, "x") / "holdout/zz.bmp")
    refused(photographs(0, "x"), "train and holdout share an image: 'train/004.png' and 'holdout/zz.bmp'")


def test_a_missing_part_is_named(photographs):
    photographs(10, "x/train")
    refused(
        photographs(0, "x"),
        "has train/ but no holdout, test; add it, by one of its names .holdout: .*validation",
    )


def test_duplicates_in_a_pool_stay_in_one_part(photographs):
    root = photographs(36)
    for i in range(4):
        Image.open(root / f"{i:03}.png").save(root / f"copy{i}.png")
    parts = load(root)
    digests = [{record.digest for record in images.records} for images in parts.values()]
    assert not (digests[0] & digests[1] or digests[0] & digests[2] or digests[1] & digests[2])
    assert sum(len(images) for images in parts.values()) >= 39


def test_an_undecodable_image_is_named_and_skipped_only_on_demand(photographs):
    root = photographs(40)
    (root / "leer é.png").write_bytes(b"")
    refused(root, "leer é.png cannot be decoded .*data.skip_unreadable=true")
    warnings = []
    parts = load(root, warnings.append, skip_unreadable=True)
    assert sum(len(images) for images in parts.values()) == 40
    assert "leer é.png" in warnings[0] and warnings[1:] == ["no image has a caption"]
    (root / "cut.png").write_bytes((root / "000.png").read_bytes()[:200])
    refused(root, "cut.png cannot be decoded")


def test_a_caption_for_an_image_that_is_not_there(photographs):
    root = photographs(32)
    (root / "metadata.csv").write_text("file_name,text\nnope.png,a\n")
    refused(root, "no row of metadata.csv names an image that is there, the first being metadata.csv, row 1")
    (root / "metadata.csv").write_text("name,text\n000.png,a\n")
    refused(root, "metadata.csv, row 1 has no 'file_name'")
    (root / "metadata.csv").unlink()
    (root / "metadata.jsonl").write_text("{not json}\n")
    refused(root, "metadata.jsonl cannot be read")
    (root / "metadata.jsonl").write_text("[1]\n")
    refused(root, "row 1 is no object; each is one such as")


def test_too_few_images_and_no_folder(photographs, tmp_path):
    refused(photographs(10), "needs? at least 8|need at least 8")
    refused(tmp_path / "nowhere", "no such folder")
    (tmp_path / "void").mkdir()
    refused(tmp_path / "void", "holds no images")
    refused("digits", "asks for 3000 images and there are 1797", train=1000, holdout=1000, test=1000)


def test_images_are_upright_rgb(tmp_path):
    wide = Image.fromarray(
        np.concatenate([np.zeros((20, 20, 3), np.uint8), np.full((20, 20, 3), 255, np.uint8)], 1)
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    wide.save(tmp_path / "turned.jpg", exif=exif)
    turned = np.asarray(decode_image(tmp_path / "turned.jpg"))
    assert turned.shape == (40, 20, 3) and turned[:15].mean() < 20 and turned[25:].mean() > 235
    Image.fromarray(np.full((9, 9), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert np.abs(np.asarray(decode_image(tmp_path / "deep.png")).astype(int) - 127).max() <= 1
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(decode_image(tmp_path / "clear.png")).min() == 255
    for mode in ("L", "LA", "P", "1", "CMYK"):
        image = Image.new(mode, (9, 9))
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        image.save(path)
        assert decode_image(path).mode == "RGB"


def test_a_calibration_part_is_split_off_last_and_used_for_the_line(photographs, tmp_path):
    parts = load(photographs(60), train=20, holdout=10, test=10, calibration=12)
    assert [len(images) for images in parts.values()] == [20, 10, 10, 12] and list(parts)[3] == "calibration"
    names = [record.name for images in parts.values() for record in images.records]
    assert len(set(names)) == 52
    for number, part in enumerate(("train", "holdout", "test", "calibration")):
        photographs(10, f"given/{part}", first=100 * number)
    given = load(tmp_path / "given")
    assert [record.caption for record in given["calibration"].records] == [""] * 10
