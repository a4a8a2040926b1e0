"""Where a trial's time goes on a warm worker, by what is trained: the share inside the denoiser's forward and
backward, in training and in sampling, what the rest is, and how long it takes to the first trained step."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

N_REPEATS = int(os.environ.get("REPEATS", "3"))


def run(device: str) -> list[dict]:
    import torch

    from benchmarks.peers import specs
    from memcontrol.trial.run import run_trial

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        loaded, trials = specs(Path(folder), device)
        clock = Clock(torch.device(device))
        base = loaded.base(trials[0].config)
        for mask, spec in enumerate(trials):
            found: list[dict[str, float]] = []
            for i in range(1 + N_REPEATS):
                path = Path(folder) / f"{mask}-{i}"
                spec.write(path)
                found.append(
                    timed(clock, base, lambda path=path, progress=None: run_trial(path, loaded, progress))
                )
            row = {name: statistics.median(one[name] for one in found[1:]) for name in found[0]}
            rows.append({"trained": ", ".join(spec.choice.groups), **row})
    return rows


class Clock:
    """Seconds by what was done; on a GPU its queue is waited for, before and after."""

    def __init__(self, device):
        self.device, self.seconds = device, defaultdict(float)

    def now(self) -> float:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def timing(self, name: str, call):
        def timed(*args, **keys):
            started = self.now()
            try:
                return call(*args, **keys)
            finally:
                self.seconds[name] += self.now() - started

        return timed


def timed(clock: Clock, base, call) -> dict[str, float]:
    """Of one trial."""
    import torch
    from torch.optim import AdamW

    clock.seconds.clear()
    vae, first = base.autoencoder, []
    patched = [
        (base.denoiser, "forward", "denoiser, forward"),
        (torch.Tensor, "backward", "denoiser, backward"),
        (vae, "decode", "decoding"),
        (AdamW, "step", "optimizer"),
    ]
    before = [getattr(owner, name) for owner, name, _ in patched]
    started = clock.now()
    try:
        for (owner, name, what), original in zip(patched, before):
            setattr(owner, name, clock.timing(what, original))
        result = call(
            progress=lambda stage, done, total, **said: (
                first.append(clock.now()) if not first and stage == "train" else None
            )
        )
    finally:
        for (owner, name, _), original in zip(patched, before):
            if owner in (base.denoiser, vae):
                delattr(owner, name)
            else:
                setattr(owner, name, original)
    seconds = clock.now() - started
    inside = clock.seconds["denoiser, forward"] + clock.seconds["denoiser, backward"]
    parts = {
        name: clock.seconds[name]
        for name in ("denoiser, forward", "denoiser, backward", "optimizer", "decoding")
    }
    return {
        "seconds": seconds,
        "share in the denoiser": inside / seconds,
        "to the first step": first[0] - started,
        **parts,
        "scoring": result["scoring_seconds"],
        "rest": seconds - sum(parts.values()) - result["scoring_seconds"],
    }
