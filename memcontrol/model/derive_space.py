"""Owns search spaces for architectures never seen before: a denoiser's blocks, grouped by their place."""

from __future__ import annotations

import re

import yaml
from torch import nn

from memcontrol.model.adapter import list_trainable_modules
from memcontrol.model.parts import suits

N_GROUPS = 16
DERIVED_METHODS = ("lora", "svdiff", "difffit", "attention")
LOW, HIGH = 1e-5, 1e-3
WAY = ("down_blocks", "mid_block", "up_blocks")  # a U-Net registers its middle last


def derive_space(denoiser: nn.Module, base: str) -> str:
    """YAML of a space with a group for each block, or for each run of blocks where there are many of a kind.

    A block is a numbered child of a list ("up_blocks.2"), or a child of the denoiser that holds layers of its
    own.
    """
    blocks = find_blocks(denoiser)
    length = -(-sum(max(1, len(numbers)) for numbers in blocks.values()) // N_GROUPS)
    groups = {}
    for name, numbers in blocks.items():
        if not numbers:
            groups[name] = rf"{name}\..*"
        for start in range(0, len(numbers), length):
            run = numbers[start : start + length]
            groups[name_group(name, run)] = (
                rf"{name}\.({'|'.join(map(str, run))})\..*" if len(run) > 1 else rf"{name}\.{run[0]}\..*"
            )
    lower = [float(f"{rate / 10:.3g}") for rate in (LOW, HIGH)]
    values = {
        "description": f"Derived from the blocks of {base} ({type(denoiser).__name__}).",
        "groups": groups,
        "methods": list(DERIVED_METHODS),
        "learning_rate": {**dict.fromkeys(DERIVED_METHODS, [LOW, HIGH]), "attention": lower, "full": lower},
        "rank": [2, 4, 8, 16],
    }
    return yaml.dump(values, Dumper=PlainDumper, sort_keys=False, width=1000)


def find_blocks(denoiser: nn.Module) -> dict[str, list[int]]:
    """List name to the numbers of its members, none for a single block; in the order of a forward pass."""
    blocks: dict[str, list[int]] = {}
    for name in list_trainable_modules(denoiser):
        parts = name.split(".")
        if len(parts) > 1 and suits("lora", denoiser.get_submodule(name)):
            numbers = blocks.setdefault(parts[0], [])
            if parts[1].isdigit() and int(parts[1]) not in numbers:
                numbers.append(int(parts[1]))
    kept = [name for name in blocks if blocks[name] or name.endswith("block")]
    kept.sort(key=lambda name: WAY.index(name) if name in WAY else len(WAY))
    return {name: blocks[name] for name in kept}


class PlainDumper(yaml.SafeDumper):
    """Writes equal lists out each time instead of as anchors and aliases."""

    def ignore_aliases(self, data) -> bool:
        return True


def name_group(block: str, run: list[int]) -> str:
    """up_blocks, [2] gives up_2; transformer_blocks, [4, 5, 6] gives transformer_4_6."""
    return "_".join([re.sub("_?blocks?$", "", block) or block, *map(str, sorted({run[0], run[-1]}))])
