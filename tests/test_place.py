"""A study's place: its file is read once by each command, and what was searched counts, not what the file
says now."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
import yaml
from simulated import Simulated, search

import memcontrol
from memcontrol.cli import main
from memcontrol.config import load
from memcontrol.core.errors import MemControlError
from memcontrol.core.yaml_reader import read_yaml
from memcontrol.study.place import StudyPlace

VALUES = {
    "name": "s",
    "data": "digits",
    "space": "digits",
    "rewards": {"confirm": 0},
    "search": {"trials": 20, "workers": 1, "sampler": "random"},
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A study over simulated trials, ended; its file."""
    path = tmp_path_factory.mktemp("place") / "s.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    study = search(path, Simulated())
    rows = [{"name": str(i), "caption": "a digit", "digest": str(i)} for i in range(100)]
    split = {"source": "digits", "resolution": 32, "parts": {"train": rows}}
    (study.folder / "split.json").write_text(json.dumps(split))
    study.close()
    return path


@pytest.fixture
def reads(monkeypatch):
    """The files that were read as YAML."""
    paths = []

    def read(path, keys):
        paths.append(Path(path))
        return read_yaml(path, keys)

    monkeypatch.setattr(load, "read_yaml", read)
    return paths


@contextlib.contextmanager
def open_simulated(config, folder, command="search"):
    yield Simulated()


@pytest.mark.parametrize(
    "words",
    [
        ("status",),
        ("status", "--json"),
        ("front",),
        ("front", "--json"),
        ("pick",),
        ("pick", "--json"),
        ("importance", "--json"),
        ("report", "--json"),
        ("report", "--csv"),
    ],
    ids=" ".join,
)
def test_command_reads_the_study_file_once(words, searched, reads, monkeypatch, capsys):
    command, *options = words
    monkeypatch.setattr(sys, "argv", ["memcontrol", command, str(searched), *options])
    assert main() == 0 and capsys.readouterr().out
    assert reads == [searched]


def test_retrain_command_reads_the_study_file_once(searched, reads, monkeypatch):
    from memcontrol.cli import retrain as command
    from memcontrol.execution import make

    plans = []
    monkeypatch.setattr(make, "open_executor", open_simulated)
    monkeypatch.setattr(command, "show_retraining", lambda plan, executor: plans.append(plan))
    monkeypatch.setattr(sys, "argv", ["memcontrol", "retrain", str(searched)])
    assert main() == 0 and len(plans) == 1
    assert reads == [searched]


@pytest.mark.parametrize("name", ["status", "front", "pick", "importance", "report"])
def test_function_reads_the_study_file_once(name, searched, reads):
    assert getattr(memcontrol, name)(searched)
    assert reads == [searched]


def test_retrain_and_search_read_the_study_file_once(tmp_path, searched, reads, monkeypatch):
    from memcontrol.commands import retrain as retraining
    from memcontrol.commands import search as searching

    for module in (retraining, searching):
        monkeypatch.setattr(module, "open_executor", open_simulated)
    assert memcontrol.retrain(searched, out=tmp_path / "out")["pick"]["state"] == "COMPLETE"
    assert reads == [searched]
    again = tmp_path / "s.yaml"
    again.write_text(searched.read_text())
    assert memcontrol.search(again, trials=1, quiet=True)
    assert reads == [searched, again]


def test_place_is_made_of_the_file_and_overrides(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    place = StudyPlace.load(path, ["search.trials=7", "storage=sqlite:///other.db"])
    assert (place.config.search.trials, place.space.name) == (7, "digits")
    assert place.folder.path == tmp_path / "runs" / "s"
    assert place.url == f"sqlite:///{tmp_path}/other.db"
    assert StudyPlace.load(path).url == f"sqlite:///{tmp_path}/runs/s/study.db"


def test_place_opens_the_study_as_it_was_searched(searched):
    place = StudyPlace.load(searched, ["inner.batch_size=8"])
    assert place.is_searched()
    with contextlib.closing(place.open()) as study:
        assert (place.config.inner.batch_size, study.config.inner.batch_size) == (8, 16)
        assert len(study.records()) == 23


def test_place_that_was_never_searched_is_named(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    place = StudyPlace.load(path)
    assert not place.is_searched()
    with pytest.raises(MemControlError, match="has not been searched yet"):
        place.open()
    assert list(tmp_path.iterdir()) == [path]  # looking makes nothing
