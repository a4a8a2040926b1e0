"""Owns the files of a fine-tuning's rounds: what it goes on from when killed, and how the processes that
share it meet.

Each shard leaves NNNN-SS.safetensors, then one process leaves NNNN-mean.safetensors (where the round
averages) and NNNN-end.json. What follows is a function of these files alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from memcontrol.config.methods import SkipConfig
from memcontrol.data.cache import save_tensors
from memcontrol.model.adapter import Adapter
from memcontrol.model.parts import State
from memcontrol.training.loop import Loop
from memcontrol.training.loss_memory import LossMemory
from memcontrol.training.shard import Shard

STATE_KINDS = ("weights", "ema", "moments")


@dataclass
class ShardState:
    """A shard's file."""

    shard: Shard
    weights: State
    ema: State
    moments: State
    scaler: dict
    records: list[dict]
    # within a round: steps done, and counts and number of losses at its start
    n_done: int = 0
    begun: dict = field(default_factory=dict)


def locate_plan(folder: Path) -> Path:
    """What the folder's rounds depend on."""
    return folder / "plan.json"


class RoundFiles:
    """Of one fine-tuning: its rounds and shards by number, counted from 0."""

    def __init__(self, folder: Path, skip: SkipConfig | None, device: torch.device):
        self.folder, self.skip, self.device = folder, skip, device

    @property
    def start(self) -> Path:
        """The loss gap before anything was learned."""
        return self.folder / "start.json"

    @property
    def noise(self) -> Path:
        """What the noise of a private fine-tuning follows from: a secret, which goes with the rounds."""
        return self.folder / "noise.json"

    def shard(self, number: int, shard: int) -> Path:
        return self.folder / f"{number:04}-{shard:02}.safetensors"

    def partial(self, number: int, shard: int) -> Path:
        """Of a shard within a round."""
        return self.folder / f"{number:04}-{shard:02}-part.safetensors"

    def mean(self, number: int) -> Path:
        return self.folder / f"{number:04}-mean.safetensors"

    def end(self, number: int) -> Path:
        return self.folder / f"{number:04}-end.json"

    def last_mean(self, number: int) -> Path | None:
        """Of the averagings before the round."""
        return next((self.mean(i) for i in reversed(range(number)) if self.mean(i).exists()), None)

    def read_shard(self, number: int, shard: int, kinds: Collection[str] = ()) -> ShardState:
        return self.read(self.shard(number, shard), shard, kinds)

    def read(self, path: Path, shard: int, kinds: Collection[str]) -> ShardState:
        """A shard's file; of the large tensors only those of the `kinds` (of KINDS) that are asked for."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()["memcontrol"])
            own = {name: file.get_tensor(name) for name in file.keys() if " " not in name}
        memory = (
            LossMemory(self.skip, own["bank"].to(self.device), own["weight"].to(self.device))
            if self.skip
            else None
        )
        state = Shard(
            shard,
            own["rows"],
            own["skips"],
            own["skipped"],
            memory,
            own["queue"],
            own["closeness"],
            own["losses"].tolist(),
            Counter(said["counts"]),
            said["exchanged_at"],
        )
        weights, ema, moments = (select_tensors(path, kind) if kind in kinds else {} for kind in STATE_KINDS)
        n_done, begun = said.get("n_done", 0), said.get("begun", {})
        return ShardState(state, weights, ema, moments, said["scaler"], said["records"], n_done, begun)

    def holds_weights(self, path: Path) -> bool:
        """Whether a fine-tuning can go on from the file."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return any(name.startswith("weights ") for name in file.keys())

    def write_mean(self, number: int, mean: State, ema: State, moments: State) -> None:
        """What a round's shards were averaged to."""
        found = _prefix_kinds(mean, "weights", "offsets") | _prefix_kinds(ema, "ema", "ema_offsets")
        save_tensors(
            self.mean(number), found | {f"moments {name}": moment for name, moment in moments.items()}
        )

    def drop_before(self, number: int, shards: Iterable[int], means: bool) -> None:
        """The files that no round from this one on looks at; `means`: those of earlier averagings too."""
        for shard in shards if number else ():
            self.shard(number - 1, shard).unlink(missing_ok=True)
        for i in range(number if means else 0):
            self.mean(i).unlink(missing_ok=True)


def collect_tensors(adapter: Adapter, loop: Loop, kinds: Collection[str]) -> State:
    """All that a shard's file holds: "KIND NAME" of the large tensors, and the shard's own."""
    shard = loop.shard
    large: dict[str, State] = {
        "weights": dict(adapter.named_parameters()),
        "ema": dict(zip(loop.trained, loop.shadows)),
        "moments": loop.moments(),
    }
    found: State = {f"{kind} {name}": each for kind in kinds for name, each in large[kind].items()}
    found |= {
        "rows": shard.rows,
        "skips": shard.skips,
        "skipped": shard.skipped,
        "queue": shard.queue,
        "closeness": shard.queue_closeness,
    }
    found["losses"] = torch.tensor(shard.losses, dtype=torch.float64)
    if shard.memory:
        found |= {"bank": shard.memory.bank, "weight": shard.memory.weight}
    return found


def select_tensors(path: Path | None, kind: str) -> State:
    """The file's tensors of a kind, by their own names; none where there is no file."""
    from safetensors import safe_open

    if path is None:
        return {}
    with safe_open(path, "pt") as file:
        return {
            name.removeprefix(f"{kind} "): file.get_tensor(name)
            for name in file.keys()
            if name.startswith(f"{kind} ")
        }


def _prefix_kinds(state: State, kind: str, offsets: str) -> State:
    return {
        f"{offsets if name.endswith('.offset') else kind} {name}": tensor for name, tensor in state.items()
    }
