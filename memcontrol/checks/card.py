"""Owns what is known of this machine's GPUs, and what fine-tuning Stable Diffusion 1.5 at 512 pixels fits on
them."""

from __future__ import annotations

from dataclasses import dataclass

from memcontrol.core.choice import ANCHORS, Anchor

# GiB, counted from the model's shapes (`python -m benchmarks memory`), with 1.0 for the feature network and
# CUDA itself. A trial of LoRA holds the base in 16 bits, 1.6
_LORA_GIB = 2.6
# full fine-tuning: weights, gradients and two moments in float32, 12.8; in little memory, weights and
# gradients in 16 bits, 3.2
_FULL_GIB, _LOW_MEMORY_GIB = 13.8, 4.2
# images in a forward, whether activations are recomputed, and the activations of such a step
_FORWARDS = ((16, False, 16.7), (4, False, 4.2), (4, True, 1.0), (1, True, 0.3))

# images a second of a LoRA step of Stable Diffusion 1.5 at 512 pixels in 16 bits, by part of the card's name:
# assumed from the cards' peaks, right within a factor of two or so
_RATES = {"H100": 50, "H200": 50, "A100": 25, "L40": 20, "4090": 15, "A10": 8, "L4": 8, "V100": 10, "T4": 3}
_RATE_ELSE = 8


@dataclass(frozen=True)
class Card:
    """The GPU with the least free memory, and how many there are."""

    name: str
    free_gib: float
    n: int = 1

    @property
    def images_per_second(self) -> int:
        return next((rate for part, rate in _RATES.items() if part in self.name), _RATE_ELSE)


def describe_card() -> Card | None:
    """None without a GPU."""
    import torch

    n = torch.cuda.device_count()
    if not n:
        return None
    free, least = min((torch.cuda.mem_get_info(i)[0] / 2**30, i) for i in range(n))
    return Card(torch.cuda.get_device_name(least), free, n)


@dataclass(frozen=True)
class MemoryPlan:
    """How a step is made to fit: images in a forward, recomputed activations, the anchors that fit, and
    whether full fine-tuning only fits in little memory."""

    micro_batch_size: int
    gradient_checkpointing: bool
    anchors: tuple[Anchor, ...]
    low_memory_full: bool = False


def propose_memory(card_gib: float) -> MemoryPlan:
    """For Stable Diffusion 1.5 at 512 pixels: the largest step without recomputing with which full
    fine-tuning fits as well, or else the largest that a LoRA has room for."""
    for size, recomputes, gib in _FORWARDS:
        if not recomputes and _FULL_GIB + gib <= card_gib:
            return MemoryPlan(size, recomputes, ANCHORS)
    fitting = (step for step in _FORWARDS if _LORA_GIB + step[2] <= card_gib)
    size, recomputes, _ = next(fitting, _FORWARDS[-1])
    recomputed = next(gib for n, again, gib in reversed(_FORWARDS) if again and n <= size)
    if _LOW_MEMORY_GIB + recomputed <= card_gib:
        return MemoryPlan(size, recomputes, ANCHORS, low_memory_full=True)
    return MemoryPlan(size, recomputes, ("none", "all"))


def explain_too_small(card_gib: float) -> str:
    return f"full fine-tuning takes {_FULL_GIB:g} GiB before activations, and {card_gib:.1f} are free"
