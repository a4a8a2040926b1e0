"""Owns a worker: reads jobs as JSON lines, runs them with one Bench, and says what became of each; knows no database.

`python -m memcontrol.worker` is started by the local executor, with its thread counts set before torch is imported.
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

from memcontrol.errors import Diverged, MemControlError
from memcontrol.files import write_json

Say = Callable[[dict], None]


def run_job(job: dict, bench, say: Say) -> None:
    """One job: {"prepare": folder, "config": ...}, {"trial": folder}, {"confirm": folder}, or {"help": folder, "rank": ..., "size":
    ...}, a share of another process's trial. Says progress, then exactly one end."""
    if "help" in job:  # what goes wrong here ends the process, and the one that leads the trial meets it itself
        from memcontrol.run import help_train

        return help_train(Path(job["help"]), job["rank"], job["size"], bench)
    try:
        if "prepare" in job:
            from memcontrol.prepare import prepare

            say({"event": "prepared", **prepare(job["config"], Path(job["prepare"]), bench, lambda line: say({"event": "warning", "text": line}))})
        elif "confirm" in job:
            run_confirm(Path(job["confirm"]), bench, say)
        else:
            run_trial(Path(job["trial"]), bench, say)
    except MemControlError as error:
        say({"event": "stop", "reason": str(error)})


def progress_of(say: Say) -> Callable[..., None]:
    def progress(stage: str, done: int, total: int, **said) -> None:
        say({"event": "progress", "stage": stage, "done": done, "total": total, **said})

    return progress


def run_confirm(folder: Path, bench, say: Say) -> None:
    from memcontrol.run import confirm

    confirm(folder, bench, progress_of(say))
    say({"event": "done"})


def run_trial(folder: Path, bench, say: Say) -> None:
    """A trial that diverges is pruned, one that breaks is failed, both with a result file; other user errors end the search."""
    from memcontrol.run import RESULT, ROUNDS, read_spec, trial

    try:
        trial(folder, bench, progress_of(say))
    except Diverged as error:
        write_json(folder / RESULT, {"state": "PRUNED", "choice": read_spec(folder).choice.as_dict(), "reason": str(error)})
    except MemControlError:
        raise
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error} (see {folder / 'log.txt'})"
        write_json(folder / RESULT, {"state": "FAIL", "choice": read_spec(folder).choice.as_dict(), "reason": reason})
    shutil.rmtree(folder / ROUNDS, ignore_errors=True)  # it ended, however it did: nothing will go on from there
    say({"event": "done"})


def jobs_from_stdin() -> SimpleQueue:
    """Jobs as they come; when the orchestrator is gone, however it died, the process ends at once."""
    queue: SimpleQueue = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            queue.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return queue


def log_to(path: Path) -> None:
    """Whatever any library prints goes to the job's log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the orchestrator's to handle
    out = os.fdopen(os.dup(1), "w", buffering=1)
    jobs = jobs_from_stdin()

    def say(event: dict) -> None:
        out.write(json.dumps(event) + "\n")

    from memcontrol.bench import Bench

    bench = Bench()
    while True:
        job = jobs.get()
        folder = next(job[kind] for kind in ("trial", "prepare", "confirm", "help") if kind in job)
        log_to(Path(folder) / (f"log-{job['rank']}.txt" if "help" in job else "log.txt"))
        run_job(job, bench, say)


if __name__ == "__main__":
    main()
