"""One shard's inner loop: batches, schedule, and each rule of a step against a plain loop written from its
formula."""

import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHOICE as KEYS
from conftest import N_IMAGES

from memcontrol.config.inner import InnerConfig
from memcontrol.config.load import load_config
from memcontrol.config.methods import AugmentationConfig, SkipConfig
from memcontrol.core.choice import Choice
from memcontrol.core.errors import Diverged
from memcontrol.core.seeds import derive_seed
from memcontrol.core.space_yaml import load_space
from memcontrol.model.adapter import inject_adapter
from memcontrol.training.loop import Gathered, Loop, Verdict, learning_rate_factor, select_batch_rows
from memcontrol.training.loss_memory import LossMemory
from memcontrol.training.optimizers import RoundedAdafactor, round_by_chance
from memcontrol.training.shard import Shard
from memcontrol.trial.loaded import LoadedModels, choose_threads

CHOICE = Choice(**KEYS)


@pytest.fixture
def loop(base, material):
    """A loop over all images; its adapter is removed when the next one is made, and in the end."""
    adapters = []

    def make(choice=CHOICE, bank=None, **inner):
        if adapters:
            adapters.pop().remove()
        adapters.append(inject_adapter(base.denoiser, load_space("digits"), choice, 3))
        settings = InnerConfig(**{"batch_size": 8, **inner})
        memory = LossMemory.empty(settings.skip) if settings.skip else None
        if bank is not None:
            memory.bank[:] = bank
        shard = Shard(0, torch.arange(N_IMAGES), *torch.zeros(2, N_IMAGES, dtype=torch.long), memory)
        return Loop(base, adapters[-1], material, settings, shard, 3)

    yield make
    for adapter in adapters:
        adapter.remove()


def same(one, other, tolerance=0.0):
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], rtol=0, atol=tolerance) for name in one
    )


def gradients(loop):
    return {name: parameter.grad.clone() for name, parameter in loop.trained.items()}


def test_every_pass_sees_every_image_once():
    rows = torch.cat([select_batch_rows(20, 8, 0, step) for step in range(5)]).tolist()
    assert sorted(rows[:20]) == sorted(rows[20:]) == list(range(20)) and rows[:20] != rows[20:]


def test_batches_larger_than_the_data_repeat_it():
    assert sorted(select_batch_rows(3, 7, 0, 0).tolist())[:2] == [0, 0]


def test_the_schedule():
    constant, cosine = (InnerConfig(schedule=name, warmup=0.1) for name in ("constant", "cosine"))
    assert [learning_rate_factor(share, constant) for share in (0.05, 0.1, 1.0)] == pytest.approx([0.5, 1, 1])
    assert [learning_rate_factor(share, cosine) for share in (0.05, 0.1, 0.55, 1.0)] == pytest.approx(
        [0.5, 1, 0.5, 0]
    )
    assert learning_rate_factor(0.01, InnerConfig(schedule="constant", warmup=0.0)) == 1


def test_the_same_seed_gives_the_same_numbers(trained):
    torch.manual_seed(1)
    first_log, first = trained(folder="a")
    torch.manual_seed(2)
    again_log, again = trained(folder="b")
    other_log, _ = trained(seed=4, folder="c")
    assert first_log.last_loss == again_log.last_loss != other_log.last_loss and (
        first_log.n_steps,
        first_log.images_seen,
    ) == (3, 24)
    assert same(first, again)


def test_training_lowers_the_loss(trained):
    log, _ = trained(Choice(("*",), "full", 1e-3), budget_images=960, batch_size=16)
    assert log.last_loss < 0.9 * log.first_loss


def test_a_loss_that_is_not_finite_is_named(trained):
    with pytest.raises(Diverged, match="loss became .*learning rate 1e\\+30"):
        trained(Choice(("*",), "full", 1e30), budget_images=1600, warmup=0.0, max_grad_norm=1e30)


def test_nothing_to_train_takes_no_step(trained):
    log, state = trained(Choice((), "none", 0.0))
    assert log.n_steps == 0 and math.isnan(log.last_loss) and state == {}


