"""Owns what one shard trains on, and where it stands between rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memcontrol.model.encoded import Encoded, list_texts
from memcontrol.training.loss_memory import LossMemory


@dataclass(frozen=True)
class Material:
    """What a fine-tuning learns from: the encoded training set, its captions, and how to read its pixels
    again."""

    data: Encoded
    captions: Sequence[str]
    pixels: Callable[[Sequence[int]], np.ndarray]  # image numbers [B] -> uint8 [B, 3, H, W]
    holdout: Callable[[], Encoded]
    groups: Sequence[str] = ()  # of each image, where a group must stay in one shard
    further_captions: Sequence[Sequence[str]] = ()  # of each image, where any has several
    # of each image, the group that it shares with others, or a name of its own; empty: all their own
    units: Sequence[str] = ()

    @cached_property
    def texts(self) -> list[str]:
        """Of each row of `data.text` the caption."""
        return list_texts(self.captions, self.further_captions)

    @cached_property
    def group_numbers(self) -> Tensor | None:
        """[N], equal within a group; None where there are no groups."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(self.groups))}
        return torch.tensor([numbers[name] for name in self.groups]) if numbers else None

    def name_units(self) -> Sequence[str]:
        """Of each image, whom a private fine-tuning's bound is about."""
        return self.units or [str(row) for row in range(len(self.data.mean))]


@dataclass
class Shard:
    """One shard's own state, all that a round needs beside the weights: its images, loss memory, queue,
    counts and losses."""

    number: int
    rows: Tensor  # image numbers [n]
    skips: Tensor  # [N], since the last exchange
    skipped: Tensor  # [N], since the start
    memory: LossMemory | None = None
    # image numbers that wait for augmentation
    queue: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    queue_closeness: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    losses: list[float] = field(default_factory=list)  # one for each slot of the budget
    counts: Counter[str] = field(default_factory=Counter)
    exchanged_at: int = 0  # batches drawn when its images last changed

    def copy(self) -> Shard:
        """Of what a slot changes, but for its losses, which are only added to."""
        changed: dict[str, Any] = {"counts": Counter(self.counts)}
        if self.memory:
            changed |= {
                "memory": replace(self.memory),
                "skips": self.skips.clone(),
                "skipped": self.skipped.clone(),
            }
        return replace(self, **changed)

    def restore(self, before: Shard, n_losses: int) -> None:
        """What `copy` gave, when there were so many losses; it may be restored again."""
        del self.losses[n_losses:]
        vars(self).update(vars(before.copy()))
