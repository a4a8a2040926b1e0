"""Owns search spaces for architectures never seen before: a denoiser's blocks, grouped by their place."""

from __future__ import annotations

import re

import yaml
from torch import nn

from memcontrol.model.adapter import list_trainable_modules
from memcontrol.model.parts import suits

_N_GROUPS = 16
_DERIVED_METHODS = ("lora", "svdiff", "difffit", "attention")
_LEAST_RATE, _MOST_RATE = 1e-5, 1e-3
_WAY = ("down_blocks", "mid_block", "up_blocks")  # a U-Net registers its middle last


def derive_space(denoiser: nn.Module, base: str) -> str:
    """YAML of a space with a group for each block, or for each run of blocks where there are many of a kind.

    A block is a numbered child of a list ("up_blocks.2"), or a child of the denoiser that holds layers of its
    own.
    """
    blocks = _find_blocks(denoiser)
    length = -(-sum(max(1, len(numbers)) for numbers in blocks.values()) // _N_GROUPS)
    groups = {}
    for name, numbers in blocks.items():
        if not numbers:
            groups[name] = rf"{name}\..*"
        for start in range(0, len(numbers), length):
            run = numbers[start : start + length]
            groups[_name_group(name, run)] = (
                rf"{name}\.({'|'.join(map(str, run))})\..*" if len(run) > 1 else rf"{name}\.{run[0]}\..*"
            )
    rates = dict.fromkeys(_DERIVED_METHODS, [_LEAST_RATE, _MOST_RATE])
    lower = [float(f"{rate / 10:.3g}") for rate in (_LEAST_RATE, _MOST_RATE)]
    values = {
        "description": f"Derived from the blocks of {base} ({type(denoiser).__name__}).",
        "groups": groups,
        "methods": list(_DERIVED_METHODS),
        "learning_rate": rates | {"attention": lower, "full": lower},
        "rank": [2, 4, 8, 16],
    }
    return yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, width=1000)


def _find_blocks(denoiser: nn.Module) -> dict[str, list[int]]:
    """List name to the numbers of its members, none for a single block; in the order of a forward pass."""
    blocks: dict[str, list[int]] = {}
    for name in list_trainable_modules(denoiser):
        parts = name.split(".")
        if len(parts) > 1 and suits("lora", denoiser.get_submodule(name)):
            numbers = blocks.setdefault(parts[0], [])
            if parts[1].isdigit() and int(parts[1]) not in numbers:
                numbers.append(int(parts[1]))
    kept = [name for name in blocks if blocks[name] or name.endswith("block")]
    kept.sort(key=lambda name: _WAY.index(name) if name in _WAY else len(_WAY))
    return {name: blocks[name] for name in kept}


class _PlainDumper(yaml.SafeDumper):
    """Writes equal lists out each time instead of as anchors and aliases."""

    def ignore_aliases(self, data) -> bool:
        return True


def _name_group(block: str, run: list[int]) -> str:
    """up_blocks, [2] gives up_2; transformer_blocks, [4, 5, 6] gives transformer_4_6."""
    return "_".join([re.sub("_?blocks?$", "", block) or block, *map(str, sorted({run[0], run[-1]}))])
