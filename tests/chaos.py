"""The chaos suite: a search on a real PostgreSQL while its workers are killed and frozen, its orchestrator is
killed and told to end and the database is stopped; then the invariants, over the database and the run
folders, and an undisturbed search to compare with.

`python tests/chaos.py [--trials N] [--seed S]` (make chaos) runs it in full and prints what happened;
tests/test_chaos.py a short one.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import yaml
from optuna.artifacts import get_all_artifact_meta
from postgres import Postgres

from memcontrol.config.load import load_config
from memcontrol.core.run_folder import RunFolder, StudyFolder, locate_study_folder
from memcontrol.execution.attempts import read_attempts, read_failures
from memcontrol.execution.job_queue import N_TRIES
from memcontrol.study.opening import open_study
from memcontrol.study.pareto import find_front

SEARCH = [sys.executable, "-m", "memcontrol.cli", "search"]
TIME_LIMIT_SECONDS = 45
OUTAGE_SECONDS = 20
FAULTS = Counter(
    {
        "kill worker": 4,
        "freeze workers": 2,
        "kill orchestrator": 5,
        "terminate orchestrator": 3,
        "stop database": 3,
        "cut connections": 2,
        "exhaust connections": 1,
    }
)


def write_study(folder: Path, name: str, url: str, trials: int, executor: str = "local", **keys) -> Path:
    """Short trials; choices that do not depend on the order in which others end, so that any two runs ask for
    the same."""
    study = {
        "name": name,
        "storage": url,
        "data": {"path": "digits", "train": 32, "holdout": 64, "test": 64},
        "space": "digits",
        "inner": {"budget_images": 192, "batch_size": 16, "rounds": 4},
        "rewards": {
            "objectives": ["kid", "memorization"],
            "n_samples": 32,
            "sampling_steps": 2,
            "confirm": 1,
        },
        "search": {
            "trials": trials - 3,
            "workers": 2,
            "sampler": "random",
            "executor": executor,
            "time_limit_minutes": TIME_LIMIT_SECONDS / 60,
        },
        **keys,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


class Chaos:
    """One disturbed search: faults in a seeded order, each when another part of the trials has ended."""

    def __init__(
        self, study: Path, server: Postgres, trials: int, faults: Counter, seed: int, say=lambda line: None
    ):
        self.study, self.server, self.trials, self.say = study, server, trials, say
        self.folder = locate_study_folder(study, load_config(study).name)
        self.plan = [fault for fault, n in faults.items() for _ in range(n)]
        random.Random(seed).shuffle(self.plan)
        self.started = time.monotonic()
        self.done: Counter = Counter()
        self.search, self.n_late = None, 0
        self.log = open(self.folder.parent.parent / "search.log", "a")

    def run(self) -> None:
        """Until the search has ended by itself and every fault was met."""
        n_faults = len(self.plan)
        for i, fault in enumerate(self.plan):
            self.until(lambda i=i: self.n_ended() >= (i + 1) * self.trials // (n_faults + 2))
            self.say(f"{time.monotonic() - self.started:5.0f} s, {self.n_ended():2} runs ended: {fault}")
            getattr(self, fault.replace(" ", "_"))()
            self.done[fault] += 1
        self.until(lambda: self.search.poll() == 0)
        self.log.close()

    def begin(self) -> None:
        self.search = subprocess.Popen([*SEARCH, self.study], stdout=self.log, stderr=self.log)

    def until(self, condition) -> None:
        """Waits, with a search running: one that ended badly is begun again, as a user or a service manager
        would."""
        deadline = time.monotonic() + 600
        while True:
            if self.search is None or self.search.poll() not in (None, 0):
                time.sleep(1)
                self.begin()
            if condition():
                return
            assert time.monotonic() < deadline, f"no progress in 10 minutes; see {self.log.name}"
            time.sleep(0.2)

    def n_ended(self) -> int:
        return len(list(self.folder.glob("*/result.json")))

    def find_workers(self) -> list[psutil.Process]:
        """Those at work on a run, told by the attempts in the run folders; never one whose third failure it
        would be, which ends a run. Empty where all work is done."""
        while self.search.poll() != 0:
            if self.search.poll() is not None:
                self.begin()
            try:
                workers = [
                    child
                    for child in psutil.Process(self.search.pid).children()
                    if "memcontrol.execution.worker" in " ".join(child.cmdline())
                ]
            except psutil.Error:  # one of them ended just now
                continue
            runs = [
                path.parent
                for path in self.folder.glob("*/attempts.jsonl")
                if not RunFolder(path.parent).result_file.exists()
            ]
            busy = {read_attempts(run)[-1]["pid"] for run in runs if len(read_failures(run)) < N_TRIES - 1}
            found = [worker for worker in workers if worker.pid in busy]
            if found:
                return found
            time.sleep(0.05)
        return []

    def kill_worker(self) -> None:
        if workers := self.find_workers():
            workers[0].kill()
        else:
            self.n_late += 1

    def freeze_workers(self) -> None:
        """All at work, as where a machine hangs (one alone would leave the other time to end the search):
        stopped past their time limit, then woken: by then they are dead, and that wakes nobody."""
        workers = self.find_workers()
        self.n_late += not workers
        for worker in workers:
            worker.suspend()
        deadline = time.monotonic() + 2 * TIME_LIMIT_SECONDS
        while any(map(is_alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.5)
        for worker in filter(is_alive, workers):
            worker.send_signal(signal.SIGCONT)

    def kill_orchestrator(self) -> None:
        if self.search.poll() is None:
            os.kill(self.search.pid, signal.SIGKILL)
        self.search.wait()

    def terminate_orchestrator(self) -> None:
        """As a service manager does: it ends by itself, with its workers."""
        self.search.terminate()
        status = self.search.wait(timeout=60)
        # 0: it had ended; -15: it had not come to what heeds signals
        assert status in (128 + signal.SIGTERM, 0, -signal.SIGTERM), f"SIGTERM ended it with {status}"

    def stop_database(self) -> None:
        self.server.outage(OUTAGE_SECONDS, "immediate" if self.done["stop database"] % 2 else "fast")

    def cut_connections(self) -> None:
        self.server.cut_connections()

    def exhaust_connections(self) -> None:
        """Every place that the server has is taken, and those of the search are gone."""
        with self.server.exhausted():
            time.sleep(OUTAGE_SECONDS / 2)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def violations(study_file: Path, trials: int, n_kills: int) -> list[str]:
    """What does not hold of what a search left behind; empty if all does."""
    config = load_config(study_file)
    folder = locate_study_folder(study_file, config.name)
    study = open_study(config, folder, study_file, create=False)
    records, optuna_trials, found = study.records(), study.inner.get_trials(), []

    def claim(holds, words) -> None:
        if not holds:
            found.append(words)

    claim(len(records) == trials, f"{len(records)} trials, not {trials}")
    claim(
        {record.state for record in records} == {"COMPLETE"},
        f"states {Counter(record.state for record in records)}",
    )
    claim([record.number for record in records] == list(range(len(records))), "numbers are not dense")
    candidates = [choice for record in records for choice in record.candidates]
    claim(len(set(candidates)) == len(candidates), "a choice was asked for twice")
    for record, trial in zip(records, optuna_trials):
        results = [
            json.loads((RunFolder(folder / choice.key).result_file).read_text())
            for choice in record.candidates
        ]
        own = json.loads((RunFolder(folder / record.choice.key).result_file).read_text())
        claim(
            record.searched == own["rewards"], f"trial {record.number}: rewards differ from its result file"
        )
        claim(
            trial.values == list(record.values.values()),  # measured again, where it was
            f"trial {record.number}: plain Optuna shows other values",
        )
        for choice in record.candidates:
            run = folder / choice.key
            claim(
                RunFolder(run).samples_file.is_file() and (run / "adapter.safetensors").is_file(),
                f"{run}: no samples or no adapter",
            )
            claim(not (run / "rounds").exists(), f"{run}: rounds were left behind")
        if record.anchor is None:
            off = set(trial.params) - {"method", "rank", "learning_rate"}
            claim(
                off >= set(record.choice.groups) and len(trial.params) >= 3,
                f"trial {record.number}: its parameters are not whole",
            )
        if record.confirmed:
            claim(
                record.confirmed
                == json.loads((RunFolder(folder / record.choice.key).confirmed_file).read_text())["rewards"],
                f"trial {record.number}: confirmed rewards differ",
            )
        run, metas = folder / record.choice.key, get_all_artifact_meta(trial, storage=study.storage)
        blobs = {
            meta.filename: (StudyFolder(folder).artifacts / meta.artifact_id).read_bytes() for meta in metas
        }
        claim(
            blobs == {name: (run / name).read_bytes() for name in ("samples.png", "pairs.png")},
            f"trial {record.number}: its artifacts are not its run's pictures",
        )
        study.finish(record.number, results)
    claim(study.inner.get_trials() == optuna_trials, "telling the results again changed something")
    n_attempts = sum(len(read_attempts(folder / choice.key)) for choice in candidates)
    claim(
        len(candidates) <= n_attempts <= len(candidates) + n_kills,
        f"{n_attempts} attempts at {len(candidates)} choices with {n_kills} kills",
    )
    strays = {path.parent.name for path in folder.glob("*/result.json")} - {
        choice.key for choice in candidates
    }
    claim(not strays, f"runs of no trial: {strays}")
    claim(
        len(list(StudyFolder(folder).artifacts.iterdir())) == 2 * len(records),
        "artifacts of no trial, or halves of some",
    )
    study.close()
    return found


def measure_front(study_file: Path) -> tuple[set[str], float]:
    """The keys of all choices, and the hypervolume of the values as searched, against the worst of each."""
    config = load_config(study_file)
    study = open_study(config, locate_study_folder(study_file, config.name), study_file, create=False)
    records = study.records()
    study.close()
    points = [[record.searched[name] for name in config.rewards.names] for record in records]
    (x_worst, y_worst), total, last = (max(column) for column in zip(*points)), 0.0, None
    for i in find_front(points):
        x, y = points[i]
        total += (x_worst - x) * ((y_worst if last is None else last) - y)
        last = y
    return {choice.key for record in records for choice in record.candidates}, total


def disturbed_and_not(folder: Path, trials: int, faults: Counter, seed: int, say) -> list[str]:
    """Runs both, and says what does not hold."""
    server = Postgres(folder / "pg")
    try:
        chaos = Chaos(write_study(folder, "disturbed", server.url, trials), server, trials, faults, seed, say)
        chaos.run()
        # an orchestrator's two workers go with it
        of_both = ("kill orchestrator", "terminate orchestrator", "freeze workers")
        n_kills = faults["kill worker"] + 2 * sum(faults[fault] for fault in of_both)
        found = violations(chaos.study, trials, n_kills)
        if chaos.n_late:
            found.append(f"{chaos.n_late} faults came when all work was done; give it more trials")
        say(f"{time.monotonic() - chaos.started:5.0f} s: ended; the undisturbed run")
        quiet = write_study(folder, "quiet", server.url, trials)
        subprocess.run([*SEARCH, quiet], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found += violations(quiet, trials, 0)
        a, b = measure_front(chaos.study), measure_front(quiet)
        say(f"hypervolume {a[1]:.6g} disturbed, {b[1]:.6g} undisturbed")
        if a != b:
            found.append(
                f"the disturbed run differs from the undisturbed one: hypervolume {a[1]} and "
                f"{b[1]}, {len(a[0] ^ b[0])} choices of one only"
            )
        return found
    finally:
        server.stop("immediate")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        found = disturbed_and_not(
            folder, args.trials, FAULTS, args.seed, lambda line: print(line, flush=True)
        )
        from meddling import HANDS, meddle

        found += meddle(folder, args.trials // 2, HANDS, args.seed, lambda line: print(line, flush=True))
        if found:
            print((folder / "search.log").read_text()[-3000:])
    n_faults, n_hands = FAULTS.total(), HANDS.total()
    print("\n".join(found) or f"all invariants hold after {n_faults} faults and {n_hands} times of meddling")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