def test_a_run_is_plain_adamw_on_the_batches_mean_loss(base, material, trained):
    """The whole default training, written out: no helper of ours but batches and seeds."""
    log, found = trained(budget_images=40, weight_decay=0.1, warmup=0.4)
    adapter = inject_adapter(base.denoiser, load_space("digits"), CHOICE, 3)
    parameters, data = adapter.parameters(), material.data
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)
    for step in range(5):
        done = (step + 1) / 5
        optimizer.param_groups[0]["lr"] = 3e-3 * (
            done / 0.4 if done < 0.4 else 0.5 + 0.5 * math.cos(math.pi * (done - 0.4) / 0.6)
        )
        generator = torch.Generator().manual_seed(derive_seed(3, "step", step))
        rows = select_batch_rows(N_IMAGES, 8, 3, step)
        clean = data.mean[rows] + data.deviation[rows] * torch.randn(
            data.mean[rows].shape, generator=generator
        )
        captions = torch.where(torch.rand(8, generator=generator) < 0.1, 0, data.caption_rows[rows])
        losses, _ = base.denoise(base.add_noise(clean, generator), data.texts(captions))
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert same(adapter.state(), found, 1e-6) and log.last_loss == pytest.approx(
        losses.mean().item(), rel=1e-4
    )
    adapter.remove()


def test_micro_batches_change_no_gradient(loop):
    found = []
    for size in (None, 3, 1):
        one = loop(micro_batch_size=size)
        assert one.learn_plain([]) == 8
        found.append(gradients(one))
    assert same(found[0], found[1], 1e-6) and same(found[0], found[2], 1e-6)


def test_the_step_is_on_the_mean_gradient_of_the_images_kept(base, loop):
    """L = sum keep l / sum keep, the memory judged before and updated after; skipped images are counted."""
    one = loop(skip=SkipConfig(ratio=2.0), bank=0.3)
    batch = one.draw()
    losses, _ = base.denoise(batch.noised, batch.text)
    keep = 2 * losses.detach() >= 0.3
    assert 0 < keep.sum() < 8
    expected = torch.autograd.grad((losses * keep).sum() / keep.sum(), one.parameters)
    one.shard.counts.clear()
    n_kept = one.learn_plain([])
    one.inner = one.inner.replaced({"max_grad_norm": 1e9})
    one.optimizer.step = lambda: None
    one.step(n_kept)
    assert n_kept == keep.sum() == one.shard.counts["trained"] and one.shard.counts["skipped"] == 8 - n_kept
    assert all(
        torch.allclose(found, wanted, atol=1e-7) for found, wanted in zip(gradients(one).values(), expected)
    )
    assert (
        one.shard.skips[batch.rows].tolist() == (~keep).int().tolist() and one.shard.skips.sum() == 8 - n_kept
    )
    bank = torch.full((1000,), 0.3, dtype=torch.float64)
    for t, loss in zip(batch.noised.timesteps.tolist(), losses.tolist()):
        bank[t] = 0.8 * bank[t] + 0.2 * loss
    assert torch.allclose(one.shard.memory.bank, bank)


def test_a_batch_that_is_skipped_whole_takes_no_step(loop):
    one = loop(skip=SkipConfig(), bank=1e6)
    before = {name: parameter.detach().clone() for name, parameter in one.trained.items()}
    one.take_slot(0.5)
    assert one.shard.counts["steps"] == 0 and one.shard.counts["skipped"] == 8 and one.shard.losses[0] > 0
    assert (
        same(before, {name: parameter.detach() for name, parameter in one.trained.items()})
        and not one.optimizer.state
    )


def test_a_refilled_step_is_whole(loop):
    assert loop(skip=SkipConfig(), bank=0.3).learn_plain([]) < 8
    refilled = loop(skip=SkipConfig(refill=20), bank=0.3)
    assert refilled.learn_plain([]) == 8
    assert refilled.shard.counts["trained"] == 8 and refilled.shard.counts["batches"] > 1


def test_min_snr_weighs_each_loss(base, loop):
    one = loop(min_snr=5.0)
    batch = one.draw()
    losses, _ = base.denoise(batch.noised, batch.text)
    kept = base.schedule.alphas_cumprod[batch.noised.timesteps]
    weights = torch.minimum(kept / (1 - kept), torch.tensor(5.0)) / (kept / (1 - kept))
    expected = torch.autograd.grad((losses * weights).mean(), one.parameters)
    one.shard.counts.clear()
    one.learn_plain([])
    assert all(
        torch.allclose(found, wanted, atol=1e-6) for found, wanted in zip(gradients(one).values(), expected)
    )


