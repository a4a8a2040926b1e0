"""Owns running jobs on a Slurm cluster: one Slurm job for each, known on disk before Slurm knows it, so that
the next process takes over what one that was killed has left at work."""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from memcontrol.config.clusters import SlurmConfig
from memcontrol.core.console import LOG
from memcontrol.core.files import make_private_folder
from memcontrol.core.jobs import ConfirmJob, EncodeJob, Event, Job, Lost, Progress, TrialJob
from memcontrol.execution.executor import Executor, describe_overrun, pick_time_limit, read_new_progress
from memcontrol.execution.slurm_commands import (
    SlurmState,
    cancel_jobs,
    query_states,
    require_slurm,
    submit_script,
    wait_for_states,
    write_script,
)
from memcontrol.execution.slurm_job import SlurmFiles, list_records

_QUERY_SECONDS = 2.0  # between two questions to squeue
_SUBMIT_SECONDS = 15.0  # after which a job that was being submitted is known to squeue, or never will be
_N_LINES = 20
_TAKEN_OVER = (TrialJob, ConfirmJob, EncodeJob)
_GONE = {"BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}


@dataclass
class Running:
    """A job, and the files of the Slurm job that it became."""

    job: Job
    files: SlurmFiles
    reason: str = ""
    told: Progress | None = field(default=None)


class Slurm(Executor):
    """Up to `n_workers` Slurm jobs in flight; their records and scripts are in `folder`, which a lock keeps
    for this process. `left` are those that an earlier one did not live to see the end of: each is taken over
    when it is asked for, and cancelled where it is not by the end, or need not be."""

    def __init__(
        self,
        settings: SlurmConfig,
        n_workers: int,
        time_limit_seconds: float | None,
        folder: Path,
        gpus_per_trial: int = 1,
    ):
        require_slurm()
        self.settings, self.gpus_per_trial = settings, gpus_per_trial
        self.n_workers, self.time_limit_seconds = n_workers, time_limit_seconds
        self.running: list[Running] = []
        self.states: dict[str, SlurmState] = {}
        self.asked_at = 0.0
        self.folder, self.lock = _lock_folder(folder)
        for place in folder.parent.iterdir():
            if place.is_dir() and place != self.folder:
                _cancel_unwanted(place)
        self.left, unwanted = _find_left(self.folder)
        self.drop(unwanted)

    @property
    def left_at_work(self) -> frozenset[Path]:
        return frozenset(one.job.folder for one in self.left)

    def count_free(self) -> int:
        return max(self.n_workers - len(self.running), 0)

    def resize(self, n_places: int) -> bool:
        self.n_workers = n_places
        return True

    def submit(self, job: Job) -> None:
        same = [one for one in self.left if one.job == job]
        other = [one for one in self.left if one not in same and _exclude_each_other(one.job, job)]
        self.drop(other)
        if same:
            self.left.remove(same[0])
            self.running.append(same[0])
            LOG.info("Slurm job %s of an earlier process is taken over", same[0].files.name)
        else:
            self.begin(Running(job, SlurmFiles(self.folder, _make_name(self.folder))))

    def begin(self, one: Running) -> None:
        """Raises MemControlError where sbatch refuses it."""
        self.running.append(one)
        one.files.note(one.job)
        write_script(one.files, self.settings, self.gpus_per_trial)
        try:
            identity = submit_script(one.files)
        except Exception:
            self.running.remove(one)
            one.files.forget()
            raise
        one.files.note(one.job, identity)

    def events(self, timeout_seconds: float) -> Iterator[Event]:
        if not self.running:
            return
        deadline = time.monotonic() + timeout_seconds
        while not any(one.files.answer.exists() for one in self.running) and time.monotonic() < deadline:
            time.sleep(0.1)
        is_heard = self.ask_states()
        for one in list(self.running):
            word = self.find_word(one)
            if one.files.answer.exists() or (is_heard and word in _GONE | {""}):
                self.running.remove(one)
                yield from self.ended(one, word)
                one.files.forget()
            else:
                yield from self.watched(one)

    def ask_states(self) -> bool:
        """Whether Slurm was asked just now, and answered."""
        if time.monotonic() - self.asked_at < _QUERY_SECONDS:
            return False
        self.asked_at = time.monotonic()
        found = query_states([one.files.name for one in self.running])
        self.states = self.states if found is None else found
        return found is not None

    def find_word(self, one: Running) -> str:
        state = self.states.get(one.files.name)
        return state.word if state else ""

    def ended(self, one: Running, word: str) -> Iterator[Event]:
        if one.files.answer.exists():
            yield from one.files.read_answer(one.job)
            return
        lines = one.files.read_last_lines(_N_LINES)
        number = one.files.read_identity()
        reason = one.reason or f"Slurm job {number} ended as {word or 'unknown'} without a result" + (
            f"; the last that it printed: {lines[-1]} (see {one.files.log})" if lines else ""
        )
        yield Lost(one.job, reason, "\n".join(lines))

    def watched(self, one: Running) -> Iterator[Event]:
        limit, state = pick_time_limit(one.job, self.time_limit_seconds), self.states.get(one.files.name)
        if limit is not None and state and state.word == "RUNNING" and state.seconds > limit:
            one.reason = describe_overrun(limit)
            cancel_jobs([one.files.name])
        if told := read_new_progress(one.job, one.told):
            one.told = told
            yield told

    def drop(self, unwanted: list[Running]) -> None:
        """Cancels what has not ended. What Slurm could not be told of stays on record, for the next
        process."""
        at_work = [one for one in unwanted if not one.files.answer.exists()]
        is_told = not at_work or cancel_jobs([one.files.name for one in at_work])
        for one in unwanted:
            if is_told or one not in at_work:
                one.files.forget()
        self.left = [one for one in self.left if one not in unwanted]

    def close(self) -> None:
        self.drop([*self.running, *self.left])
        self.running = []
        self.lock.release()


def _make_name(folder: Path) -> str:
    study = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.parent.parent.name)[:40]
    return f"memcontrol-{study}-{uuid.uuid4().hex[:12]}"


