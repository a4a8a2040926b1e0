"""Rounds over shards: averaging and exchange against the same written out, resuming to the bit, several
processes."""

import json
import os
import signal

import pytest
import torch
from commands import FORKS
from conftest import CHOICE, N_IMAGES
from safetensors.torch import load_file

from memcontrol.config.inner import InnerConfig
from memcontrol.core import interrupt
from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.seeds import derive_seed
from memcontrol.core.space_yaml import load_space
from memcontrol.execution.worker import COMMAND
from memcontrol.model.adapter import inject_adapter
from memcontrol.training.checkpoints import Checkpoints
from memcontrol.training.loop import Loop
from memcontrol.training.rounds import ProcessGroup, Rounds
from memcontrol.training.shard import Shard
from memcontrol.training.shards import deal_images

LORA = Choice(**CHOICE)
FULL = Choice(("*",), "full", 1e-3)
SHARDED = {"ensemble": {"shards": 3, "moments": "reset"}, "rounds": 2, "budget_images": 8 * 12}


def same(one, other, tolerance=0.0):
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], rtol=0, atol=tolerance) for name in one
    )


def by_hand(base, material, choice, n_shards, n_rounds, n_steps, **inner):
    """Iterative ensemble training of weights that average as they are, written out: moments reset, shards of
    equal steps."""
    settings = InnerConfig(**{"batch_size": 8, "budget_images": 8 * n_steps, **inner})
    adapter = inject_adapter(base.denoiser, load_space("digits"), choice, 3, shared_a=True)
    data = material.data
    members = deal_images("random", n_shards, data.caption_rows, data.mean.flatten(1), 3)
    shards = [Shard(i, rows, *torch.zeros(2, N_IMAGES, dtype=torch.long)) for i, rows in enumerate(members)]
    shared, per_round = adapter.state(), n_steps // (n_shards * n_rounds)
    for number in range(n_rounds):
        states = []
        for i, shard in enumerate(shards):
            adapter.load_state(shared)
            loop = Loop(base, adapter, material, settings, shard, derive_seed(3, "shard", i) if i else 3)
            for step in range(per_round):
                loop.take_slot((number * per_round + step + 1) / (n_rounds * per_round))
            states.append(adapter.state())
        weights = [len(shard.rows) / N_IMAGES for shard in shards]
        shared = {name: sum(w * state[name] for w, state in zip(weights, states)) for name in shared}
    adapter.remove()
    return shared


# Adam divides its first gradients by themselves, and so makes steps of rounding where LoRA's are smallest:
# 3e-6 on some CPUs.
@pytest.mark.parametrize(
    "choice, optimizer",
    [(Choice(**{**CHOICE, "learning_rate": 30.0}), "sgd"), (FULL, "adamw")],
    ids=("lora", "full"),
)
def test_shards_are_trained_apart_and_averaged_by_size(base, material, trained, choice, optimizer):
    log, found = trained(choice, **SHARDED, optimizer=optimizer)
    hand, once = (
        by_hand(base, material, choice, 3, 2, 12, optimizer=optimizer),
        by_hand(base, material, choice, 3, 1, 12, optimizer=optimizer),
    )
    assert same(found, hand, 1e-6) and not same(found, once, 1e-5)  # averaged once is another model
    assert log.n_steps == 12 and log.images_seen == 96
    assert [row["images"] for row in log.record["shards"][:3]] == [7, 7, 6]
    assert sorted(sum(log.record["images"], [])) == list(range(N_IMAGES))
    assert all(0 < one["divergence"] <= 1 for one in log.record["rounds"])


def test_the_budget_is_the_same_however_many_shards(trained):
    for shards, rounds in ((1, 5), (2, 3), (5, 2)):
        log, _ = trained(ensemble={"shards": shards}, rounds=rounds, budget_images=8 * 13, folder=f"{shards}")
        assert log.n_steps == 13 and log.images_seen == 104


