"""The training loop's own step on a real base: model FLOPs beside the card's matrix rate, its kernels, and
the paths that only a card takes."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._gpu_size import NO_CARD, Size, tell, telling_failures
from benchmarks.utilisation import matrix_rate
from memcontrol.config.inner import InnerConfig
from memcontrol.core.choice import Choice
from memcontrol.core.space import SearchSpace
from memcontrol.core.space_yaml import load_space
from memcontrol.model.adapter import Adapter, inject_adapter
from memcontrol.model.base import Base, load_base
from memcontrol.model.cost import Cost, StepSettings, measure_cost
from memcontrol.model.derive_space import derive_space
from memcontrol.model.encoded import Encoded
from memcontrol.model.precision import Precision
from memcontrol.training.loop import Loop
from memcontrol.training.shard import Material, Shard

N_WARM, N_PROFILED, N_KERNELS, RANK = 2, 2, 15, 16


@dataclass(frozen=True)
class Bench:
    """A base, LoRA in all of its blocks, and random data of its shape."""

    size: Size
    base: Base
    space: SearchSpace
    choice: Choice
    data: Encoded

    @property
    def latents(self) -> tuple[int, ...]:
        return tuple(self.data.mean.shape[1:])

    @property
    def text(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape[1:]) for name, tensor in self.data.text.items()}

    def inject(self) -> Adapter:
        return inject_adapter(self.base.denoiser, self.space, self.choice, 0)

    def count_cost(self, settings: StepSettings | None = None) -> Cost:
        arguments = (self.base.family, self.latents, self.text, settings or StepSettings())
        return measure_cost(self.base.bare_denoiser, self.space, self.choice, *arguments)

    def make_loop(self, adapter: Adapter, batch: int, **inner: Any) -> Loop:
        """The loop that trials are trained by; where the card is too small, with fewer images in a
        forward."""
        n = len(self.data.mean)
        unused = np.zeros((0, 3, 8, 8), np.uint8)
        material = Material(self.data, [""] * n, lambda rows: unused, lambda: self.data)
        nothing = torch.zeros(n, dtype=torch.long)
        shard = Shard(0, torch.arange(n), nothing, nothing.clone())
        settings = InnerConfig(budget_images=1000 * batch, batch_size=batch, **inner)
        return Loop(self.base, adapter, material, settings, shard, 0)


def open_bench(size: Size, path: str, side: int, precision: Precision) -> Bench:
    base = load_base(path, precision)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "derived.yaml"
        place.write_text(derive_space(base.bare_denoiser, "the base"))
        space = load_space(str(place))
    choice = space.choice(space.select_groups("lora"), "lora", 0.5, RANK)
    return Bench(size, base, space, choice, make_data(base, side))


def choose_precision(size: Size, quantized: str | None = None) -> Precision:
    kind = torch.bfloat16 if size.on_card else torch.float32
    return Precision(kind, kind, quantized)


def make_data(base: Base, side: int, n: int = 64) -> Encoded:
    """n random latents and two captions of the base's shapes."""
    generator, sides = torch.Generator().manual_seed(0), side // base.pixels_per_latent
    mean = torch.randn(n, base.n_channels, sides, sides, generator=generator)
    shapes = base.family.list_text_shapes(base.config)
    text = {name: torch.randn(3, *shape, generator=generator) for name, shape in shapes.items()}
    return Encoded(mean, torch.zeros_like(mean), text, torch.arange(n) % 2 + 1)


def wait(size: Size) -> None:
    if size.on_card:
        torch.cuda.synchronize()


def time_steps(bench: Bench, loop: Loop) -> tuple[float, float]:
    """Seconds of a step, and on a card the peak in MiB."""
    for _ in range(N_WARM):
        loop.take_slot(0.5)
    wait(bench.size)
    if bench.size.on_card:  # without what was tried and did not fit
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(bench.size.n_steps):
        loop.take_slot(0.5)
    wait(bench.size)
    seconds = (time.perf_counter() - started) / bench.size.n_steps
    loop.flush()
    return seconds, torch.cuda.max_memory_allocated() / 2**20 if bench.size.on_card else 0.0


def say_memory(mib: float) -> str:
    return f"{mib:.0f} MiB" if mib else NO_CARD


def measure(bench: Bench, checkpointing: bool = False, prefetch: bool = True, **inner: Any) -> tuple:
    """Seconds of a step, MiB, images in a forward."""
    adapter = bench.inject()
    try:
        with bench.base.checkpoint_gradients(checkpointing):
            loop = bench.make_loop(adapter, bench.size.step_batch, **inner)
            if not prefetch:
                loop.reader = None
            return *time_steps(bench, loop), loop.n_forward
    finally:
        adapter.remove()


