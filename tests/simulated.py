"""Trials that only pretend: an executor whose places are busy for a while and then hold a result, for the
search loop itself."""

import random

from memcontrol.config.spec import read_spec
from memcontrol.core.files import write_json
from memcontrol.core.jobs import ConfirmJob, Done, EncodeJob, Prepared, PrepareJob, TrialJob
from memcontrol.core.run_folder import RunFolder
from memcontrol.dashboard.notes import Publisher
from memcontrol.execution.attempts import begin_attempt
from memcontrol.execution.executor import Executor
from memcontrol.search.observer import Observer, Observers
from memcontrol.search.orchestrator import search_study
from memcontrol.study.place import StudyPlace


def few_groups(choice):
    """FID falls and M rises with every group, both with a little of what the choice's own number adds."""
    draw, n = random.Random(str(sorted(choice.items(), key=str))), len(choice["groups"])
    return {"fid": 30 - n + draw.random(), "memorization": 0.02 * n + 0.1 * draw.random()}


class Clock:
    """In place of the module `time`: a time of its own, which passes only where somebody says so."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Simulated(Executor):
    """`places` that run a job for `seconds`, one in ten a little longer, by a clock of their own unless one
    is given: benchmarks give `time`. `busy` adds up their time."""

    def __init__(self, places=1, seconds=0.0, rewards=few_groups, clock=None):
        self.places, self.seconds, self.rewards, self.clock = places, seconds, rewards, clock or Clock()
        self.running: list[tuple[float, float, dict]] = []
        self.busy, self.first, self.last, self.n_ended = 0.0, None, 0.0, 0

    def count_free(self):
        return max(self.places - len(self.running), 0)

    def resize(self, n_places):
        self.places = n_places
        return True

    def submit(self, job):
        now = self.clock.monotonic()
        self.first = self.first or now
        length = 0.0
        if isinstance(job, TrialJob):
            begin_attempt(job.folder)
            draw = random.Random(str(job.choice.as_dict()))
            length = self.seconds * draw.choice([1.0] * 9 + [1.1])
        self.running.append((now, now + length, job))

    def events(self, timeout_seconds):
        first = min((end for _, end, _ in self.running), default=0)
        self.clock.sleep(min(max(first - self.clock.monotonic(), 0), timeout_seconds))
        for entry in [entry for entry in self.running if entry[1] <= self.clock.monotonic()]:
            self.running.remove(entry)
            yield self.ended(*entry)

    def ended(self, begun, end, job):
        if isinstance(job, PrepareJob):
            return Prepared(job, {"train": 100}, ["minimize", "minimize"])
        if isinstance(job, EncodeJob):
            return Done(job)
        self.busy, self.last, self.n_ended = self.busy + end - begun, self.clock.monotonic(), self.n_ended + 1
        run, choice = RunFolder(job.folder), job.choice.as_dict()
        rewards = self.rewards(choice)
        if isinstance(job, ConfirmJob):
            write_json(run.confirmed_file, {"rewards": {name: value + 1 for name, value in rewards.items()}})
            return Done(job)
        if job.rung:  # FID is still higher, M still lower
            early = rewards | {
                "fid": rewards["fid"] + 10 * (1 - job.rung),
                "memorization": rewards["memorization"] * job.rung,
            }
            told = {"rung": job.rung, "n_steps": round(100 * job.rung), "rewards": early, "seconds": 0}
            write_json(run.rung_file(job.rung), told)
            return Done(job)
        config = read_spec(job.folder).config
        result = {
            "state": "COMPLETE",
            "choice": choice,
            "rewards": rewards,
            "rungs": run.read_rungs(config.search.rungs, config.rewards.names),
            "n_steps": 100,
            "seconds": self.seconds,
        }
        write_json(run.result_file, {**result, "measured_with": {"figures": 1}})
        return Done(job)

    def close(self): ...


class Heard(Observer):
    """Passes on what is said; publishes nothing."""

    def __init__(self, hear):
        self.heard = hear


def search(study_file, executor, hear=lambda event: None):
    """A whole search over simulated trials, with the notes that it leaves for dashboards. Returns the study,
    which is open."""
    place = StudyPlace.load(study_file)
    return search_study(place, executor, Observers(Heard(hear), Publisher(place.space, place.folder)))
