"""What one reading tells of each image, kept: nothing is read twice, whatever is killed; pages and large
images."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from memcontrol.config.load import load_config
from memcontrol.core import run_folder
from memcontrol.core.errors import MemControlError
from memcontrol.core.run_folder import StudyFolder
from memcontrol.data import index as index_module
from memcontrol.data.images import Images
from memcontrol.data.index import examine_files
from memcontrol.data.split import load_parts
from memcontrol.reading.decode import decode_image

N = 40


def make_noise(number, side=40):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "images"
    place.mkdir()
    for i in range(N):
        make_noise(i).save(place / f"{i:02}.png")
    return place


@pytest.fixture
def count_read(monkeypatch):
    """Counts the files that are opened."""
    opened, real = [], index_module.open_file

    def open_file(path):
        opened.append(path.name)
        return real(path)

    monkeypatch.setattr(index_module, "open_file", open_file)
    return opened


def list_names(folder):
    return sorted(path.name for path in folder.iterdir())


def load(folder, kept=None, **keys):
    config = load_config({"name": "a", "data": {"path": str(folder), **keys}})
    return load_parts(config.data, 32, 0, kept=kept)


def test_nothing_is_read_twice_and_the_rest_follows_from_what_was_kept(folder, tmp_path, count_read):
    kept, names = tmp_path / "cache" / "images.db", list_names(folder)
    first = load(folder, kept)
    assert sorted(count_read) == names
    assert load(folder, kept) == first == load(folder) and len(count_read) == 2 * N
    make_noise(99).save(folder / names[3])
    (folder / names[5]).unlink()
    count_read.clear()
    found = examine_files(folder, list_names(folder), kept).images
    assert count_read == [names[3]] and list(found) == list_names(folder)
    assert found == examine_files(folder, list_names(folder)).images
    with sqlite3.connect(kept) as rows:
        assert {file for (file,) in rows.execute("SELECT file FROM images")} == set(list_names(folder))
    rows.close()


def test_a_file_of_the_same_size_and_time_is_another_one(tmp_path):
    kept, path = tmp_path / "images.db", tmp_path / "x" / "a.ppm"
    path.parent.mkdir()
    seen = []
    for number in (1, 2):
        make_noise(number).save(path)
        os.utime(path, (0, 0))
        seen.append(examine_files(path.parent, [path.name], kept).images[path.name].digest)
    assert seen[0] != seen[1]


@pytest.mark.parametrize("content", [b"no database at all" * 99, b""])
def test_a_broken_index_is_begun_anew(folder, tmp_path, content):
    kept = tmp_path / "images.db"
    kept.write_bytes(content)
    assert examine_files(folder, list_names(folder), kept) == examine_files(folder, list_names(folder))
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE images (file, digest)")
    other.close()
    examine_files(folder, list_names(folder), tmp_path / "other.db")


_SLOW = """
import sys, time
from pathlib import Path
from memcontrol.data import index
real = index.open_file
def open_file(path):
    time.sleep(0.02)
    print(path.name, flush=True)
    return real(path)