def run(size: Size) -> None:
    """Model FLOPs, which leave out what checkpointing computes again."""
    rate = matrix_rate(size.device)
    tell("large matrix product", rate, "TFLOP/s", "bf16" if size.on_card else "float32, the CPU's")
    bench = open_bench(size, size.find_base(), size.side, choose_precision(size))
    tflops = bench.count_cost().step_gflops * size.step_batch / 1e3
    tell("a step's model FLOPs", tflops, "TFLOP", f"LoRA everywhere, batch {size.step_batch}")
    for checkpointing in (False, True):
        name = f"MFU, {'with' if checkpointing else 'without'} gradient checkpointing"
        with telling_failures(name):
            seconds, mib, n = measure(bench, checkpointing)
            said = f"{seconds:.3g} s a step, {n} of {size.step_batch} in a forward, {say_memory(mib)}"
            tell(name, tflops / seconds / rate, "of the matrix rate", said)
    with telling_failures("profile"):
        profile(bench)


def profile(bench: Bench) -> None:
    """Kernels by time, in shares of all kernels' time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    adapter = bench.inject()
    try:
        loop = bench.make_loop(adapter, bench.size.step_batch)
        for _ in range(N_WARM):
            loop.take_slot(0.5)
        wait(bench.size)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.size.on_card else [])]
        with watch(activities=kinds) as found:
            started = time.perf_counter()
            for _ in range(N_PROFILED):
                loop.take_slot(0.5)
            wait(bench.size)
            seconds = time.perf_counter() - started
    finally:
        adapter.remove()
    tell_kernels(list_kernels(found, bench.size), seconds)


def list_kernels(found: Any, size: Size) -> list[tuple[str, float, int]]:
    """Name, seconds and calls of each kernel (on a CPU, of each operation by itself), the longest first."""
    events = found.key_averages()
    if size.on_card:
        kernels = [
            (each.key, each.self_device_time_total / 1e6, each.count)
            for each in events
            if each.device_type.name == "CUDA" and not getattr(each, "is_user_annotation", False)
        ]
    else:
        kernels = [(each.key, each.self_cpu_time_total / 1e6, each.count) for each in events]
    return sorted(kernels, key=lambda kernel: -kernel[1])


def tell_kernels(kernels: list[tuple[str, float, int]], seconds: float) -> None:
    total = sum(each for _, each, _ in kernels)
    tell("kernels, all", total / seconds, "of the profiled time", "the rest waits for the CPU")
    for name, each, count in kernels[:N_KERNELS]:
        said = f"{each / N_PROFILED * 1e3:.3g} ms in {count / N_PROFILED:.0f} calls a step"
        tell(f"kernel {name[:70]}".replace("|", "/"), each / total, "of the kernels' time", said)


def run_paths(size: Size) -> None:
    """Each path beside the plain step, in turn with it."""
    bench = open_bench(size, size.find_base(), size.side, choose_precision(size))
    plain, mib, n = measure(bench, checkpointing=True)
    tell("plain step", plain, "s", f"checkpointed, {n} in a forward, {say_memory(mib)}")
    with telling_failures("without the prefetch thread"):
        if size.on_card:
            beside(measure(bench, checkpointing=True, prefetch=False), "without the prefetch thread", plain)
        else:
            tell("without the prefetch thread", NO_CARD)
    with telling_failures("8-bit AdamW"):
        if not size.on_card:
            tell("8-bit AdamW", NO_CARD)
        elif importlib.util.find_spec("bitsandbytes") is None:
            tell("8-bit AdamW", "skipped", beside="bitsandbytes is not installed")
        else:
            beside(measure(bench, checkpointing=True, optimizer="adamw8bit"), "8-bit AdamW", plain)
    with telling_failures("weights not channels_last"):
        bench.base.denoiser.to(memory_format=torch.contiguous_format)
        beside(measure(bench, checkpointing=True), "weights not channels_last", plain)
        bench.base.denoiser.to(memory_format=torch.channels_last)
        beside(measure(bench, checkpointing=True), "channels_last", plain)


def beside(measured: tuple, what: str, plain: float) -> None:
    seconds, mib, _ = measured
    tell(what, seconds / plain, "of the plain step's time", f"{seconds:.3g} s, {say_memory(mib)}")
