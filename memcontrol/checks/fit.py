"""Owns whether fine-tunings of the base fit on the device, counted from shapes before anything is loaded; and
which keys make them fit."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memcontrol.checks.card import describe_card, explain_too_small, propose_memory
from memcontrol.checks.downloads import find_base_folder
from memcontrol.checks.finding import FAIL, OK, WARN, Finding
from memcontrol.checks.machine import LIBRARIES_GIB, count_free_gib
from memcontrol.config.settings import load_study_space
from memcontrol.config.study import Config
from memcontrol.core.choice import EVERYTHING, Choice
from memcontrol.core.files import read_json
from memcontrol.execution.local import list_gpus
from memcontrol.execution.make import count_workers
from memcontrol.model.cost import Cost, StepSettings, measure_cost
from memcontrol.model.counting import make_bare_copy
from memcontrol.model.families import FAMILIES_BY_DENOISER
from memcontrol.model.precision import choose_precision
from memcontrol.model.source import make_empty_denoiser
from memcontrol.training.optimizers import MOMENT_BYTES

_PASSING = "activations and gradients"
_RECOMPUTED = 0.2  # of the activations, with gradient checkpointing: docs/memory.md
_LOW_BYTES = 4.0  # of a parameter and its gradient, with inner.low_memory_full on a card
_KINDS = {"all": "LoRA and its kin", "full": "full fine-tuning"}


def check_usual_fit() -> Finding:
    """Without a study: what fits of Stable Diffusion 1.5, as `init` proposes it."""
    card = describe_card()
    if card is None:
        text = "no GPU: the embedded base is made for it; Stable Diffusion 1.5 takes minutes for some images"
        return Finding("fit", OK, text)
    plan = propose_memory(card.free_gib)
    said = f"Stable Diffusion 1.5 at 512 pixels in {card.free_gib:.1f} GiB: "
    said += f"{plan.micro_batch_size} images in a forward"
    if plan.gradient_checkpointing:
        said += ", recomputing activations"
    if "full" in plan.anchors and not plan.low_memory_full:
        return Finding("fit", OK, f"{said}, full fine-tuning too")
    cure = "inner.low_memory_full: true" if plan.low_memory_full else "search.anchors: [none, all]"
    return Finding("fit", WARN, f"{said}; {explain_too_small(card.free_gib)}", f"in the study file: {cure}")


@dataclass(frozen=True)
class _Room:
    """GiB that a trial may take on the device, which so many of the workers share; of how many there are."""

    gib: float
    device: torch.device
    n_sharing: int = 1
    n_devices: int = 1

    @property
    def name(self) -> str:
        return "on the card" if self.device.type == "cuda" else "in main memory"


def check_fit(config: Config, file: Path) -> Finding:
    """A step of each kind of fine-tuning that the study has, as it is configured. Raises MemControlError
    where the space does not fit the base."""
    folder = find_base_folder(config)
    if folder is None:
        return Finding("fit", WARN, "is not known: the base's configs are not here", "see base")
    if config.search.executor in ("slurm", "ray"):
        return Finding(
            "fit", OK, f"not counted: trials run on {config.search.executor}, and this is another machine"
        )
    room = _find_room(config)
    counted = {
        kind: _count_step(config, folder, room, kind) for kind in ("all", "full") if _runs(config, kind)
    }
    costs = {kind: cost for kind, cost in counted.items() if cost}
    if not costs:
        return Finding("fit", OK, "not counted: this base is of no family whose inputs are known")
    said = ", ".join(f"{_KINDS[kind]} {_measure(cost):.2g} GiB" for kind, cost in costs.items())
    said += f"; {room.gib:.2g} GiB for each worker {room.name}"
    large = [kind for kind, cost in costs.items() if _measure(cost) > room.gib]
    if not large:
        return Finding("fit", OK, said)
    return _propose_cure(config, room, {kind: costs[kind] for kind in large}, said, file)


def _runs(config: Config, kind: str) -> bool:
    """What is sampled is no larger than the anchor `all`."""
    return kind == "all" or "full" in config.search.anchors


def _find_room(config: Config) -> _Room:
    n_workers, card = count_workers(config.search), describe_card()
    if card is None:
        return _Room(count_free_gib() / n_workers, torch.device("cpu"), n_workers)
    n_devices = max(1, len(list_gpus()) // config.search.processes_per_trial)
    n_sharing = -(-n_workers // n_devices)
    return _Room(card.free_gib / n_sharing, torch.device("cuda"), n_sharing, n_devices)


def _measure(cost: Cost) -> float:
    """GiB of a trial."""
    return cost.memory_mib / 2**10 + LIBRARIES_GIB


def _count_step(config: Config, folder: Path, room: _Room, kind: str) -> Cost | None:
    """None where the base's family is not known."""
    inner, low_memory = config.inner, config.inner.low_memory_full and kind == "full"
    precision = choose_precision(config.base_precision, inner.precision, room.device)
    denoiser: Any = make_empty_denoiser(str(folder))
    family = FAMILIES_BY_DENOISER.get(type(denoiser).__name__, lambda config: None)(denoiser.config)
    if family is None:
        return None
    if precision.weights != torch.float32:
        denoiser = make_bare_copy(denoiser, precision.weights)
    if inner.gradient_checkpointing or low_memory:
        denoiser.enable_gradient_checkpointing()
    side = _find_latent_side(config, folder, denoiser.config)
    space, n_forward = load_study_space(config), inner.micro_batch_size or inner.batch_size
    plain = space.methods[0]
    everything = space.choice(space.select_groups(plain), plain, 0.5)
    choice = Choice((EVERYTHING,), "full", 1e-5) if kind == "full" else everything
    settings = StepSettings(
        forward=n_forward,
        accumulates=n_forward < inner.batch_size,
        moments=MOMENT_BYTES["adafactor" if low_memory else inner.optimizer],
        copies=(4.0 if room.device.type == "cpu" and kind == "full" else 0.0) + (4.0 if inner.ema else 0.0),
        precision=precision,
        on_card=room.device.type == "cuda",
        ranks=config.search.gpus_per_trial,
        in_blocks=config.shards_base,
    )
    latents = (denoiser.config.in_channels // family.packing, side, side)
    text = family.list_text_shapes(denoiser.config)
    shared_a = inner.ensemble.shares_a
    return measure_cost(denoiser, space, choice, family, latents, text, settings, shared_a, low_memory)


def _find_latent_side(config: Config, folder: Path, known: Any) -> int:
    """Of the study's images; the size that the denoiser was made for, unless the study names another."""
    file, made_for = folder / "vae" / "config.json", known.get("sample_size") or 128
    if config.data.resolution is None:
        return made_for
    if not file.is_file():
        return config.data.resolution
    described: Mapping[str, Any] = read_json(file)
    factor = described.get("spatial_compression_ratio") or 2 ** (
        len(described.get("block_out_channels", "1")) - 1
    )
    return max(1, config.data.resolution // factor)


def _propose_cure(config: Config, room: _Room, large: Mapping[str, Cost], said: str, file: Path) -> Finding:
    """The first of a few changes with which all fits."""
    n = config.inner.micro_batch_size or config.inner.batch_size
    fewer = int(room.gib * room.n_sharing / max(map(_measure, large.values())))
    if fewer:
        return Finding("fit", FAIL, said, _write_command(file, {"search.workers": fewer * room.n_devices}))
    size = _find_forward(large.values(), n, room)
    if size:
        halves = config.search.accumulate_on_oom and 2 * size >= n and room.device.type == "cuda"
        said += "; a search halves the images in a forward when it comes to that" if halves else ""
        command = _write_command(file, {"inner.micro_batch_size": size})
        return Finding("fit", WARN if halves else FAIL, said, command)
    if "all" in large and _shrink(large["all"], n, 1, _RECOMPUTED) > room.gib:
        cure = "base_offload: all, base_precision: nf4 (docs/memory.md), or a larger card"
        return Finding("fit", FAIL, said, cure)
    wanted: dict[str, Any] = {"inner.micro_batch_size": 1, "inner.gradient_checkpointing": True}
    if "full" in large and _shrink(large["full"], n, 1, _RECOMPUTED) > room.gib:
        wanted = (wanted if "all" in large else {}) | _spare_full(config, large["full"], n, room)
    return Finding("fit", FAIL, said, _write_command(file, wanted))


def _find_forward(costs: Collection[Cost], n_forward: int, room: _Room) -> int:
    """The most images in a forward, halved from those that there are, with which all fits; 0 where none
    do."""
    size = n_forward
    while size and any(_shrink(cost, n_forward, size) > room.gib for cost in costs):
        size //= 2
    return size


def _shrink(cost: Cost, n_forward: int, size: int, share: float = 1.0) -> float:
    """GiB of a trial with another number of images in a forward, or a share of their activations."""
    gradients = 4.0 * cost.parameters / 2**20  # MiB, in float32
    activations = max(cost.parts[_PASSING] - gradients, 0.0)
    return _measure(cost) - activations * (1 - share * size / n_forward) / 2**10


def _spare_full(config: Config, cost: Cost, n_forward: int, room: _Room) -> dict[str, Any]:
    """Full fine-tuning in the base's own 16 bits where that suffices and may be; else without it."""
    gradients = 4.0 * cost.parameters / 2**20
    activations = max(cost.parts[_PASSING] - gradients, 0.0) * _RECOMPUTED / n_forward
    low = (_LOW_BYTES * cost.parameters / 2**20 + activations) / 2**10 + LIBRARIES_GIB
    if (
        low <= room.gib
        and room.device.type == "cuda"
        and not config.inner.ema
        and config.inner.ensemble.shards == 1
    ):
        return {"inner.micro_batch_size": 1, "inner.low_memory_full": True}
    return {"search.anchors": f"[{','.join(name for name in config.search.anchors if name != 'full')}]"}


def _write_command(file: Path, keys: Mapping[str, Any]) -> str:
    words = [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()
    ]
    return shlex.join(["memcontrol", "search", str(file), *words])
