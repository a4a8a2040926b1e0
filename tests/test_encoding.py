"""Encodings that are made in chunks, by several processes or one that was killed; files that are written part
by part; what lies in memory meanwhile."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import memcontrol.model.encoded as encoded
from memcontrol.config.inner import InnerConfig
from memcontrol.config.load import load_config
from memcontrol.config.rewards import RewardsConfig
from memcontrol.data.cache import TensorRows, hold_lock, iterate_rows, map_bytes, write_tensors
from memcontrol.data.split import load_parts
from memcontrol.model.base import load_base
from memcontrol.model.encoded import EncodingTask, list_texts, load_encoded
from memcontrol.training.probe import ProbeSize, choose_probe_size
from memcontrol.trial.memory import StageMemory


def test_a_file_written_in_parts_is_one_of_safetensors(tmp_path):
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool)
    whole = {str(kind): torch.randint(0, 2, (7, 3, 5)).to(kind) for kind in kinds}
    rows = {name: TensorRows(name, (7, 3, 5), list(each.split(3))) for name, each in whole.items()}
    write_tensors(tmp_path / "a.safetensors", rows, {"model": "x"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == whole.keys()
    assert all(
        torch.equal(found[name], each) and found[name].dtype == each.dtype for name, each in whole.items()
    )
    mapped = map_bytes(tmp_path / "a.safetensors", "torch.uint8")
    blocks = list(map(np.array, iterate_rows(mapped, 2)))
    assert [len(block) for block in blocks] == [2, 2, 2, 1]
    assert np.array_equal(np.concatenate(blocks), whole["torch.uint8"].numpy())


def test_too_few_parts_leave_no_file(tmp_path):
    rows = {"a": TensorRows("torch.float32", (4, 2), [torch.zeros(3, 2)])}
    with pytest.raises(ValueError, match="a: 24 bytes were given in place of 32"):
        write_tensors(tmp_path / "a.safetensors", rows)
    assert not any(tmp_path.iterdir())


def test_a_lock_that_another_one_holds_is_waited_for_or_not(tmp_path):
    with hold_lock(tmp_path / "a") as first, hold_lock(tmp_path / "a", wait=False) as second:
        assert first and not second
    with hold_lock(tmp_path / "a", wait=False) as third:
        assert third


@pytest.fixture
def images():
    config = load_config({"name": "a", "data": {"path": "digits", "train": 20, "holdout": 20, "test": 20}})
    return load_parts(config.data, 32, 0).parts["train"]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(encoded, "_CHUNKS", {"captions": 4, "images": 8})


def equal(one, other):
    pairs = [(one.mean, other.mean), (one.deviation, other.deviation), (one.caption_rows, other.caption_rows)]
    pairs += [(one.text[name], other.text[name]) for name in other.text]
    return all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_chunks_give_the_whole_and_a_killed_process_leaves_those_that_it_made(
    base, images, tmp_path, small_chunks, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(encoded, "_CHUNKS", {"captions": 64, "images": 256})
        whole = load_encoded(base, images, tmp_path / "whole")
    counted = []
    real = type(base).encode_images

    def encode(self, some):
        counted.append(len(some))
        if len(counted) == 2:
            raise KeyboardInterrupt
        return real(self, some)

    monkeypatch.setattr(type(base), "encode_images", encode)
    with pytest.raises(KeyboardInterrupt):
        load_encoded(base, images, tmp_path / "killed")
    told = []
    found = load_encoded(base, images, tmp_path / "killed", lambda done, total: told.append((done, total)))
    assert equal(found, whole) and counted == [8, 8, 8, 4]  # the first one once
    n = 20 + len(found.text["prompt_embeds"])
    assert told[-1] == (n, n) and [done for done, _ in told] == sorted(done for done, _ in told)
    names = [path.name for path in (tmp_path / "killed").iterdir()]
    assert not any("chunks" in name for name in names)


def test_of_several_captions_each_use_draws_one(base, images, tmp_path):
    records = [
        replace(record, further=tuple(f"further {i} {k}" for k in range(i % 3)))
        for i, record in enumerate(images.records)
    ]
    several = replace(images, records=tuple(records))
    assert several.digest != images.digest
    data = load_encoded(base, several, tmp_path)
    texts = list_texts(several.captions, several.further_captions)
    wanted = base.encode_captions(texts)["prompt_embeds"]
    assert torch.allclose(data.text["prompt_embeds"], wanted, atol=1e-5)
    generator, n = torch.Generator().manual_seed(0), 600
    for i, record in enumerate(records):
        drawn = data.draw_captions(torch.full((n,), i), generator)
        counts = Counter(texts[row] for row in drawn.tolist())
        assert set(counts) == {record.caption, *record.further}
        assert min(counts.values()) > 0.7 * n / len(counts)
    assert (data.draw_captions(torch.arange(20), generator) != data.caption_rows).any()


def test_processes_share_the_chunks(base, images, tmp_path, small_chunks, monkeypatch):
    """A chunk that another process is at is left to it, and waited for in the end."""
    task = EncodingTask(base, images, tmp_path)
    chunks = task.list_chunks()
    held = next(chunk for chunk in chunks if chunk.kind == "images")
    with hold_lock(task.folder / held.file_name):
        for chunk in chunks:
            task.make(chunk, wait=False)
        made = sorted(path.name for path in task.folder.glob("*.safetensors"))
        assert made == sorted(chunk.file_name for chunk in chunks if chunk != held)
    task.join(chunks)
    assert equal(load_encoded(base, images, tmp_path), load_encoded(base, images, tmp_path / "alone"))


def test_text_encoders_come_and_go(images, tmp_path):
    base = load_base("tiny")
    assert base.pipeline.text_encoder is None and base.pipeline.vae is None
    with base.hold_encoders():
        assert base.pipeline.text_encoder is not None
        base.encode_captions(["a"])
        assert base.pipeline.text_encoder is not None
    assert base.pipeline.text_encoder is None
    load_encoded(base, images, tmp_path)
    assert base.pipeline.text_encoder is None
    stays = load_base("tiny", offload="none")
    stays.encode_captions(["a"])
    assert stays.pipeline.text_encoder is not None


@pytest.mark.parametrize(
    "inner, rewards, size",
    [
        ({"budget_images": 7360}, {}, ProbeSize()),
        ({"budget_images": 4}, {"n_samples": 8, "sampling_steps": 2}, ProbeSize(1, 1, False)),
        ({"budget_images": 1}, {"n_samples": 1, "sampling_steps": 1}, None),
        ({"budget_images": 1}, {"objectives": ("loss_gap", "fid")}, ProbeSize()),
        ({"budget_images": 1}, {"limits": {"noise_norm_mean": 1.0}}, ProbeSize()),
    ],
)
def test_probes_take_a_tenth_at_most(inner, rewards, size):
    assert choose_probe_size(InnerConfig(**inner), RewardsConfig(**rewards)) == size


def test_probes_stay_below_a_tenth_at_any_budget():
    for n in (1, 3, 10, 50, 200, 1000, 5000, 10**5):
        for steps in (1, 20):
            inner, rewards = InnerConfig(budget_images=n), RewardsConfig(n_samples=n, sampling_steps=steps)
            size = choose_probe_size(inner, rewards)
            passes = 0 if size is None else 2 * size.images * size.draws * (2 if size.norms else 1)
            assert passes <= 0.1 * (3 * n + n * steps)


def test_a_stages_peak_is_its_own():
    memory = StageMemory()
    with memory.watch("large"):
        held = torch.ones(2**26)  # 256 MiB
        assert held.sum() > 0
        del held
    with memory.watch("small"):
        pass
    assert memory.peaks["large"] - memory.peaks["small"] > 200
    assert json.dumps(memory.peaks)


def test_a_fine_tuning_that_edits_captions_loads_text_encoders_once(trained, base, monkeypatch):
    loaded = []
    real = type(base).load_encoders
    monkeypatch.setattr(
        type(base),
        "load_encoders",
        lambda self, names: (loaded.append(base.pipeline.text_encoder is None), real(self, names)),
    )
    log, _ = trained(captions={"add_words": 1.0}, rounds=3)
    assert log.n_steps == 3 and loaded == [True]
    assert base.pipeline.text_encoder is None
