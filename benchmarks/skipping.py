"""What judging, counting and remembering every image's loss adds to a training step: both loops in turn, in
one process.

Nothing is skipped (ratio 10^9), so both do the same forward and backward. `bookkeeping / step` times the
added calls alone.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

N_STEPS = 60
SIZES = {
    "tiny widths, batch 32 of 8 x 8": ((24, 40, 56, 56), 8, 32),
    "35 M parameters, batch 8 of 16 x 16": ((64, 128, 256, 256), 16, 8),
}


def run(device: str) -> list[dict]:
    import torch

    torch.set_num_threads(1)
    return [measure(name, *size, device) for name, size in SIZES.items()]


def measure(name: str, widths: tuple, side: int, batch: int, device: str) -> dict:
    import torch

    from benchmarks._models import make_base, random_material, unet
    from memcontrol.config.inner import InnerConfig
    from memcontrol.config.methods import SkipConfig
    from memcontrol.core.space_yaml import load_space
    from memcontrol.model.adapter import inject_adapter
    from memcontrol.training.loop import Loop
    from memcontrol.training.loss_memory import LossMemory
    from memcontrol.training.shard import Shard

    base, space = make_base(unet(widths, side), device), load_space("sd15-sites-complete")
    material, rows = random_material(200, side), torch.arange(200)
    adapter = inject_adapter(base.denoiser, space, space.choice(space.select_groups("lora"), "lora", 0.5), 0)
    loops = {}
    for skip in (None, SkipConfig(ratio=1e9)):
        shard = Shard(
            0,
            rows,
            *torch.zeros(2, 200, dtype=torch.long),
            LossMemory.empty(skip, base.device) if skip else None,
        )
        loops[bool(skip)] = Loop(base, adapter, material, InnerConfig(batch_size=batch, skip=skip), shard, 0)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(N_STEPS):
        for on, loop in loops.items():
            times[on].append(seconds(partial(loop.take_slot, 0.5), device))
    losses, timesteps, loop = (
        torch.rand(batch, device=device),
        torch.randint(1000, (batch,), device=device),
        loops[True],
    )

    def bookkeeping() -> None:
        known = loop.shard.memory.keeps(losses, timesteps)
        loop.count_skips(rows[:batch][~known.cpu()])
        loop.shard.memory.update(losses, timesteps)

    alone = statistics.median(seconds(bookkeeping, device) for _ in range(200))
    plain, skipping = (statistics.median(times[on][5:]) for on in (False, True))
    return {
        "model": name,
        "s per step": plain,
        "with skipping / plain": skipping / plain,
        "bookkeeping / step": alone / plain,
    }


def seconds(call, device: str) -> float:
    import torch

    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
