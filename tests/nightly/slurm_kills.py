"""A search on a real Slurm whose orchestrator is killed while jobs are pending, running and ending, and is
told once to end: nothing is submitted twice, nothing stays behind, and what comes out is what an undisturbed
search finds.

Needs Debian's slurm-wlm and munge, and root.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from slurm_cluster import Slurm

from memcontrol.core.run_folder import locate_study_folder
from memcontrol.execution.attempts import read_attempts

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not (shutil.which("slurmctld") and shutil.which("munged")),
    reason="needs Debian's slurm-wlm and munge, and root",
)
SEARCH = [sys.executable, "-P", "-m", "memcontrol.cli", "search"]


def write_study(folder: Path, name: str) -> Path:
    """Trials of half a minute; choices that do not depend on the order in which others end. Of three jobs
    at a time two run on the two nodes."""
    study = {
        "name": name,
        "data": {"path": "digits", "train": 32, "holdout": 64, "test": 64},
        "space": "digits",
        "inner": {"budget_images": 3200, "batch_size": 16, "rounds": 4},
        "rewards": {
            "objectives": ["kid", "memorization"],
            "n_samples": 32,
            "sampling_steps": 2,
            "confirm": 0,
        },
        "search": {
            "anchors": ["all"],
            "trials": 4,
            "workers": 3,
            "sampler": "random",
            "executor": "slurm",
        },
        "slurm": {"partition": "short", "time_minutes": 20},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


class Disturbed:
    """One search, begun again after each end that is no good one."""

    def __init__(self, slurm: Slurm, study: Path):
        self.slurm, self.study = slurm, study
        self.folder = locate_study_folder(study, study.stem)
        self.log = study.with_suffix(".log")
        self.begin()

    def begin(self) -> None:
        with open(self.log, "a") as log:
            self.search = subprocess.Popen(
                [*SEARCH, self.study], stdout=log, stderr=log, env=self.slurm.environment
            )

    def until(self, condition) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert self.search.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, "no progress in 5 minutes"
            time.sleep(0.02)

    def kill(self) -> None:
        self.search.kill()
        self.search.wait()

    def read_states(self) -> Counter:
        """Of all jobs that Slurm has to do something for."""
        return Counter(self.slurm.ask("squeue", "-h", "-o", "%T").split())

    def has_trials(self, **wanted: int) -> bool:
        """Whether trials are at work, and so many jobs are in such states."""
        states = self.read_states()
        is_training = any(json.loads(path.read_text())["stage"] == "train" for path in self.list_progress())
        return is_training and all(states[word] >= n for word, n in wanted.items())

    def list_progress(self) -> list[Path]:
        paths = self.folder.glob("*/progress.json")
        return [path for path in paths if not (path.parent / "result.json").exists()]

    def count_results(self) -> int:
        return len(list(self.folder.glob("*/result.json")))

    def count_begun(self) -> int:
        """Attempts that have no result yet."""
        runs = [path.parent for path in self.folder.glob("*/attempts.jsonl")]
        return len([run for run in runs if not (run / "result.json").exists()])

    def count_attempts(self) -> int:
        return sum(len(read_attempts(path.parent)) for path in self.folder.glob("*/attempts.jsonl"))

    def is_said(self, words: str, n: int) -> bool:
        return (self.folder / "search.log").read_text().count(words) >= n

    def read_rewards(self) -> dict[str, dict]:
        results = {
            path.parent.name: json.loads(path.read_text()) for path in self.folder.glob("*/result.json")
        }
        assert {result["state"] for result in results.values()} == {"COMPLETE"}
        return {key: result["rewards"] for key, result in results.items()}


@pytest.fixture
def slurm():
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        made = Slurm(Path(name, "slurm"))
        try:
            yield made
        finally:
            made.close()


def test_whatever_dies_no_choice_is_run_twice_and_no_job_is_left(slurm, tmp_path):
    one = Disturbed(slurm, write_study(tmp_path, "disturbed"))

    # Killed while jobs run and one waits: the next search takes over what has not ended until it asks.
    one.until(lambda: one.has_trials(RUNNING=2, PENDING=1))
    one.kill()
    one.begin()
    one.until(lambda: one.is_said("is taken over", 1))

    # Killed as a job ends, so that nobody hears its answer.
    n_ended = one.count_results()
    one.until(lambda: one.count_results() > n_ended)
    one.kill()
    time.sleep(5)
    one.begin()

    # Killed while it submits.
    one.until(lambda: one.is_said("search of", 3) and one.has_trials(RUNNING=1))
    known = {path.name for path in one.folder.glob("slurm/search/*.json")}
    one.until(lambda: {path.name for path in one.folder.glob("slurm/search/*.json")} - known)
    one.kill()
    one.begin()

    # Told to end: its jobs are cancelled, and have time for a checkpoint.
    one.until(lambda: one.is_said("search of", 4) and one.has_trials(RUNNING=1))
    n_before = one.count_begun()
    one.search.send_signal(signal.SIGTERM)
    assert one.search.wait(timeout=60) == 143 and one.is_said("ended by SIGTERM", 1)
    deadline = time.monotonic() + 60
    while one.read_states() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not one.read_states(), "a job was left in the queue"
    n_interrupted = one.count_begun()
    assert 0 < n_interrupted <= n_before
    begun = [path.parent for path in one.folder.glob("*/attempts.jsonl")]
    assert any(any((run / "rounds").glob("*")) for run in begun if not (run / "result.json").exists())
    one.begin()

    # To the end, beside an undisturbed search.
    assert one.search.wait(timeout=900) == 0, one.log.read_text()[-3000:]
    assert not one.read_states() and not list(one.folder.glob("slurm/search/*.json"))
    assert not list(one.folder.glob("*/failures.json"))
    assert one.count_attempts() == one.count_results() + n_interrupted
    quiet = Disturbed(slurm, write_study(tmp_path, "quiet"))
    assert quiet.search.wait(timeout=900) == 0
    assert quiet.count_attempts() == quiet.count_results() and not quiet.read_states()
    assert one.read_rewards() == quiet.read_rewards()
