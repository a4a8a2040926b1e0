"""Datasets that are no folder of images: what is read of them is what their own library gives."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
from commands import run
from PIL import Image

from memcontrol.config.load import load_config
from memcontrol.core.errors import MemControlError
from memcontrol.data import dataset as dataset_module
from memcontrol.data.dataset import is_dataset, plan_splits, unpack_dataset
from memcontrol.data.split import load_parts

SPLITS = {"train": 20, "validation": 12, "test": 10}


def make_noise(number):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8))


def make_split(first, n):
    rows = range(first, first + n)
    kinds = {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "patient_id": datasets.Value("string"),
    }
    return datasets.Dataset.from_dict(
        {
            "image": [make_noise(row) for row in rows],
            "text": [f"caption {row}" for row in rows],
            "label": [row % 2 for row in rows],
            "patient_id": [f"patient {row // 2}" for row in rows],
        },
        features=datasets.Features(kinds),
    )


@pytest.fixture(scope="module")
def splits():
    datasets.disable_progress_bars()
    starts = np.cumsum([0, *SPLITS.values()])
    return datasets.DatasetDict(
        {name: make_split(int(first), n) for first, (name, n) in zip(starts, SPLITS.items())}
    )


def save_parquet(splits, folder):
    (folder / "data").mkdir(parents=True)
    for name, split in splits.items():
        half = len(split) // 2
        for shard, rows in enumerate((range(half), range(half, len(split)))):
            split.select(rows).to_parquet(folder / "data" / f"{name}-{shard:05}-of-00002.parquet")


def save_arrow(splits, folder):
    splits.save_to_disk(folder)


def save_tars(splits, folder):
    folder.mkdir()
    for name, split in splits.items():
        write_tar(folder / f"{name}-000.tar", split)


def write_tar(path, split):
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(split):
            file = io.BytesIO()
            row["image"].save(file, "PNG")
            label = split.features["label"].int2str(row["label"])
            told = {"patient_id": row["patient_id"], "label": label}
            members = {
                "png": file.getvalue(),
                "txt": row["text"].encode(),
                "json": json.dumps(told).encode(),
            }
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{number:04}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_members(path, members):
    """A tar of names with contents, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def encode_noise(number):
    file = io.BytesIO()
    make_noise(number).save(file, "PNG")
    return file.getvalue()


def load(path, kept=None, **keys):
    config = load_config({"name": "a", "data": {"path": str(path), **keys}})
    return load_parts(config.data, 40, 0, kept=kept).parts


@pytest.mark.parametrize("save", [save_parquet, save_arrow, save_tars])
def test_splits_captions_labels_and_pixels_are_those_that_the_library_gives(splits, tmp_path, save):
    save(splits, tmp_path / "set")
    assert is_dataset(str(tmp_path / "set"))
    parts = load(tmp_path / "set", tmp_path / "cache" / "images.db", group="patient_id")
    for part, name in (("train", "train"), ("holdout", "validation"), ("test", "test")):
        wanted = splits[name]
        assert parts[part].captions == wanted["text"][:]
        assert [record.group for record in parts[part].records] == wanted["patient_id"][:]
        pixels = np.stack([np.asarray(image) for image in wanted["image"]]).transpose(0, 3, 1, 2)
        assert (parts[part].pixels() == pixels).all()
    by_label = load(tmp_path / "set", tmp_path / "cache" / "images.db", caption="label")
    assert by_label["train"].captions == ["cat", "dog"] * 10