index.open_file, index._SECONDS = open_file, 0.0
folder = Path(sys.argv[1])
index.examine_files(folder, sorted(path.name for path in folder.iterdir()), Path(sys.argv[2]))
"""


def test_killed_at_five_moments_it_goes_on_to_the_same_end(folder, tmp_path):
    kept = tmp_path / "images.db"
    n_read = 0
    for wanted in (1, 6, 12, 18, 24):
        process = subprocess.Popen(
            [sys.executable, "-c", _SLOW, folder, kept], stdout=subprocess.PIPE, text=True
        )
        while n_read < wanted or not kept.is_file():
            n_read += bool(process.stdout.readline())
        time.sleep(0.03)  # in the midst of whatever it does then
        process.send_signal(signal.SIGKILL)
        n_read += len(process.stdout.readlines())
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    done = subprocess.run([sys.executable, "-c", _SLOW, folder, kept], stdout=subprocess.PIPE, check=True)
    n_read += len(done.stdout.splitlines())
    assert n_read <= 2 * N  # each time what was under way is lost, and no more
    assert load(folder, kept) == load(folder)


def find_homes(split):
    """Of each image by its name, the part and the record."""
    return {record.name: (part, record) for part, images in split.parts.items() for record in images.records}


def save_pages(path, images, **how):
    images[0].save(path, save_all=True, append_images=images[1:], **how)


def test_pages_are_refused_taken_first_or_all(folder, tmp_path):
    pages = [make_noise(100 + i) for i in range(3)]
    save_pages(folder / "scan.tif", pages)
    (folder / "scan.txt").write_text("a scan")
    with pytest.raises(MemControlError, match=r"1 files have several pages.*scan\.tif with 3; set data\.p"):
        load(folder, tmp_path / "images.db")
    first = find_homes(load(folder, pages="first", train=20, holdout=10, test=11))
    assert len(first) == N + 1 and first["scan.tif"][1].caption == "a scan"
    homes = find_homes(load(folder, tmp_path / "images.db", pages="all"))
    names = [f"scan.tif#page={i}" for i in (1, 2, 3)]
    assert len(homes) == N + 3 and len({homes[name][0] for name in names}) == 1
    assert [homes[name][1].caption for name in names] == ["a scan"] * 3
    records = tuple(homes[name][1] for name in names)
    shown = Images(str(folder), 40, records).pixels()
    assert (shown == np.stack([np.asarray(page) for page in pages]).transpose(0, 3, 1, 2)).all()


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_animations_have_pages(tmp_path, name):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    save_pages(tmp_path / name, frames, lossless=True)
    found = examine_files(tmp_path, [name], pages="all").images
    assert list(found) == [f"{name}#page={i}" for i in (1, 2, 3)]
    for page, frame in zip(found, frames):
        assert (np.asarray(decode_image(tmp_path / page)) == np.asarray(frame)).all()


def test_a_phones_two_pictures_are_one(tmp_path):
    save_pages(tmp_path / "a.mpo", [make_noise(1), make_noise(2)])
    shutil.move(tmp_path / "a.mpo", tmp_path / "a.jpg")
    assert list(examine_files(tmp_path, ["a.jpg"]).images) == ["a.jpg"]


def test_a_large_image_is_said_to_be_so(folder, tmp_path):
    make_noise(7, side=64).save(folder / "large.png")
    kept = tmp_path / "images.db"
    assert "large.png" in examine_files(folder, list_names(folder), kept).images
    for place in (kept, None):  # known, or as yet unread
        failed = examine_files(folder, list_names(folder), place, most_pixels=4000).failures
        assert list(failed) == ["large.png"]
        assert "too large: 64 x 64 pixels, and 4,000 are allowed" in str(failed["large.png"])
    with pytest.raises(MemControlError, match="large.png is too large"):
        load(folder, max_pixels=4000)
    assert load(folder, max_pixels=4000, skip_unreadable=True).found["left_out"]["too large"] == 1


def test_more_than_pillows_own_limit_is_read_where_it_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    make_noise(1).save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png").size == (40, 40)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "a.png")


def test_many_images_are_a_table_by_columns(tmp_path, monkeypatch):
    rows = [{"name": f"{i}", "caption": f"c {i % 2}", "digest": f"{i:x}"} for i in range(7)]
    rows[3]["group"] = "Anna"
    rows[4]["further"] = ["more", "and more"]
    split = {"source": "x", "resolution": 8, "parts": {"train": rows[:4], "holdout": rows[4:]}}
    place = StudyFolder(tmp_path)
    for most in (7, 6):
        monkeypatch.setattr(run_folder, "_MOST_ROWS", most)
        place.write_split(split)
        assert place.read_split() == split
    stored = json.loads(place.split_file.read_text())
    assert stored["parts"]["train"]["group"] == ["", "", "", "Anna"] and place.summarize_data()["parts"]