def test_images_with_a_large_noise_norm_are_dropped(base, loop):
    one = loop(norm_threshold="decile", batch_size=10, caption_dropout=0.0)
    batch = one.draw()
    with torch.no_grad():
        _, with_caption = base.denoise(batch.noised, batch.text)
        empty = base.encode_captions([""])["prompt_embeds"].expand(10, -1, -1)
        without = base.denoiser(batch.noised.noisy, batch.noised.times, empty).sample
    norms = (with_caption - without).flatten(1).norm(dim=1)
    one.shard.counts.clear()
    assert one.learn_plain([]) == 9 and one.shard.counts["dropped"] == 1
    fixed = loop(norm_threshold=float(norms.sort().values[4]), batch_size=10, caption_dropout=0.0)
    assert fixed.learn_plain([]) == 4


def test_input_perturbation_and_noise_offset_by_hand(base):
    clean, generator = torch.randn(4, 4, 8, 8), torch.Generator().manual_seed(5)
    found = base.add_noise(clean, torch.Generator().manual_seed(5), offset=0.1, perturbation=0.2)
    noise, timesteps = (
        torch.randn(clean.shape, generator=generator),
        torch.randint(1000, (4,), generator=generator),
    )
    noise = noise + 0.1 * torch.randn(4, 4, 1, 1, generator=generator)
    shown = noise + 0.2 * torch.randn(clean.shape, generator=generator)
    kept = base.schedule.alphas_cumprod[timesteps].view(4, 1, 1, 1)
    assert torch.equal(found.target, noise) and torch.allclose(
        found.noisy, kept.sqrt() * clean + (1 - kept).sqrt() * shown, atol=1e-6
    )


def test_zones_train_queue_and_skip(base, loop):
    """u >= bar trains, 1 <= u < bar waits for augmentation, u < 1 is skipped; the queue is trained when it
    holds a batch."""
    one = loop(skip=SkipConfig(ratio=2.0), augmentation=AugmentationConfig(bar=2.0), bank=0.2)
    batch = one.draw()
    with torch.no_grad():
        u = 2 * base.denoise(batch.noised, batch.text)[0] / 0.2
    one.shard.counts.clear()
    assert one.learn_plain([]) == (u >= 2).sum()
    assert (
        one.shard.queue.tolist() == batch.rows[(u >= 1) & (u < 2)].tolist()
        and one.shard.counts["skipped"] == (u < 1).sum()
    )
    assert torch.allclose(one.shard.queue_closeness, u[(u >= 1) & (u < 2)].double())
    for _ in range(20):
        if one.is_queue_full():
            break
        one.learn_plain([])
    waiting, bank = one.shard.queue.tolist(), one.shard.memory.bank.clone()
    assert one.learn_augmented([]) > 0 and one.shard.queue.tolist() == waiting[8:]
    assert torch.equal(one.shard.memory.bank, bank) and one.shard.counts["augmented_batches"] == 1


def test_the_rule_kept_trains_nothing_but_augmented_images(loop):
    one = loop(skip=SkipConfig(), augmentation=AugmentationConfig(rule="kept", retest=False))
    one.take_slot(0.5)
    assert (
        one.shard.counts["steps"] == one.shard.counts["augmented_batches"] == 1 and len(one.shard.queue) == 0
    )
    full = loop(skip=SkipConfig(), augmentation=AugmentationConfig(rule="kept"), bank=1e6)
    full.take_slot(0.5)
    assert (
        full.shard.counts["steps"] == 0
        and full.shard.counts["skipped"] == 8 * 8
        and len(full.shard.queue) == 0
    )


@pytest.mark.parametrize(
    "inner",
    [
        {"skip": {"refill": 3}},
        {"skip": {}, "augmentation": {}},
        {"skip": {}, "augmentation": {"rule": "kept"}},
        {
            "skip": {"refill": 2},
            "augmentation": {"retest": False},
            "norm_threshold": "decile",
            "batch_size": 10,
        },
        {"norm_threshold": 0.5},
    ],
    ids=str,
)
def test_every_image_that_was_seen_is_accounted_for(loop, inner):
    one = loop(**inner, bank=0.2 if "skip" in inner else None)
    for _ in range(6):
        one.take_slot(0.5)
    counts = one.shard.counts
    assert counts["seen"] == sum(
        counts[name] for name in ("trained", "skipped", "dropped", "queued", "surplus")
    )
    assert counts["trained"] and counts["skipped"] == one.shard.skipped.sum()


