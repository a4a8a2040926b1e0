"""Anti-gradient control against the published rule, worked by hand and as a plain loop over images."""

import random

import pytest
import torch

from memcontrol.config.methods import SkipConfig
from memcontrol.training.loss_memory import LossMemory


def test_the_published_rule_by_hand():
    """methods of IET-AGC: ratio 2, decay 0.8, from zero; two batches on timesteps 5, 5, 7, 9."""
    memory, timesteps = LossMemory.empty(SkipConfig()), torch.tensor([5, 5, 7, 9])
    losses = torch.tensor([1, 0.2, 0.5, 0.1])
    assert memory.keeps(losses, timesteps).all()
    memory.update(losses, timesteps)
    assert (
        memory.bank[[5, 7, 9]].tolist() == pytest.approx([0.2, 0.1, 0.02])
        and memory.bank.count_nonzero() == 3
    )
    losses = torch.tensor([0.09, 0.11, 0.04, 0.02])
    keep = memory.keeps(losses, timesteps)
    assert keep.tolist() == [False, True, False, True]
    assert float((losses * keep).sum() / keep.sum()) == pytest.approx(0.065)


def sequential(bank, timesteps, losses, ratio, decay):
    """The published loop: every image judged by the bank before the batch, then taken in one after the
    other."""
    keep = [loss * ratio >= bank[t] for t, loss in zip(timesteps, losses)]
    for t, loss in zip(timesteps, losses):
        bank[t] = decay * bank[t] + (1 - decay) * loss
    return keep


@pytest.mark.parametrize("ratio, decay", [(2.0, 0.8), (1.25, 0.95)])
def test_many_batches_equal_the_plain_loop_even_when_timesteps_repeat(ratio, decay):
    draw, bank = random.Random(0), [0.0] * 1000
    memory, n_skipped = LossMemory.empty(SkipConfig(ratio=ratio, decay=decay)), 0
    for _ in range(1000):
        size = draw.randint(1, 40)
        timesteps = [draw.choice((draw.randrange(1000), draw.randrange(7))) for _ in range(size)]
        losses = [draw.lognormvariate(-2, 1) for _ in range(size)]
        given = torch.tensor(losses, dtype=torch.float64), torch.tensor(timesteps)
        expected = sequential(bank, timesteps, losses, ratio, decay)
        assert memory.keeps(*given).tolist() == expected
        memory.update(*given)
        n_skipped += expected.count(False)
        assert torch.allclose(memory.bank, torch.tensor(bank, dtype=torch.float64), rtol=1e-12, atol=0)
    assert n_skipped > 100


def test_a_corrected_start_knows_the_mean_from_the_first_visit():
    memory, at = LossMemory.empty(SkipConfig(start="corrected")), torch.tensor([3])
    assert memory.usual(at).item() == 0 and memory.keeps(torch.tensor([1e-9]), at).all()
    values, decay = [0.5, 0.1, 0.9], 0.8
    for visit, value in enumerate(values, start=1):
        memory.update(torch.tensor([value]), at)
        weights = [decay ** (visit - 1 - i) for i in range(visit)]
        mean = sum(w * v for w, v in zip(weights, values)) / sum(weights)
        assert memory.usual(at).item() == pytest.approx(mean)
    assert (
        memory.keeps(torch.tensor([mean / 2 + 1e-6]), at).all()
        and not memory.keeps(torch.tensor([mean / 2 - 1e-6]), at).any()
    )


def test_closeness_is_one_at_the_threshold():
    memory, at = LossMemory.empty(SkipConfig(ratio=2)), torch.tensor([3, 4])
    memory.update(torch.tensor([1.0]), at[:1])  # the bank at 3 is 0.2
    assert memory.closeness(torch.tensor([0.1, 0.1]), at).tolist() == [pytest.approx(1.0), float("inf")]


def test_bins_share_a_memory():
    memory = LossMemory.empty(SkipConfig(bins=50))
    memory.update(torch.tensor([1.0, 1.0]), torch.tensor([0, 19]))
    assert (
        memory.usual(torch.tensor([0, 10, 19, 20, 999])).tolist() == pytest.approx([0.36, 0.36, 0.36, 0, 0])
        and len(memory.bank) == 50
    )