def _exclude_each_other(one: Job, other: Job) -> bool:
    """Whether both would write the same run."""
    return all(isinstance(job, (TrialJob, ConfirmJob)) for job in (one, other)) and one.folder == other.folder


def withdraw_jobs(folder: Path) -> None:
    """Those of earlier processes, where trials run elsewhere now: they are cancelled where Slurm is here, and
    leave at once where they begin all the same."""
    if any(list_records(place) for place in folder.parent.glob(f"{folder.name}*")):
        place, lock = _lock_folder(folder)
        for files in list_records(place):
            with contextlib.suppress(FileNotFoundError):  # no Slurm here
                cancel_jobs([files.name])
            files.forget()
        lock.release()


def _lock_folder(folder: Path):
    """A folder that no other living process has, and its lock, which a kill frees: a second process of the
    same kind takes the next."""
    from filelock import FileLock, Timeout

    for i in range(1, 1000):
        place = folder if i == 1 else folder.with_name(f"{folder.name}-{i}")
        make_private_folder(place)
        lock = FileLock(place / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            continue
        return place, lock
    raise RuntimeError(f"a thousand processes hold {folder}")


def _cancel_unwanted(folder: Path) -> None:
    """What nobody wants any more of another command's jobs, where no living process has them: as of a dry
    run that was killed."""
    from filelock import FileLock, Timeout

    with contextlib.suppress(Timeout), FileLock(folder / "lock", timeout=0):
        _, unwanted = _find_left(folder)
        if cancel_jobs([one.files.name for one in unwanted]):
            for one in unwanted:
                one.files.forget()


def _find_left(folder: Path) -> tuple[list[Running], list[Running]]:
    """What an earlier process has left at work and may still be asked for; and what nobody wants any more:
    what is done, and what looks at files that may have changed since."""
    left, unwanted, known = [], [], list_records(folder)
    states = _await_submissions(known) if known else {}
    for files in known:
        one, state = Running(files.read_job(), files), states.get(files.name)
        if state is None or state.word in _GONE | {"COMPLETED"}:
            files.forget()
        elif not isinstance(one.job, _TAKEN_OVER) or one.job.is_done() or files.answer.exists():
            unwanted.append(one)
        else:
            left.append(one)
    return left, unwanted


def _await_submissions(known: list[SlurmFiles]) -> dict[str, SlurmState]:
    """Slurm's words for them. Whoever was killed while it submitted one may have left an sbatch behind, which
    gets through in a moment."""
    names, deadline = [files.name for files in known], time.monotonic() + _SUBMIT_SECONDS
    unanswered = {files.name for files in known if files.read_identity() is None}
    while True:
        states = wait_for_states(names)
        if unanswered <= states.keys() or time.monotonic() > deadline:
            return states
        time.sleep(1.0)