def test_divergence_by_hand(base, material, trained):
    """Root mean square distance of the shards from their mean, over that from the start, weighted by size."""
    kept, plain = {}, Rounds.measure_divergence

    def watched(self, number):
        kept[number] = [
            (len(one.shard.rows), one.weights)
            for one in (self.files.read_shard(number, shard, ("weights",)) for shard in range(2))
        ]
        kept["start"] = self.initial
        return plain(self, number)

    Rounds.measure_divergence = watched
    try:
        log, _ = trained(FULL, ensemble={"shards": 2, "split": "contiguous"}, rounds=1, budget_images=8 * 6)
    finally:
        Rounds.measure_divergence = plain
    flat = [
        (n, torch.cat([weights[name].flatten() for name in sorted(weights)]).double())
        for n, weights in kept[0]
    ]
    start = torch.cat([kept["start"][name].flatten() for name in sorted(kept["start"])]).double()
    mean = sum(n * each for n, each in flat) / N_IMAGES
    apart, moved = (
        sum(n * float((each - point).square().sum()) for n, each in flat) for point in (mean, start)
    )
    assert log.record["rounds"][0]["divergence"] == pytest.approx((apart / moved) ** 0.5, rel=1e-4)


def test_a_shared_a_is_never_trained(trained):
    _, found = trained(**SHARDED)
    _, start = trained(
        budget_images=8,
        max_grad_norm=1e-12,
        weight_decay=0.0,
        warmup=0.5,
        ensemble={"shards": 1},
        folder="start",
    )
    down = [name for name in found if ".lora_A." in name]
    assert down and all(torch.allclose(found[name], start[name], atol=1e-4) for name in down)
    assert any(found[name].abs().max() > 0 for name in found if ".lora_B." in name)


@pytest.mark.parametrize("method", ("lora", "dora", "svdiff", "difffit"))
def test_what_is_kept_is_the_mean_of_the_shards_changes(base, trained, method, monkeypatch):
    """Every method, both factors trained: the weights after a round are the mean of the shards' weights."""
    from test_adapters import fuse_state, make_space

    space = make_space(base.denoiser, [method])
    choice = space.choice(("first", "second"), method, 0.8)
    kept, plain = {}, Rounds.average

    def watched(self, number):
        kept["shards"] = [
            (len(one.shard.rows), one.weights)
            for one in (self.files.read_shard(number, shard, ("weights",)) for shard in range(3))
        ]
        return plain(self, number)

    monkeypatch.setattr(Rounds, "average", watched)
    _, found = trained(
        choice,
        space=space,
        ensemble={"shards": 3, "average": "refactored"},
        rounds=1,
        budget_images=8 * 6,
        weight_decay=0.0,
    )
    before = fuse_state(base, space, choice, inject_and_state(base, space, choice))
    each = [(n, fuse_state(base, space, choice, state)) for n, state in kept["shards"]]
    expected = {name: sum(n * weights[name].double() for n, weights in each) / N_IMAGES for name in before}
    after = fuse_state(base, space, choice, found)
    assert max(float((after[name] - expected[name]).abs().max()) for name in expected) < 1e-6
    assert max(float((after[name] - before[name]).abs().max()) for name in expected) > 1e-4


def inject_and_state(base, space, choice):
    adapter = inject_adapter(base.denoiser, space, choice, 3)
    state = adapter.state()
    adapter.remove()
    return state


def test_refactored_rounds_go_on_from_their_offset(trained):
    """Two rounds of both factors: a shard's second round begins at the mean, so the loss does not jump
    back."""
    log, found = trained(ensemble={"shards": 2, "average": "refactored"}, rounds=3, budget_images=8 * 24)
    assert any(name.endswith(".offset") for name in found)
    again, resumed = trained(ensemble={"shards": 2, "average": "refactored"}, rounds=3, budget_images=8 * 24)
    assert same(found, resumed) and again.record == log.record


@pytest.mark.parametrize("moments", ("reset", "averaged", "kept"))
def test_moments_after_an_averaging(trained, moments, tmp_path):
    trained(FULL, ensemble={"shards": 2, "moments": moments}, rounds=2, budget_images=8 * 8, folder=moments)
    files = sorted((tmp_path / moments).glob("*.safetensors"))
    assert [file.name for file in files] == [
        "0001-00.safetensors",
        "0001-01.safetensors",
        "0001-mean.safetensors",
    ]


