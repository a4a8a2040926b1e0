"""Owns executors on this machine: in this process (inline), or in worker processes (local)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from memcontrol.core.files import make_private_folder, open_private
from memcontrol.core.jobs import END_EVENTS, Event, Job, Lost, parse_event
from memcontrol.core.run_folder import StudyFolder
from memcontrol.execution.executor import Executor, describe_overrun, pick_time_limit
from memcontrol.execution.worker import COMMAND
from memcontrol.reading.threads import count_cores

_GRACE_SECONDS = 8.0  # for checkpoints; Docker waits 10 before it kills
_N_TOLD = 3  # lines of what a worker printed at its start


class Inline(Executor):
    """One job at a time, in this process: for tests and debugging."""

    def __init__(self):
        self.waiting: list[Job] = []
        self.loaded = None

    def count_free(self) -> int:
        return 1 - len(self.waiting)

    def submit(self, job: Job) -> None:
        self.waiting.append(job)

    def events(self, timeout_seconds: float) -> Iterator[Event]:
        from memcontrol.execution.worker import run_job
        from memcontrol.trial.loaded import LoadedModels

        self.loaded = self.loaded or LoadedModels(COMMAND)
        while self.waiting:
            job = self.waiting[0]
            said: list[Event] = []
            run_job(job, self.loaded, said.append)
            self.waiting.pop(0)
            yield from said

    def close(self) -> None:
        self.waiting.clear()
        if self.loaded is not None:
            self.loaded.close()


class Local(Executor):
    """A worker process for each place, which keeps the base loaded; one that dies is started again for the
    next job."""

    def __init__(
        self,
        n_workers: int,
        n_processes: int = 1,
        time_limit_seconds: float | None = None,
        folder: Path | None = None,
    ):
        """`folder` is the study's, which keeps what a worker prints before its first job."""
        self.said: queue.Queue = queue.Queue()
        self.time_limit_seconds = time_limit_seconds
        self.n_processes, self.folder = n_processes, folder
        self.workers: list[Worker] = []
        self.resize(n_workers)

    def start_worker(self) -> Worker:
        """At the first number that is free, which says on what GPU."""
        index = next(i for i in itertools.count() if all(worker.index != i for worker in self.workers))
        # whatever n_processes: sums round by the number of threads
        threads = max(1, count_cores() // self.n_places)
        log = StudyFolder(self.folder).worker_log(index) if self.folder else None
        return Worker(index, threads, self.said, self.n_processes, log)

    def resize(self, n_places: int) -> bool:
        self.n_places = n_places
        while len(self.workers) < n_places:
            self.workers.append(self.start_worker())
        self.end_surplus()
        return True

    def end_surplus(self) -> None:
        """Of the workers beyond the number of places, those that have no job, the last first."""
        idle = [worker for worker in self.workers if worker.job is None]
        while idle and len(self.workers) > self.n_places:
            worker = idle.pop()
            self.workers.remove(worker)
            worker.kill()

    def count_free(self) -> int:
        self.end_surplus()
        return sum(worker.job is None for worker in self.workers)

    def submit(self, job: Job) -> None:
        next(worker for worker in self.workers if worker.job is None).take(job)

    def events(self, timeout_seconds: float) -> Iterator[Event]:
        with contextlib.suppress(queue.Empty):
            yield from self.heard(*self.said.get(timeout=timeout_seconds))
            while True:
                yield from self.heard(*self.said.get_nowait())
        for worker in self.workers:
            limit = pick_time_limit(worker.job, self.time_limit_seconds)
            if worker.job is not None and limit is not None and time.monotonic() - worker.began > limit:
                yield self.lost(worker, worker.job, describe_overrun(limit))

    def lost(self, worker: Worker, job: Job, reason: str) -> Event:
        worker.job = None
        worker.kill()
        return Lost(job, reason)

    def heard(self, worker: Worker, process: subprocess.Popen, line: dict | None) -> Iterator[Event]:
        if process is not worker.process or worker.job is None:
            return
        if line is not None:
            worker.has_begun = True
            event = parse_event(line, worker.job)
            if isinstance(event, END_EVENTS):
                worker.job = None
            yield event
        else:
            code = process.wait()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            yield self.lost(worker, worker.job, f"its worker process died ({how}){worker.describe_start()}")

    def close(self) -> None:
        """Workers that have a job leave a checkpoint first, as far as they do so at once."""
        busy = [worker.process for worker in self.workers if worker.job is not None]
        for process in busy:
            process.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in busy:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
        for worker in self.workers:
            worker.kill()


class Worker:
    """One worker process and the job it has."""

    def __init__(
        self,
        index: int,
        n_threads: int,
        said: queue.Queue,
        n_processes: int = 1,
        log: Path | None = None,
    ):
        """`log` takes what it prints before its first job."""
        self.index, self.n_threads, self.said, self.n_processes = index, n_threads, said, n_processes
        self.log = log
        self.job: Job | None = None
        self.began = 0.0
        self.spawn()

    def spawn(self) -> None:
        # Torch reads these when it is imported; threads that spin for two cores make each other up to 30
        # times slower.
        threads = {
            "OMP_NUM_THREADS": str(self.n_threads),
            "MKL_NUM_THREADS": str(self.n_threads),
            "OMP_WAIT_POLICY": "passive",
        }
        # not as Popen's own pipe, which the listener would close while the other thread reads
        end, start = os.pipe()
        self.process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=start,
            text=True,
            env={**os.environ, **threads, **choose_gpus(self.index, self.n_processes)},
        )
        os.close(start)
        self.has_begun = False  # as far as is known: it said something of a job
        self.printed: deque[str] = deque(maxlen=_N_TOLD)
        self.reader = threading.Thread(target=self.keep_printed, args=(end, self.printed), daemon=True)
        self.listener = threading.Thread(target=self.listen, args=(self.process,), daemon=True)
        self.reader.start()
        self.listener.start()

    def keep_printed(self, end: int, printed: deque[str]) -> None:
        """Until its first job, whose log takes whatever it prints then."""
        with os.fdopen(end, encoding="utf-8", errors="backslashreplace") as stderr:
            for line in stderr:
                if line.strip():
                    printed.append(line.strip())
                if self.log:
                    with contextlib.suppress(OSError):  # a full disk, say
                        make_private_folder(self.log.parent)
                        with open_private(self.log, "a", encoding="utf-8") as file:
                            file.write(line)

    def describe_start(self) -> str:
        """The last that it printed, where it came to no job."""
        self.reader.join(timeout=1.0)  # a process that it began may hold the other end
        if self.has_begun or not self.printed:
            return ""
        where = f" (see {self.log})" if self.log else ""
        return f" before its first job; the last that it printed: {' / '.join(self.printed)}{where}"

    def listen(self, process: subprocess.Popen) -> None:
        with contextlib.suppress(BrokenPipeError), process:
            for line in process.stdout or ():
                self.said.put((self, process, json.loads(line)))
        self.said.put((self, process, None))

    def take(self, job: Job) -> None:
        self.job, self.began = job, time.monotonic()
        if self.process.poll() is not None:
            self.spawn()
        with contextlib.suppress(BrokenPipeError, ValueError):  # it died just now: `listen` says so
            print(json.dumps(job.to_json()), file=self.process.stdin, flush=True)

    def kill(self) -> None:
        """SIGKILL: also a process that was stopped ends, and does not wake up later."""
        self.process.kill()
        self.listener.join()
        self.reader.join(timeout=1.0)


def list_gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them, which hides all from its first entry that
    is negative; without it, those that have a device file."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    names = (name.strip() for name in listed.split(","))
    return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))


def choose_gpus(index: int, n_processes: int = 1) -> dict[str, str]:
    """The GPUs that worker `index` sees, one for each process of its trials, where there are any: they are
    dealt out in turn."""
    gpus = list_gpus()
    own = (
        dict.fromkeys(gpus[(index * n_processes + i) % len(gpus)] for i in range(n_processes)) if gpus else {}
    )
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {}
