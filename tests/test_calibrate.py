"""The calibration: what each part of a short trial took, told by a clock and files that are known."""

import pytest
import torch

from memcontrol.config.load import load_config
from memcontrol.core.choice import ANCHORS
from memcontrol.core.errors import MemControlError
from memcontrol.core.space_yaml import load_space
from memcontrol.trial import calibrate
from memcontrol.trial.calibrate import (
    measure_parts,
    measure_shared_bytes,
    pick_calibration_choices,
    shorten_config,
)


class Clock:
    """Stands where the module has `time`."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


def write(path, n_bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(n_bytes))


def leave_files(folder):
    for name, n_bytes in {
        "samples.safetensors": 1000,
        "samples.png": 30,
        "pairs.png": 20,
        "adapter.safetensors": 150,
        "spec.json": 50,
        "rounds/0/state.safetensors": 400,
        "rounds/1/state.safetensors": 300,
    }.items():
        write(folder / name, n_bytes)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Measures a trial that is a list of (stage, seconds), each told at its end."""

    def measure(*stages):
        clock = Clock()

        def run_trial(folder, loaded, progress):
            for stage, seconds in stages:
                clock.now += seconds
                progress(stage, 1, 1, loss=0.5)
            leave_files(folder)

        monkeypatch.setattr(calibrate, "time", clock)
        monkeypatch.setattr(calibrate, "run_trial", run_trial)
        return measure_parts(tmp_path / "run", spec=None, loaded=None)

    return measure


def test_parts_of_a_trial_are_set_up_steps_and_what_comes_after(measured):
    # 5 s before the first of five steps of 2 s; the third ends a round, which takes 4 s more
    cost = measured(
        ("train", 7), ("train", 2), ("train", 6), ("train", 2), ("train", 2), ("sample", 8), ("score", 3)
    )
    assert (cost.setup_seconds, cost.step_seconds, cost.after_seconds) == (5 + 4, 2, 8 + 3)


def test_parts_of_a_trial_that_trains_nothing_are_all_after(measured):
    cost = measured(("sample", 8), ("score", 3))
    assert (cost.setup_seconds, cost.step_seconds, cost.after_seconds) == (0, 0, 11)


def test_bytes_of_a_trial_are_samples_checkpoints_and_the_rest_with_pictures_twice(measured):
    cost = measured(("train", 1), ("train", 1), ("sample", 1))
    assert (cost.samples_bytes, cost.rounds_bytes) == (1000, 400 + 300)
    assert cost.rest_bytes == 150 + 50 + 2 * (30 + 20) and cost.weights_bytes == 150


def test_shared_bytes_are_those_beside_the_runs(tmp_path):
    leave_files(tmp_path / "one")
    leave_files(tmp_path / "two")
    write(tmp_path / "cache" / "latents.safetensors", 70)
    write(tmp_path / "split.json", 7)
    assert measure_shared_bytes(tmp_path) == 77


def test_short_trials_have_few_steps_whole_batches_and_no_attack():
    config = load_config(
        {
            "name": "a",
            "data": "digits",
            "inner": {"budget_images": 10_000, "batch_size": 8, "rounds": 5, "ensemble": {"shards": 2}},
            "rewards": {"extraction": {}},
            "search": {"early_stopping": {}},
        }
    )
    short = shorten_config(config, 2)
    assert short.inner.budget_steps == 3 * 2 * 5  # three steps in each round of each shard
    assert (
        shorten_config(config.replaced({"inner.ensemble.shards": 1, "inner.rounds": 1}), 1).inner.budget_steps
        == 10
    )
    assert (short.rewards.n_samples, short.rewards.extraction, short.rewards.force) == (128, None, True)
    assert short.search.early_stopping is None
    assert short.inner.replaced({"budget_images": 10_000}) == config.inner


def test_choices_to_calibrate_with_are_the_anchors_and_a_few_others():
    space = load_space("digits")
    kinds = pick_calibration_choices(space, ANCHORS, 0)
    assert {kind: len(choices) for kind, choices in kinds.items()} == {
        "none": 1,
        "all": 1,
        "full": 1,
        "sampled": 3,
    }
    assert all(kinds[name][0] in anchors for name, anchors in space.list_anchors().items())
    assert pick_calibration_choices(space, ANCHORS, 0) == kinds
    assert list(pick_calibration_choices(space, ["all"], 0)) == ["none", "all", "sampled"]
    assert list(pick_calibration_choices(space, [], 0)) == ["none", "sampled"]


def test_full_fine_tuning_that_does_not_fit_is_named_with_the_ways_on(monkeypatch, tmp_path):
    def fail(folder, spec, loaded):
        if spec.choice.method == "full":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return calibrate.TrialCost(0, 1, 1, 1, 1, 1, 1)

    monkeypatch.setattr(calibrate, "measure_parts", fail)
    monkeypatch.setattr(calibrate, "prepare_study", lambda *_: {"sizes": {"train": 20}})
    values = load_config({"name": "a", "data": "digits", "space": "digits"}).model_dump(mode="json")
    with pytest.raises(MemControlError, match="full fine-tuning.*low_memory_full=true.*anchors=.none, all"):
        calibrate.calibrate(values, tmp_path, None, print, lambda *_: None)
