"""What the stages of a trial hold at their peaks on one base at one size, beside what is predicted from
shapes."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks._gpu_size import NO_CARD, Size, tell
from benchmarks._gpu_step import Bench, choose_precision, open_bench
from benchmarks._real_bases import BASES, FEWER, TOYS
from memcontrol.model.base import Base
from memcontrol.model.batches import release_memory
from memcontrol.model.cost import Cost, StepSettings
from memcontrol.model.counting import count_decoding_bytes, count_encoding_bytes
from memcontrol.model.source import import_libraries
from memcontrol.training.optimizers import MOMENT_BYTES
from memcontrol.trial.memory import StageMemory, read_process_mib

BATCH, N_STEPS, GUIDANCE = 2, 2, 2.0
CAPTIONS = ("a red picture", "")
FAMILIES = ("sd3", "flux")  # checkpointed, as they are trained on the cards that people have


def run(size: Size, name: str, side: str) -> None:
    quantized = "nf4" if name == "flux" else None
    if quantized and not size.on_card:
        tell("nf4", NO_CARD, beside="in float32 instead")
        quantized = None
    if quantized and importlib.util.find_spec("bitsandbytes") is None:
        tell("nf4", "skipped", beside="bitsandbytes is not installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = write(name, Path(folder) / name, size)
        import_libraries()
        held = StageMemory(0.0 if size.on_card else read_process_mib())
        bench = open_bench(size, path, int(side), choose_precision(size, quantized))
        changed = {} if size.toys else FEWER.get(name, {})
        compare(held, bench, checkpointing=name in FAMILIES, said=", ".join(map(say, changed.items())))


def say(change: tuple[str, int]) -> str:
    return f"{change[0]} {change[1]}"


def write(name: str, folder: Path, size: Size) -> str:
    """Random weights of the real widths, drawn where that is fast; or a base that is there."""
    if name not in BASES:
        return name
    if name == size.base:
        return size.find_base()
    kind = torch.bfloat16 if size.on_card else torch.float32
    with torch.device(size.device):
        BASES[name](folder, kind, **(TOYS if size.toys else FEWER).get(name, {}))
    release_memory()
    return str(folder)


def compare(held: StageMemory, bench: Bench, checkpointing: bool, said: str) -> None:
    """Every stage in a trial's order, one image at a time where a stage chooses by what is free."""
    base, side = bench.base, bench.data.mean.shape[-1] * bench.base.pixels_per_latent
    with held.watch("captions"), base.hold_encoders():
        encoders = [getattr(base.pipeline, name) for name in base.source.list_encoders()]
        n_encoders = sum(map(count_bytes, encoders))
        text = base.encode_captions(CAPTIONS)
        del encoders
    with held.watch("encode"):
        base.encode_pixels(np.zeros((1, 3, side, side), np.uint8))
    with held.watch("train"):
        train(bench, checkpointing)
    with held.watch("sample"):
        latents = sample(base, text, side)
    with held.watch("decode"):
        base.decode(latents)
    cost = count_step(bench, checkpointing)
    for stage, predicted in {"captions": n_encoders / 2**20, **predict(bench, cost, side)}.items():
        mib = held.peaks[stage]
        known = f"predicted {predicted:.0f}, {predicted / max(mib, 1):.2f} of it"
        tell(stage, mib, "MiB", "; ".join(filter(None, (known, said))))


def train(bench: Bench, checkpointing: bool) -> None:
    adapter = bench.inject()
    try:
        with bench.base.checkpoint_gradients(checkpointing):
            loop = bench.make_loop(adapter, BATCH)
            for _ in range(N_STEPS):
                loop.take_slot(0.5)
            loop.flush()
    finally:
        adapter.remove()


@torch.no_grad()
def sample(base: Base, text: dict, side: int) -> torch.Tensor:
    """Latents of one image, by two steps with guidance."""
    own, none = ({name: tensor[rows] for name, tensor in text.items()} for rows in (slice(1), slice(1, 2)))
    generators = [torch.Generator().manual_seed(0)]
    call = base.make_conditional_call(generators, base.cast(own), base.cast(none), GUIDANCE, side)
    assert base.denoiser is not None  # placed on the device
    with base.autocast():
        found = base.pipeline(**call, num_inference_steps=2, output_type="latent").images
    sides = side // base.pixels_per_latent
    return base.family.unpack_latents(found, sides, sides)


def count_step(bench: Bench, checkpointing: bool) -> Cost:
    """What a trial would predict as memory_mib."""
    base = bench.base
    beside = 0 if base.device.type == "cuda" else count_bytes(base.autoencoder)
    moments, on_card = MOMENT_BYTES["adamw"], base.device.type == "cuda"
    with base.checkpoint_gradients(checkpointing):
        return bench.count_cost(StepSettings(BATCH, False, moments, 0.0, beside, base.precision, on_card))


def predict(bench: Bench, cost: Cost, side: int) -> dict[str, float]:
    """MiB of each stage after the captions, of which the encoders themselves are all that counts."""
    base, factor = bench.base, bench.base.pixels_per_latent
    autoencoder, weights = count_bytes(base.autoencoder) / 2**20, cost.parts["weights"]
    # a guided base asks about both captions at once; one that knows its guidance about one
    n = 1 if base.config.get("guidance_embeds") else 2
    return {
        "encode": autoencoder + count_encoding_bytes(base.autoencoder, side, factor) / 2**20,
        "train": cost.memory_mib,
        "sample": weights + n * base.count_forward_bytes(bench.latents, bench.text) / 2**20,
        "decode": weights + autoencoder + count_decoding_bytes(base.autoencoder, side, factor) / 2**20,
    }


def count_bytes(model: torch.nn.Module) -> int:
    return sum(each.nbytes for each in model.parameters())
