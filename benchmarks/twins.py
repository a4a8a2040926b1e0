"""The search for twins: seconds on one core, memory, and the share of changed copies that is found, among
smooth pictures that are all different.

`[IMAGES=20000] python -m benchmarks twins`: one in a hundred images has a changed copy.
"""

from __future__ import annotations

import os
import resource
import time

import numpy as np
import torch
from PIL import Image
from torch import nn

from memcontrol.data.twins import CHANGES, change_image, find_twins, shrink_to_thumbnail

COUNTS = [int(os.environ["IMAGES"])] if "IMAGES" in os.environ else [5_000, 20_000]
SIDE, LAYERS = 64, ((3, 1.0), (6, 0.7), (12, 0.5), (24, 0.3))  # sides of noise, and how strong it is
_ONE_IN = 100
_MIB = 2**20


def draw_pictures(n: int, generator: torch.Generator) -> np.ndarray:
    """Smooth noise, coloured at its largest scale: uint8 [n, SIDE, SIDE, 3]."""
    layers = (
        weight * nn.functional.interpolate(_draw_noise(n, side, generator), (SIDE, SIDE), mode="bicubic")
        for side, weight in LAYERS
    )
    whole = torch.stack(list(layers)).sum(0)
    low, high = (end(whole, (1, 2, 3), True) for end in (torch.amin, torch.amax))
    return (255 * (whole - low) / (high - low)).byte().permute(0, 2, 3, 1).numpy()


def _draw_noise(n: int, side: int, generator: torch.Generator) -> torch.Tensor:
    n_colours = 3 if side == LAYERS[0][0] else 1
    return torch.randn(n, n_colours, side, side, generator=generator).expand(n, 3, side, side)


def search(n: int) -> dict:
    generator, random = torch.Generator().manual_seed(0), np.random.default_rng(0)
    images = np.concatenate([draw_pictures(min(1000, n - i), generator) for i in range(0, n, 1000)])
    planted: dict[tuple[int, int], str] = {}
    thumbnails = [shrink_to_thumbnail(Image.fromarray(one)) for one in images]
    for number, row in enumerate(random.permutation(n)[: n // _ONE_IN].tolist()):
        planted[row, len(thumbnails)] = change = CHANGES[number % len(CHANGES)]
        changed = change_image(Image.fromarray(images[row]), change, random)
        thumbnails.append(shrink_to_thumbnail(changed))
    own = {copy: row for row, copy in planted}
    stacked, digests = np.stack(thumbnails), [str(row) for row in range(len(thumbnails))]
    began = time.process_time()
    found = find_twins(stacked, digests, lambda row: Image.fromarray(images[own.get(row, row)]))
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pairs = set(found.pairs)
    shares = {
        change: np.mean([pair in pairs for pair, name in planted.items() if name == change])
        for change in CHANGES
    }
    return {
        "images": len(thumbnails),
        "CPU seconds": seconds,
        "peak MiB less the pictures": peak - images.nbytes / _MIB,
        "other pairs": len(pairs - set(planted)),
        **{change: float(share) for change, share in shares.items()},
    }


def run(device: str) -> list[dict]:
    torch.set_num_threads(1)
    return [search(n) for n in COUNTS]
