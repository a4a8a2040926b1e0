"""Time and peak memory of a training step by what is trained, on a U-Net of Stable Diffusion 1.5's structure
at half its width.

Each measurement is a process of its own, so that peaks do not mix; variants take turns, and medians are
compared.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

from benchmarks._processes import medians, peak_mib

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
    """Rows with seconds per step and MiB above the imported libraries, and both relative to full
    fine-tuning."""
    found = medians("benchmarks.adapters", list(VARIANTS), N_REPEATS, device)
    full = found["full fine-tuning"]
    return [
        {
            "trained": name,
            "parameters": int(one["parameters"]),
            "s per step": one["seconds"],
            "peak MiB": one["mib"],
            "time / full": one["seconds"] / full["seconds"],
            "memory / full": one["mib"] / full["mib"],
        }
        for name, one in found.items()
    ]


def measure(name: str, device: str) -> dict:
    import torch

    from benchmarks._models import unet
    from memcontrol.core.space_yaml import load_space
    from memcontrol.model.adapter import inject_adapter
    from memcontrol.model.families import Family

    before = peak_mib(device)
    denoiser = unet((160, 320, 640, 640), SIDE).to(device)
    space = load_space("sd15-sites-complete")
    site = VARIANTS[name]
    choice = space.choice((site[0],), site[1], 0.5) if site else space.list_anchors()["full"][1]
    adapter = inject_adapter(denoiser, space, choice, 0)
    if not site:
        adapter.parts[0].original.clear()  # what plain full fine-tuning does not hold
    optimizer = torch.optim.AdamW(adapter.groups(), fused=True)
    noisy, text = (
        torch.randn(BATCH, 4, SIDE, SIDE, device=device),
        {"prompt_embeds": torch.randn(BATCH, 77, 768, device=device)},
    )
    times = []
    for _ in range(1 + N_STEPS):
        started = time.perf_counter()
        Family().predict(
            denoiser, noisy, torch.full((BATCH,), 500, device=device), text
        ).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return {
        "seconds": statistics.median(times[1:]),
        "mib": peak_mib(device) - before,
        "parameters": adapter.n_trained(),
    }


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