def test_one_split_is_dealt_out_and_splits_that_are_no_parts_are_refused(splits, tmp_path):
    two = datasets.DatasetDict({name: splits[name] for name in ("train", "test")})
    save_parquet(two, tmp_path / "set")
    kept = tmp_path / "cache" / "images.db"
    with pytest.raises(MemControlError, match="splits train, test: they are not one each .* set data.split"):
        load(tmp_path / "set", kept)
    with pytest.raises(MemControlError, match="data.split is 'val'; .* has train, test"):
        load(tmp_path / "set", kept, split="val")
    keys = {"train": 8, "holdout": 8, "test": 8}
    with pytest.raises(MemControlError, match="asks for 24 images and there are 20"):
        load(tmp_path / "set", kept, split="train", **keys)
    with pytest.raises(MemControlError, match="data.split is 'x', and data.path is no dataset"):
        load(tmp_path / "cache", kept, split="x")
    write_tar(tmp_path / "alone.tar", concatenate(splits))
    alone = load(tmp_path / "alone.tar", kept, train=22, holdout=10, test=10)
    captions = {caption for part in alone.values() for caption in part.captions}
    assert captions == {f"caption {row}" for row in range(sum(SPLITS.values()))}
    assert plan_splits("x", ["training", "dev", "testing", "more"], None).unused == ("more",)


def concatenate(splits):
    return datasets.concatenate_datasets(list(splits.values()))


def test_what_was_unpacked_is_not_unpacked_again_and_a_killed_one_goes_on(splits, tmp_path, monkeypatch):
    save_parquet(splits, tmp_path / "set")
    written, real = [], dataset_module._write_missing

    def write(path, content):
        if len(written) == 17:
            raise KeyboardInterrupt
        if not path.is_file():
            written.append(path.name)
        real(path, content)

    monkeypatch.setattr(dataset_module, "_write_missing", write)
    with pytest.raises(KeyboardInterrupt):
        unpack_dataset(str(tmp_path / "set"), None, tmp_path / "cache", lambda done, total: None)
    assert not list((tmp_path / "cache").glob("dataset-*/"))
    written.append("the rest")
    told = []
    folder = unpack_dataset(
        str(tmp_path / "set"), None, tmp_path / "cache", lambda done, total: told.append(total)
    )
    assert len(written) == len(set(written)) == sum(SPLITS.values()) + 1
    monkeypatch.setattr(dataset_module, "_open_splits", None)
    assert unpack_dataset(str(tmp_path / "set"), None, tmp_path / "cache", print) == folder


@pytest.mark.parametrize(
    "path, words",
    [
        ("hf://alone", "a dataset of the hub is hf://OWNER/NAME"),
        ("hf://a/b/c/d/e", "a dataset of the hub is"),
    ],
)
def test_no_name_of_the_hub_is_refused_in_one_line(path, words):
    with pytest.raises(MemControlError, match=words):
        load(path)


def test_the_hub_is_asked_by_name_config_and_revision(splits, tmp_path, monkeypatch):
    asked = []

    def load_dataset(*given, **how):
        asked.append((given, how))
        return splits

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for path in ("hf://owner/name", "hf://datasets/owner/name/config@v1"):
        assert len(load(path, tmp_path / path[-2:] / "images.db")["train"]) == 20
    assert asked == [
        (("owner/name", None), {"revision": None, "streaming": True}),
        (("owner/name", "config"), {"revision": "v1", "streaming": True}),
    ]


