"""What the outer loop costs: 64 simulated workers, 1,000 trials that sleep 20 s each, on a PostgreSQL of its
own, by multivariate TPE: the share of the time that workers are busy, and what a draw, the wait for one and a
tell cost against the number of finished trials."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from pathlib import Path
from unittest import mock

import yaml

from benchmarks._postgresql import postgresql

N_WORKERS, N_TRIALS, SECONDS = (
    int(os.environ.get("WORKERS", "64")),
    int(os.environ.get("TRIALS", "1000")),
    20.0,
)
GRID = (0, 100, 250, 500, 1000, 2500, 5000, 10000)


def run(device: str) -> list[dict]:
    with postgresql() as (folder, server):
        return searched(folder, server)


def searched(folder: Path, server) -> list[dict]:
    import simulated

    from memcontrol.search.sampler import PrefetchedChoices, Sampler
    from memcontrol.study.store import Study

    executor = simulated.Simulated(N_WORKERS, SECONDS, clock=time)
    watched = {
        "draw, in its own thread": (Sampler, "pick_new"),
        "wait for a choice": (PrefetchedChoices, "take"),
        "begin": (Study, "begin"),
        "tell": (Study, "finish"),
    }
    spent: dict[str, list[tuple[int, float]]] = {name: [] for name in watched}

    def timed(name: str, function):
        def call(*args, **keys):
            started = time.perf_counter()
            found = function(*args, **keys)
            spent[name].append((executor.n_ended, time.perf_counter() - started))
            return found

        return call

    study_file = folder / "sleep.yaml"
    study_file.write_text(
        yaml.safe_dump(
            {
                "name": "sleep",
                "storage": server.url,
                "data": "digits",
                "space": "sd15-blocks",
                "rewards": {"confirm": 0},
                "search": {"trials": N_TRIALS, "workers": N_WORKERS, "sampler": "tpe"},
            }
        )
    )
    before = transactions(server)
    with contextlib.ExitStack() as stack:
        for name, (owner, method) in watched.items():
            stack.enter_context(mock.patch.object(owner, method, timed(name, getattr(owner, method))))
        simulated.search(study_file, executor).close()
    share = executor.busy / (N_WORKERS * (executor.last - executor.first))
    steady = share_while_full(executor, share)
    rows = [
        {
            "what": f"{N_WORKERS} workers, {executor.n_ended} runs of {SECONDS:.0f} s: busy",
            "figure": share,
            "of": "all of the time",
        },
        {
            "what": "the same, less the last wave, which no sampler could fill",
            "figure": steady,
            "of": "all of the time",
        },
        {
            "what": "transactions for each trial",
            "figure": (transactions(server) - before) / executor.n_ended,
            "of": "",
        },
    ]
    for name, times in spent.items():
        for low, high in zip(GRID, GRID[1:]):
            chosen = [seconds for n, seconds in times if low <= n < high]
            if chosen:
                rows.append(
                    {
                        "what": f"{name}, {low} to {high} finished trials",
                        "figure": 1000 * statistics.median(chosen),
                        "of": "ms, median",
                    }
                )
    return rows


def share_while_full(executor, share: float) -> float:
    """Busy time over places times time until the last job was handed out, which is one length before the
    end."""
    whole = executor.last - executor.first
    n_last = (executor.n_ended - 1) % N_WORKERS + 1
    idle_at_end = (N_WORKERS - n_last) * SECONDS
    return share * N_WORKERS * whole / (N_WORKERS * whole - idle_at_end)


def transactions(server) -> int:
    time.sleep(1.5)  # PostgreSQL's statistics lag by about a second
    return server.sql("SELECT xact_commit FROM pg_stat_database WHERE datname = 'postgres'")[0][0]
