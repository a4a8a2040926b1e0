"""What the stages of a trial hold on a card, by real configurations, counted from shapes; and which cards
that fits. Writes the table of docs/memory.md too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks._real_bases import ARCHITECTURES, AUTOENCODER
from memcontrol.core.choice import EVERYTHING, Choice
from memcontrol.core.space_yaml import load_space
from memcontrol.model.cost import StepSettings, measure_cost
from memcontrol.model.counting import (
    PeakBytes,
    count_decoding_bytes,
    count_encoding_bytes,
    make_bare_copy,
    pass_shapes,
)
from memcontrol.model.families import FAMILIES_BY_DENOISER
from memcontrol.model.precision import Precision
from memcontrol.model.source import make_empty_denoiser
from memcontrol.training.optimizers import MOMENT_BYTES

PAGE = Path(__file__).parent.parent / "docs" / "memory.md"
BEGIN, END = "<!-- table: python -m benchmarks memory -->\n", "<!-- end of the table -->\n"
CARDS = (16, 24, 48, 80)  # GB
USABLE = 0.92 * 1e9 / 2**30  # GiB of each GB: the rest is the driver's, and gaps
ENCODERS = {  # parameters of the text encoders, in billions
    "sd15": 0.12,
    "sdxl": 0.82,
    "sd3": 5.58,
    "flux": 4.88,
    "pixart": 4.76,
    "sana": 2.61,
}
CHANNELS = {"sd3": 16, "flux": 16}  # of a latent, where they are not 4


@dataclass(frozen=True)
class Setting:
    """One way to train one base at one size: `keys` are what the study file says."""

    base: str
    side: int
    batch: int
    forward: int
    keys: str
    method: str = "lora"
    checkpointing: bool = False
    quantized: str | None = None
    low_memory: bool = False

    @property
    def precision(self) -> Precision:
        return Precision(torch.bfloat16, torch.bfloat16, self.quantized)


SETTINGS = (
    Setting("sd15", 512, 16, 16, "batch_size: 16, gradient_checkpointing", checkpointing=True),
    Setting("sd15", 512, 16, 4, "batch_size: 16, micro_batch_size: 4"),
    Setting("sd15", 512, 16, 16, "batch_size: 16"),
    Setting("sd15", 512, 16, 4, "full, micro_batch_size: 4, gradient_checkpointing", "full", True),
    Setting("sd15", 512, 16, 4, "full, low_memory_full, micro_batch_size: 4", "full", True, None, True),
    Setting("sdxl", 1024, 4, 1, "micro_batch_size: 1"),
    Setting("sdxl", 1024, 4, 4, "batch_size: 4, gradient_checkpointing", checkpointing=True),
    Setting("sdxl", 1024, 4, 1, "full, low_memory_full, micro_batch_size: 1", "full", True, None, True),
    Setting("sd3", 1024, 4, 1, "micro_batch_size: 1, gradient_checkpointing", checkpointing=True),
    Setting("flux", 512, 4, 1, "base_precision: nf4, micro_batch_size: 1", quantized="nf4"),
    Setting("flux", 512, 4, 1, "the same, gradient_checkpointing", checkpointing=True, quantized="nf4"),
    Setting("flux", 512, 4, 1, "bfloat16, micro_batch_size: 1, gradient_checkpointing", checkpointing=True),
    Setting("flux", 1024, 4, 1, "base_precision: int8, gradient_checkpointing", "lora", True, "int8"),
    Setting("pixart", 1024, 4, 4, "batch_size: 4, gradient_checkpointing", checkpointing=True),
    Setting("sana", 1024, 4, 4, "batch_size: 4, gradient_checkpointing", checkpointing=True),
)
SMALL = (SETTINGS[0], SETTINGS[5])


def measure_stages(setting: Setting) -> dict[str, float]:
    """GiB of each stage at its peak, one image at a time where a stage chooses by what is free."""
    denoiser: Any = make_bare_copy(make_empty_denoiser(str(ARCHITECTURES / setting.base)), torch.bfloat16)
    family = FAMILIES_BY_DENOISER[type(denoiser).__name__](denoiser.config)
    factor = 32 if setting.base == "sana" else 8
    side = setting.side // factor
    n_channels = denoiser.config.in_channels // family.packing
    latents, text = (n_channels, side, side), family.list_text_shapes(denoiser.config)
    if setting.checkpointing:
        denoiser.enable_gradient_checkpointing()
    cost = measure_cost(
        denoiser,
        load_space(f"{setting.base}-blocks"),
        choose(setting),
        family,
        latents,
        text,
        StepSettings(
            forward=setting.forward,
            accumulates=setting.forward < setting.batch,
            moments=MOMENT_BYTES["adafactor" if setting.low_memory else "adamw"],
            precision=setting.precision,
            on_card=True,
        ),
        low_memory_full=setting.low_memory,
    )
    with torch.no_grad(), PeakBytes() as held:
        pass_shapes(denoiser, family, latents, text, 2, torch.bfloat16, True)
    weights = cost.parts["weights"] / 2**10 if setting.method == "lora" else 2 * count(denoiser) / 2**30
    encoding, decoding, autoencoder = measure_autoencoder(setting, factor)
    return {
        "captions": 2 * ENCODERS[setting.base] * 1e9 / 2**30,
        "encode": autoencoder + encoding,
        "train": cost.memory_mib / 2**10,
        "sample": weights + held.peak / 2**30,
        "decode": weights + autoencoder + decoding,
    }


def count(denoiser: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in denoiser.parameters())


def choose(setting: Setting) -> Choice:
    if setting.method == "full":
        return Choice((EVERYTHING,), "full", 1e-5)
    space = load_space(f"{setting.base}-blocks")
    return space.choice(space.select_groups("lora"), "lora", 0.5, 16)


def measure_autoencoder(setting: Setting, factor: int) -> tuple[float, float, float]:
    """GiB of one image's way in and out, and of the autoencoder itself; Sana's, which has another kind, as
    twice that of Stable Diffusion."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        bare = AutoencoderKL(**{**AUTOENCODER, "latent_channels": CHANNELS.get(setting.base, 4)})
    bare = bare.to(torch.bfloat16)
    times = 2 if factor == 32 else 1
    counts = (count_encoding_bytes(bare, setting.side, 8), count_decoding_bytes(bare, setting.side, 8))
    own = 2 * count(bare)
    return times * counts[0] / 2**30, times * counts[1] / 2**30, times * own / 2**30


def run(device: str, settings: tuple[Setting, ...] = SETTINGS, page: Path | None = PAGE) -> list[dict]:
    rows = []
    for setting in settings:
        stages = measure_stages(setting)
        most = max(stages.values())
        fits = [str(card) for card in CARDS if most <= USABLE * card]
        rows.append(
            {
                "base": setting.base,
                "px": setting.side,
                "keys": setting.keys,
                **{name: round(gib, 1) for name, gib in stages.items()},
                "fits GB": f"{fits[0]}+" if fits else "none",
            }
        )
    if page and page.is_file():
        from benchmarks.__main__ import table

        before, rest = page.read_text().split(BEGIN)
        after = rest.split(END)[1]
        page.write_text(f"{before}{BEGIN}\n{table(rows)}\n\n{END}{after}")
    return rows
