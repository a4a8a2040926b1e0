"""Owns the loss memory: how high the loss usually is at each timestep, and which images are therefore
skipped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memcontrol.config.methods import SkipConfig

_N_TIMESTEPS = 1000


@dataclass
class LossMemory:
    """Anti-gradient control (IET-AGC, arXiv 2407.15328): an exponential mean of the loss at each timestep.

    An image is skipped where its loss lies below the mean at its timestep divided by `ratio`: it is known too
    well already.
    """

    rule: SkipConfig
    bank: Tensor  # [bins] float64
    weight: Tensor  # [bins] float64: the share of the mean that losses have filled, 1 - decay^visits

    @classmethod
    def empty(cls, rule: SkipConfig, device: torch.device | str = "cpu") -> LossMemory:
        return cls(rule, *torch.zeros(2, rule.bins, dtype=torch.float64, device=device))

    def place(self, timesteps: Tensor) -> Tensor:
        return timesteps * self.rule.bins // _N_TIMESTEPS

    def usual(self, timesteps: Tensor) -> Tensor:
        """The memory at timesteps [B], 0 where nothing is known. Published as it is; corrected for its start
        at 0 if asked for."""
        place = self.place(timesteps)
        return (
            self.bank[place]
            if self.rule.start == "zero"
            else self.bank[place] / self.weight[place].clamp(min=1e-12)
        )

    def closeness(self, losses: Tensor, timesteps: Tensor) -> Tensor:
        """u = ratio loss / memory [B]: below 1 an image is skipped; infinite where nothing is known."""
        usual = self.usual(timesteps)
        scaled = self.rule.ratio * losses.double()
        return torch.where(usual > 0, scaled / usual.clamp(min=1e-300), torch.inf)

    def keeps(self, losses: Tensor, timesteps: Tensor) -> Tensor:
        """Whether each image is trained on [B]: ratio loss >= memory."""
        return self.rule.ratio * losses.double() >= self.usual(timesteps)

    def update(self, losses: Tensor, timesteps: Tensor) -> None:
        """bank[t] = decay bank[t] + (1 - decay) loss for one image after the other, skipped ones too, all at
        once.

        Of images that share a memory, an earlier one has decayed once for each later one.
        """
        decay, place = self.rule.decay, self.place(timesteps)
        same = place[:, None] == place[None, :]  # [B, B]
        n_later = same.triu(1).sum(1)
        visits = torch.zeros_like(self.bank).index_add_(
            0, place, torch.ones_like(losses, dtype=torch.float64)
        )
        kept, share = decay**visits, (1 - decay) * decay ** n_later.double()  # [bins], [B]
        self.bank = (self.bank * kept).index_add_(0, place, share * losses.double())
        self.weight = (self.weight * kept).index_add_(0, place, share)