def test_a_dataset_without_images_or_with_broken_shards_is_refused_in_one_line(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(MemControlError, match="no column of images; its columns are text"):
        load(tmp_path / "a.parquet", tmp_path / "images.db")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(MemControlError, match="b.parquet', which cannot be read: ") as error:
        load(tmp_path / "b.parquet", tmp_path / "images.db")
    assert "\n" not in str(error.value)


def test_what_of_a_dataset_is_not_used_is_said_and_a_cut_tar_is_refused(splits, tmp_path):
    kinds = datasets.Features(
        {"mask": datasets.Image(), "image": datasets.Image(), "text": datasets.Value("string")}
    )
    rows = {
        "mask": [make_noise(100 + i) for i in range(40)],
        "image": [None if i in (3, 8) else make_noise(i) for i in range(40)],
        "text": [f"c {i}" for i in range(40)],
    }
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "a.parquet")
    config, said = load_config({"name": "a", "data": {"path": str(tmp_path / "a.parquet")}}), []
    for place in ("1", "1"):
        parts = load_parts(config.data, 40, 0, said.append, kept=tmp_path / place / "images.db").parts
    assert said.count("2 rows of the dataset have no image") == 2
    assert "columns of images that are not used: mask" in said
    for images in parts.values():
        for record, pixels in zip(images.records, images.pixels()):
            assert (pixels == np.asarray(make_noise(int(record.caption[2:]))).transpose(2, 0, 1)).all()
    whole = datasets.Dataset.from_dict(rows, features=kinds)
    names = ("train", "validation", "test", "calibration")
    several = {name: whole.select(range(i, 40, 4)) for i, name in enumerate(names)}
    save_parquet(several, tmp_path / "several")
    config, said = load_config({"name": "a", "data": {"path": str(tmp_path / "several")}}), []
    load_parts(config.data, 40, 0, said.append, kept=tmp_path / "3" / "images.db")
    assert "columns of images that are not used: mask" in said
    write_tar(tmp_path / "cut.tar", splits["train"])
    content = (tmp_path / "cut.tar").read_bytes()
    for n in (30_000, 51_200, len(content) - 20_480):
        (tmp_path / "cut.tar").write_bytes(content[:n])
        with pytest.raises(MemControlError, match="cut.tar breaks off: it has no end of a tar"):
            load(tmp_path / "cut.tar", tmp_path / "2" / "images.db")


def test_init_writes_a_study_for_each_that_a_search_takes(splits, tmp_path):
    two = datasets.DatasetDict({"test": splits["test"], "train": concatenate(splits)})
    save_parquet(two, tmp_path / "set")
    done = run("init", tmp_path / "set", "--out", tmp_path / "a.yaml")
    assert done.returncode == 0, done.stderr
    assert 'split: "train"' in done.stderr and 'group: "patient_id"' in (tmp_path / "a.yaml").read_text()
    dry = run("search", tmp_path / "a.yaml", "--dry-run", "search.trials=0", "search.workers=1")
    assert dry.returncode == 0, dry.stderr


@pytest.mark.parametrize("missing", [0, 2, 25, 29])
@pytest.mark.parametrize("side_by_side", [True, False])
def test_samples_of_a_tar_may_differ_in_what_they_have(tmp_path, missing, side_by_side):
    members = [(f"a/{i:03}.png", encode_noise(i)) for i in range(40)]
    members += [(f"a/{i:03}.txt", f"caption {i}\n".encode()) for i in range(40) if i != missing]
    members += [("a/004.mask.png", encode_noise(99)), ("a/._005.txt", b"x"), ("a/lonely.txt", b"x")]
    write_members(tmp_path / "a.tar", sorted(members) if side_by_side else members)
    config, said = load_config({"name": "a", "data": {"path": str(tmp_path / "a.tar")}}), []
    split = load_parts(config.data, 40, 0, said.append, kept=tmp_path / "cache" / "images.db")
    found = {}
    for images in split.parts.values():
        for record, pixels in zip(images.records, images.pixels()):
            number = int(record.name.partition("-")[2][:3])
            assert (pixels == np.asarray(make_noise(number)).transpose(2, 0, 1)).all()
            found[number] = record.caption
    assert found == {i: "" if i == missing else f"caption {i}" for i in range(40)}
    assert "1 of 40 images have no caption" in said and "1 rows of the dataset have no image" in said
    assert "columns of images that are not used: mask.png" in said
    assert split.found["captions"] == f"column 'txt' of {tmp_path / 'a.tar'}"
    left_out = {"image without a caption": 1, "row of the dataset without an image": 1}
    assert split.found["left_out"] == left_out