def test_averaged_moments_are_the_mean_of_the_shards_moments(trained, tmp_path, monkeypatch):
    from memcontrol.training.round_files import select_tensors

    kept, plain = {}, Rounds.average

    def watched(self, number):
        kept[number] = [
            (len(one.shard.rows), one.moments)
            for one in (self.files.read_shard(number, shard, ("moments",)) for shard in range(3))
        ]
        found = plain(self, number)
        kept[f"mean {number}"] = select_tensors(self.files.mean(number), "moments")
        return found

    monkeypatch.setattr(Rounds, "average", watched)
    trained(LORA, ensemble={"shards": 3, "moments": "averaged"}, rounds=2, budget_images=8 * 12)
    assert any(name.endswith("exp_avg_sq") for name in kept["mean 0"])
    for name, value in kept["mean 0"].items():
        assert torch.allclose(value, sum(n * moments[name] for n, moments in kept[0]) / N_IMAGES)
    assert not kept["mean 1"]  # nothing follows the last round


def test_the_ways_of_moments_differ(trained):
    found = {
        way: trained(FULL, ensemble={"shards": 2, "moments": way}, rounds=2, budget_images=8 * 8, folder=way)[
            1
        ]
        for way in ("reset", "averaged", "kept")
    }
    name = "conv_in.weight"
    assert not torch.equal(found["reset"][name], found["kept"][name]) and not torch.equal(
        found["averaged"][name], found["kept"][name]
    )


def test_a_moving_average_is_averaged_too(trained):
    inner = {**SHARDED, "rounds": 1, "budget_images": 8 * 6}
    _, plain = trained(FULL, folder="plain", **inner)
    _, slow = trained(FULL, folder="slow", ema=0.9999, **inner)
    _, start = trained(FULL, folder="start", budget_images=8, max_grad_norm=1e-12, weight_decay=0.0)
    name = "conv_in.weight"
    assert 0 < (slow[name] - start[name]).norm() < (plain[name] - start[name]).norm()
    files = load_file(next(iter_mean(trained)))
    assert torch.equal(files[f"ema {name}"], slow[name]) and torch.equal(
        files[f"weights {name}"], plain[name]
    )


def iter_mean(trained):
    """The last round's mean of the run in folder `slow`."""
    folder = trained.__closure__[
        [cell for cell in trained.__code__.co_freevars].index("tmp_path")
    ].cell_contents
    return (folder / "slow").glob("*-mean.safetensors")


def test_alternate_rounds_exchange_and_average(trained, monkeypatch):
    """Odd rounds move images and keep the proxies' own weights, even ones average; the last always
    averages."""
    averaged, plain = dict.fromkeys(range(5), False), Rounds.average
    monkeypatch.setattr(
        Rounds, "average", lambda self, number: (averaged.update({number: True}), plain(self, number))
    )
    log, _ = trained(
        skip={"ratio": 1.0, "bins": 20},
        redistribution={"share": 0.5},
        ensemble={"shards": 2, "split": "contiguous"},
        rounds=5,
        budget_images=8 * 40,
    )
    assert [number for number in range(5) if averaged[number]] == [1, 3, 4]
    assert all(0 < one["divergence"] <= 1 for one in log.record["rounds"])
    assert sorted(sum(log.record["images"], [])) == list(range(N_IMAGES))
    assert set(log.record["images"][0]) & set(range(10, 20)) and all(
        len(rows) == 10 for rows in log.record["images"]
    )
    assert sum(row["skipped"] for row in log.record["shards"]) == sum(log.record["skips_by_image"]) > 0


def test_every_round_can_do_both(trained):
    log, _ = trained(
        skip={"ratio": 1.0, "bins": 5},
        redistribution={"rounds": "every"},
        ensemble={"shards": 2},
        rounds=3,
        budget_images=8 * 12,
    )

    assert sorted(sum(log.record["images"], [])) == list(range(N_IMAGES)) and sum(
        log.record["skips_by_image"]
    )


def test_training_stops_when_held_out_images_fall_behind(trained):
    log, _ = trained(FULL, stop_gap=1e-6, budget_images=8 * 200, rounds=20)
    gaps = [one["gap"] for one in log.record["rounds"]]
    assert log.record["rounds"][-1]["stopped"] and gaps[-1] > 1e-6 and log.n_steps == 10 * len(gaps) < 200
    again, _ = trained(FULL, stop_gap=1e-6, budget_images=8 * 200, rounds=20)
    assert again.n_steps == log.n_steps