def test_the_strength_of_augmentation_follows_the_closeness(loop, monkeypatch):
    """magnitude = base * mean exp(-5 |u - 1|), not cut to a whole number."""
    given = []
    monkeypatch.setattr(
        "memcontrol.training.loop.augment_images",
        lambda pixels, magnitude, seed: given.append((pixels, magnitude)) or pixels,
    )
    one = loop(skip=SkipConfig(), augmentation=AugmentationConfig(base=5.0))
    closeness = torch.tensor([1.0, 1.1, 1.2, 1.4, 1.05, 1.3, 1.0, 1.01, 1.49], dtype=torch.float64)
    one.enqueue(torch.arange(9), closeness)
    batch = one.from_queue(one.inner.augmentation.base)
    pixels, magnitude = given[0]
    assert magnitude == pytest.approx(5 * np.exp(-5 * np.abs(closeness[:8].numpy() - 1)).mean())
    assert (
        batch.rows.tolist() == list(range(8))
        and one.shard.queue.tolist() == [8]
        and np.array_equal(pixels, one.material.pixels(range(8)))
    )


def test_edited_captions_are_encoded_anew(base, loop):
    one = loop(captions={"add_words": 1.0}, caption_dropout=0.5)
    rows, dropped = torch.arange(4), torch.tensor([True, False, False, True])
    text, plain = (
        one.texts(rows, dropped, 1),
        one.material.data.texts(torch.where(dropped, 0, one.material.data.caption_rows[rows])),
    )
    changed = (text["prompt_embeds"] - plain["prompt_embeds"]).flatten(1).abs().amax(1) > 1e-3
    assert changed.tolist() == [False, True, True, False]
    from memcontrol.training.mitigations import edit_captions

    captions = edit_captions(["", *one.material.captions[1:3], ""], one.inner.captions, one.words, 1)
    assert torch.allclose(
        text["prompt_embeds"][1:3], base.encode_captions(captions[1:3])["prompt_embeds"], atol=1e-6
    )
    assert torch.equal(
        one.material.data.texts(torch.tensor([0]))["prompt_embeds"],
        base.encode_captions([""])["prompt_embeds"],
    )


def test_the_moving_average_by_hand(loop):
    one = loop(ema=0.5)
    shadow = {name: parameter.detach().clone() for name, parameter in one.trained.items()}
    for step in range(1, 4):
        one.take_slot(0.5)
        decay = min(0.5, (1 + step) / (10 + step))
        shadow = {
            name: decay * shadow[name] + (1 - decay) * parameter.detach()
            for name, parameter in one.trained.items()
        }
    assert all(
        torch.allclose(found, wanted, atol=1e-7) for found, wanted in zip(one.shadows, shadow.values())
    )


@pytest.mark.parametrize("optimizer", ("adamw", "adam", "nadam", "radam", "adafactor", "sgd"))
def test_every_optimizer_goes_on_from_its_checkpoint(trained, optimizer):
    _, whole = trained(optimizer=optimizer, rounds=1, budget_images=40, folder="a")
    _, in_parts = trained(optimizer=optimizer, rounds=5, budget_images=40, folder="b")
    _, start = trained(optimizer=optimizer, rounds=1, budget_images=8, warmup=0.0, folder="c")
    assert same(whole, in_parts) and not same(whole, start)


@pytest.mark.parametrize("precision", ("bfloat16", "float16"))
def test_half_precision_learns_nearly_the_same(trained, precision):
    _, full = trained(folder="a")
    log, half = trained(precision=precision, folder="b")
    assert log.n_steps == 3 and not same(full, half)
    before = trained(
        budget_images=8, batch_size=8, warmup=0.9, max_grad_norm=1e-9, weight_decay=0.0, folder="c"
    )[1]
    moved = torch.cat([(full[name] - before[name]).flatten() for name in full])
    other = torch.cat([(half[name] - before[name]).flatten() for name in full])
    assert torch.nn.functional.cosine_similarity(moved, other, 0) > 0.9


