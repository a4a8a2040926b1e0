"""What a search leaves in the study for dashboards: pictures before a trial ends, notes, plots; and what a
person wrote is kept."""

import contextlib
import itertools
import json
import sqlite3
import threading
from pathlib import Path

import numpy as np
import optuna
import pytest
import sqlalchemy.exc
import yaml
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta
from optuna_dashboard import get_note, save_note
from PIL import Image
from simulated import Simulated, search

from memcontrol.core.jobs import Done, TrialJob
from memcontrol.core.run_folder import RunFolder, StudyFolder, locate_study_folder
from memcontrol.core.space_yaml import load_space
from memcontrol.dashboard import notes
from memcontrol.dashboard.note_text import write_trial_note
from memcontrol.dashboard.notes import Publisher
from memcontrol.study import artifacts
from memcontrol.study import hypervolume as growth
from memcontrol.study.hypervolume import trace_hypervolume
from memcontrol.study.optuna_private import Notes
from memcontrol.study.pareto import hypervolume
from memcontrol.study.place import StudyPlace
from memcontrol.study.record import Record
from memcontrol.study.store import Study


class Drawing(Simulated):
    """Its trials leave pictures, as real ones do."""

    def ended(self, begun, end, job):
        event = super().ended(begun, end, job)
        if isinstance(job, TrialJob):
            for name in ("samples.png", "pairs.png"):
                Image.effect_noise((8, 8), hash(str(job.folder / name)) % 100).save(job.folder / name)
        return event


@pytest.fixture
def study_path(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "s",
                "data": "digits",
                "space": "digits",
                "rewards": {"confirm": 0},
                "search": {"trials": 5, "workers": 2},
            }
        )
    )
    return path


def read(store, artifact_id):
    with store.open_reader(artifact_id) as file:
        return file.read()


def shown(study):
    """(number, file names to bytes) of each trial, as optuna reads them."""
    store = FileSystemArtifactStore(study.folder / "artifacts")
    for trial in study.inner.get_trials():
        metas = get_all_artifact_meta(trial, storage=study.storage)
        yield trial.number, {meta.filename: read(store, meta.artifact_id) for meta in metas}


def test_every_finished_trial_has_the_pictures_of_its_run(study_path):
    study = search(study_path, Drawing(2))
    found = dict(shown(study))
    assert len(found) == 8
    for record in study.records():
        run = study.folder / record.choice.key
        assert found[record.number] == {
            name: (run / name).read_bytes() for name in ("samples.png", "pairs.png")
        }


def test_pictures_are_there_before_the_trial_is_told_and_a_repetition_adds_none(study_path, monkeypatch):
    seen = []
    real = optuna.storages._CachedStorage.set_trial_state_values

    def told(storage, trial_id, state, values=None):
        if state.is_finished():
            attributes = storage.get_trial(trial_id).system_attrs
            seen.append(
                sorted(
                    json.loads(value)["filename"]
                    for name, value in attributes.items()
                    if name.startswith("artifacts:")
                )
            )
        return real(storage, trial_id, state, values)

    monkeypatch.setattr(optuna.storages._CachedStorage, "set_trial_state_values", told)
    study = search(study_path, Drawing(1))
    assert seen == [["pairs.png", "samples.png"]] * 8
    record = study.records()[3]
    open_trial = study.begin([record.chosen], load_space("digits"))
    for _ in range(2):
        artifacts.attach_pictures(study.storage, study.ids[open_trial], RunFolder(record.run), study.folder)
    assert len(dict(shown(study))[open_trial]) == 2
    assert len(list((study.folder / "artifacts").iterdir())) == 16


def test_a_read_only_store_reads(tmp_path):
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "ab").write_bytes(b"x")
    store = artifacts.ReadOnlyStore(tmp_path)
    assert read(store, "ab") == b"x"
    for change in (lambda: store.write("cd", None), lambda: store.remove("ab")):
        with pytest.raises(PermissionError):
            change()
    assert [path.name for path in (tmp_path / "artifacts").iterdir()] == ["ab"]


def test_notes_tell_of_each_trial_and_of_the_study(study_path):
    study = search(study_path, Drawing(2))
    text = get_note(study.inner)
    assert "# s" in text and "**the pick**" in text and "8 complete" in text
    for record in study.records():
        attributes = study.storage.get_study_system_attrs(study.inner._study_id)
        note = attributes[f"dashboard:{study.ids[record.number]}:note_str:0"]
        assert all(group in note for group in record.choice.groups if group != "*")
        assert f"| {record.values['fid']:.2f} |" in note


def test_what_a_person_adds_to_a_note_is_kept(study_path):
    study = search(study_path, Drawing(2))
    save_note(study.inner, get_note(study.inner) + "\nI like trial 3.")
    study.close()
    again = search(study_path.with_name("s.yaml"), Drawing(2))
    assert get_note(again.inner).endswith("\nI like trial 3.")
    again.close()
    study_path.write_text(study_path.read_text().replace("trials: 5", "trials: 6"))
    longer = search(study_path, Drawing(2))
    assert get_note(longer.inner).endswith("\nI like trial 3.") and "9 complete" in get_note(longer.inner)


@pytest.mark.parametrize("kind", ["reason", "dropped"])
def test_a_note_names_no_place_of_the_machine(kind):
    """Spaces in the names of folders are no way out."""
    said = "/data/ward 3/images/a.png is broken; see /srv/my runs/s/1a/log.txt or /home/me/x.py: no"
    record = Record(3, "FAIL", (), folder=Path("/srv/my runs/s"), **{kind: said})
    note = write_trial_note(record, load_space("digits"), "/data/ward 3/images")
    assert "a.png is broken; see 1a/log.txt or x.py: no" in note
    assert not any(place in note for place in ("/data", "/srv", "my runs", "ward 3", "/home"))


