"""One base that several processes of a trial hold together: the numbers of one process, a part of the weights
on each, a process that dies, and what is refused."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_pipelines import SMALL, build
from test_families import write_family_space
from torch.distributed.fsdp import FSDPModule

from memcontrol.config.load import load_config
from memcontrol.config.spec import Spec
from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.jobs import ConfirmJob, Done, TrialJob
from memcontrol.core.run_folder import RunFolder
from memcontrol.core.space_yaml import load_space
from memcontrol.execution.attempts import read_failures
from memcontrol.execution.job_queue import JobQueue
from memcontrol.execution.local import Inline
from memcontrol.execution.make import count_workers
from memcontrol.execution.slurm_commands import choose_gres
from memcontrol.execution.worker import COMMAND
from memcontrol.model import sharding
from memcontrol.model.adapter import inject_adapter
from memcontrol.model.base import load_base
from memcontrol.model.cost import Cost
from memcontrol.model.cost import _count_bytes_in_blocks as count_bytes_in_blocks
from memcontrol.training.loop import Loop
from memcontrol.trial.loaded import LoadedModels
from memcontrol.trial.prepare import prepare_study
from memcontrol.trial.samples import read_samples

pytestmark = pytest.mark.slow
SPACE = {
    "groups": {
        "attention": r"up_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.0\.attn[12]\.(to_q|to_v)",
        "convolutions": r"(mid_block\.resnets\.\d+\.conv1|conv_in)",
    },
    "methods": ["lora"],
    "learning_rate": {"lora": [1.0e-3, 1.0e-2], "full": [1.0e-4, 1.0e-3]},
    "rank": [2],
}
CHOICE = Choice(("attention", "convolutions"), "lora", 3e-3, 2)
# forwards of 5 and 2 images, of which two processes cannot share 5 evenly
PLAIN = {"budget_images": 28, "batch_size": 7, "micro_batch_size": 5, "rounds": 2}
PLAIN |= {"gradient_checkpointing": True}
UNPROBED, PROBED = ("kid", "memorization"), ("kid", "loss_gap")
RULES = {
    "budget_images": 48,
    "batch_size": 8,
    "rounds": 2,
    "ema": 0.9,
    "skip": {"ratio": 1.1, "bins": 1, "refill": 2},
    "norm_threshold": 1.9,
    "ensemble": {"shards": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def executor():
    """Whose process holds the base with one helper, which stays from trial to trial."""
    made = Inline()
    made.loaded = LoadedModels(COMMAND)
    made.loaded.helper(1)  # it imports its libraries meanwhile
    yield made
    made.close()


def configure(place, inner=PLAIN, gpus=2, objectives=UNPROBED, space=SPACE, search=None, **keys):
    (place / "space.yaml").write_text(yaml.safe_dump(space))
    return load_config(
        {
            "name": "a",
            "space": str(place / "space.yaml"),
            "inner": inner,
            "data": {"path": "digits", "train": 20, "holdout": 20, "test": 20},
            "rewards": {
                "n_samples": 9,
                "force": True,
                "sampling_steps": 1,
                "objectives": objectives,
                "guidance": 2,
                "confirm": 1,
            },
            "search": {"gpus_per_trial": gpus, "anchors": ["none", "all"], **(search or {})},
            **keys,
        }
    )


def write_trial(folder, config, choice=CHOICE):
    study = folder.parent / "study"
    if not (study / "split.json").exists():
        prepare_study(config.model_dump(mode="json"), study, LoadedModels(), lambda line: None)
    Spec(config, load_space(config.space), choice, study, "search", "holdout", 20).write(folder)
    return TrialJob(folder, choice)


def run(executor, job):
    executor.submit(job)
    (*_, end) = executor.events(0)
    assert isinstance(end, Done), end
    return RunFolder(job.folder)


def assert_same_trials(one, two):
    """Weights, samples and record, up to rounding."""
    learned = [load_file(run.adapter_file) for run in (one, two)]
    assert learned[0].keys() == learned[1].keys()
    assert all(torch.allclose(learned[0][key], learned[1][key], atol=1e-4, rtol=0) for key in learned[0])
    first, second = (read_samples(run.path)["images"].astype(int) for run in (one, two))
    assert first.shape == second.shape and abs(first - second).max() <= 1
    records = [json.loads(run.training_file.read_text()) for run in (one, two)]
    counted = ("steps", "seen", "trained", "skipped", "dropped", "queued", "surplus")
    rows = [[[row[name] for name in counted] for row in record["shards"]] for record in records]
    assert rows[0] == rows[1] and records[0]["skips_by_image"] == records[1]["skips_by_image"]
    return records[0]


@pytest.fixture
def uncounted(monkeypatch):
    """What a step costs takes longer to count than to run here; one test looks at it."""
    monkeypatch.setattr(LoadedModels, "cost", lambda *given: Cost(1, 1.0, 1.0))


@pytest.fixture(scope="module")
def whole(place):
    """The trial by one process."""
    return run(Inline(), write_trial(place / "whole", configure(place, gpus=1, objectives=PROBED)))


def test_two_processes_give_the_numbers_of_one(executor, place, whole):
    two = run(executor, write_trial(place / "plain", configure(place, objectives=PROBED)))
    assert_same_trials(whole, two)
    rewards = [run.read_result()["rewards"] for run in (whole, two)]
    for name in ("loss_gap", "noise_norm_mean", "noise_norm_max", "step_gflops"):
        assert rewards[0][name] == pytest.approx(rewards[1][name], rel=1e-3), name
    assert not two.rounds.exists() and not two.list_copies_of_rounds()

    # A rank's part of the base, and a trial's confirmation, in the same processes.
    base = executor.loaded.base(configure(place))
    n_bytes = [
        sum(getattr(each, "to_local", lambda each=each: each)().nbytes for each in base.denoiser.parameters())
        for base in (base, load_base("tiny"))
    ]
    assert n_bytes[0] == pytest.approx(n_bytes[1] / 2, rel=0.03)
    executor.submit(ConfirmJob(two.path, CHOICE, 0))
    assert isinstance(list(executor.events(0))[-1], Done) and two.confirmed_file.exists()


def test_rules_decide_the_same_in_every_process(executor, place, uncounted):
    one, two = (
        run(each, write_trial(place / f"rules-{n}", configure(place, RULES, n)))
        for n, each in ((1, Inline()), (2, executor))
    )
    record = assert_same_trials(one, two)
    assert all(sum(row[name] for row in record["shards"]) for name in ("skipped", "dropped"))


def test_a_trial_that_diverges_ends_no_process(executor, place):
    helper = executor.loaded and executor.loaded.helpers.get(1)
    wild = Choice(CHOICE.groups, "lora", 1e30, 2)
    config = configure(place, {"budget_images": 35, "batch_size": 7, "max_grad_norm": 1e30})
    found = run(executor, write_trial(place / "wild", config, wild))
    assert found.read_result()["state"] == "PRUNED"
    assert helper is None or executor.loaded.helpers[1] is helper and helper.poll() is None


def test_a_process_that_dies_costs_an_attempt_and_no_number(executor, place, whole, uncounted, monkeypatch):
    """kill -9 in the second round; before, the way to a rung."""
    search = {"early_stopping": {"rungs": [0.5], "n_samples": 8}}
    job = write_trial(place / "killed", configure(place, search=search))
    taken, take = [], Loop.take_slot
    run(executor, TrialJob(job.folder, CHOICE, rung=0.5))
    assert RunFolder(job.folder).rung_file(0.5).exists()

    def take_or_kill(loop, share):
        taken.append(share)
        if len(taken) == 2:
            executor.loaded.helpers[1].kill()
            executor.loaded.helpers[1].wait()
        return take(loop, share)

    monkeypatch.setattr(Loop, "take_slot", take_or_kill)
    assert [type(end) for end in JobQueue(executor, lambda event: None).run([job])] == [Done]
    assert len(read_failures(job.folder)) == 1 and taken[0] > 0.4
    assert_same_trials(whole, RunFolder(job.folder))


@pytest.fixture
def alone():
    """A group of this process alone, whose blocks come together and part as those of several do."""
    sharding.leave_ranks()
    yield sharding.join_alone(torch.device("cpu"))
    sharding.leave_ranks()


def compute(base, space, choice):
    """A loss with its gradients under checkpointing, and samples, with an adapter that was moved."""
    adapter, generator = inject_adapter(base.denoiser, space, choice, 0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    side = base.config.get("sample_size", 8)
    noised = base.add_noise(torch.randn(2, base.n_channels, side, side, generator=generator), generator)
    text, empty = base.encode_captions(["a", "b"]), base.encode_captions([""])
    with base.checkpoint_gradients(True):
        loss, predicted = base.denoise(noised, text)
        loss.sum().backward()
    gradients = {name: parameter.grad for name, parameter in adapter.trained().items()}
    drawing = {"seeds": [1, 2], "steps": 2, "guidance": 2.0, "progress": lambda *_: None}
    with adapter.fold():
        images = base.sample(text, empty, resolution=side * base.pixels_per_latent, **drawing)
    adapter.remove()
    return {"loss": loss.detach(), "predicted": predicted.detach(), **gradients}, images.astype(int)


KIN = ("loha", "lokr", "ia3")
FAMILIES = sorted(SMALL.keys() - {"sdxl", "pixart"})  # whose blocks are those of sd-v and sana


@pytest.mark.parametrize(
    "name, method", [*((name, "lora") for name in FAMILIES), *(("sd3", method) for method in KIN)]
)
def test_a_sharded_base_of_every_family_computes_the_same(name, method, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "_WORTH_SHARDING", 0)
    path = str(build(name, tmp_path / "base"))
    plain, shared = load_base(path), load_base(path, offload="all")
    shared.share(alone)
    assert all(map(sharding.is_sharded, shared.denoiser.parameters()))
    assert sum(isinstance(module, FSDPModule) for module in shared.denoiser.modules()) > 2
    space = load_space(write_family_space(tmp_path, method))
    choice = space.list_anchors(["all"])["all"][0]
    (expected, drawn), (found, images) = (compute(base, space, choice) for base in (plain, shared))
    assert all(map(sharding.is_sharded, shared.denoiser.parameters()))
    assert expected.keys() == found.keys() and len(found) > 4
    for key, value in expected.items():
        assert torch.allclose(value, found[key], atol=1e-5, rtol=1e-4), key
    assert abs(drawn - images).max() <= 1


@pytest.mark.parametrize(
    "keys, word",
    [
        (
            {"search": {"anchors": ["none", "full"]}},
            "gpus_per_trial is 2, which shards the base; search.anchors must .*none, all",
        ),
        ({"base_precision": "int8"}, "base_precision must then ask for weights in 16 or 32 bits"),
        ({"inner": PLAIN | {"from_scratch": True}}, "inner.from_scratch"),
        ({"inner": RULES | {"ensemble": {"shards": 2, "average": "refactored"}}}, "set average: shared_a"),
        ({"space": SPACE | {"methods": ["dora"]}}, "method dora changes weights of .* which are sharded"),
        ({"space": SPACE | {"methods": ["attention"]}, "gpus": 1, "base_offload": "all"}, "method attention"),
        ({"search": {"processes": 2}}, "search.processes is 2 and search.gpus_per_trial 2"),
        ({"search": {"executor": "ray"}, "ray": {"gpus": 1}}, "ray.gpus reserves 1 GPUs .* is 2"),
        ({"search": {"executor": "slurm"}, "slurm": {"gres": "gpu:a100"}}, "slurm.gres reserves 1 GPUs"),
    ],
)
def test_what_a_sharded_base_cannot_do_is_refused_by_name(keys, word, tmp_path):
    if "space" in keys:
        (method,) = keys["space"]["methods"]
        rates = {method: [1e-3, 1e-2], "full": [1e-4, 1e-3]}
        keys = keys | {"space": keys["space"] | {"learning_rate": rates}}
    with pytest.raises(MemControlError, match=word):
        config = configure(tmp_path, **keys)
        prepare_study(config.model_dump(mode="json"), tmp_path / "study", LoadedModels(), lambda line: None)


@pytest.mark.parametrize(
    "slurm, gpus, expected",
    [
        ({}, 1, None),
        ({}, 2, "gpu:2"),
        ({"gres": "gpu:a100:4,shard:1"}, 2, "gpu:a100:4,shard:1"),
        ({"extra": {"gpus-per-node": 2}}, 2, None),
    ],
)
def test_a_cluster_reserves_as_many_gpus_as_a_trial_takes(slurm, gpus, expected, tmp_path):
    config = configure(tmp_path, gpus=gpus, search={"executor": "slurm"}, slurm=slurm)
    assert choose_gres(config.slurm, config.search.gpus_per_trial) == expected


def test_there_is_a_worker_for_so_many_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert [count_workers(configure(tmp_path, gpus=n).search) for n in (1, 2, 3, 4)] == [4, 2, 1, 1]


def test_the_card_is_counted_to_hold_a_part_and_two_blocks(monkeypatch):
    """By hand: 2 ranks, three blocks of 4 x 4 + 4, the root's own 4 x 8 + 8, 5 trained, 4 bytes each."""
    monkeypatch.setattr(sharding, "_WORTH_SHARDING", 0)
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
    model.last, model.requires = torch.nn.Linear(4, 8), torch.nn.Linear(4, 1)
    for part in (model.blocks, model.last):
        part.requires_grad_(False)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert count_bytes_in_blocks(model, 2, whole) == 4 * ((3 * 20 + 40) // 2 + 5 + 40 + 2 * 20)
    assert count_bytes_in_blocks(model, 1, whole) == 4 * (5 + 40 + 2 * 20)


def test_too_many_images_are_told_of_and_not_halved(trained, base, monkeypatch):
    def fail(loop, losses):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Loop, "learn_plain", fail)
    monkeypatch.setattr(base, "is_sharded", True)
    with pytest.raises(torch.OutOfMemoryError, match="8 images .* set inner.micro_batch_size=4 .CUDA out"):
        trained()


def test_parts_are_equal_and_complete():
    for n in range(1, 10):
        for size in range(1, 5):
            parts = [sharding.Ranks(rank, size).select_rows(n) for rank in range(size)]
            assert len({len(part) for part in parts}) == 1
            assert [row for part in parts for row in part][:n] == list(range(n))