def test_gradient_checkpointing_changes_no_number(base, trained):
    _, plain = trained(folder="a")
    base.denoiser.enable_gradient_checkpointing()
    try:
        _, checkpointed = trained(folder="b")
    finally:
        base.denoiser.disable_gradient_checkpointing()
    assert same(plain, checkpointed, 1e-6)


def test_a_step_without_rules_reads_nothing_from_the_device(loop, monkeypatch):
    """On a card each read would stop the CPU until the step is done; with a rule there is one for a batch."""
    one = loop()
    refuse = pytest.fail
    for name in ("item", "__int__", "__float__", "__bool__", "tolist", "numpy", "nonzero", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_, name=name: refuse(f"{name} of a tensor"))
    one.take_slot(0.5)
    monkeypatch.undo()
    assert one.shard.losses == []
    one.flush()
    assert len(one.shard.losses) == 1


@pytest.mark.parametrize("size", (None, 2))
def test_a_rule_reads_once_a_batch(loop, size, monkeypatch):
    one, reads = loop(skip=SkipConfig(ratio=1.1, bins=1), bank=0.2, micro_batch_size=size), []
    read = Verdict.read
    monkeypatch.setattr(Verdict, "read", lambda self: reads.append(len(self.loss)) or read(self))
    for name in ("item", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, name=name: pytest.fail(f"{name} of a tensor"))
    one.take_slot(0.5)
    monkeypatch.undo()
    assert set(reads) == {8} and one.shard.counts["seen"] == 8


def test_batches_gathered_ahead_are_the_same(loop, monkeypatch):
    plain = loop()
    expected = [plain.draw() for _ in range(4)]
    ahead = loop()
    monkeypatch.setattr(Gathered, "pin", lambda self: self)
    ahead.reader = ThreadPoolExecutor(1)
    for batch in expected:
        found = ahead.draw()
        assert torch.equal(found.rows, batch.rows) and torch.equal(found.noised.noisy, batch.noised.noisy)
    ahead.reader.shutdown()


def test_rounding_by_chance_is_exact_in_the_mean():
    """1 + 2^-10 lies between two bfloat16 numbers, an eighth of the way up from 1."""
    values = torch.full((20_000,), 1 + 2.0**-10)
    found = round_by_chance(values, torch.bfloat16, torch.Generator().manual_seed(0)).float()
    assert set(found.tolist()) == {1.0, 1 + 2.0**-7}
    assert abs(float(found.double().mean()) - (1 + 2.0**-10)) < 5 * 2.0**-7 * (0.125 * 0.875 / 20_000) ** 0.5


@pytest.mark.parametrize("kind", (torch.float32, torch.bfloat16))
def test_rounded_adafactor_is_torchs_on_float32_and_learns_in_bfloat16(kind):
    torch.manual_seed(0)
    target, start = torch.randn(8, 8), torch.zeros(8, 8)
    ours, theirs = (torch.nn.Parameter(start.clone().to(dtype)) for dtype in (kind, torch.float32))
    groups = [{"params": [ours], "lr": 1e-2, "rate": 1e-2}]
    one, other = (
        RoundedAdafactor(groups, 0.01, 0),
        torch.optim.Adafactor([theirs], lr=1e-2, weight_decay=0.01),
    )
    for _ in range(200):
        for parameter, optimizer in ((ours, one), (theirs, other)):
            optimizer.zero_grad()
            (parameter.float() - target).square().mean().backward()
            optimizer.step()
    assert ours.dtype == kind
    if kind == torch.float32:
        assert torch.equal(ours, theirs)
    else:
        off, usual = ((each.float() - target).square().mean() for each in (ours, theirs))
        assert abs(float((off - usual).detach())) < 0.02 * float(target.square().mean())


@pytest.mark.parametrize("side, n_threads", [(8, 1), (16, 1), (64, 6)])
def test_a_base_of_small_latents_is_computed_by_one_thread(base, side, n_threads):
    sized = SimpleNamespace(
        device=base.device, n_parameters=base.n_parameters, resolution=4 * side, pixels_per_latent=4
    )
    assert choose_threads(sized, 6) == n_threads


def test_a_process_has_its_threads_again_when_its_models_are_closed():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loaded = LoadedModels()
        loaded.base(load_config({"name": "small", "data": "digits"}))
        assert torch.get_num_threads() == 1
        loaded.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
