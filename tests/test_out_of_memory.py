"""Memory that does not suffice, at every stage of a trial: the stage is done again with fewer images, what
was finished is not."""

import json

import pytest
import torch
import yaml
from conftest import CHOICE, SMALL

from memcontrol.config.inner import InnerConfig
from memcontrol.config.load import load_config
from memcontrol.config.spec import Spec
from memcontrol.core.choice import Choice
from memcontrol.core.jobs import Done, Failed, TrialJob
from memcontrol.core.run_folder import RunFolder
from memcontrol.core.space_yaml import load_space
from memcontrol.execution.worker import run_job
from memcontrol.model.adapter import inject_adapter
from memcontrol.model.base import Base
from memcontrol.model.batches import choose_batch, halve_until_it_fits
from memcontrol.scoring.extractors import TinyFeatures
from memcontrol.training.rounds import train_rounds
from memcontrol.trial.loaded import LoadedModels
from memcontrol.trial.prepare import prepare_study
from memcontrol.trial.run import run_trial

pytestmark = pytest.mark.slow
ERROR = "CUDA out of memory. Tried to allocate 2 GiB"


def make_spec(folder, **keys):
    study = {"name": "small", **SMALL, **keys}
    config = load_config(yaml.safe_load(yaml.safe_dump(study)))
    prepare_study(config.model_dump(mode="json"), folder, LoadedModels(), lambda line: None)
    spec = Spec(config, load_space("digits"), Choice(**CHOICE), folder, "search", "holdout", 32)
    spec.write(folder / "run")
    return spec


class Fault:
    """Lets no more than `most` images through a stage at a time; `sizes` are those that got through."""

    def __init__(self, most):
        self.most, self.sizes, self.n_failed = most, [], 0

    def let(self, n):
        if n > self.most:
            self.n_failed += 1
            raise torch.OutOfMemoryError(ERROR)
        self.sizes.append(n)


