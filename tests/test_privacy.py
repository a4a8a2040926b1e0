"""Whose a study's files are, what lies in its folder, and that it can be removed."""

import base64
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import uuid
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import run
from conftest import SMALL
from filelock import FileLock
from PIL import Image

from memcontrol.core.files import PACKAGE, make_private_folder, open_private, replace_file, write_text
from memcontrol.core.published import hide_paths, publish_name
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.study.artifacts import name_artifact
from memcontrol.study.contents import list_others, write_readme
from memcontrol.study.optuna_private import Notes
from memcontrol.study.pick import select_front
from memcontrol.study.place import StudyPlace

FOR_ALL = stat.S_IRWXG | stat.S_IRWXO
NOBODY = 65534  # a user with no rights, of every Linux


CLINIC, PATIENT = "clinic-of-dr-grimm", "Iphigenia"  # in all paths of the study, and in every caption


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A study of images with captions that was searched by worker processes, and retrained, under a umask
    that keeps nothing from anyone."""
    folder = tmp_path_factory.mktemp("searched") / CLINIC
    images = folder / "images"
    images.mkdir(parents=True)
    folder.chmod(0o755)
    with open(images / "metadata.jsonl", "w") as table:
        for i in range(72):
            cells = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(cells).resize((32, 32), Image.Resampling.BICUBIC).save(images / f"{i}.png")
            table.write(json.dumps({"file_name": f"{i}.png", "text": f"{PATIENT} {i} has a cold"}) + "\n")
    path = folder / "open.yaml"
    data = {"path": str(images), "train": 16, "holdout": 24, "test": 32}
    search = {"trials": 2, "workers": 1, "executor": "local"}
    path.write_text(yaml.safe_dump({**SMALL, "name": "open", "data": data, "search": search}))
    for words in (("search", path), ("retrain", path), ("status", path)):
        run(*words, check=True, before=open_everything)
    return path


def open_everything():
    os.umask(0)


@pytest.fixture
def copied(searched, tmp_path):
    shutil.copytree(searched.parent, tmp_path / CLINIC, symlinks=True)
    return tmp_path / CLINIC / searched.name


def list_rights(folder):
    return {path: stat.S_IMODE(path.lstat().st_mode) for path in (folder, *folder.rglob("*"))}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_a_file_is_its_owners_whatever_the_umask_and_what_is_published_is_as_it_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a" / "b" / "mine", "x")
        with open_private(tmp_path / "log", "a") as file:
            file.write("x")
        if umask != 0o777:  # which lets nobody write
            write_text(tmp_path / "c" / "given", "x", published=True)
    finally:
        os.umask(before)
    rights = {path.name: mode for path, mode in list_rights(tmp_path).items() if path != tmp_path}
    given = {} if umask == 0o777 else {"c": 0o777 & ~umask, "given": 0o666 & ~umask}
    assert rights == {"a": 0o700, "b": 0o700, "mine": 0o600, "log": 0o600} | given


def test_a_folder_that_is_there_keeps_its_rights(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o755)
    make_private_folder(tmp_path / "shared")
    with replace_file(tmp_path / "shared" / "x") as part:
        assert stat.S_IMODE(part.stat().st_mode) == 0o600  # while it is written, too
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o755
    with pytest.raises(FileExistsError):
        make_private_folder(tmp_path / "shared" / "x")


def test_a_search_leaves_nothing_that_another_may_read_but_weights(searched):
    rights = list_rights(searched.parent / "runs")
    assert {path.name for path, mode in rights.items() if mode & FOR_ALL} == {"adapter.safetensors"}
    names = {path.name for path in rights}
    assert {
        "study.db",
        "images.db",
        "log.txt",
        "attempts.jsonl",
        "pairs.png",
        "search.log",
        "retrain",
    } <= names


def test_another_user_reads_no_file_and_lists_no_folder(searched):
    if os.geteuid():
        pytest.skip("only root can become another user")
    for path in (searched.parent, *searched.parent.parents):
        if not path.stat().st_mode & stat.S_IXOTH:
            path.chmod(path.stat().st_mode | stat.S_IXOTH)  # the folders of tests themselves
    places = [str(path) for path in (searched.parent / "runs").rglob("*")]
    code = (
        f"import json, os, sys\nplaces = json.load(sys.stdin)\nos.setgroups([]); os.setgid({NOBODY}); "
        f"os.setuid({NOBODY})\nassert open({str(searched)!r}).read()\nread = []\nfor place in places:\n"
        " for look in (lambda: open(place, 'rb').read(1), lambda: os.listdir(place)):\n"
        "  try:\n   look(); read.append(place)\n  except OSError: pass\n"
        "print(json.dumps(read))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(places), capture_output=True, text=True, check=True
    )
    assert len(places) > 50 and json.loads(done.stdout) == []


def test_what_an_older_version_made_becomes_its_owners_once(copied):
    folder = copied.parent / "runs" / "open"
    (folder / "README.txt").unlink()
    (folder / "others.json").unlink()
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    run("search", copied, check=True)
    assert not any(mode & FOR_ALL for mode in list_rights(folder).values())
    folder.chmod(0o750)  # the owner's own will
    run("search", copied, check=True)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_the_readme_lists_all_that_lies_in_the_folder(searched):
    place = StudyPlace.load(searched)
    said = (place.folder.path / "README.txt").read_text()
    assert said == write_readme("open") and list_others(place.folder) == []
    assert "32 x 32 pixels of every image" in " ".join(said.split())
    for path in place.folder.path.iterdir():
        name = "eight digits and letters" if re.fullmatch("[0-9a-f]{8}", path.name) else path.name
        assert name in said, path


def test_names_of_pictures_cannot_be_guessed_and_stay(searched, tmp_path):
    place = StudyPlace.load(searched)
    names = {path.name for path in place.folder.artifacts.iterdir()}
    study = place.open()
    runs = [RunFolder(record.run) for record in study.records()]
    study.close()
    pictures = [(one, file) for one in runs for file in (one.samples_picture, one.pairs_picture)]
    assert names == {name_artifact(place.folder.path, *picture) for picture in pictures}
    guessed = {str(uuid.uuid5(uuid.NAMESPACE_URL, f"{one.path.name}/{file.name}")) for one, file in pictures}
    assert not names & guessed and all(uuid.UUID(name).version == 4 for name in names)
    elsewhere = {name_artifact(tmp_path, *picture) for picture in pictures}
    assert len(elsewhere) == len(names) and not names & elsewhere
    assert elsewhere == {name_artifact(tmp_path, *picture) for picture in pictures}


def count_bytes(*paths):
    """As `find` counts them."""
    words = ["find", *map(str, paths), "-type", "f", "-printf", "%s\n"]
    return sum(map(int, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()))


def test_clean_asks_says_and_removes(copied):
    folder = copied.parent / "runs" / "open"
    n_bytes = count_bytes(folder)
    asked = run("clean", copied)
    assert asked.returncode == 1 and folder.is_dir()
    assert asked.stderr == "memcontrol: nothing was removed; give --yes to remove it\n"
    assert f"{n_bytes:,} bytes" in asked.stdout
    done = run("clean", copied, "--yes", check=True)
    assert f"removed {n_bytes:,} bytes" in done.stdout and not folder.exists() and copied.is_file()
    again = run("clean", copied, "--yes")
    assert again.returncode == 1 and again.stderr.count("\n") == 1 and "holds nothing of" in again.stderr


def test_clean_leaves_what_no_search_made_and_a_running_one(copied):
    folder = copied.parent / "runs" / "open"
    (folder / "thesis.txt").write_text("mine")
    with FileLock(folder / "search.lock"):
        refused = run("clean", copied, "--yes")
    assert refused.returncode == 1 and "a search is running" in refused.stderr
    assert (folder / "study.db").is_file()
    assert "holds 1 more" in run("clean", copied, "--yes", check=True).stdout
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_clean_beside_a_study_file_leaves_it_and_its_images(copied):
    file = copied.parent / "runs" / "open" / "open.yaml"
    copied.rename(file)
    images = file.parent / "images"
    images.mkdir()
    run("clean", file, "--yes", check=True)
    assert sorted(path.name for path in file.parent.iterdir()) == ["images", "open.yaml"]


def test_clean_keeps_the_front(copied):
    place = StudyPlace.load(copied)
    with_study = place.open()
    records = with_study.records()
    with_study.close()
    front = {record.choice.key for record in select_front([one for one in records if one.finished])}
    before = run("front", copied, "--json", check=True).stdout
    run("clean", copied, "--keep", "front", "--yes", check=True)
    folder = StudyFolder(place.folder.path)
    assert run("front", copied, "--json", check=True).stdout == before
    assert not folder.cache.exists() and not folder.log_file.exists()
    keys = {path.name for path in folder.path.iterdir() if re.fullmatch("[0-9a-f]{8}", path.name)}
    weights = {path.parent.name for path in folder.path.glob("*/adapter.safetensors")}
    pictures = {path.parent.name for path in folder.path.glob("*/pairs.png")}
    assert front <= weights < keys and front <= pictures < keys
    assert all((folder.path / key / "result.json").is_file() for key in keys)
    assert 2 * len(pictures) == len(list(folder.artifacts.iterdir()))
    run("report", copied, copied.parent / "report.html", check=True)
    lost = next(record for record in records if record.finished and record.choice.key not in weights)
    said = run("export", lost.run, copied.parent / "out").stderr
    assert f"--trial {lost.number}" in said and "was dropped" in said


def read_all_bytes(path):
    """Of a file, and of what is packed in it: text chunks of pictures, members of archives and of arrays, and
    pictures in pages."""
    content = path.read_bytes()
    yield content
    for encoded in re.findall(rb"data:image/[a-z]+;base64,([A-Za-z0-9+/=]+)", content):
        yield from read_picture(base64.b64decode(encoded))
    if path.suffix == ".png":
        yield from read_picture(content)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())


def read_picture(content):
    with Image.open(io.BytesIO(content)) as image:
        yield repr(image.info).encode()


@pytest.fixture(scope="module")
def published(searched):
    """Everything that commands make of the study to be given away."""
    out = searched.parent.parent / "published"
    out.mkdir()
    runs = {}
    for path in (searched.parent / "runs" / "open").glob("*/result.json"):
        runs.setdefault(json.loads(path.read_text())["choice"]["method"], path.parent)
    runs["retrained"] = next((searched.parent / "runs" / "open" / "retrain").iterdir())
    for name, place in runs.items():
        shutil.copyfile(place / "adapter.safetensors", out / f"{name}.safetensors")
        for format in ("adapter", "pipeline", "denoiser"):
            run("export", place, out / f"{name}-{format}", "--format", format, check=True)
    run("report", searched, out / "report.html", check=True)
    run("report", searched, out / "bare.html", "--without-images", check=True)
    for kind in ("csv", "json"):
        (out / f"report.{kind}").write_text(run("report", searched, f"--{kind}", check=True).stdout)
    study = StudyPlace.load(searched).open()
    (out / "notes").write_text(repr(Notes(study.inner).texts()))
    study.close()
    return out


def test_nothing_that_is_published_holds_a_path_or_a_caption(searched, published):
    telling = [CLINIC, PATIENT, str(searched.parent.parent), os.path.expanduser("~") + "/", str(PACKAGE)]
    files = [path for path in published.rglob("*") if path.is_file()]
    found = [
        (str(path.relative_to(published)), word)
        for path in files
        for content in read_all_bytes(path)
        for word in telling
        if word.encode() in content
    ]
    assert len(files) > 40 and found == []
    kept = (searched.parent / "runs" / "open" / "split.json").read_bytes()
    assert PATIENT.encode() in kept  # so that the words are those to look for


def test_what_is_published_is_for_everyone_but_a_page_with_training_images(published):
    before = os.umask(0)
    os.umask(before)
    rights = {path.name: mode for path, mode in list_rights(published).items() if path.is_file()}
    assert rights.pop("report.html") == 0o600
    assert {mode & FOR_ALL for mode in rights.values()} == {0o666 & ~before & FOR_ALL}


def test_paths_are_told_to_who_asks(searched):
    said = json.loads(run("report", searched, "--json", "--with-paths", check=True).stdout)
    assert said["data"]["source"] == str(searched.parent / "images")
    bare = json.loads(run("report", searched, "--json", check=True).stdout)
    assert bare["data"]["source"] == "images" and bare["retrained"][0]["run"].startswith("retrain/")
    for told, hidden in zip(said["trials"], bare["trials"], strict=True):
        assert told["run"] == str(searched.parent / "runs" / "open" / hidden["run"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("/a b/c/x.pt", "x.pt"),
        ("../a/b/", "b"),
        ("torchscript:/a/b.pt,side=288", "torchscript:b.pt,side=288"),
        ("transformers:google/vit", "transformers:google/vit"),
        ("/a/mine.py:auc", "mine.py:auc"),
        ("hf://owner/name", "hf://owner/name"),
        ("owner/name", "owner/name"),
        ("tiny", "tiny"),
    ],
)
def test_a_published_name_is_no_path(given, said):
    assert publish_name(given, may_be_hub=True) == said


def test_a_reason_keeps_its_words_and_loses_its_paths():
    text = "OSError: /home/me and you/data/x.png is cut (see /home/me and you/runs/s/ab/log.txt); a/b and 3/4"
    said = "OSError: data/x.png is cut (see ab/log.txt); a/b and 3/4"
    assert hide_paths(text, Path("/home/me and you"), Path("/home/me and you/runs/s")) == said
    assert hide_paths("in '/a/b/c.py': no") == "in 'c.py': no"


def test_what_a_person_had_in_the_folder_stays(tmp_path):
    """A study file in a folder of the study's name, beside files that bear names as the search's own do."""
    folder = tmp_path / "mine"
    for name in ("cache", "retrain"):
        (folder / name).mkdir(parents=True)
        (folder / name / "mine.txt").write_text("mine")
    for name in ("README.txt", "log.txt"):
        (folder / name).write_text("mine")
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "name": "mine", "search": {**SMALL["search"], "trials": 0}}))
    run("search", file, check=True)
    run("clean", file, "--yes", check=True)
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"cache/mine.txt", "retrain/mine.txt", "README.txt", "log.txt", "mine.yaml"} <= left
    assert not list(folder.glob("study.db*")) and (folder / "log.txt").read_text() == "mine"
