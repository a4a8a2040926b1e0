"""Owns the recipe plan: a choice as another trainer must know it, whichever trainer that is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from memcontrol.core.errors import MemControlError
from memcontrol.model.parts import Target

ARCHITECTURES = {
    "sd15": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux.1",
    "pixart": "PixArt",
    "sana": "Sana",
}
UNET_WIDTHS = {"sd15": (320, 640, 1280, 1280), "sd2": (320, 640, 1280, 1280), "sdxl": (320, 640, 1280)}


@dataclass(frozen=True)
class RecipePlan:
    """A choice as another trainer must know it: the base, its layers, what is trained of them, and how
    long."""

    architecture: str  # a key of ARCHITECTURES
    base: str  # a Hub id, a folder or a file
    names: Mapping[str, bool]  # every module of the denoiser, and whether it is a Linear or a Conv2d
    targets: tuple[Target, ...]
    steps: int
    batch_size: int
    n_images: int  # that the steps go over
    warmup_steps: int = 0
    schedule: str = "cosine"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    resolution: int | None = None
    name: str = "memcontrol"
    widths: tuple[int, ...] = ()  # of a U-Net's blocks
    notes: tuple[str, ...] = ()  # what whoever trains must know beside

    @property
    def modules(self) -> dict[str, Target]:
        return {target.module: target for target in self.targets}

    @property
    def method(self) -> str:
        return self.targets[0].method

    @property
    def epochs(self) -> int:
        """Passes over the images that give at least as many steps, for a trainer that counts nothing else and
        drops what fills no batch. Raises MemControlError where no batch is full."""
        in_epoch = self.n_images // self.batch_size
        if not in_epoch:
            raise MemControlError(
                f"it drops batches that are not full, and there are {self.n_images} images for batches of "
                f"{self.batch_size}"
            )
        return -(-self.steps // in_epoch)


def group_modules(plan: RecipePlan, value: Callable[[Target], Any]) -> dict[Any, list[str]]:
    """Value to the names of its modules, the most frequent value first."""
    groups: dict[Any, list[str]] = {}
    for target in plan.targets:
        groups.setdefault(value(target), []).append(target.module)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def measure_alpha(target: Target) -> float:
    """As trainers count it: alpha / rank is the factor on the adapter's output."""
    return target.rank * target.alpha


def list_values(values: Iterable[Any]) -> list[Any]:
    """Each once, the most frequent first."""
    found = list(values)
    return sorted(set(found), key=lambda value: (-found.count(value), value))
