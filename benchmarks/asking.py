"""How long a free worker waits for its next choice under `sampler: auto`: a search over 16 sites on a
PostgreSQL of its own, with 4 and 16 simulated workers; the waits after 200 finished trials, and how busy the
workers are."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import yaml

from benchmarks._postgresql import postgresql

N_TRIALS, N_BEFORE = 260, 200
LENGTHS = {4: 2.0, 16: 6.0}  # seconds of a run, by number of workers: real ones take minutes


def run(device: str) -> list[dict]:
    with postgresql() as (folder, server):
        return [
            row
            for n_workers, seconds in LENGTHS.items()
            for row in searched(folder, server.url, n_workers, seconds)
        ]


def searched(folder: Path, url: str, n_workers: int, seconds: float) -> list[dict]:
    import simulated

    from memcontrol.search.sampler import PrefetchedChoices, Sampler

    executor, waits, hurries = simulated.Simulated(n_workers, seconds, clock=time), [], []
    take, prepared = PrefetchedChoices.take, Sampler.prepare_draw

    def timed_take(ahead, records, *args):
        started = time.perf_counter()
        found = take(ahead, records, *args)
        waits.append((executor.n_ended, time.perf_counter() - started))
        return found

    def counted(sampler, records, hurried=False):
        hurries.append((executor.n_ended, hurried))
        return prepared(sampler, records, hurried)

    study_file = folder / f"asking{n_workers}.yaml"
    study_file.write_text(
        yaml.safe_dump(
            {
                "name": study_file.stem,
                "storage": url,
                "data": "digits",
                "space": "sd15-sites",
                "rewards": {"confirm": 0},
                "search": {"trials": N_TRIALS, "workers": n_workers},
            }
        )
    )
    PrefetchedChoices.take, Sampler.prepare_draw = timed_take, counted
    try:
        simulated.search(study_file, executor).close()
    finally:
        PrefetchedChoices.take, Sampler.prepare_draw = take, prepared
    late = [wait for n, wait in waits if n >= N_BEFORE]
    hurried = [hurried for n, hurried in hurries if n >= N_BEFORE]
    return [
        {
            "what": f"{n_workers} workers, runs of {seconds:.0f} s",
            "median_wait_ms": 1000 * statistics.median(late),
            "longest_wait_ms": 1000 * max(late),
            "by_hurried_tpe": statistics.mean(hurried),
            "busy": executor.busy / (n_workers * (executor.last - executor.first)),
        }
    ]
