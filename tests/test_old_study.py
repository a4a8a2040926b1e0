"""A study that was searched when all modules lay in one folder (version 0.1.0) stays readable: its
database, run folders and exported files; and its search goes on. tests/old_study holds it, less what is
large."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors.torch import load_file

from memcontrol.config.spec import read_spec
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.study.pick import choose_trial, select_front
from memcontrol.study.place import StudyPlace

OLD = Path(__file__).parent / "old_study"
EXPECTED = json.loads((OLD / "expected.json").read_text())  # what the commands of that version printed
LORA = "c2ff621f"


@pytest.fixture
def place(tmp_path):
    shutil.copytree(OLD, tmp_path / "digits", ignore=shutil.ignore_patterns("exported", "expected.json"))
    return StudyPlace.load(tmp_path / "digits" / "old.yaml")


def read_records(place):
    study = place.open()
    study.close()
    return study.records()


def test_its_records_say_what_they_said(place):
    records = read_records(place)
    found = [record.as_dict() for record in records]
    assert [{key: trial[key] for key in EXPECTED["trials"][0]} for trial in found] == EXPECTED["trials"]
    complete = [record for record in records if record.finished]
    assert [record.number for record in select_front(complete)] == EXPECTED["front"]
    assert choose_trial(records).number == EXPECTED["pick"]


def test_status_prints_what_it_printed(place):
    found = json.loads(run("status", place.file, "--json", check=True).stdout)
    assert found["hypervolume"] == EXPECTED["hypervolume"]
    assert {run["finished"] for trial in found["trials"] for run in trial["runs"]} == {True}


def test_its_run_folders_are_read(place):
    folder = StudyFolder(place.folder.path)
    for found in (*folder.list_runs(), *folder.list_retrained()):
        spec = read_spec(found.path)
        assert spec.choice.key == found.path.name
    lora = RunFolder(folder.path / LORA)
    config = read_spec(lora.path).config
    assert (
        lora.is_complete
        and lora.read_rungs(config.search.rungs, config.rewards.names)[0]["rung"] == 0.5
        and lora.read_judgements()[0]["goes_on"]
    )


def test_its_search_goes_on(place):
    before = read_records(place)
    run("search", place.file, "--trials", 4, check=True)
    after = read_records(place)
    assert after[: len(before)] == before and len(after) == len(before) + 1
    assert after[-1].state in ("COMPLETE", "PRUNED") and after[-1].rungs


def test_its_exported_lora_is_the_runs_own(base, place):
    """In plain diffusers, and by memcontrol.load_adapter: every weight changes by what the run's adapter
    says."""
    from diffusers import DiffusionPipeline

    import memcontrol
    from memcontrol.models import TINY

    card = (OLD / "exported" / "README.md").read_text()
    assert (
        "from memcontrol.models import TINY" in card
    )  # the name that cards of that version tell people to use
    plain, ours = (DiffusionPipeline.from_pretrained(TINY) for _ in range(2))
    plain.load_lora_weights(str(OLD / "exported"))
    plain.fuse_lora()
    adapter = memcontrol.load_adapter(ours, place.folder.path / LORA)
    learned = load_file(RunFolder(place.folder.path / LORA).adapter_file)
    assert {name: tensor.shape for name, tensor in adapter.state().items()} == {
        name: tensor.shape for name, tensor in learned.items()
    }
    adapter.fuse()
    known, changed = dict(plain.unet.named_parameters()), 0
    for name, weight in ours.unet.named_parameters():
        under_peft = name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        assert torch.allclose(weight, known.get(name, known.get(under_peft)), atol=1e-6), name
        changed += not torch.equal(weight, base.denoiser.get_parameter(name))
    assert changed
