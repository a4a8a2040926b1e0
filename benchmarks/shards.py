"""Time and peak memory of ten shards against one at the same number of steps: LoRA on a U-Net of 35 million random parameters."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._processes import medians, peak_mib

N_REPEATS, N_STEPS, N_ROUNDS, BATCH, SIDE, N_IMAGES = 3, 150, 5, 4, 16, 200


def run(device: str) -> list[dict]:
    """Rows with the seconds of training and the process's MiB, and both relative to one shard."""
    found = medians("benchmarks.shards", ("1", "10"), N_REPEATS, device)
    one = found["1"]
    return [
        {
            "shards": shards, "parameters": int(row["parameters"]), "seconds": row["seconds"], "peak MiB": row["mib"],
            "time / one shard": row["seconds"] / one["seconds"], "memory / one shard": row["mib"] / one["mib"],
        }
        for shards, row in found.items()
    ]  # fmt: skip


def measure(shards: str, device: str) -> dict:
    from benchmarks._models import base_of, random_material, unet
    from memcontrol.adapters import inject
    from memcontrol.config import InnerConfig
    from memcontrol.ensemble import train
    from memcontrol.space import load_space

    base, space = base_of(unet((64, 128, 256, 256), SIDE), device), load_space("sd15-sites-complete")
    adapter = inject(base.denoiser, space, space.choice(space.groups_for("lora"), "lora", 0.5), 0, shared_a=shards != "1")
    inner = InnerConfig(budget_images=N_STEPS * BATCH, batch_size=BATCH, rounds=N_ROUNDS, ensemble={"shards": int(shards)})
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train(base, adapter, random_material(N_IMAGES, SIDE), inner, seed=0, folder=Path(folder), progress=lambda *_, **said: None)
    seconds, n = time.perf_counter() - started, sum(parameter.numel() for parameter in base.denoiser.parameters())
    return {"seconds": seconds, "mib": peak_mib(device), "parameters": n}


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