def test_plots_hold_every_finished_trial_and_the_pick(study_path):
    study = search(study_path, Drawing(2))
    attributes = study.storage.get_study_system_attrs(study.inner._study_id)

    def plot(name):
        parts = {
            key: value for key, value in attributes.items() if key.startswith(f"dashboard:plot_data:{name}:")
        }
        return json.loads(
            "".join(parts[key] for key in sorted(parts, key=lambda key: int(key.rpartition(":")[2])))
        )

    markers = [trace for trace in plot("front")["data"] if trace["mode"] == "markers"]
    shown = {(x, y) for trace in markers if trace["name"] != "pick" for x, y in zip(trace["x"], trace["y"])}
    assert shown == {tuple(record.values.values()) for record in study.records()}
    assert [len(trace["x"]) for trace in markers if trace["name"] == "pick"] == [1]
    volumes = plot("hypervolume")["data"][-1]["y"]
    assert volumes[-1] == pytest.approx(
        hypervolume([record.losses for record in study.records()], study.attributes["reference"])
    )


def test_the_history_of_the_hypervolume_is_that_of_each_beginning(study_path, monkeypatch):
    study = search(study_path, Drawing(1))
    ordered, reference = (
        sorted(study.records(), key=lambda record: (record.ended, record.number)),
        study.attributes["reference"],
    )
    expected = [
        hypervolume([record.losses for record in ordered[: n + 1]], reference) for n in range(len(ordered))
    ]
    found = trace_hypervolume(study.records(), reference)
    assert list(found) == list(range(1, len(ordered) + 1)) and np.allclose(
        [volume.value for volume in found.values()], expected
    )
    monkeypatch.setattr(growth, "N_PLACES", 3)
    few = trace_hypervolume(study.records(), reference)
    assert len(few) == 3 and list(few)[-1] == len(ordered)
    assert all(few[n].value == found[n].value for n in few)


def hold_up(monkeypatch, n=1):
    """Has the thread's n-th write wait until it is let; what tells that it waits, and what lets it."""
    writing, let, real = threading.Event(), threading.Event(), Study.write_aside
    count = itertools.count(1)

    def write(study, inner, key, value):
        if next(count) == n:
            writing.set()
            assert let.wait(60)
        real(study, inner, key, value)

    monkeypatch.setattr(Study, "write_aside", write)
    return writing, let


def test_a_search_does_not_wait_for_notes_and_ends_with_all_of_them(study_path, monkeypatch):
    """Of which the first is being written until the search itself has ended."""
    writing, let = hold_up(monkeypatch)
    over = Publisher.over

    def ending(publisher):
        assert writing.wait(60) and not let.is_set()
        assert all(record.state == "COMPLETE" for record in publisher.study.records())
        let.set()
        over(publisher)

    monkeypatch.setattr(Publisher, "over", ending)
    study = search(study_path, Drawing(1))
    texts = Notes(study.inner).texts()
    assert texts.keys() == {None, *study.ids.values()}
    assert f"{len(study.records())} complete" in texts[None]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("notes")]


def test_notes_are_whole_after_an_interruption(study_path, monkeypatch):
    def interrupt(event):
        if isinstance(event, Done) and getattr(event.job, "number", None) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(study_path, Drawing(1), interrupt)
    with contextlib.closing(StudyPlace.load(study_path).open()) as study:
        ended = [record for record in study.records() if record.finished]
        texts = Notes(study.inner).texts()
        assert {study.ids[record.number] for record in ended} <= texts.keys() and "interrupted" in texts[None]


def test_a_search_that_breaks_off_leaves_nobody_writing(study_path, monkeypatch):
    writing, let = hold_up(monkeypatch, n=2)

    def fail(event):
        if isinstance(event, Done) and getattr(event.job, "number", None) == 5:
            assert writing.wait(60)
            threading.Timer(0.2, let.set).start()
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        search(study_path, Drawing(1), fail)
    assert let.is_set() and not [one for one in threading.enumerate() if one.name.startswith("notes")]


@pytest.mark.parametrize(
    "error", [sqlalchemy.exc.OperationalError("", {}, Exception("locked")), KeyError("?")]
)
def test_what_the_thread_could_not_write_is_written_later(study_path, monkeypatch, error):
    def write(*_):
        raise error

    monkeypatch.setattr(Study, "write_aside", write)
    study = search(study_path, Drawing(1))
    assert Notes(study.inner).texts().keys() == {None, *study.ids.values()}


def test_a_publisher_writes_nothing_twice(study_path, monkeypatch):
    study = search(study_path, Drawing(1))
    monkeypatch.setattr(
        notes,  # its name as a text would be that of the function `memcontrol.dashboard`
        "save_note",
        lambda *_: pytest.fail("a note that is there was written again"),
    )
    publisher = Publisher(load_space("digits"), StudyFolder(study.folder))
    publisher.opened(study)
    publisher.publish()
    with sqlite3.connect(locate_study_folder(study_path, "s") / "study.db") as database:
        before = database.execute("SELECT * FROM study_system_attributes").fetchall()
    monkeypatch.setattr(Study, "patiently", lambda self, call: pytest.fail("it wrote"))
    publisher.publish()
    with sqlite3.connect(locate_study_folder(study_path, "s") / "study.db") as database:
        assert database.execute("SELECT * FROM study_system_attributes").fetchall() == before
