"""What the outer loop costs: 64 simulated workers, 1,000 trials that sleep 20 s each, on a PostgreSQL of its own, by multivariate TPE:
the share of the time that workers are busy, and what a draw, the wait for one and a tell cost against the number of finished trials."""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

N_WORKERS, N_TRIALS, SECONDS = 64, int(os.environ.get("TRIALS", "1000")), 20.0
GRID = (0, 100, 250, 500, 1000)


def run(device: str) -> list[dict]:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from postgres import Postgres

    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        server = Postgres(folder / "pg")
        try:
            return searched(folder, server)
        finally:
            server.stop("immediate")


def searched(folder: Path, server) -> list[dict]:
    from memcontrol import orchestrate
    from memcontrol.config import load_config, study_folder
    from memcontrol.executors import Event, Executor
    from memcontrol.files import write_json
    from memcontrol.sampling import Ahead, Sampler
    from memcontrol.study import Study

    class Sleeping(Executor):
        """Places whose jobs end after SECONDS, one in ten a little later, with values drawn from the choice."""

        def __init__(self):
            self.running: list[tuple[float, float, dict]] = []
            self.busy, self.first, self.last, self.n_ended = 0.0, None, 0.0, 0

        def free(self) -> int:
            return N_WORKERS - len(self.running)

        def submit(self, job: dict) -> None:
            now = time.monotonic()
            self.first = self.first or now
            length = 0.0 if "prepare" in job else SECONDS * random.Random(str(job["choice"])).choice([1.0] * 9 + [1.1])
            self.running.append((now, now + length, job))

        def events(self, timeout_seconds: float) -> Iterator[Event]:
            first = min((end for _, end, _ in self.running), default=0)
            time.sleep(min(max(first - time.monotonic(), 0), timeout_seconds))
            for begun, end, job in [entry for entry in self.running if entry[1] <= time.monotonic()]:
                self.running.remove((begun, end, job))
                if "prepare" in job:
                    yield Event(job, "prepared", {"sizes": {"train": 100}, "directions": ["minimize", "minimize"]})
                    continue
                self.busy, self.last, self.n_ended = self.busy + end - begun, time.monotonic(), self.n_ended + 1
                write_json(Path(job["trial"]) / "result.json", result_of(job["choice"]))
                yield Event(job, "done")

        def cancel(self, job: dict) -> None: ...

        def close(self) -> None: ...

    def result_of(choice: dict) -> dict:
        draw = random.Random(str(sorted(choice.items(), key=str)))
        n = len(choice["groups"])
        rewards = {"fid": 30 - n + draw.random(), "memorization": 0.02 * n + 0.1 * draw.random()}
        return {"state": "COMPLETE", "choice": choice, "rewards": rewards, "seconds": SECONDS, "measured_with": {"figures": 1}}

    spent: dict[str, list[tuple[int, float]]] = {"draw, in its own thread": [], "wait for a choice": [], "begin": [], "tell": []}

    def timed(name: str, function, n_of):
        def call(*args, **keys):
            started = time.perf_counter()
            found = function(*args, **keys)
            spent[name].append((n_of(*args), time.perf_counter() - started))
            return found

        return call

    study_file = folder / "sleep.yaml"
    study_file.write_text(yaml.safe_dump({
        "name": "sleep", "storage": server.url, "data": "digits", "space": "sd15-blocks", "rewards": {"confirm": 0},
        "search": {"trials": N_TRIALS, "workers": N_WORKERS},
    }))  # fmt: skip
    config, executor = load_config(study_file), Sleeping()

    def n_finished(study: Study, *_) -> int:
        return sum(record.finished for record in study.records())

    Sampler.drawn = timed("draw, in its own thread", Sampler.drawn, lambda sampler, *_: executor.n_ended)
    Ahead.take = timed("wait for a choice", Ahead.take, lambda ahead, records: executor.n_ended)
    Study.begin, Study.finish = timed("begin", Study.begin, n_finished), timed("tell", Study.finish, n_finished)
    before = transactions(server)
    orchestrate.search(config, study_file, study_folder(study_file, "sleep"), executor, lambda event: None, lambda study: None)
    share = executor.busy / (N_WORKERS * (executor.last - executor.first))
    steady = share_while_full(executor, share)
    rows = [
        {"what": f"{N_WORKERS} workers, {executor.n_ended} runs of {SECONDS:.0f} s: busy", "figure": share, "of": "all of the time"},
        {"what": "the same, less the last wave, which no sampler could fill", "figure": steady, "of": "all of the time"},
        {"what": "transactions for each trial", "figure": (transactions(server) - before) / executor.n_ended, "of": ""},
    ]
    for name, times in spent.items():
        for low, high in zip(GRID, GRID[1:]):
            chosen = [seconds for n, seconds in times if low <= n < high]
            if chosen:
                rows.append({"what": f"{name}, {low} to {high} finished trials", "figure": 1000 * statistics.median(chosen), "of": "ms, median"})
    return rows


def share_while_full(executor, share: float) -> float:
    """Busy time over places times time until the last job was handed out, which is one length before the end."""
    whole = executor.last - executor.first
    n_last = (executor.n_ended - 1) % N_WORKERS + 1
    idle_at_end = (N_WORKERS - n_last) * SECONDS
    return share * N_WORKERS * whole / (N_WORKERS * whole - idle_at_end)


def transactions(server) -> int:
    time.sleep(1.5)  # PostgreSQL's statistics lag by about a second
    return server.sql("SELECT xact_commit FROM pg_stat_database WHERE datname = 'postgres'")[0][0]