def test_more_shards_than_images_or_steps_are_refused(trained):
    with pytest.raises(MemControlError, match="shards is 21 and there are 20 training images"):
        trained(ensemble={"shards": 21}, rounds=1, budget_images=8 * 40)


def test_another_plan_in_the_folder_is_begun_anew(trained):
    _, first = trained(FULL)
    _, other = trained(FULL, budget_images=32)
    _, again = trained(FULL)
    assert same(first, again) and not same(first, other)


INNER = {
    "budget_images": 96,
    "batch_size": 8,
    "rounds": 4,
    "ema": 0.9,
    "skip": {"ratio": 1.25},
    "redistribution": {},
    "augmentation": {},
    "ensemble": {"shards": 2, "moments": "kept"},
}


def folder_of_trial(tmp_path, name, inner=INNER, processes=1):
    from memcontrol.config.load import load_config
    from memcontrol.config.spec import Spec
    from memcontrol.trial.loaded import LoadedModels
    from memcontrol.trial.prepare import prepare_study

    values = {
        "name": "a",
        "space": "digits",
        "inner": inner,
        "data": {"path": "digits", "train": 20, "holdout": 20, "test": 20},
        "rewards": {"n_samples": 32, "force": True, "sampling_steps": 1},
        "search": {"processes": processes},
    }
    study, config = tmp_path / "study", load_config(values)
    if not (study / "split.json").exists():
        prepare_study(values, study, LoadedModels(), lambda line: None)
    Spec(config, load_space("digits"), LORA, study, "search", "holdout", 20).write(tmp_path / name)
    return tmp_path / name


def run_trial(folder):
    from memcontrol.trial.loaded import LoadedModels
    from memcontrol.trial.run import run_trial

    loaded = LoadedModels(COMMAND)
    run_trial(folder, loaded, lambda *_, **said: None)
    loaded.close()
    return (folder / "adapter.safetensors").read_bytes(), json.loads((folder / "training.json").read_text())


def trial_killed_after(folder, steps):
    """kill -9 of the process that calls it, in the middle of a round."""
    from memcontrol.trial.loaded import LoadedModels
    from memcontrol.trial.run import run_trial

    def progress(stage, done, total, **said):
        if stage == "train" and done == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    run_trial(folder, LoadedModels(COMMAND), progress)


def without_times(record):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in record["shards"]]


def test_a_killed_trial_ends_as_if_it_had_never_stopped(tmp_path):
    """kill -9 in the middle of rounds 1, 3 and 4, the last: the same adapter, byte for byte."""
    whole, record = run_trial(folder_of_trial(tmp_path, "whole"))
    folder = folder_of_trial(tmp_path, "killed")
    for steps in (2, 8, 11):
        killed = FORKS.Process(target=trial_killed_after, args=(folder, steps))
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
    resumed, other = run_trial(folder)
    assert resumed == whole
    assert (
        without_times(record) == without_times(other) and record["skips_by_image"] == other["skips_by_image"]
    )


def test_processes_that_share_a_trials_shards_change_no_number(tmp_path):
    alone, record = run_trial(folder_of_trial(tmp_path, "alone"))
    shared, other = run_trial(folder_of_trial(tmp_path, "shared", processes=2))
    tensors = [load_file(tmp_path / name / "adapter.safetensors") for name in ("alone", "shared")]
    assert same(*tensors) and without_times(record) == without_times(other)
    assert (tmp_path / "shared" / "log-1.txt").exists()
    assert record["images_of_shards"] == other["images_of_shards"]
    rows = [parse_ranges(said) for said in record["images_of_shards"]]
    assert sorted([*rows[0], *rows[1]]) == list(range(20))


def parse_ranges(said):
    pairs = [part.split("-") for part in said.split(", ")]
    return [row for ends in pairs for row in range(int(ends[0]), int(ends[-1]) + 1)]


