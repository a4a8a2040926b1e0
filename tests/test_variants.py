"""Trials that need no training: a fine-tuning measured at other strengths, checkpoints and settings of
sampling."""

import contextlib
import json

import pytest
import torch
import yaml
from commands import run
from conftest import SMALL
from safetensors.torch import load_file

from memcontrol.config.spec import read_spec
from memcontrol.core.run_folder import RunFolder
from memcontrol.study.place import StudyPlace
from memcontrol.trial.loaded import LoadedModels, tell_nobody
from memcontrol.trial.run import run_trial

SEARCH = {**SMALL["search"], "anchors": ["full"], "strengths": [0.5], "checkpoints": [0.5]}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A study file, searched, and its records."""
    path = tmp_path_factory.mktemp("variants") / "v.yaml"
    over = {"inner.budget_images": [64, 96], "rewards.guidance": [2.0]}
    path.write_text(yaml.safe_dump({**SMALL, "name": "v", "search": {**SEARCH, "over": over}}))
    run("search", path, check=True)
    return path, read_records(path)


def read_records(path):
    with contextlib.closing(StudyPlace.load(path).open()) as study:
        return study.records()


def test_each_fine_tuning_has_a_trial_for_each_of_its_measurements(searched):
    _, records = searched
    assert [record.state for record in records] == ["COMPLETE"] * 2 * 8
    trained = [record for record in records if not record.is_variant]
    assert [record.anchor for record in trained] == ["full", None]
    for record in trained:
        own = [other for other in records if other.is_variant and other.chosen.trained == record.chosen]
        settings = [
            (one.chosen.strength, one.chosen.checkpoint, dict(one.chosen.settings).get("rewards.guidance"))
            for one in own
        ]
        every = [(s, c, g) for s in (1, 0.5) for c in (1, 0.5) for g in (None, 2.0)]
        assert sorted(settings, key=str) == sorted(set(every) - {(1, 1, None)}, key=str)


def test_what_is_measured_is_the_fine_tuning_at_the_settings(searched):
    _, records = searched
    for record in records:
        result = RunFolder(record.run).read_result()
        training = json.loads(RunFolder(record.run).training_file.read_text())
        assert result["measured_with"]["sampling"]["guidance"] == dict(record.chosen.settings).get(
            "rewards.guidance", 1.0
        )
        budget = dict(record.chosen.settings).get("inner.budget_images", 32)
        assert result["images_seen"] == budget * record.chosen.checkpoint
        assert bool(training.get("shards")) == (not record.is_variant)  # nothing is trained twice
        assert not RunFolder(record.run).list_checkpoints()  # each variant has what it was measured on


def test_half_the_strength_is_half_of_what_was_learned(searched):
    _, records = searched
    by_choice = {record.chosen: record for record in records}
    sampled = next(record for record in records if record.is_sampled)
    half = by_choice[sampled.chosen.with_settings({"strength": 0.5})]
    whole, weak = (load_file(RunFolder(record.run).adapter_file) for record in (sampled, half))
    assert sampled.chosen.methods == ("lora",)
    for name, tensor in whole.items():
        factor = 0.5 if name.endswith("lora_B.weight") else 1.0
        assert torch.equal(weak[name], factor * tensor), name


def test_a_checkpoint_is_the_fine_tuning_that_was_ended_there(searched, tmp_path):
    """By a run of its own, which has nothing to take it from."""
    _, records = searched
    record = next(
        record
        for record in records
        if record.chosen.checkpoint == 0.5
        and record.chosen.groups != ("*",)
        and len(record.chosen.settings) == 2
    )
    read_spec(record.run).write(tmp_path / "alone")
    run_trial(tmp_path / "alone", LoadedModels(), tell_nobody)
    alone, own = (load_file(RunFolder(path).adapter_file) for path in (tmp_path / "alone", record.run))
    assert all(torch.equal(alone[name], own[name]) for name in own)
    results = [RunFolder(path).read_result() for path in (tmp_path / "alone", record.run)]
    assert results[0]["rewards"] == results[1]["rewards"] and results[0]["n_steps"] == results[1]["n_steps"]


def test_a_strength_that_is_added_is_measured_and_nothing_is_trained(searched):
    path, before = searched
    trained = [record for record in before if not record.is_variant]
    written = [RunFolder(record.run).adapter_file.stat().st_mtime_ns for record in trained]
    run("search", path, "search.strengths=[0.5, 0.25]", check=True)
    after = read_records(path)
    assert [record.as_dict() for record in after[: len(before)]] == [record.as_dict() for record in before]
    assert [record.chosen.strength for record in after[len(before) :]] == [0.25] * 2 * 4
    with contextlib.closing(StudyPlace.load(path).open()) as study:
        shown = [trial.params.get("strength", 1.0) for trial in study.inner.get_trials(deepcopy=False)]
    assert sorted(shown) == sorted(record.chosen.strength for record in after)
    for record in after[len(before) :]:
        assert not json.loads(RunFolder(record.run).training_file.read_text()).get("shards")
    assert written == [RunFolder(record.run).adapter_file.stat().st_mtime_ns for record in trained]
