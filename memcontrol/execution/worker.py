"""Owns a worker: runs jobs with one set of loaded models and says what became of each; knows no database.

`python -m memcontrol.execution.worker` reads jobs as JSON lines; the local executor starts it with its thread
counts set before torch is imported. Ray's actors and Slurm's jobs call `run_job` themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue

from memcontrol.core import interrupt
from memcontrol.core.errors import Diverged, MemControlError, RewardFailed
from memcontrol.core.files import make_private_folder, open_private, write_json
from memcontrol.core.jobs import (
    Calibrated,
    CalibrateJob,
    ConfirmJob,
    Done,
    EncodeJob,
    Event,
    Failed,
    GivenUp,
    HelpJob,
    Job,
    Overtaken,
    Prepared,
    PrepareJob,
    Progress,
    Stopped,
    TrialJob,
    Warned,
    parse_job,
)
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.execution.attempts import Superseded, begin_attempt

# -P: what lies in the working directory must not stand in for modules of the same names
COMMAND = (sys.executable, "-P", "-m", "memcontrol.execution.worker")
_IDLE_SECONDS = 0.5  # between two looks at whether SIGTERM came
SendEvent = Callable[[Event], None]


def run_job(job: Job, loaded, say: SendEvent) -> None:
    """Says progress, then exactly one end; of a share of another process's trial nothing. What is done
    already, by whichever process, is left as it is."""
    if job.is_done():
        return say(Done(job))
    if isinstance(job, HelpJob):
        # what goes wrong here ends the process, and the one that leads the trial meets it itself
        from memcontrol.trial.run import help_trial

        return help_trial(job, loaded)
    try:
        say(_RUN[type(job)](job, loaded, say))
    except RewardFailed as error:
        # before the first trial it costs nothing to mend it; later it is that trial's alone
        is_early = isinstance(job, PrepareJob)
        say(Stopped(job, str(error)) if is_early else GivenUp(job, str(error), traceback.format_exc()))
    except MemControlError as error:
        say(Stopped(job, str(error)))
    except Superseded as error:
        say(Overtaken(job, str(error)))
    except Exception as error:
        traceback.print_exc()
        say(Failed(job, _describe_failure(error, job), traceback.format_exc()))


def collect_events(values: dict, loaded) -> list[dict]:
    """Runs a job that came as JSON in a process of its own. Returns all that was said but progress, which is
    in the job's folder."""
    job = parse_job(values)
    said: list[Event] = []
    _redirect_output(job.folder / job.log_name)
    run_job(job, loaded, said.append)
    return [event.to_json() for event in said if not isinstance(event, Progress)]


def _describe_failure(error: Exception, job: Job) -> str:
    import torch

    kind = "out of memory on the GPU" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    return f"{kind}: {str(error).splitlines()[0] if str(error) else ''} (see {job.folder / job.log_name})"


def _make_progress(
    job: Job, say: SendEvent, tell: Callable[[str, int, int], None] = lambda *_: None
) -> Callable[..., None]:
    def progress(stage: str, done: int, total: int, **said) -> None:
        if stage != "train":  # which saves what it has before it ends
            interrupt.end_if_terminated()
        tell(stage, done, total)
        say(Progress(job, stage, done, total, **said))

    return progress


def _prepare_folder(job: PrepareJob, loaded, say: SendEvent) -> Prepared:
    from memcontrol.trial.prepare import prepare_study

    progress = _make_progress(job, say)
    kept = StudyFolder(job.folder).image_index
    found = prepare_study(job.config, job.folder, loaded, lambda line: say(Warned(job, line)), kept, progress)
    return Prepared(job, **found)


def _calibrate_folder(job: CalibrateJob, loaded, say: SendEvent) -> Calibrated:
    from memcontrol.trial.calibrate import calibrate

    progress = _make_progress(job, say)
    speaks = job.folder == StudyFolder(job.folder.parent).calibration(0)  # one of several that read the same

    def warn(line: str) -> None:
        if speaks:
            say(Warned(job, line))

    found = calibrate(job.config, job.folder, loaded, warn, progress)
    return Calibrated(job, found.as_dict())


def _encode_folder(job: EncodeJob, loaded, say: SendEvent) -> Done:
    from memcontrol.trial.prepare import encode_study

    progress = _make_progress(job, say)
    encode_study(job.config, job.folder, loaded, job.n_train, job.reference, progress)
    return Done(job)


def _confirm_folder(job: ConfirmJob, loaded, say: SendEvent) -> Done:
    from memcontrol.trial.run import confirm_trial

    confirm_trial(job.folder, loaded, _make_progress(job, say))
    return Done(job)


def attempt_trial(job: TrialJob, loaded, say: SendEvent) -> Done:
    """One attempt at a trial, or at its way to a rung, in a folder that it takes over. One that diverges is
    pruned: its choice, not its process, is at fault."""
    from memcontrol.config.spec import read_spec
    from memcontrol.trial.run import run_trial

    attempt, run = begin_attempt(job.folder), RunFolder(job.folder)
    try:
        run_trial(job.folder, loaded, _make_progress(job, say, attempt.progress), job.rung)
    except Diverged as error:
        attempt.check()
        choice = read_spec(job.folder).choice.as_dict()
        write_json(run.result_file, {"state": "PRUNED", "choice": choice, "reason": str(error)})
    attempt.check()
    if run.has_result:
        for rounds in (run.rounds, *run.list_copies_of_rounds()):
            shutil.rmtree(rounds, ignore_errors=True)  # nothing will go on from them
    return Done(job)


_RUN: dict[type[Job], Callable[..., Event]] = {
    PrepareJob: _prepare_folder,
    CalibrateJob: _calibrate_folder,
    EncodeJob: _encode_folder,
    ConfirmJob: _confirm_folder,
    TrialJob: attempt_trial,
}


def _read_jobs() -> SimpleQueue[Job]:
    """Jobs as they come; when the orchestrator is gone, however it died, the process ends at once."""
    queue: SimpleQueue[Job] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            queue.put(parse_job(json.loads(line)))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return queue


def _await_job(jobs: SimpleQueue[Job]) -> Job:
    while True:
        interrupt.end_if_terminated()
        with contextlib.suppress(Empty):
            return jobs.get(timeout=_IDLE_SECONDS)


def _redirect_output(path: Path) -> None:
    """Whatever any library prints goes to the job's log."""
    make_private_folder(path.parent)
    with open_private(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _run_worker() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # the orchestrator's to handle
        signal.signal(number, signal.SIG_IGN)
    interrupt.remember_termination()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    jobs = _read_jobs()

    def say(event: Event) -> None:
        out.write(json.dumps(event.to_json()) + "\n")

    from memcontrol.trial.loaded import LoadedModels

    loaded = LoadedModels(COMMAND)
    while True:
        job = _await_job(jobs)
        _redirect_output(job.folder / job.log_name)
        run_job(job, loaded, say)


if __name__ == "__main__":
    _run_worker()
