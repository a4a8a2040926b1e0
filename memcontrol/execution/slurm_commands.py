"""Owns what is asked of Slurm's own commands: sbatch, squeue and scancel; needs no accounting database."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from memcontrol.config.clusters import SlurmConfig
from memcontrol.core import interrupt
from memcontrol.core.console import LOG
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import write_text
from memcontrol.execution.slurm_job import SECONDS_LEFT, SlurmFiles

_Found = TypeVar("_Found")
_PATIENCE_SECONDS, _PAUSE_SECONDS = 600.0, 5.0  # while the controller is away
_AWAY = (
    "unable to contact slurm controller",
    "unable to establish",
    "socket timed out",
    "temporarily",
    "connection refused",
    "zero bytes were transmitted",
    "communication connection failure",
)


@dataclass(frozen=True)
class SlurmState:
    """Slurm's id, its word for the job's state, and the seconds that it has run since it last began."""

    identity: str
    word: str
    seconds: float


def require_slurm() -> None:
    """Raises MemControlError where Slurm is not here."""
    if missing := [name for name in ("sbatch", "squeue", "scancel") if shutil.which(name) is None]:
        raise MemControlError(
            f"search.executor is slurm and no Slurm is here ({missing[0]} is not found); run the search on a "
            "login node"
        )


def query_states(names: Sequence[str]) -> dict[str, SlurmState] | None:
    """By name, of those jobs that Slurm still knows; None where it does not answer."""
    done = _ask_slurm(
        "squeue", "--noheader", "--states=all", "--format=%j|%A|%T|%M", f"--name={','.join(names)}"
    )
    if done.returncode:
        return None
    rows = [line.strip().split("|") for line in done.stdout.splitlines()]
    return {name: SlurmState(identity, word, parse_duration(used)) for name, identity, word, used in rows}


def parse_duration(text: str) -> float:
    """Seconds of Slurm's [days-][hours:]minutes:seconds; 0 of what is none."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, days or "0"]):
        return 0.0
    seconds = 0
    for part in parts:
        seconds = 60 * seconds + int(part)
    return float(86400 * int(days or 0) + seconds)


def wait_for_states(names: Sequence[str]) -> dict[str, SlurmState]:
    """The same; waits while Slurm does not answer. Raises MemControlError."""
    found = _be_patient(lambda: query_states(names), "squeue does not answer")
    if found is None:
        raise MemControlError(
            "search.executor is slurm, jobs of an earlier search may be at work, and squeue does not answer; "
            "run the search again when it does"
        )
    return found


def submit_script(files: SlurmFiles) -> str:
    """Slurm's id of the job. Raises MemControlError where sbatch refuses it, or does not answer for long."""
    refusal = ""

    def submit() -> str | None:
        nonlocal refusal
        if refusal and (known := query_states([files.name])):  # the last try was heard after all
            return known[files.name].identity
        done = _ask_slurm("sbatch", "--parsable", f"--job-name={files.name}", str(files.script))
        if not done.returncode:
            return done.stdout.strip().partition(";")[0]
        refusal = " ".join(done.stderr.split())[-300:]
        return None if any(words in refusal.lower() for words in _AWAY) else ""

    if identity := _be_patient(submit, "sbatch does not answer"):
        return identity
    raise MemControlError(
        f"search.executor is slurm, and sbatch refuses the job: {refusal}; check the slurm keys, and that "
        "`sinfo` works here"
    )


def cancel_jobs(names: Sequence[str]) -> bool:
    """Each gets SIGTERM first. Whether Slurm was told."""
    return all([not _ask_slurm("scancel", f"--name={name}").returncode for name in names])


def _be_patient(ask: Callable[[], _Found | None], what: str) -> _Found | None:
    """What is found, waiting while that is None."""
    deadline, is_told = time.monotonic() + _PATIENCE_SECONDS, False
    while (found := ask()) is None and time.monotonic() < deadline:
        if not is_told:
            LOG.warning("%s; it is asked again for %d minutes", what, _PATIENCE_SECONDS / 60)
        is_told = True
        interrupt.check()
        time.sleep(_PAUSE_SECONDS)
    return found


def _ask_slurm(*words: str) -> subprocess.CompletedProcess:
    """In a session of its own: a signal to this process's group does not end it half-way."""
    return subprocess.run(words, capture_output=True, text=True, errors="replace", start_new_session=True)


def write_script(files: SlurmFiles, settings: SlurmConfig, gpus_per_trial: int) -> None:
    """What sbatch takes. The process is the batch script's own, and so gets its signals."""
    command = [sys.executable, "-P", "-u", "-m", "memcontrol.execution.slurm_job", str(files.record)]
    options = list_options(files, settings, gpus_per_trial)
    flags = [f"#SBATCH --{name}" + ("" if value is True else f"={value}") for name, value in options.items()]
    n = settings.cpus
    setup = f"export OMP_NUM_THREADS={n} MKL_NUM_THREADS={n} OMP_WAIT_POLICY=passive"
    write_text(files.script, "\n".join(["#!/bin/bash", *flags, setup, f"exec {shlex.join(command)}", ""]))


def list_options(files: SlurmFiles, settings: SlurmConfig, gpus_per_trial: int) -> dict[str, str | bool]:
    """Those of sbatch, less the job's name; the config's `extra` comes last."""
    given = {
        "partition": settings.partition,
        "gres": choose_gres(settings, gpus_per_trial),
        "mem": f"{round(1024 * settings.memory_gb)}M" if settings.memory_gb else None,
        "account": settings.account,
    }
    own: dict[str, str | bool] = {
        "nodes": "1",
        "time": str(settings.time_minutes),
        "cpus-per-task": str(settings.cpus),
        "signal": f"B:USR2@{SECONDS_LEFT}",
        "requeue": True,
        "open-mode": "append",
        "output": shlex.quote(str(files.log).replace("%", "%%")),
    }
    named = {name: shlex.quote(value) for name, value in given.items() if value is not None}
    further = {name.replace("_", "-"): shlex.quote(str(value)) for name, value in settings.extra.items()}
    return own | named | further


def choose_gres(settings: SlurmConfig, gpus_per_trial: int) -> str | None:
    """The config's own, or as many GPUs as a trial takes where several are asked for and nothing else names
    them."""
    is_named = settings.gres or any(name.startswith(("gpus", "gres")) for name in settings.extra)
    return settings.gres if is_named or gpus_per_trial == 1 else f"gpu:{gpus_per_trial}"
