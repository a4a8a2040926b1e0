"""One part of `python -m benchmarks gpu`, in a process of its own: `python -m benchmarks._gpu_parts PART
SIZE`."""

from __future__ import annotations

import json
import os
import sys

from benchmarks._gpu_size import Size, tell, telling_failures

# of benchmarks that are sized by the environment, which their own processes inherit
SIZED_DOWN = {"SMALL": "1", "REPEATS": "1", "TRIALS": "1"}


def run_search(size: Size) -> None:
    from benchmarks import _gpu_search

    _gpu_search.run(size)


def run_peers(size: Size) -> None:
    """Trials an hour, and how far losses are from ours."""
    from benchmarks import peers

    found: dict[str, dict] = {}
    for name in (peers.OURS[0], *peers.PEERS):
        with telling_failures(name):
            (found[name],) = peers.measured(name, size.device)
            said = f"{found[name]['seconds'][0]:.3g} s a trial, {found[name]['mib']:.0f} MiB"
            tell(f"trials an hour, {name}", peers.per_hour([found[name]]), "", said)
    ours = found.pop(peers.OURS[0], None)
    for name, theirs in found.items() if ours else ():
        ratio = peers.per_hour([ours]) / peers.per_hour([theirs])
        apart = max(abs(a - b) for a, b in zip(ours["losses"][0], theirs["losses"][0]))
        steps = len(theirs["losses"][0])
        tell(f"ours / {name}", ratio, "trials an hour", f"losses of {steps} steps within {apart:.2g}")


def run_step(size: Size) -> None:
    from benchmarks import _gpu_step

    _gpu_step.run(size)


def run_shards(size: Size) -> None:
    from benchmarks import shards
    from benchmarks._processes import measured

    one = None
    for name in ("1", "10", shards.COPIES):
        with telling_failures(f"{name} shards"):
            found = measured("benchmarks.shards", name, size.device)
            one = one or found
            ratio = (
                f"{found['seconds'] / one['seconds']:.2f} and {found['mib'] / one['mib']:.2f} of one shard"
            )
            tell(f"shards: {name}", found["seconds"], "s", f"{found['mib']:.0f} MiB; {ratio}")


def run_trial(size: Size) -> None:
    """A worker that has run a trial before."""
    from benchmarks import trial

    for row in trial.run(size.device):
        tell("to the end of the first step", row["to the first step"], "s", "a warm worker")
        tell("inside the denoiser", row["share in the denoiser"], "of the trial", f"{row['seconds']:.3g} s")
        parts = ", ".join(f"{name} {row[name]:.3g}" for name in ("optimizer", "decoding", "scoring", "rest"))
        tell("the rest", 1 - row["share in the denoiser"], "of the trial", f"s: {parts}")


def run_memory(size: Size, base: str, side: str) -> None:
    from benchmarks import _gpu_memory

    _gpu_memory.run(size, base, side)


def run_paths(size: Size) -> None:
    from benchmarks import _gpu_step

    _gpu_step.run_paths(size)


PARTS = {
    "search": run_search,
    "peers": run_peers,
    "step": run_step,
    "shards": run_shards,
    "trial": run_trial,
    "memory": run_memory,
    "paths": run_paths,
}


if __name__ == "__main__":
    os.environ.update(SIZED_DOWN)
    name, *words = sys.argv[1].split()
    PARTS[name](Size(**json.loads(sys.argv[2])), *words)
