"""Owns whether fine-tunings of the base fit on the device, counted from shapes before anything is loaded; and
which keys make them fit."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from memcontrol.checks.card import describe_card, explain_too_small, propose_memory
from memcontrol.checks.downloads import find_base_folder
from memcontrol.checks.finding import FAIL, OK, WARN, Finding
from memcontrol.checks.machine import LIBRARIES_GIB, count_free_gib
from memcontrol.core.choice import EVERYTHING, Choice
from memcontrol.core.config import Config
from memcontrol.core.files import read_json
from memcontrol.core.settings import load_study_space
from memcontrol.execution.local import list_gpus
from memcontrol.execution.make import count_workers
from memcontrol.model.cost import Cost, StepSettings, measure_cost
from memcontrol.model.counting import make_bare_copy
from memcontrol.model.families import FAMILIES_BY_DENOISER
from memcontrol.model.precision import choose_precision
from memcontrol.model.source import make_empty_denoiser
from memcontrol.training.optimizers import MOMENT_BYTES

_PASSING = "activations and gradients"
_FREE_KEYS = {"inner.micro_batch_size": 1, "inner.gradient_checkpointing": True}
_WORDS = {"all": "LoRA and its kin", "full": "full fine-tuning"}


def check_usual_fit() -> Finding:
    """Without a study: what fits of Stable Diffusion 1.5, as `init` proposes it."""
    card = describe_card()
    if card is None:
        text = "no GPU: the embedded base is made for it; Stable Diffusion 1.5 takes minutes for some images"
        return Finding("fit", OK, text)
    plan = propose_memory(card.free_gib)
    said = f"Stable Diffusion 1.5 at 512 pixels in {card.free_gib:.1f} GiB: {plan.micro_batch_size} images in a forward"
    if plan.gradient_checkpointing:
        said += ", recomputing activations"
    if "full" in plan.anchors and not plan.low_memory_full:
        return Finding("fit", OK, f"{said}, full fine-tuning too")
    cure = "inner.low_memory_full: true" if plan.low_memory_full else "search.anchors: [none, all]"
    return Finding("fit", WARN, f"{said}; {explain_too_small(card.free_gib)}", f"in the study file: {cure}")


@dataclass(frozen=True)
class _Room:
    """GiB that a trial may take on the device, and the device's name."""

    gib: float
    device: torch.device

    @property
    def name(self) -> str:
        return "on the card" if self.device.type == "cuda" else "in main memory"


def check_fit(config: Config, file: Path) -> Finding:
    """A step of each kind of fine-tuning that the study has, as it is configured. Raises MemControlError where
    the space does not fit the base."""
    folder = find_base_folder(config)
    if folder is None:
        return Finding("fit", WARN, "is not known: the base's configs are not here", "see base")
    if config.search.executor in ("slurm", "ray"):
        return Finding("fit", OK, f"not counted: trials run on {config.search.executor}, and this is another machine")
    room = _find_room(config)
    counted = {kind: _count_step(config, folder, room, kind) for kind in ("all", "full") if _runs(config, kind)}
    costs = {kind: cost for kind, cost in counted.items() if cost}
    if not costs:
        return Finding("fit", OK, "not counted: this base is of no family whose inputs are known")
    said = ", ".join(f"{_WORDS[kind]} {_measure(cost):.2g} GiB" for kind, cost in costs.items())
    said += f"; {room.gib:.2g} GiB for each worker {room.name}"
    large = [kind for kind, cost in costs.items() if _measure(cost) > room.gib]
    if not large:
        return Finding("fit", OK, said)
    return _propose_cure(config, folder, room, {kind: costs[kind] for kind in large}, said, file)


def _runs(config: Config, kind: str) -> bool:
    """What is sampled is no larger than the anchor `all`."""
    return kind == "all" or "full" in config.search.anchors


def _find_room(config: Config) -> _Room:
    n_workers, card = count_workers(config.search), describe_card()
    if card is None:
        return _Room(count_free_gib() / n_workers, torch.device("cpu"))
    sharing = -(-n_workers // max(1, len(list_gpus())))
    return _Room(card.free_gib / sharing, torch.device("cuda"))


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
    factor = described.get("spatial_compression_ratio") or 2 ** (len(described.get("block_out_channels", "1")) - 1)
    return max(1, config.data.resolution // factor)


def _propose_cure(
    config: Config, folder: Path, room: _Room, large: Mapping[str, Cost], said: str, file: Path
) -> Finding:
    """The first of a few changes with which all fits; a search halves forwards by itself, where it may."""
    n = config.inner.micro_batch_size or config.inner.batch_size
    by_size = [kind for kind, cost in large.items() if _measure_beside(cost, n) > room.gib]
    if not by_size and config.search.accumulate_on_oom:
        size = _find_forward(large, n, room)
        text = f"{said}; a search halves the images in a forward when it comes to that"
        return Finding("fit", WARN, text, _write_command(file, {"inner.micro_batch_size": size}))
    wanted: dict[str, Any] = dict(_FREE_KEYS)
    if "full" in large and _count_with(config, folder, room, "full", wanted) > room.gib:
        low = wanted | {"inner.low_memory_full": True}
        may_be_low = not config.inner.ema and config.inner.ensemble.shards == 1
        if may_be_low and _count_with(config, folder, room, "full", low) <= room.gib:
            wanted = low
        else:
            anchors = [name for name in config.search.anchors if name != "full"]
            wanted = {"search.anchors": f"[{','.join(anchors)}]"} | (_FREE_KEYS if "all" in large else {})
    if "all" in large and _count_with(config, folder, room, "all", _FREE_KEYS) > room.gib:
        cure = "base_offload: all, base_precision: nf4 (docs/memory.md), fewer search.workers, or a larger card"
        return Finding("fit", FAIL, said, cure)
    return Finding("fit", FAIL, said, _write_command(file, wanted))


def _measure_beside(cost: Cost, n_forward: int) -> float:
    """GiB of a trial with one image in a forward, as far as activations grow with images."""
    return _measure(cost) - cost.parts[_PASSING] / 2**10 * (1 - 1 / n_forward)


def _find_forward(large: Mapping[str, Cost], n: int, room: _Room) -> int:
    """The most images in a forward, halved from those that there are, with which all fits."""
    size = n
    while size > 1 and any(
        _measure(cost) - cost.parts[_PASSING] / 2**10 * (1 - size / n) > room.gib for cost in large.values()
    ):
        size //= 2
    return size


def _count_with(config: Config, folder: Path, room: _Room, kind: str, keys: Mapping[str, Any]) -> float:
    cost = _count_step(config.replaced(keys), folder, room, kind)
    return _measure(cost) if cost else 0.0


def _write_command(file: Path, keys: Mapping[str, Any]) -> str:
    words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()]
    return shlex.join(["memcontrol", "search", str(file), *words])
