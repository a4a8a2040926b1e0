"""Owns running jobs on a Slurm cluster through submitit: one Slurm job for each, requeued where its node is
lost or it is preempted."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memcontrol.core.config import SlurmConfig
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import make_private_folder
from memcontrol.core.jobs import Event, Failed, Job, Lost, Progress, parse_event
from memcontrol.core.run_folder import StudyFolder
from memcontrol.execution.executor import Executor, describe_overrun, pick_time_limit, read_new_progress
from memcontrol.execution.worker import COMMAND, collect_events

_SLURM_POLL_SECONDS = 2.0
_GONE = (
    "BOOT_FAIL",
    "CANCELLED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
    "",
)


class _SlurmTask:
    """What runs in a Slurm job; preempted, it is submitted again and goes on from the trial's last round."""

    def __call__(self, values: dict) -> list[dict]:
        from memcontrol.trial.loaded import LoadedModels

        return collect_events(values, LoadedModels(COMMAND))

    def checkpoint(self, values: dict):
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, values)


@dataclass
class Running:
    """A job and the Slurm job that it became."""

    job: Job
    submitted: Any
    began: float | None = None
    reason: str = ""
    told: Progress | None = None


class Slurm(Executor):
    """Up to `n_workers` Slurm jobs in flight; scripts, logs and results of submitit are in the study's
    folder, under slurm/."""

    def __init__(
        self,
        settings: SlurmConfig,
        n_workers: int,
        time_limit_seconds: float | None,
        folder: Path,
        gpus_per_trial: int = 1,
    ):
        self.n_workers, self.time_limit_seconds = n_workers, time_limit_seconds
        self.running: list[Running] = []
        self.submitter = _make_submitter(settings, StudyFolder(folder).slurm, gpus_per_trial)

    def count_free(self) -> int:
        return self.n_workers - len(self.running)

    def submit(self, job: Job) -> None:
        from submitit.core.utils import FailedJobError

        try:
            self.running.append(Running(job, self.submitter.submit(_SlurmTask(), job.to_json())))
        except FailedJobError as error:
            reason = " ".join(str(error).split())[-300:]
            raise MemControlError(
                f"search.executor is slurm, and sbatch refuses the job: {reason}; check the slurm "
                "keys, and that `sinfo` works here"
            ) from None

    def events(self, timeout_seconds: float) -> Iterator[Event]:
        if not self.running:
            return
        deadline = time.monotonic() + timeout_seconds
        while not any(self.has_result(one) for one in self.running) and time.monotonic() < deadline:
            time.sleep(0.1)
        states = _query_states([one.submitted.job_id for one in self.running])
        for one in list(self.running):
            state = states.get(one.submitted.job_id, "")
            if self.has_result(one) or state in _GONE:
                self.running.remove(one)
                yield from self.ended(one, state)
            else:
                yield from self.watched(one, state)

    @staticmethod
    def has_result(one: Running) -> bool:
        return one.submitted.paths.result_pickle.exists()

    def ended(self, one: Running, state: str) -> Iterator[Event]:
        if one.reason or not self.has_result(one):
            tail = (one.submitted.stderr() or "").strip().splitlines()[-20:]
            reason = (
                one.reason
                or f"Slurm job {one.submitted.job_id} ended as {state or 'unknown'} without a result "
                f"(see {one.submitted.paths.stderr})"
            )
            yield Lost(one.job, reason, "\n".join(tail))
            return
        from submitit.core.utils import FailedJobError

        try:
            yield from [parse_event(values, one.job) for values in one.submitted.result()]
        except FailedJobError as error:
            yield Failed(one.job, str(error).strip().splitlines()[-1], str(error))

    def watched(self, one: Running, state: str) -> Iterator[Event]:
        if state == "RUNNING":
            one.began = one.began or time.monotonic()
        limit = pick_time_limit(one.job, self.time_limit_seconds)
        if limit is not None and one.began and time.monotonic() - one.began > limit and not one.reason:
            one.reason = describe_overrun(limit)
            one.submitted.cancel(check=False)
        if told := read_new_progress(one.job, one.told):
            one.told = told
            yield told

    def close(self) -> None:
        for one in self.running:
            one.submitted.cancel(check=False)
        self.running = []


def _query_states(ids: list[str]) -> dict[str, str]:
    """Slurm's word for each job that it still knows; needs no accounting database."""
    done = subprocess.run(
        ["squeue", "--noheader", "--states=all", "--format=%A %T", f"--jobs={','.join(ids)}"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {} if "Invalid job id" in done.stderr else dict.fromkeys(ids, "UNREACHABLE")
    return dict(line.split() for line in done.stdout.splitlines())


def _choose_gres(settings: SlurmConfig, gpus_per_trial: int) -> str | None:
    """The config's own, or as many GPUs as a trial takes where several are asked for and nothing else names
    them."""
    is_named = settings.gres or any(name.startswith(("gpus", "gres")) for name in settings.extra)
    return settings.gres if is_named or gpus_per_trial == 1 else f"gpu:{gpus_per_trial}"


def _make_submitter(settings: SlurmConfig, folder: Path, gpus_per_trial: int):
    """submitit's executor. Raises MemControlError where it or Slurm is missing."""
    try:
        import submitit
    except ImportError:
        raise MemControlError(
            "search.executor is slurm, which needs submitit; install memcontrol[slurm]"
        ) from None
    try:
        make_private_folder(folder)
        made = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_python=sys.executable)
    except RuntimeError as error:
        raise MemControlError(
            f"search.executor is slurm and no Slurm is here ({error}); run the search on a login node"
        ) from None
    threads = settings.cpus
    given = {
        "slurm_partition": settings.partition,
        "slurm_gres": _choose_gres(settings, gpus_per_trial),
        "mem_gb": settings.memory_gb,
        "slurm_account": settings.account,
        "slurm_additional_parameters": dict(settings.extra) or None,
    }
    made.update_parameters(
        name="memcontrol",
        timeout_min=settings.time_minutes,
        cpus_per_task=threads,
        slurm_setup=[f"export OMP_NUM_THREADS={threads} MKL_NUM_THREADS={threads} OMP_WAIT_POLICY=passive"],
        **{key: value for key, value in given.items() if value is not None},
    )
    return made