def guard(monkeypatch, stage, fault):
    """Puts the fault at a stage."""
    if stage == "score":
        forward = TinyFeatures.forward
        monkeypatch.setattr(
            TinyFeatures, "forward", lambda self, images: (fault.let(len(images)), forward(self, images))[1]
        )
        return
    name, counts = {
        "encode": ("encode_posterior", lambda base, pixels: len(pixels)),
        "train": ("denoise", lambda base, noised, text: len(noised.noisy) if torch.is_grad_enabled() else 0),
        "probe": ("denoise", lambda base, noised, text: 0 if torch.is_grad_enabled() else len(noised.noisy)),
        "sample": ("call_pipeline", lambda base, call, steps, side: len(call["latents"])),
        "decode": ("decode", None),
    }[stage]
    real = getattr(Base, name)
    if stage == "decode":
        decode = real

        def decoding(base, latents):
            network = base.autoencoder.decode
            base.autoencoder.decode = lambda part, **settings: (
                fault.let(len(part)),
                network(part, **settings),
            )[1]
            try:
                return decode(base, latents)
            finally:
                del base.autoencoder.decode

        monkeypatch.setattr(Base, name, decoding)
        return

    def guarded(base, *given):
        if n := counts(base, *given):
            fault.let(n)
        return real(base, *given)

    monkeypatch.setattr(Base, name, guarded)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The same trial without faults."""
    folder = tmp_path_factory.mktemp("expected")
    make_spec(folder)
    return run_trial(folder / "run", LoadedModels(), lambda *_, **said: None)


# the most that gets through, and how many images the stage has in all
STAGES = {
    "encode": (5, 32 + 32),
    "train": (5, 32),
    "probe": (1, 16),  # a tenth of 3 * 32 training passes and 64 of sampling
    "sample": (5, 64),
    "decode": (5, 64),
    "score": (5, 32 + 40 + 64),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_runs_out_of_memory_is_done_in_halves(stage, tmp_path, monkeypatch, expected):
    make_spec(tmp_path)
    most, total = STAGES[stage]
    fault = Fault(most)
    guard(monkeypatch, stage, fault)
    found = run_trial(tmp_path / "run", LoadedModels(), lambda *_, **said: None)
    assert fault.n_failed and max(fault.sizes) in (most, 4)
    assert sum(fault.sizes) == total  # nothing twice
    assert found["state"] == "COMPLETE" and found["n_steps"] == expected["n_steps"]
    for name in ("fid", "kid", "memorization", "loss_gap"):
        assert found["rewards"][name] == pytest.approx(expected["rewards"][name], rel=1e-2, abs=1e-3)
    assert found["micro_batch_size"] == (4 if stage == "train" else None)


def test_what_is_there_is_not_made_again(tmp_path, monkeypatch):
    """An attempt that dies while it scores leaves its rounds and its samples to the next one."""
    make_spec(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("memcontrol.trial.run.score_samples", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_trial(tmp_path / "run", LoadedModels(), lambda *_, **said: None)
    run, stages = RunFolder(tmp_path / "run"), []
    made = run.samples_file.stat().st_mtime_ns
    found = run_trial(run.path, LoadedModels(), lambda stage, *_, **said: stages.append(stage))
    assert found["state"] == "COMPLETE" and stages == []
    assert run.samples_file.stat().st_mtime_ns == made


def test_one_image_that_does_not_fit_ends_the_attempt_with_its_reason(tmp_path, monkeypatch):
    make_spec(tmp_path)
    guard(monkeypatch, "train", Fault(0))
    said = []
    run_job(TrialJob(tmp_path / "run", Choice(**CHOICE)), LoadedModels(), said.append)
    assert type(said[-1]) is Failed and said[-1].reason.startswith(f"out of memory on the GPU: {ERROR}")


@pytest.mark.parametrize("keys, size", [({}, 4), ({"norm_threshold": "decile"}, None)])
def test_halving_may_be_switched_off_and_stays_off_where_it_changes_numbers(
    keys, size, tmp_path, monkeypatch
):
    for allowed in (True, False):
        folder = tmp_path / str(allowed)
        make_spec(
            folder,
            inner={**SMALL["inner"], **keys},
            search={**SMALL["search"], "accumulate_on_oom": allowed},
        )
        with monkeypatch.context() as patch:
            guard(patch, "train", Fault(5))
            said = []
            run_job(TrialJob(folder / "run", Choice(**CHOICE)), LoadedModels(), said.append)
        ends_well = allowed and size is not None
        assert type(said[-1]) is (Done if ends_well else Failed)
        if ends_well:
            assert json.loads((folder / "run" / "result.json").read_text())["micro_batch_size"] == size


def test_rounds_that_are_there_outlive_a_change_of_keys_of_memory_alone(base, material, tmp_path):
    """Trained with other such keys, nothing is trained: the state is the one that was saved, bit for bit."""
    steps = []

    def train(**keys):
        inner = InnerConfig(budget_images=24, batch_size=8, **keys)
        adapter = inject_adapter(base.denoiser, load_space("digits"), Choice(**CHOICE), 3)
        try:
            settings = {"seed": 3, "folder": tmp_path, "progress": lambda *_, **said: steps.append(1)}
            train_rounds(base, adapter, material, inner, **settings)
            return adapter.state()
        finally:
            adapter.remove()

    before = train()
    assert len(steps) == 3
    of_memory = {
        "micro_batch_size": 2,
        "gradient_checkpointing": True,
        "checkpoint_minutes": 1.0,
        "checkpoint_gb": 1.0,
    }
    for keys in ({key: value} for key, value in of_memory.items()):
        after = train(**keys)
        assert len(steps) == 3 and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    train(weight_decay=0.5)
    assert len(steps) == 6


def test_parts_come_in_order_and_each_once():
    done = []

    def work(rows):
        if rows.stop - rows.start > 3:
            raise torch.OutOfMemoryError(ERROR)
        done.extend(range(rows.start, rows.stop))
        return rows.start

    assert [rows for rows, _ in halve_until_it_fits(10, 64, work)] == [
        slice(start, min(start + 2, 10)) for start in range(0, 10, 2)
    ]
    assert done == list(range(10))


def test_one_alone_is_tried_again_after_economies_and_then_raises():
    calls = []

    def work(rows):
        calls.append(rows)
        if len(calls) < 3:
            raise torch.OutOfMemoryError(ERROR)
        return "ok"

    assert [found for _, found in halve_until_it_fits(1, 1, work, lambda: len(calls) == 1)] == ["ok"]
    with pytest.raises(torch.OutOfMemoryError):
        list(halve_until_it_fits(4, 4, lambda rows: (_ for _ in ()).throw(torch.OutOfMemoryError(ERROR))))


@pytest.mark.parametrize(
    "free, each, fixed, n", [(1000, 10, 0, 64), (1000, 100, 0, 4), (1000, 9999, 0, 1), (1000, 10, 600, 8)]
)
def test_a_batch_is_a_power_of_two_that_free_memory_holds(monkeypatch, free, each, fixed, n):
    monkeypatch.setattr("memcontrol.model.batches.count_free_bytes", lambda device: free)
    assert choose_batch(each, torch.device("cpu"), fixed) == n
