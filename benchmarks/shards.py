"""Time and peak memory of ten shards against one at the same number of steps, ours and as deep copies of the
model (IET-AGC's): LoRA on a U-Net of 35 million random parameters."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._processes import medians, peak_mib

COPIES = "10 copies"
N_REPEATS, N_STEPS, N_ROUNDS, BATCH, SIDE, N_IMAGES = 3, 150, 5, 4, 16, 200
WIDTHS = (64, 128, 256, 256)
CARD = (160, 320, 640, 640), 32  # widths and side where there is a card: 220 million parameters
if os.environ.get("SMALL"):  # to see that it runs; on a card, what takes a minute
    N_STEPS, WIDTHS = 50, (16, 16, 16, 16)


def run(device: str) -> list[dict]:
    """Rows with the seconds of training and the process's MiB, and both relative to one shard."""
    found = medians("benchmarks.shards", ("1", "10", COPIES), N_REPEATS, device)
    one = found["1"]
    return [
        {
            "shards": shards,
            "parameters": int(row["parameters"]),
            "seconds": row["seconds"],
            "peak MiB": row["mib"],
            "time / one shard": row["seconds"] / one["seconds"],
            "memory / one shard": row["mib"] / one["mib"],
        }
        for shards, row in found.items()
    ]


def choose_size(device: str) -> tuple[tuple[int, int, int, int], int]:
    """Widths of the U-Net, and the side of its latents."""
    return CARD if device == "cuda" else (WIDTHS, SIDE)


def copied(n: int, device: str) -> dict:
    """Each shard a copy of the model with an optimizer of its own, trained in turn, the adapters' mean given
    to all after each round."""
    import copy

    import torch

    from benchmarks._models import make_base, random_material, unet
    from memcontrol.core.space_yaml import load_space
    from memcontrol.model.adapter import inject_adapter

    widths, side = choose_size(device)
    first, space, data = (
        make_base(unet(widths, side), device),
        load_space("sd15-sites-complete"),
        random_material(N_IMAGES, side).data,
    )
    choice, parameters = (
        space.choice(space.select_groups("lora"), "lora", 0.5),
        sum(parameter.numel() for parameter in first.denoiser.parameters()),
    )
    bases = [first, *(make_base(copy.deepcopy(first.denoiser), device) for _ in range(n - 1))]
    trained = [inject_adapter(base.denoiser, space, choice, 0).parameters() for base in bases]
    optimizers = [torch.optim.AdamW(mine, lr=choice.learning_rate) for mine in trained]
    started, generator = time.perf_counter(), torch.Generator().manual_seed(0)
    for _ in range(N_ROUNDS):
        for base, mine, optimizer in zip(bases, trained, optimizers):
            for _ in range(N_STEPS // N_ROUNDS // n):
                rows = torch.randint(N_IMAGES, (BATCH,), generator=generator)
                text = {
                    name: tensor.to(device) for name, tensor in data.texts(data.caption_rows[rows]).items()
                }
                loss, _ = base.denoise(base.add_noise(data.mean[rows].to(device), generator), text)
                loss.mean().backward()
                torch.nn.utils.clip_grad_norm_(mine, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            for same in zip(*trained):
                mean = torch.stack(same).mean(0)
                for parameter in same:
                    parameter.copy_(mean)
    return {"seconds": time.perf_counter() - started, "mib": peak_mib(device), "parameters": parameters}


def measure(shards: str, device: str) -> dict:
    if shards == COPIES:
        return copied(10, device)
    from benchmarks._models import make_base, random_material, unet
    from memcontrol.config.inner import InnerConfig
    from memcontrol.core.space_yaml import load_space
    from memcontrol.model.adapter import inject_adapter
    from memcontrol.training.rounds import train_rounds

    widths, side = choose_size(device)
    base, space = make_base(unet(widths, side), device), load_space("sd15-sites-complete")
    adapter = inject_adapter(
        base.denoiser,
        space,
        space.choice(space.select_groups("lora"), "lora", 0.5),
        0,
        shared_a=shards != "1",
    )
    inner = InnerConfig(
        budget_images=N_STEPS * BATCH, batch_size=BATCH, rounds=N_ROUNDS, ensemble={"shards": int(shards)}
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train_rounds(
            base,
            adapter,
            random_material(N_IMAGES, side),
            inner,
            seed=0,
            folder=Path(folder),
            progress=lambda *_, **said: None,
        )
    seconds, n = (
        time.perf_counter() - started,
        sum(parameter.numel() for parameter in base.denoiser.parameters()),
    )
    return {"seconds": seconds, "mib": peak_mib(device), "parameters": n}


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