def test_a_helper_that_dies_is_done_without(tmp_path, monkeypatch):
    run_trial(folder_of_trial(tmp_path, "alone"))
    monkeypatch.setattr(
        "memcontrol.trial.loaded.LoadedModels.team",
        lambda self, folder, spec, rung=None: ProcessGroup(0, 2, lambda rank: rank == 0),
    )
    run_trial(folder_of_trial(tmp_path, "left", processes=2))
    assert same(*(load_file(tmp_path / name / "adapter.safetensors") for name in ("alone", "left")))


def test_a_trial_that_diverges_leaves_no_helper_behind_that_waits(tmp_path):
    """The next trial of the same worker would wait for it, and it for the end of the trial that diverged."""
    from memcontrol.core.errors import Diverged
    from memcontrol.trial.loaded import LoadedModels
    from memcontrol.trial.run import run_trial

    wild = INNER | {"max_grad_norm": 1e30, "skip": None, "redistribution": None, "augmentation": None}
    first, loaded = folder_of_trial(tmp_path, "wild", wild, processes=2), LoadedModels(COMMAND)
    spec = json.loads((first / "spec.json").read_text())
    spec["choice"]["learning_rate"] = 1e30
    (first / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(Diverged):
        run_trial(first, loaded, lambda *_, **said: None)
    assert all(process.poll() is not None for process in loaded.helpers.values()) and loaded.helpers
    assert (
        run_trial(folder_of_trial(tmp_path, "next", processes=2), loaded, lambda *_, **said: None)["state"]
        == "COMPLETE"
    )
    loaded.close()


PARTS = {"budget_images": 160, "batch_size": 8, "rounds": 2}


def strip_times(record):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in record["shards"]]


@pytest.mark.parametrize("keys", [{}, {"ensemble": {"shards": 2}, "skip": {"bins": 1}, "ema": 0.9}])
def test_a_checkpoint_within_a_round_gives_the_same_numbers(trained, keys, monkeypatch):
    """Killed twelve steps in, two after the last checkpoint; and told to end by SIGTERM three steps in."""
    expected, state = trained(folder="whole", **PARTS, **keys)
    for folder, n_steps in (("killed", 12), ("terminated", 3)):
        seen = []

        def progress(*_, seen=seen, n_steps=n_steps, folder=folder, **said):
            seen.append(1)
            if len(seen) == n_steps and folder == "killed":
                raise KeyboardInterrupt
            if len(seen) == n_steps:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(interrupt, "is_terminated", False)
            before = signal.getsignal(signal.SIGTERM)
            interrupt.remember_termination()
            due = [False, False, True] if folder == "killed" else [False]
            patch.setattr(Checkpoints, "is_due", lambda self, due=due: pick_due(due))
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                trained(folder=folder, progress=progress, **PARTS, **keys)
            signal.signal(signal.SIGTERM, before)
        again = []
        log, found = trained(
            folder=folder, progress=lambda *_, again=again, **said: again.append(1), **PARTS, **keys
        )
        assert len(again) < 20 - n_steps + 3 and strip_times(log.record) == strip_times(expected.record)
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
        assert (log.first_loss, log.last_loss, log.n_steps) == (expected.first_loss, expected.last_loss, 20)


def pick_due(due):
    due.append(due.pop(0))
    return due[-1] or interrupt.is_terminated


def test_a_checkpoint_that_is_too_large_is_not_written_and_changes_no_number(trained, tmp_path):
    expected, state = trained(folder="whole", **PARTS)
    sizes = []

    def progress(*_, **said):
        sizes.append(sum(path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors")))

    log, found = trained(folder="small", progress=progress, checkpoint_gb=0.0, **PARTS)
    assert max(sizes) < 10_000 and all(torch.equal(found[name], state[name]) for name in state)
    assert strip_times(log.record) == strip_times(expected.record)
    # killed within the second round, it begins again
    seen = []

    def kill(*_, **said):
        seen.append(1)
        if len(seen) == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(folder="killed", progress=kill, checkpoint_gb=0.0, **PARTS)
    again = []
    log, found = trained(
        folder="killed", progress=lambda *_, **said: again.append(1), checkpoint_gb=0.0, **PARTS
    )
    assert len(again) == 20 and all(torch.equal(found[name], state[name]) for name in state)
