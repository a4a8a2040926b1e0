"""Experiment trackers, and trials as a table: what they are told of a search, and that they never harm it."""

import contextlib
import csv
import io
import json
import threading

import pytest
from commands import run
from PIL import Image
from simulated import Simulated
from test_orchestrate import study_in

import memcontrol
from memcontrol.config.differing import find_differing_keys
from memcontrol.config.load import load_config
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import write_json
from memcontrol.core.run_folder import RunFolder
from memcontrol.search import track
from memcontrol.search.observer import Observers
from memcontrol.search.orchestrator import search_study
from memcontrol.search.track import TrackedTrial, Tracker, Tracking, require_trackers
from memcontrol.study.place import StudyPlace


class Kept(Tracker):
    """Keeps what it is told."""

    told: list = []

    def write(self, trial):
        self.told.append((trial.record.number, trial.record.state, trial.rewards))


class Failing(Tracker):
    def write(self, trial):
        raise OSError("the server\nis gone")


class Hanging(Tracker):
    def write(self, trial):
        threading.Event().wait()


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    kinds = {"kept": Kept, "failing": Failing, "hanging": Hanging}
    monkeypatch.setattr(track, "TRACKERS", {**track.TRACKERS, **kinds})
    monkeypatch.setattr(track, "_LAST_SECONDS", 1.0)
    monkeypatch.setattr(Kept, "told", [])


def search(file, *names):
    """What was said."""
    said, place = [], StudyPlace.load(file)
    watcher = Tracking(names, place.space, place.folder, said.append)
    search_study(place, Simulated(), Observers(watcher)).close()
    return said


def test_a_tracker_is_told_of_each_trial_once_and_again_where_more_is_known(tmp_path):
    file = study_in(tmp_path)
    assert search(file, "kept") == []
    records = memcontrol.status(file)
    assert sorted(number for number, *_ in Kept.told) == [record.number for record in records]
    for number, _, rewards in Kept.told:
        assert rewards == {f"searched/{k}": v for k, v in records[number].searched.items()}
    Kept.told.clear()
    memcontrol.drop(file, 5, "no good")
    search(file, "kept")  # which samples another one
    assert [(number, state) for number, state, _ in Kept.told] == [(5, "DROPPED"), (12, "COMPLETE")]


def test_what_fails_or_hangs_harms_no_search(tmp_path):
    file = study_in(tmp_path)
    said = search(file, "failing", "hanging", "kept")
    assert said == [
        "failing could not be written (search.track); the search goes on: the server is gone",
        "hanging is not done; the next search writes to it what is missing",
    ]
    assert len(Kept.told) == len(memcontrol.status(file)) == 12
    Kept.told.clear()
    track.TRACKERS["failing"] = Kept  # it can be written again
    assert search(file, "failing") == [] and len(Kept.told) == 12


def test_what_is_not_installed_is_said_and_the_key_is_free(monkeypatch):
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MemControlError, match=r"search.track names wandb, .*install memcontrol\[wandb\]"):
        require_trackers(["wandb"])
    study = {"name": "a", "data": "digits"}
    plain, tracked = (load_config({**study, "search": {"track": kinds}}) for kinds in ([], ["mlflow"]))
    assert find_differing_keys(plain, tracked) == []
    with pytest.raises(MemControlError, match="search.track"):
        load_config({**study, "search": {"track": ["neptune"]}})


@pytest.fixture
def trial(tmp_path):
    """One with curves and pictures."""
    file = study_in(tmp_path)
    search(file)
    place = StudyPlace.load(file)
    record = memcontrol.status(file)[7]
    run = RunFolder(record.run)
    shards = [{"round": n, "shard": i, "loss": n + i} for n in (1, 2) for i in (0, 1)]
    write_json(run.training_file, {"shards": shards, "rounds": [{"round": 1, "divergence": 0.5}]})
    Image.new("RGB", (20, 10), "red").save(run.samples_picture)
    return TrackedTrial("s", "0123456789", record, place.space)


def test_a_trial_is_told_with_curves_and_pictures(trial):
    assert trial.curves == [(1, {"loss": 1.5, "divergence": 0.5}), (2, {"loss": 2.5})]
    assert list(trial.pictures) == ["samples"]
    assert trial.parameters["learning_rate"] == trial.record.choice.learning_rate


def test_tensorboard_reads_it(trial, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # written again, it is there once
        track.TensorBoard(tmp_path).write(trial)
    (place,) = tmp_path.glob("0007-*")
    found = EventAccumulator(str(place))
    found.Reload()
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == [(1, 1.5), (2, 2.5)]
    assert found.Scalars("searched/fid")[0].value == pytest.approx(trial.record.searched["fid"])
    picture = trial.pictures["samples"].read_bytes()
    assert [one.encoded_image_string for one in found.Images("samples")] == [picture]


@pytest.mark.filterwarnings("ignore")  # its own
def test_mlflow_reads_it(trial, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for _ in range(2):
        track.MLflow(tmp_path).write(trial)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("s").experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(one.step, one.value) for one in history] == [(1, 1.5), (2, 2.5)]
    assert found.data.metrics["searched/fid"] == trial.record.searched["fid"]
    assert [one.path for one in client.list_artifacts(found.info.run_id)] == ["samples.png"]


@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_it_without_a_network(trial, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    track.WandB(tmp_path).write(trial)
    (place,) = tmp_path.glob("wandb/offline-run-*")
    assert place.name.endswith(trial.identity) and list(place.glob("*.wandb"))


def test_trials_are_a_table_with_all_that_is_known(tmp_path):
    file = study_in(tmp_path)
    search(file)
    with contextlib.closing(StudyPlace.load(file).open()) as study:
        study.confirm(6, {"fid": 3.0, "fid_error": 0.5, "memorization": 0.1})
    memcontrol.drop(file, 5, "=cmd|no good")
    memcontrol.enqueue(file, groups=["mid_attention"], learning_rate=0.00123456789)
    rows = json.loads(run("trials", file, "--json", check=True).stdout)
    records = memcontrol.status(file)
    assert [row["trial"] for row in rows] == [record.number for record in records] == list(range(13))
    assert len({tuple(row) for row in rows}) == 1
    for row, record in zip(rows, records):
        assert (row["state"], row["dropped"]) == (record.state, record.dropped or None)
        assert row["searched.fid"] == record.searched.get("fid")
        on = {key.removeprefix("group.") for key, value in row.items() if key[:6] == "group." and value}
        whole = {key.removeprefix("group.") for key in row if key[:6] == "group."}
        assert on == (whole if record.anchor == "full" else set(record.choice.groups))
    assert (rows[6]["confirmed.fid"], rows[6]["confirmed.fid_error"]) == (3.0, 0.5)
    assert rows[12]["learning_rate"] == 0.00123456789 and rows[12]["state"] == "WAITING"
    text = run("trials", file, check=True).stdout
    cells = list(csv.DictReader(io.StringIO(text)))
    assert cells[5]["dropped"] == "'=cmd|no good" and float(cells[6]["confirmed.fid"]) == 3.0
    refused = run("trials", file, "--parquet")
    assert refused.returncode == 1 and "name its file with --out" in refused.stderr
    frame = memcontrol.trials(file)
    pandas = pytest.importorskip("pandas")
    run("trials", file, "--parquet", "--out", tmp_path / "t.parquet", check=True)
    assert list(pandas.read_parquet(tmp_path / "t.parquet")["trial"]) == list(frame["trial"])
