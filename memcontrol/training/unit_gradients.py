"""Owns the gradient of a private step: those of single units, each clipped, added up, and noise on their sum.

Notations

unit: What the bound is about, an image or a group with all its images.
B: Units that a step draws on the average, inner.batch_size; u: those that it drew.
M: Draws of each, inner.privacy.multiplicity.
g: A unit's gradient over all that is trained, the mean over its M draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from memcontrol.config.inner import InnerConfig
from memcontrol.core.seeds import derive_seed
from memcontrol.model.adapter import Adapter
from memcontrol.model.base import Base, Noised
from memcontrol.model.batches import is_out_of_memory
from memcontrol.model.families import Text
from memcontrol.training.privacy import open_account


def list_units(names: Sequence[str]) -> list[Tensor]:
    """Of each unit the numbers of its images, from the name of each image's unit."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return [torch.tensor(own) for own in rows.values()]


class PrivateSteps:
    """DP-SGD (Abadi et al. 2016, arXiv 1607.00133) on what an adapter trains, with several draws of noise and
    timestep for a unit, averaged before its gradient is clipped (Dockhorn et al. 2022, arXiv 2210.09929).

    All that is drawn follows from `seed` and the step's number, so that a step which is taken again is the
    same. `units`: of each image the name of its unit. Raises MemControlError as `open_account` does.
    """

    def __init__(self, base: Base, adapter: Adapter, inner: InnerConfig, units: Sequence[str], seed: int):
        self.base, self.parameters, self.seed = base, adapter.parameters(), seed
        self.account, self.units = open_account(inner, units), list_units(units)
        self.batch_size, self.n_draws = inner.batch_size, self.account.multiplicity
        self.sums = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.denoiser = _WithValues(base.denoiser, self.parameters)
        self.is_together = True  # until that was tried in vain

    def derive(self, purpose: str, number: int) -> int:
        return derive_seed(self.seed, purpose, number)

    def make_generator(self, purpose: str, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.derive(purpose, number))

    def draw_units(self, number: int) -> list[Tensor]:
        """Those of a step, each by its own lot with the same chance (Poisson sampling): the numbers of their
        images. There may be none."""
        lots = torch.rand(
            len(self.units), generator=self.make_generator("units", number), dtype=torch.float64
        )
        return [self.units[i] for i in (lots < self.account.rate).nonzero().flatten().tolist()]

    def draw_rows(self, units: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """The images of M draws of each unit, unit after unit [u M]: of a group M of its images, in a random
        order, and again from the first where it has fewer."""
        places = torch.arange(self.n_draws)
        return torch.cat(
            [rows[torch.randperm(len(rows), generator=generator)][places % len(rows)] for rows in units]
        )

    def list_slices(self, n_units: int, n_forward: int) -> list[slice]:
        """Draws that are computed together: of whole units, `n_forward` at the most, of one unit at least."""
        size = self.n_draws * max(1, n_forward // self.n_draws)
        return [slice(start, start + size) for start in range(0, self.n_draws * n_units, size)]

    def begin(self) -> None:
        """Nothing of a step is added up yet, and no gradient is left of another, which none would clip."""
        torch._foreach_zero_(self.sums)
        for parameter in self.parameters:
            parameter.grad = None

    def add(self, noised: Noised, text: Text, weights: Tensor | float, n_forward: int) -> Tensor:
        """Adds the clipped gradients of units, from M draws of each [u M] and weights of their losses [u M].
        All in one pass; or where the denoiser cannot be differentiated so, one by one, `n_forward` draws at a
        time. The losses [u M]."""
        of_draws = torch.as_tensor(weights, device=noised.noisy.device).expand(len(noised.noisy))
        if self.is_together and len(noised.noisy) > self.n_draws:
            try:
                return self.add_together(noised, text, of_draws)
            except Exception as error:  # whatever a denoiser does that vmap does not know
                if is_out_of_memory(error):
                    raise
                self.is_together = False
        losses = []
        for start in range(0, len(noised.noisy), self.n_draws):
            rows = slice(start, start + self.n_draws)
            losses.append(self.add_one(noised.part(rows), _take(text, rows), of_draws[rows], n_forward))
        return torch.cat(losses)

    def add_together(self, noised: Noised, text: Text, weights: Tensor) -> Tensor:
        """The same, all units in one pass."""
        values = [parameter.detach() for parameter in self.parameters]
        find = vmap(grad(self.compute_loss, has_aux=True), in_dims=(None, 0, 0, 0), randomness="different")
        parts = [self.divide(each) for each in (noised.noisy, noised.target, noised.times, noised.timesteps)]
        of_text = {name: self.divide(each) for name, each in text.items()}
        gradients, losses = find(values, parts, of_text, self.divide(weights))
        norms = torch.stack([each.flatten(1).norm(dim=1) for each in gradients]).norm(dim=0)  # [u]
        shares, is_finite = self.find_shares(norms), norms.isfinite()
        if not bool(is_finite.all()):
            gradients = [each[is_finite] for each in gradients]
        for total, each in zip(self.sums, gradients):
            total += torch.tensordot(shares[is_finite], each, 1)
        return losses.flatten()

    def divide(self, each: Tensor) -> Tensor:
        """Of draws [u M, ...] those of each unit: [u, M, ...]."""
        return each.unflatten(0, (-1, self.n_draws))

    def compute_loss(
        self, values: Sequence[Tensor], parts: Sequence[Tensor], text: Text, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mean loss of a unit's draws under values of the parameters, and the losses [M]."""
        losses, _ = self.base.denoise_alone(Noised(*parts), text, self.denoiser.hold(values))
        return (losses * weights).mean(), losses.detach()

    def add_one(self, noised: Noised, text: Text, weights: Tensor, n_forward: int) -> Tensor:
        """The same of one unit [M], by plain autograd."""
        losses = []
        for start in range(0, self.n_draws, n_forward):
            rows = slice(start, start + n_forward)
            loss, _ = self.base.denoise_alone(noised.part(rows), _take(text, rows))
            ((loss * weights[rows]).sum() / self.n_draws).backward()
            losses.append(loss.detach())
        pairs = [(total, p.grad) for total, p in zip(self.sums, self.parameters) if p.grad is not None]
        totals, gradients = [total for total, _ in pairs], [gradient for _, gradient in pairs]
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        if bool(norm.isfinite()):
            torch._foreach_add_(totals, torch._foreach_mul(gradients, self.find_shares(norm)))
        for parameter in self.parameters:
            parameter.grad = None
        return torch.cat(losses)

    def find_shares(self, norms: Tensor) -> Tensor:
        """What of gradients of such norms may count. Ones that are not finite count as nothing, since no unit
        may do more than clip."""
        return (self.account.clip / norms).clamp(max=1)

    def finish(self, number: int) -> None:
        """Leaves in the parameters' gradients the sum under its noise, over B: dividing by u would tell how
        many were drawn."""
        device = self.parameters[0].device
        generator = torch.Generator(device).manual_seed(self.derive("noise", number))
        deviation = self.account.noise * self.account.clip
        for total, parameter in zip(self.sums, self.parameters):
            noise = torch.randn(total.shape, generator=generator, device=device)
            parameter.grad = (total + deviation * noise) / self.batch_size


def _take(text: Text, rows: slice) -> Text:
    return {name: tensor[rows] for name, tensor in text.items()}


class _WithValues:
    """A denoiser some of whose parameters have other values, as torch.func needs it."""

    def __init__(self, denoiser: nn.Module, parameters: Sequence[Tensor]):
        self.denoiser = denoiser
        numbers = {id(parameter): i for i, parameter in enumerate(parameters)}
        # Each place once. By its own look for tied weights torch would change a module that two others share
        # (as DiffFit's scale of a weight and its bias) twice, and leave the second value in it.
        self.places = {
            f"{prefix}.{name}".removeprefix("."): numbers[id(parameter)]
            for prefix, module in denoiser.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in numbers
        }
        self.values: Sequence[Tensor] = ()

    def hold(self, values: Sequence[Tensor]) -> _WithValues:
        self.values = values
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        held = {name: self.values[i] for name, i in self.places.items()}
        # the fused attention of a CPU knows no vmap
        is_on_cpu = self.values[0].device.type == "cpu"
        with sdpa_kernel(SDPBackend.MATH) if is_on_cpu else nullcontext():
            return functional_call(self.denoiser, held, inputs, named, tie_weights=False)
