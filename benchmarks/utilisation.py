"""How much of the machine's matrix arithmetic a training step uses: its counted operations a second over
those of a large matrix product, by how the denoiser is laid out. With `--device cuda`: Stable Diffusion 1.5's
U-Net with random weights, bf16, batch 32 at 512 pixels."""

from __future__ import annotations

import statistics
import time

N_STEPS, N_WARM = 10, 3
# widths, side, batch, precision, matrix
SIZES = {
    "cuda": ((320, 640, 1280, 1280), 64, 32, "bfloat16", 8192),
    "cpu": ((32, 64, 128, 128), 16, 8, "float32", 1024),
}
LAYOUTS = {
    "cuda": ("as loaded", "channels_last", "channels_last, compiled"),
    "cpu": ("as loaded", "channels_last"),
}
METHODS = ("lora", "full")


def run(device: str) -> list[dict]:
    rate = matrix_rate(device)
    rows = [measured(method, layout, device) for method in METHODS for layout in LAYOUTS[device]]
    return [
        {**row, "share of the matrix rate": row["TFLOP/s"] / rate, "matrix product, TFLOP/s": rate}
        for row in rows
    ]


def seconds_each(call, device: str) -> float:
    import torch

    times = []
    for _ in range(N_WARM + N_STEPS):
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[N_WARM:])


def matrix_rate(device: str) -> float:
    import torch

    *_, precision, n = SIZES[device]
    a = torch.randn(n, n, device=device, dtype=getattr(torch, precision))
    return 2 * n**3 / seconds_each(lambda: a @ a, device) / 1e12


def measured(method: str, layout: str, device: str) -> dict:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks._models import make_base, random_material, unet
    from memcontrol.core.space_yaml import load_space
    from memcontrol.model.adapter import inject_adapter

    widths, side, batch, precision, _ = SIZES[device]
    base, space, data = (
        make_base(unet(widths, side), device),
        load_space("sd15-sites-complete"),
        random_material(batch, side).data,
    )
    choice = (
        space.choice(space.select_groups("lora"), "lora", 0.5)
        if method == "lora"
        else space.list_anchors()["full"][1]
    )
    adapter = inject_adapter(base.denoiser, space, choice, 0)
    optimizer = torch.optim.AdamW(adapter.groups(), fused=True)
    if "channels_last" in layout:
        base.denoiser.to(memory_format=torch.channels_last)
    if "compiled" in layout:
        base.denoiser.compile()
    clean, text = (
        data.mean.to(device),
        {name: tensor.to(device) for name, tensor in data.texts(data.caption_rows).items()},
    )
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        with torch.autocast(device, getattr(torch, precision), enabled=precision != "float32"):
            loss = base.denoise(base.add_noise(clean, generator), text)[0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        step()
    seconds = seconds_each(step, device)
    return {
        "trained": method,
        "layout": layout,
        "s per step": seconds,
        "TFLOP a step": counter.get_total_flops() / 1e12,
        "TFLOP/s": counter.get_total_flops() / 1e12 / seconds,
    }