def save_broken(folder, content, stored_as):
    """Two shards, of which the second has an image that is none in its row 7."""
    images = [
        {"bytes": content if i == 21 else encode_noise(i), "path": stored_as and f"{i}.png"}
        for i in range(40)
    ]
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    whole = datasets.Dataset.from_dict({"image": images, "text": list(map(str, range(40)))}, features=kinds)
    folder.mkdir(exist_ok=True)
    for shard, rows in enumerate((range(15), range(15, 40))):
        whole.select(rows).to_parquet(folder / f"train-{shard:05}-of-00002.parquet")


@pytest.mark.parametrize("content", [b"", b"no picture", encode_noise(0)[:900]], ids=["empty", "text", "cut"])
@pytest.mark.parametrize("kind", ["parquet", "parquet with names", "tar"])
def test_an_image_of_a_dataset_that_is_none_is_named_by_shard_and_row(tmp_path, kind, content):
    place, kept, shard = tmp_path / "set", tmp_path / "cache" / "images.db", "train-00001-of-00002.parquet"

    def save(content):
        if kind == "tar":
            place.mkdir(exist_ok=True)
            rows = [(f"{i:03}.png", content if i == 21 else encode_noise(i)) for i in range(40)]
            write_members(place / "train-0.tar", rows[:15])
            write_members(place / "train-1.tar", rows[15:])
        else:
            save_broken(place, content, "names" in kind)

    save(content)
    shard = "train-1.tar" if kind == "tar" else shard
    with pytest.raises(MemControlError, match=f"the image of {shard}, row 7 cannot be decoded") as caught:
        load(place, kept)
    assert "data.skip_unreadable=true" in str(caught.value) and "dataset-" not in str(caught.value)
    config, said = load_config({"name": "a", "data": {"path": str(place), "skip_unreadable": True}}), []
    split = load_parts(config.data, 40, 0, said.append, kept=kept)
    assert sum(map(len, split.parts.values())) == 39 and split.found["left_out"]["cannot be decoded"] == 1
    assert any(f"skipped: the image of {shard}, row 7 cannot" in line for line in said)
    save(encode_noise(21))  # mended
    assert sum(map(len, load(place, kept).values())) == 40


def test_rows_of_a_dataset_are_called_as_a_person_finds_them(tmp_path):
    members = [(f"{i:03}.png", encode_noise(i)) for i in range(40)]
    told = json.dumps({"file_name": "x.png", "captions": {"en": "a"}}).encode()
    write_members(tmp_path / "a.tar", [*members, ("007.json", told)])
    kept = tmp_path / "cache" / "images.db"
    with pytest.raises(MemControlError, match="a.tar, row 8 has captions by name in 'captions'"):
        load(tmp_path / "a.tar", kept, caption="captions")
    with pytest.raises(MemControlError, match="no column of .*a.tar, which have captions$"):
        load(tmp_path / "a.tar", kept, caption="label")
    write_members(tmp_path / "b.tar", [*members, ("007.json", b"{")])
    with pytest.raises(MemControlError, match="b.tar: 007.json cannot be read: "):
        load(tmp_path / "b.tar", kept)
    write_members(tmp_path / "c.tar", [*members, members[3]])
    with pytest.raises(MemControlError, match="c.tar holds '003.png' twice"):
        load(tmp_path / "c.tar", kept)
    write_members(tmp_path / "d.tar", [("1.npy", b"x")])
    with pytest.raises(MemControlError, match="d.tar', which has no images; its members are npy"):
        load(tmp_path / "d.tar", kept)


def test_what_was_unpacked_before_shards_were_recorded_is_read(splits, tmp_path):
    write_tar(tmp_path / "a.tar", concatenate(splits))
    kept = tmp_path / "cache" / "images.db"
    load(tmp_path / "a.tar", kept)
    (about,) = tmp_path.glob("cache/dataset-*/.unused.json")
    about.write_text('["2 rows of the dataset have no image"]')
    (about.parent / "0000008-0007.png").write_bytes(b"")
    with pytest.raises(MemControlError, match="the image of the dataset, row 8 cannot be decoded"):
        load(tmp_path / "a.tar", kept)
