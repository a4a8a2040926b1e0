"""Runs one measurement in a process of its own, so that peaks of memory do not mix."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence


def medians(module: str, variants: Sequence[str], n_repeats: int, device: str) -> dict[str, dict[str, float]]:
    """The median of each figure of `python -m MODULE VARIANT DEVICE` for every variant; variants take
    turns."""
    found: dict[str, list[dict]] = {name: [] for name in variants}
    for _ in range(n_repeats):
        for name in variants:
            found[name].append(measured(module, name, device))
    return {
        name: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        for name, runs in found.items()
    }


def measured(module: str, variant: str, device: str) -> dict:
    threads = {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-m", module, variant, device],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **threads},
    )
    return json.loads(done.stdout.splitlines()[-1])


def peak_mib(device: str) -> float:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
