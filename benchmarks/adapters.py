"""Time and peak memory of a training step by what is trained, on a U-Net of Stable Diffusion 1.5's structure at half its width.

Each measurement is a process of its own, so that peaks do not mix; variants take turns, and medians are compared.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time

VARIANTS = {
    "full fine-tuning": None,
    "SV-Diff, site down_0_0": ("down_0_0", "svdiff"),
    "SV-Diff, site mid": ("mid", "svdiff"),
    "SV-Diff, site up_3_2": ("up_3_2", "svdiff"),
    "DiffFit, site mid": ("mid", "difffit"),
    "LoRA, site mid": ("mid", "lora"),
}
N_REPEATS, N_STEPS, BATCH, SIDE = 3, 3, 2, 32


def run(device: str) -> list[dict]:
    """Rows with seconds per step and MiB above the imported libraries, and both relative to full fine-tuning."""
    found: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    for _ in range(N_REPEATS):
        for name in VARIANTS:
            threads = {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "passive"}
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.adapters", name, device], capture_output=True, text=True, check=True, env={**os.environ, **threads}
            )
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {name: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for name, runs in found.items()}
    full = medians["full fine-tuning"]
    return [
        {
            "trained": name, "parameters": int(one["parameters"]), "s per step": one["seconds"], "peak MiB": one["mib"],
            "time / full": one["seconds"] / full["seconds"], "memory / full": one["mib"] / full["mib"],
        }
        for name, one in medians.items()
    ]  # fmt: skip


def measure(name: str, device: str) -> dict:
    import torch
    from diffusers import UNet2DConditionModel

    from memcontrol.adapters import inject
    from memcontrol.families import Family
    from memcontrol.space import load_space

    before = peak_mib(device)
    torch.manual_seed(0)
    denoiser = UNet2DConditionModel(
        sample_size=SIDE, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(160, 320, 640, 640), cross_attention_dim=768,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=8,
    ).to(device)  # fmt: skip
    space = load_space("sd15-sites-complete")
    site = VARIANTS[name]
    choice = space.choice((site[0],), site[1], 0.5) if site else space.anchors()["full"][1]
    adapter = inject(denoiser, space, choice, 0)
    if not site:
        adapter.parts[0].original.clear()  # what plain full fine-tuning does not hold
    optimizer = torch.optim.AdamW(adapter.groups(), fused=True)
    noisy, text = torch.randn(BATCH, 4, SIDE, SIDE, device=device), {"prompt_embeds": torch.randn(BATCH, 77, 768, device=device)}
    times = []
    for _ in range(1 + N_STEPS):
        started = time.perf_counter()
        Family().predict(denoiser, noisy, torch.full((BATCH,), 500, device=device), text).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return {"seconds": statistics.median(times[1:]), "mib": peak_mib(device) - before, "parameters": adapter.n_trained()}


def peak_mib(device: str) -> float:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
