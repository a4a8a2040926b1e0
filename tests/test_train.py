"""The inner loop: batches, schedule, determinism, and what happens when the loss is not finite."""

import math

import pytest
import torch

from memcontrol.adapters import inject
from memcontrol.config import InnerConfig, load_config
from memcontrol.data import load_parts
from memcontrol.errors import Diverged
from memcontrol.space import Choice, load_space
from memcontrol.train import batch_rows, pace, train

CHOICE = Choice(("up_attention",), "lora", 3e-3, 2)


@pytest.fixture(scope="module")
def encoded(base, tmp_path_factory):
    config = load_config({"name": "a", "data": {"path": "digits", "train": 20, "holdout": 20, "test": 20}})
    return base.encoded(load_parts(config.data, 32, 0)["train"], tmp_path_factory.mktemp("cache"), "tiny")


def trained(base, encoded, choice=CHOICE, seed=3, **inner):
    adapter = inject(base.denoiser, load_space("digits"), choice, seed)
    try:
        settings = InnerConfig(**{"budget_images": 24, "batch_size": 8, **inner})
        log = train(base, adapter, encoded, settings, seed=seed, progress=lambda *_: None)
        return log, {name: parameter.detach().clone() for name, parameter in adapter.named_parameters().items()}
    finally:
        adapter.remove()


def test_every_pass_sees_every_image_once():
    rows = torch.cat([batch_rows(20, 8, 0, step) for step in range(5)]).tolist()
    assert sorted(rows[:20]) == sorted(rows[20:]) == list(range(20)) and rows[:20] != rows[20:]


def test_batches_larger_than_the_data_repeat_it():
    assert sorted(batch_rows(3, 7, 0, 0).tolist())[:2] == [0, 0]


def test_the_schedule():
    constant, cosine = (InnerConfig(schedule=name, warmup=0.1) for name in ("constant", "cosine"))
    assert [pace(share, constant) for share in (0.05, 0.1, 1.0)] == pytest.approx([0.5, 1, 1])
    assert [pace(share, cosine) for share in (0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.5, 1, 0.5, 0])
    assert pace(0.01, InnerConfig(schedule="constant", warmup=0.0)) == 1


def test_the_same_seed_gives_the_same_numbers(base, encoded):
    torch.manual_seed(1)
    first_log, first = trained(base, encoded)
    torch.manual_seed(2)
    again_log, again = trained(base, encoded)
    other_log, _ = trained(base, encoded, seed=4)
    assert first_log == again_log != other_log and (first_log.n_steps, first_log.images_seen) == (3, 24)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_training_lowers_the_loss(base, encoded):
    log, _ = trained(base, encoded, Choice(("*",), "full", 1e-3), budget_images=960, batch_size=16)
    assert log.last_loss < 0.9 * log.first_loss


def test_a_loss_that_is_not_finite_is_named(base, encoded):
    with pytest.raises(Diverged, match="loss became .* of 200 .*learning rate 1e\\+30"):
        trained(base, encoded, Choice(("*",), "full", 1e30), budget_images=1600, warmup=0.0, max_grad_norm=1e30)


def test_nothing_to_train_takes_no_step(base, encoded):
    log, state = trained(base, encoded, Choice((), "none", 0.0))
    assert log.n_steps == 0 and math.isnan(log.last_loss) and state == {}
