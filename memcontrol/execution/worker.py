"""Owns a worker: runs jobs with one set of loaded models and says what became of each; knows no database.

`python -m memcontrol.execution.worker` reads jobs as JSON lines; the local executor starts it with its thread
counts set before torch is imported. Ray's actors and Slurm's jobs call `run_job` themselves.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

from memcontrol.core.attempts import Superseded, begin_attempt
from memcontrol.core.errors import Diverged, MemControlError
from memcontrol.core.files import write_json
from memcontrol.execution.executor import find_job_folder

COMMAND = (sys.executable, "-m", "memcontrol.execution.worker")
SendEvent = Callable[[dict], None]


def run_job(job: dict, loaded, say: SendEvent) -> None:
    """One job: {"prepare": folder, "config": ..., "calibrate": whether short trials are run in it}, {"trial":
    folder, "rung": share or none}, {"confirm": folder}, or {"help": folder, "rank": ..., "size": ..., "rung":
    ...}, a share of another process's trial. Says progress, then exactly one end: prepared, done, failed (an
    attempt that may be tried again, with its traceback) or stop (what only the user can mend)."""
    # what goes wrong here ends the process, and the one that leads the trial meets it itself
    if "help" in job:
        from memcontrol.trial.run import help_train

        return help_train(Path(job["help"]), job["rank"], job["size"], loaded, job["rung"])
    try:
        if "prepare" in job:
            from memcontrol.trial.prepare import prepare_study

            if job.get("calibrate"):
                from memcontrol.trial.calibrate import calibrate

                say(
                    {
                        "event": "prepared",
                        **calibrate(
                            job["config"], Path(job["prepare"]), loaded, lambda line: None, make_progress(say)
                        ).as_dict(),
                    }
                )
                return
            say(
                {
                    "event": "prepared",
                    **prepare_study(
                        job["config"],
                        Path(job["prepare"]),
                        loaded,
                        lambda line: say({"event": "warning", "text": line}),
                    ),
                }
            )
        elif "confirm" in job:
            run_confirm(Path(job["confirm"]), loaded, say)
        else:
            attempt_trial(Path(job["trial"]), loaded, say, job.get("rung"))
    except MemControlError as error:
        say({"event": "stop", "reason": str(error)})
    except Superseded as error:
        say({"event": "failed", "reason": str(error)})
    except Exception as error:
        traceback.print_exc()
        say({"event": "failed", "reason": describe_failure(error, job), "traceback": traceback.format_exc()})


def describe_failure(error: Exception, job: dict) -> str:
    import torch

    kind = "out of memory on the GPU" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    return (
        f"{kind}: {str(error).splitlines()[0] if str(error) else ''} (see {find_job_folder(job) / 'log.txt'})"
    )


def make_progress(
    say: SendEvent, tell: Callable[[str, int, int], None] = lambda *_: None
) -> Callable[..., None]:
    def progress(stage: str, done: int, total: int, **said) -> None:
        tell(stage, done, total)
        say({"event": "progress", "stage": stage, "done": done, "total": total, **said})

    return progress


def run_confirm(folder: Path, loaded, say: SendEvent) -> None:
    from memcontrol.trial.run import confirm_trial

    confirm_trial(folder, loaded, make_progress(say))
    say({"event": "done"})


def attempt_trial(folder: Path, loaded, say: SendEvent, rung: float | None = None) -> None:
    """One attempt at a trial, or at its way to a rung, in a folder that it takes over. One that diverges is
    pruned: its choice, not its process, is at fault."""
    from memcontrol.core.run_folder import RESULT, ROUNDS
    from memcontrol.core.spec import read_spec
    from memcontrol.trial.run import run_trial

    attempt = begin_attempt(folder)
    try:
        run_trial(folder, loaded, make_progress(say, attempt.progress), rung)
    except Diverged as error:
        attempt.check()
        write_json(
            folder / RESULT,
            {"state": "PRUNED", "choice": read_spec(folder).choice.as_dict(), "reason": str(error)},
        )
    attempt.check()
    if (folder / RESULT).exists():
        shutil.rmtree(folder / ROUNDS, ignore_errors=True)  # nothing will go on from the rounds
    say({"event": "done"})


def read_jobs() -> SimpleQueue:
    """Jobs as they come; when the orchestrator is gone, however it died, the process ends at once."""
    queue: SimpleQueue = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            queue.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return queue


def redirect_output(path: Path) -> None:
    """Whatever any library prints goes to the job's log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def run_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the orchestrator's to handle
    out = os.fdopen(os.dup(1), "w", buffering=1)
    jobs = read_jobs()

    def say(event: dict) -> None:
        out.write(json.dumps(event) + "\n")

    from memcontrol.trial.loaded import LoadedModels

    loaded = LoadedModels(COMMAND)
    while True:
        job = jobs.get()
        redirect_output(find_job_folder(job) / (f"log-{job['rank']}.txt" if "help" in job else "log.txt"))
        run_job(job, loaded, say)


if __name__ == "__main__":
    run_worker()
