"""The chaos suite's faults against plain `study.optimize` with heartbeats and retries, beside MemControl
under the same: what is lost, what is paid for twice, and what stays behind. Both on a real PostgreSQL, two
workers, the same faults in the same order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from benchmarks._postgresql import postgresql

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
N_TRIALS, SECONDS, SEED = int(os.environ.get("TRIALS", "32")), 6.0, 0
PATIENCE_SECONDS = 300


def run(device: str) -> list[dict]:
    """Rows, one for each system."""
    from chaos import FAULTS, Chaos, write_study

    with postgresql() as (folder, server):
        plain = make_plain_chaos(Chaos)(
            write_study(folder, "plain", server.url, N_TRIALS), server, N_TRIALS, FAULTS, SEED, print
        )
        plain.run()
        ours = Chaos(write_study(folder, "ours", server.url, N_TRIALS), server, N_TRIALS, FAULTS, SEED, print)
        ours.run()
        return [
            row("study.optimize with heartbeats", plain.counts()),
            row("memcontrol search", count_faults(ours)),
        ]


def row(system: str, counts: Counter) -> dict:
    names = (
        "wanted",
        "finished",
        "left running",
        "evaluations begun",
        "results lost",
        "paid for twice",
        "workers crashed",
        "stuck",
    )
    return {"system": system, **{name: counts[name] for name in names}}


def make_plain_chaos(chaos: type) -> type:
    """The chaos suite's plan of faults, carried out on two processes of plain Optuna that a service manager
    begins again."""

    class Plain(chaos):
        def begin(self) -> None:
            self.log_file, self.workers, self.crashes, self.stuck = (
                self.folder.parent / "evaluations.jsonl",
                [],
                0,
                0,
            )
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.log_file.touch()

        def keep_running(self) -> None:
            if self.search is None:
                self.begin()
                self.search = self
            ended = [worker for worker in self.workers if worker.poll() not in (None, 0)]
            self.crashes += sum(worker.returncode > 0 for worker in ended)  # not those that were killed
            self.workers = [worker for worker in self.workers if worker not in ended]
            while len(self.workers) < 2:
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks._heartbeat_worker",
                    self.server.url,
                    "plain",
                    self.log_file,
                    str(N_TRIALS),
                    str(SECONDS),
                ]
                self.workers.append(
                    subprocess.Popen([str(part) for part in command], stdout=self.log, stderr=self.log)
                )

        def until(self, condition) -> None:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not condition():
                self.keep_running()
                if time.monotonic() > deadline:
                    self.stuck = 1
                    return
                time.sleep(0.2)

        def poll(self) -> int | None:
            """Of a search as a whole: 0 when every worker has ended well."""
            return 0 if all(worker.poll() == 0 for worker in self.workers) else None

        def lines(self, kind: str) -> list[dict]:
            return [
                line
                for line in map(json.loads, self.log_file.read_text().splitlines())
                if line["kind"] == kind
            ]

        def n_ended(self) -> int:
            return len(self.lines("finished")) if self.search else 0

        def busy(self) -> subprocess.Popen:
            while True:
                self.keep_running()
                counts = Counter(
                    {
                        line["pid"]: 1 if line["kind"] == "begun" else 0
                        for line in map(json.loads, self.log_file.read_text().splitlines())
                    }
                )
                found = [worker for worker in self.workers if worker.poll() is None and counts[worker.pid]]
                if found:
                    return found[0]
                time.sleep(0.05)

        def kill_worker(self) -> None:
            self.busy().kill()

        def freeze_workers(self) -> None:
            """Longer than the grace, then woken."""
            self.busy()  # from when on one is at work
            for worker in self.workers:
                worker.send_signal(signal.SIGSTOP)
            time.sleep(30)
            for worker in self.workers:
                worker.send_signal(signal.SIGCONT)

        def kill_orchestrator(self) -> None:
            """There is none; what dies with ours dies here too: both workers."""
            for worker in self.workers:
                worker.kill()
                worker.wait()

        def counts(self) -> Counter:
            import optuna

            for worker in self.workers:
                worker.kill()
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            trials = optuna.load_study(study_name="plain", storage=self.server.url).get_trials()
            told = Counter(
                json.dumps(trial.params, sort_keys=True) for trial in trials if trial.state.name == "COMPLETE"
            )
            ended = Counter(json.dumps(line["params"], sort_keys=True) for line in self.lines("finished"))
            return Counter(
                {
                    "wanted": N_TRIALS,
                    "finished": len(told),
                    "left running": sum(trial.state.name == "RUNNING" for trial in trials),
                    "stuck": self.stuck,
                    "evaluations begun": len(self.lines("begun")),
                    "results lost": sum(params not in told for params in ended),
                    "paid for twice": sum(n - 1 for n in ended.values()),
                    "workers crashed": self.crashes,
                }
            )

    return Plain


def count_faults(chaos) -> Counter:
    from memcontrol.config.load import load_config
    from memcontrol.core.run_folder import RunFolder
    from memcontrol.execution.attempts import read_attempts
    from memcontrol.study.opening import open_study

    config = load_config(chaos.study)
    study = open_study(config, chaos.folder, chaos.study, create=False)
    records = study.records()
    study.close()
    runs = [chaos.folder / choice.key for record in records for choice in record.candidates]
    told = {
        chaos.folder / choice.key for record in records if record.finished for choice in record.candidates
    }
    return Counter(
        {
            "wanted": len(runs),
            "finished": len(told),
            "left running": sum(record.state == "RUNNING" for record in records),
            "evaluations begun": sum(len(read_attempts(run)) for run in runs),
            "results lost": sum(RunFolder(run).result_file.exists() and run not in told for run in runs),
            # begun after it had ended
            "paid for twice": sum(
                RunFolder(run).attempts_file.stat().st_mtime > RunFolder(run).result_file.stat().st_mtime
                for run in runs
            ),
        }
    )
