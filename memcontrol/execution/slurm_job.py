"""Owns one Slurm job: its files, what runs in it, and how it asks to be begun again where its time is over.

`python -P -m memcontrol.execution.slurm_job RECORD` is what sbatch starts. A job whose record is gone is
wanted by nobody any more, and leaves.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memcontrol.core import interrupt
from memcontrol.core.files import read_json, write_json
from memcontrol.core.jobs import Done, Event, Job, parse_event, parse_job
from memcontrol.execution.attempts import format_now
from memcontrol.execution.worker import COMMAND, collect_events

SECONDS_LEFT = 90  # of its time, when a job is told, so that it can leave a checkpoint
_N_REQUEUES = 3
_time_is_over = False


@dataclass(frozen=True)
class SlurmFiles:
    """Those of a job of that name, which no other job has ever had; it may be known before Slurm's id is."""

    folder: Path
    name: str

    @property
    def record(self) -> Path:
        """What is asked for; written before the job is submitted, and gone once nobody wants its answer."""
        return self.folder / f"{self.name}.json"

    @property
    def script(self) -> Path:
        return self.folder / f"{self.name}.sh"

    @property
    def log(self) -> Path:
        """What is printed before the job has its own log."""
        return self.folder / f"{self.name}.txt"

    @property
    def answer(self) -> Path:
        """What became of the job, written last."""
        return self.folder / f"{self.name}.answer"

    def note(self, job: Job, identity: str | None = None) -> None:
        write_json(self.record, {"id": identity, "submitted": format_now(), "asked": job.to_json()})

    def read_job(self) -> Job:
        return parse_job(read_json(self.record)["asked"])

    def read_identity(self) -> str | None:
        """Slurm's, where sbatch has answered."""
        return read_json(self.record)["id"]

    def write_answer(self, events: list[dict]) -> None:
        write_json(self.answer, events)

    def read_answer(self, job: Job) -> Iterator[Event]:
        return (parse_event(values, job) for values in read_json(self.answer))

    def read_last_lines(self, n: int) -> list[str]:
        if not self.log.is_file():
            return []
        text = self.log.read_text(encoding="utf-8", errors="backslashreplace")
        return [line.strip() for line in text.splitlines() if line.strip()][-n:]

    def forget(self) -> None:
        """Should the job still begin, it leaves at once. What it has printed stays."""
        for path in (self.record, self.script, self.answer):
            path.unlink(missing_ok=True)
        if self.log.is_file() and not self.log.stat().st_size:
            self.log.unlink()


def list_records(folder: Path) -> list[SlurmFiles]:
    return [SlurmFiles(folder, path.stem) for path in sorted(folder.glob("*.json"))]


def run_record(files: SlurmFiles) -> None:
    """Writes the answer last."""
    if not files.record.exists() or files.answer.exists():
        return
    job = files.read_job()
    if job.is_done():  # before anything is loaded
        return files.write_answer([Done(job).to_json()])
    from memcontrol.trial.loaded import LoadedModels

    said = collect_events(job.to_json(), LoadedModels(COMMAND))
    if files.record.exists():
        files.write_answer(said)


def _note_time(number, frame) -> None:
    global _time_is_over
    _time_is_over = interrupt.is_terminated = True


def _requeue() -> None:
    """The same job goes on later from what it has left; not for ever."""
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) < _N_REQUEUES:
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]])


def _main() -> None:
    interrupt.remember_termination()
    signal.signal(signal.SIGUSR2, _note_time)
    record = Path(sys.argv[1])
    try:
        run_record(SlurmFiles(record.parent, record.stem))
    finally:
        if _time_is_over and record.exists() and not record.with_suffix(".answer").exists():
            _requeue()


if __name__ == "__main__":
    _main()
