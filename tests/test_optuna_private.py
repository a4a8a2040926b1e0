"""What study/optuna_private.py relies on, against the installed Optuna and optuna-dashboard: each promise is
held by what the libraries themselves write or read."""

import ast
import json
import os
from pathlib import Path

import optuna
import pytest
from optuna.artifacts import ArtifactMeta, FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial
from optuna_dashboard import get_note, save_note

import memcontrol
from memcontrol.study.optuna_private import (
    Notes,
    add_trial,
    close_storage,
    get_storage,
    get_study_id,
    get_trial_id,
    name_constraint,
    read_attributes,
    record_artifact,
    write_attribute,
)

LONG = "".join(
    f"line {i}\n" for i in range(900)
)  # of several pieces, of which the library's hold 2,045 signs


@pytest.fixture(params=["memory", "sqlite"])
def study(request, tmp_path):
    if request.param == "memory":
        yield optuna.create_study()
        return
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/study.db")
    yield optuna.create_study(storage=storage, study_name="s")
    close_storage(storage)


def list_open_files(path):
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return [link for link in links if link.is_symlink() and os.path.realpath(link) == str(path)]


def test_storage_and_ids_are_those_of_the_study(study):
    for _ in range(2):
        study.tell(study.ask(), 1.0)
    storage = get_storage(study)
    assert storage.get_study_name_from_id(get_study_id(study)) == study.study_name
    for trial in study.trials:
        assert storage.get_trial(get_trial_id(trial)) == trial


def test_attributes_are_the_system_attributes_of_the_study(study):
    write_attribute(study, "memcontrol:x", {"a": [1, 2.5]})
    assert read_attributes(study)["memcontrol:x"] == {"a": [1, 2.5]} and study.user_attrs == {}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="lists open files as Linux does")
@pytest.mark.parametrize("is_behind_a_cache", [False, True])
def test_closed_storage_holds_no_connection(tmp_path, is_behind_a_cache):
    path = (tmp_path / "study.db").resolve()
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    study = optuna.create_study(storage=storage)
    assert list_open_files(path)
    close_storage(get_storage(study) if is_behind_a_cache else storage)
    assert not list_open_files(path)


def test_added_trial_is_the_template_and_may_run(study):
    distributions = {"x": FloatDistribution(0, 1)}
    study.tell(study.ask(), 1.0)
    frozen = create_trial(
        state=TrialState.RUNNING,
        params={"x": 0.25},
        distributions=distributions,
        user_attrs={"anchor": "full"},
        system_attrs={"memcontrol:candidates": [{"a": 1}]},
    )
    trial_id = add_trial(study, frozen)
    assert get_storage(study).get_trial_number_from_id(trial_id) == 1
    trial = study.trials[1]
    assert get_trial_id(trial) == trial_id and trial.state == TrialState.RUNNING
    assert (trial.params, trial.distributions) == ({"x": 0.25}, distributions)
    assert trial.user_attrs == {"anchor": "full"} and trial.datetime_start == frozen.datetime_start
    assert trial.system_attrs == {"memcontrol:candidates": [{"a": 1}]}
    get_storage(study).set_trial_state_values(trial_id, TrialState.COMPLETE, [2.0])
    assert study.trials[1].value == 2.0


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_constraint_is_kept_as_optunas_own(study):
    theirs, ours = study.ask(), study.ask()
    theirs.set_constraint("copy_rate", -0.5)
    for excess in (0.25, -0.5):  # again, where a write was not acknowledged
        get_storage(study).set_trial_system_attr(ours._trial_id, name_constraint("copy_rate"), excess)
    for trial in (theirs, ours):
        study.tell(trial, 1.0)
    first, second = study.trials
    assert second.constraints == first.constraints == {"copy_rate": -0.5}
    assert second.system_attrs == first.system_attrs


def test_artifact_is_recorded_as_optunas_own(study, tmp_path):
    (tmp_path / "store").mkdir()
    picture = tmp_path / "samples.png"
    picture.write_bytes(b"x")
    theirs, ours = study.ask(), study.ask()
    store = FileSystemArtifactStore(tmp_path / "store")
    own_id = upload_artifact(artifact_store=store, file_path=str(picture), study_or_trial=theirs)
    meta = ArtifactMeta(own_id, "samples.png", "image/png", None)
    for _ in range(2):
        record_artifact(get_storage(study), ours._trial_id, meta)
    first, second = (study.trials[trial.number] for trial in (theirs, ours))
    assert get_all_artifact_meta(second, storage=get_storage(study)) == [meta]
    assert get_all_artifact_meta(first, storage=get_storage(study)) == [meta]
    (key,) = first.system_attrs.keys() & second.system_attrs.keys()
    assert json.loads(first.system_attrs[key]) == json.loads(second.system_attrs[key])


@pytest.mark.parametrize("texts", [["short"], [LONG], [LONG, "short"], ["short", LONG, ""]])
@pytest.mark.parametrize("is_the_studys", [True, False])
def test_note_is_written_as_the_dashboards_own(study, texts, is_the_studys):
    """Ours as the library reads it, and the attributes the same as those that it writes itself."""
    theirs, ours = optuna.create_study(), study
    trials = [each.ask() for each in (theirs, ours)]
    trial_id = None if is_the_studys else get_trial_id(ours.trials[0])
    for text in texts:
        save_note(theirs if is_the_studys else trials[0], text)
        Notes(ours).save(trial_id, text)
    assert get_note(ours if is_the_studys else trials[1]) == texts[-1] == Notes(ours).read(trial_id)
    attributes = {
        key.replace(f":{trials[1]._trial_id}:", f":{trials[0]._trial_id}:"): value
        for key, value in read_attributes(ours).items()
    }
    assert attributes == read_attributes(theirs)


def test_notes_of_the_dashboard_are_read_at_once(study):
    trials = [study.ask() for _ in range(12)]
    wanted = {None: LONG + "of the study"} | {
        trial._trial_id: f"{LONG if i % 2 else ''}of trial {i}" for i, trial in enumerate(trials)
    }
    save_note(study, wanted[None])
    for trial in trials:
        save_note(trial, LONG + LONG)  # of more pieces than what replaces it
        save_note(trial, wanted[trial._trial_id])
    assert Notes(study).texts() == wanted


def test_notes_saved_one_after_the_other_read_the_attributes_once(study, monkeypatch):
    trial = study.ask()
    notes = Notes(study)
    monkeypatch.setattr(type(get_storage(study)), "get_study_system_attrs", lambda *_: pytest.fail("again"))
    notes.save(None, LONG)
    notes.save(trial._trial_id, "of the trial")
    notes.save(None, "of the study")
    assert notes.texts() == {None: "of the study", trial._trial_id: "of the trial"}
    monkeypatch.undo()
    assert (get_note(study), get_note(trial)) == ("of the study", "of the trial")


HEAD = [
    path
    for name in ("study", "search", "view")
    for path in (Path(memcontrol.__file__).parent / name).glob("*.py")
]
KEYS = ("artifacts:", "constraints:", "dashboard:", "NSGAIISampler:")  # of their attributes


@pytest.mark.parametrize("path", HEAD, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_no_other_module_knows_private_names(path):
    if path.stem == "optuna_private":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            assert node.attr.startswith("__"), f"{path}, line {node.lineno}: {node.attr}"
        if isinstance(node, ast.ImportFrom):
            assert "._" not in (node.module or ""), f"{path}, line {node.lineno}: {node.module}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith(KEYS), f"{path}, line {node.lineno}: {node.value}"
