"""Trials that only pretend: an executor whose places are busy for a while and then hold a result, for the
search loop itself."""

import random
import time
from pathlib import Path

from memcontrol.core.attempts import begin_attempt
from memcontrol.core.config import load_config
from memcontrol.core.files import write_json
from memcontrol.core.run_folder import RESULT, locate_study_folder, name_rung_file, read_rungs
from memcontrol.core.spec import read_spec
from memcontrol.execution.executor import Event, Executor
from memcontrol.search import orchestrator as orchestrate


def few_groups(choice):
    """FID falls and M rises with every group, both with a little of what the choice's own number adds."""
    draw, n = random.Random(str(sorted(choice.items(), key=str))), len(choice["groups"])
    return {"fid": 30 - n + draw.random(), "memorization": 0.02 * n + 0.1 * draw.random()}


class Simulated(Executor):
    """`places` that run a job for `seconds`, one in ten a little longer. `busy` adds up their time."""

    def __init__(self, places=1, seconds=0.0, rewards=few_groups):
        self.places, self.seconds, self.rewards = places, seconds, rewards
        self.running: list[tuple[float, float, dict]] = []
        self.busy, self.first, self.last, self.n_ended = 0.0, None, 0.0, 0

    def free(self):
        return self.places - len(self.running)

    def submit(self, job):
        now = time.monotonic()
        self.first = self.first or now
        length = (
            0.0
            if "prepare" in job
            else self.seconds * random.Random(str(job["choice"])).choice([1.0] * 9 + [1.1])
        )
        if "trial" in job:
            begin_attempt(Path(job["trial"]))
        self.running.append((now, now + length, job))

    def events(self, timeout_seconds):
        first = min((end for _, end, _ in self.running), default=0)
        time.sleep(min(max(first - time.monotonic(), 0), timeout_seconds))
        for entry in [entry for entry in self.running if entry[1] <= time.monotonic()]:
            self.running.remove(entry)
            yield self.ended(*entry)

    def ended(self, begun, end, job):
        if "prepare" in job:
            return Event(job, "prepared", {"sizes": {"train": 100}, "directions": ["minimize", "minimize"]})
        self.busy, self.last, self.n_ended = self.busy + end - begun, time.monotonic(), self.n_ended + 1
        run, rewards = Path(job["trial"]), self.rewards(job["choice"])
        if job["rung"]:  # FID is still higher, M still lower
            early = {
                "fid": rewards["fid"] + 10 * (1 - job["rung"]),
                "memorization": rewards["memorization"] * job["rung"],
            }
            write_json(
                run / name_rung_file(job["rung"]),
                {"rung": job["rung"], "n_steps": round(100 * job["rung"]), "rewards": early, "seconds": 0},
            )
            return Event(job, "done")
        rungs = read_rungs(run, read_spec(run).config)
        result = {
            "state": "COMPLETE",
            "choice": job["choice"],
            "rewards": rewards,
            "rungs": rungs,
            "n_steps": 100,
            "seconds": self.seconds,
        }
        write_json(run / RESULT, {**result, "measured_with": {"figures": 1}})
        return Event(job, "done")

    def cancel(self, job): ...

    def close(self): ...


def search(study_file, executor, show=lambda event: None):
    """A whole search over simulated trials. Returns the study, which is open."""
    config = load_config(study_file)
    return orchestrate.search_study(
        config, study_file, locate_study_folder(study_file, config.name), executor, show, lambda study: None
    )
