"""Owns running jobs on a Ray cluster: an actor for each place, which keeps the base loaded and moves to
another node when its own is lost. Ray ends the actors of a driver that is gone, however it died, so that
nothing is left for the next one to take over."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from memcontrol.config.clusters import RayConfig
from memcontrol.core import interrupt
from memcontrol.core.errors import MemControlError
from memcontrol.core.jobs import END_EVENTS, Event, Job, Lost, Progress, parse_event
from memcontrol.execution.executor import Executor, describe_overrun, pick_time_limit, read_new_progress
from memcontrol.execution.worker import COMMAND, collect_events


class _RayWorker:
    """What an actor is: jobs one after another with one set of loaded models, as in
    `memcontrol.execution.worker`."""

    def __init__(self, driver_folder: str):
        """`driver_folder` is the driver's working directory, which Ray puts before all other modules."""
        named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:] = [place for place in sys.path if place != driver_folder or place in named]
        from memcontrol.trial.loaded import LoadedModels

        self.loaded = LoadedModels(COMMAND)

    def ready(self) -> None:
        """Returns when the actor has its place."""

    def run(self, values: dict) -> list[dict]:
        return collect_events(values, self.loaded)


@dataclass
class Place:
    """One actor and the job it has. `began` is None until the cluster has found room for it."""

    actor: Any = None
    ready: Any = None
    job: Job | None = None
    answer: Any = None
    began: float | None = None
    reason: str = ""
    told: Progress | None = None


class Ray(Executor):
    """An actor with its own GPUs and cores for each place, on an existing cluster or on one started here."""

    def __init__(
        self,
        settings: RayConfig,
        n_workers: int,
        time_limit_seconds: float | None = None,
        gpus_per_trial: int = 1,
    ):
        self.ray = _connect_ray(settings)
        self.settings, self.gpus_per_trial = settings, gpus_per_trial
        self.time_limit_seconds = time_limit_seconds
        self.n_places = n_workers
        self.places = [Place() for _ in range(n_workers)]

    def resize(self, n_places: int) -> bool:
        self.n_places = n_places
        self.places += [Place() for _ in range(n_places - len(self.places))]
        self.end_surplus()
        return True

    def end_surplus(self) -> None:
        """Of the places beyond their number, those that have no job, the last first."""
        idle = [place for place in self.places if place.job is None]
        while idle and len(self.places) > self.n_places:
            place = idle.pop()
            self.places.remove(place)
            if place.actor is not None:
                self.ray.kill(place.actor)

    def count_free(self) -> int:
        self.end_surplus()
        return sum(place.job is None for place in self.places)

    def submit(self, job: Job) -> None:
        place = next(place for place in self.places if place.job is None)
        if place.actor is None:
            place.actor = self.started()
            place.ready = place.actor.ready.remote()
        place.job, place.answer = job, place.actor.run.remote(job.to_json())
        place.began, place.reason, place.told = None, "", None

    def started(self):
        threads = str(max(1, int(self.settings.cpus)))
        gpus = self.settings.gpus
        if gpus is None:
            gpus = self.gpus_per_trial if self.ray.cluster_resources().get("GPU") else 0
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
        remote = self.ray.remote(
            num_cpus=self.settings.cpus, num_gpus=gpus, max_restarts=0, runtime_env={"env_vars": environment}
        )(_RayWorker)
        return remote.remote(os.path.abspath(os.path.curdir))

    def events(self, timeout_seconds: float) -> Iterator[Event]:
        busy = [(place, place.job) for place in self.places if place.job is not None]
        if not busy:
            return
        self.ray.wait([place.answer for place, _ in busy], num_returns=1, timeout=timeout_seconds)
        for place, job in busy:
            yield from self.ended(place, job) if self.is_there(place.answer) else self.watched(place, job)

    def is_there(self, reference) -> bool:
        return bool(self.ray.wait([reference], timeout=0)[0])

    def ended(self, place: Place, job: Job) -> Iterator[Event]:
        place.job = None
        try:
            said = [parse_event(values, job) for values in self.ray.get(place.answer)]
        except self.ray.exceptions.RayError as error:
            place.actor = None
            reason = place.reason or f"its Ray actor was lost: {' '.join(str(error).split())[:300]}"
            said = [Lost(job, reason)]
        yield from said
        if not isinstance(said[-1], END_EVENTS):
            raise RuntimeError(f"job {job} ended without saying how")

    def watched(self, place: Place, job: Job) -> Iterator[Event]:
        if place.began is None and self.is_there(place.ready):
            place.began = time.monotonic()
        limit = pick_time_limit(job, self.time_limit_seconds)
        if limit is not None and place.began and time.monotonic() - place.began > limit:
            place.reason = describe_overrun(limit)
            self.ray.kill(place.actor)
        if told := read_new_progress(job, place.told):
            place.told = told
            yield told

    def close(self) -> None:
        for place in self.places:
            if place.actor is not None:
                self.ray.kill(place.actor)
            place.actor = place.job = None


def _try_connection(address: str | None) -> None:
    """Raises OSError where nobody listens: Ray itself would try for many minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


def _connect_ray(settings: RayConfig):
    """The ray module, connected. Raises MemControlError where it is missing or the cluster cannot be
    reached."""
    try:
        import ray
    except ImportError:
        raise MemControlError(
            "search.executor is ray, which is not installed; install memcontrol[ray]"
        ) from None
    if not ray.is_initialized():
        local: dict[str, Any] = {} if settings.address else {"include_dashboard": False}
        try:
            _try_connection(settings.address)
            ray.init(
                address=settings.address,
                namespace="memcontrol",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **local,
            )
            interrupt.take_back()  # Ray ends its driver itself at SIGTERM
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise MemControlError(
                f"ray.address is {settings.address}: {reason}; if a cluster runs there, it may ask "
                "for a token: set RAY_AUTH_MODE=token and its own "
                "RAY_AUTH_TOKEN here too (`ray get-auth-token` on its head shows it); otherwise "
                "start a cluster with `ray start --head`, or leave the address out"
            ) from None
    return ray
