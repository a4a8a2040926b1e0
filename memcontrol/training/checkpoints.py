"""Owns checkpoints within a round: when one is due, and how it is written beside the training."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from memcontrol.config.inner import InnerConfig
from memcontrol.core import interrupt
from memcontrol.data.cache import save_tensors
from memcontrol.model.adapter import Adapter
from memcontrol.training.loop import Loop
from memcontrol.training.round_files import STATE_KINDS, collect_tensors


def describe_shard(loop: Loop, said: dict) -> dict[str, str]:
    """What a shard's file says beside its tensors: what is `said`, and the shard's own counts."""
    own = {
        "counts": loop.shard.counts,
        "exchanged_at": loop.shard.exchanged_at,
        "scaler": loop.scaler.state_dict(),
    }
    return {"memcontrol": json.dumps(said | own)}


def fits_on_disk(adapter: Adapter, loop: Loop, inner: InnerConfig) -> bool:
    """Whether a whole checkpoint is no larger than inner.checkpoint_gb."""
    n_bytes = sum(tensor.nbytes for tensor in collect_tensors(adapter, loop, STATE_KINDS).values())
    return n_bytes <= inner.checkpoint_gb * 1e9


class Checkpoints:
    """Of one shard within one round, in one file that the next one replaces."""

    def __init__(self, path: Path, inner: InnerConfig, adapter: Adapter, loop: Loop):
        self.path, self.inner, self.adapter, self.loop = path, inner, adapter, loop
        self.written_at = time.monotonic()
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future | None = None

    def is_due(self) -> bool:
        minutes = (time.monotonic() - self.written_at) / 60
        return interrupt.is_terminated or minutes >= self.inner.checkpoint_minutes

    def write(self, said: dict) -> None:
        """Copies what a checkpoint holds, and writes it while the training goes on; where the process was
        told to end, it ends once that is done."""
        self.written_at = time.monotonic()
        if fits_on_disk(self.adapter, self.loop, self.inner):
            tensors = collect_tensors(self.adapter, self.loop, STATE_KINDS)
            copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            self.wait()
            self.writing = self.thread.submit(
                save_tensors, self.path, copies, describe_shard(self.loop, said)
            )
        if interrupt.is_terminated:
            self.wait()
            interrupt.end_if_terminated()

    def wait(self) -> None:
        """Until the last one is written. Raises what writing it raised."""
        if self.writing:
            self.writing.result()
            self.writing = None

    def close(self) -> None:
        """Waits for what is being written."""
        self.thread.shutdown()
        self.wait()
