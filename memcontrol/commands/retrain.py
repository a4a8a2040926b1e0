"""Owns `memcontrol.retrain`: the same trial on the whole training set, scored on test data, beside full
fine-tuning at the same budget, where that is an anchor of the study."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memcontrol.config.settings import configure_choice
from memcontrol.config.spec import Spec
from memcontrol.config.study import Config, describe_config
from memcontrol.core.choice import Choice
from memcontrol.core.console import LOG, log_to_file
from memcontrol.core.errors import MemControlError
from memcontrol.core.jobs import GivenUp, TrialJob
from memcontrol.core.run_folder import RunFolder, StudyFolder, refuse_results_among
from memcontrol.core.space import SearchSpace
from memcontrol.execution.executor import Executor
from memcontrol.execution.job_queue import N_TRIES, JobQueue, Show
from memcontrol.execution.make import open_executor
from memcontrol.search.locks import hold_folder_lock
from memcontrol.search.orchestrator import run_encoding, run_preparation
from memcontrol.study.pick import choose_record, explain_no_full, find_full
from memcontrol.study.place import StudyPlace
from memcontrol.study.store import Study
from memcontrol.view.live import EventLog

_BASELINE = "baseline"


@dataclass(frozen=True)
class Retraining:
    """A choice and full fine-tuning, which it is compared with where the study has it: what is trained, and
    in which run folders."""

    folder: StudyFolder
    config: Config
    space: SearchSpace
    choice: Choice
    full: Choice | None  # None: nothing to compare with, as `alone` says
    out: Path | None = None  # the choice's run folder, where it is not the study's own
    alone: str = ""

    @property
    def is_full(self) -> bool:
        """Whether the choice is full fine-tuning itself, which is then trained once."""
        return self.choice == self.full

    @property
    def choices(self) -> dict[str, Choice]:
        return {"pick": self.choice} | ({_BASELINE: self.full} if self.full else {})

    @property
    def runs(self) -> dict[str, Path]:
        """Full fine-tuning has one folder for every pick of the study."""
        own = self.out or self.folder.retrained(self.choice).path
        if self.full is None:
            return {"pick": own}
        return {"pick": own, _BASELINE: own if self.is_full else self.folder.retrained(self.full).path}

    def make_specs(self) -> dict[Path, Spec]:
        """By run folder. As many passes over the data as in the search, so the budget grows with the training
        set."""
        n_train = len(self.folder.read_split()["parts"]["train"])
        found = {}
        for name, run in self.runs.items():
            config = configure_choice(self.config, self.choices[name])
            budget = round(config.inner.budget_images / config.search.train_fraction)
            config = config.replaced({"inner.budget_images": budget})
            found[run] = Spec(
                config, self.space, self.choices[name], self.folder.path, "retrain", "test", n_train
            )
        return found


def retrain(
    study: str | Path,
    rule: str | None = None,
    *,
    trial: int | None = None,
    limits: Sequence[str] = (),
    out: str | Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Trains the pick and full fine-tuning on the whole training set, scored on test data. Returns the
    results of `pick` and `baseline` (not where the study has no full fine-tuning), each with its rewards and
    its folder, `run`. Raises MemControlError."""
    place = StudyPlace.load(study)
    with contextlib.closing(place.open()) as found:
        choice = choose_record(found, trial, rule, limits).chosen
        plan = plan_retraining(place.folder, found, choice, Path(out) if out else None)
    with (
        open_executor(place.config, place.folder.path, "retrain") as executor,
        log_retraining(plan) as log,
    ):
        results = run_retraining(plan, executor, log)
    return {name: {**result, "run": str(plan.runs[name])} for name, result in results.items()}


def plan_retraining(folder: StudyFolder, study: Study, choice: Choice, out: Path | None) -> Retraining:
    """Beside full fine-tuning, where the study has it. Raises MemControlError while that runs."""
    full = find_full(study)
    alone = "" if full else explain_no_full(study.records())
    return Retraining(folder, study.config, study.space, choice, full, out, alone)


def run_retraining(plan: Retraining, executor: Executor, show: Show) -> dict[str, dict]:
    """Trains what is not there already, and returns the results of `pick` and, where there is one,
    `baseline`. Raises MemControlError."""
    jobs = []
    if plan.alone:
        LOG.warning("%s", plan.alone)
    for run, spec in plan.make_specs().items():
        if not has_result(run, spec):
            spec.write(run)
            jobs.append(TrialJob(run, spec.choice))
    queue = JobQueue(executor, show)
    if jobs:
        spec = next(iter(plan.make_specs().values()))
        run_encoding(spec.config, plan.folder, spec.n_train, spec.reference, queue)
    for event in queue.run(jobs):
        if isinstance(event, GivenUp):
            where = event.job and event.job.folder
            raise MemControlError(f"retraining in {where} failed {N_TRIES} times: {event.reason}")
    return {name: _read_complete_result(run) for name, run in plan.runs.items()}


def has_result(run: Path, spec: Spec) -> bool:
    """Whether the folder holds the spec's result; another's is refused rather than written over."""
    if not RunFolder(run).has_result:
        return False
    stored = RunFolder(run).read_result()
    if Choice.from_dict(stored["choice"]) != spec.choice:
        raise MemControlError(f"{run} holds the result of another choice; give another folder with --out")
    spec.check_folder(run)
    return stored["state"] == "COMPLETE"


def _read_complete_result(run: Path) -> dict:
    result = RunFolder(run).read_result()
    if result["state"] != "COMPLETE":
        raise MemControlError(f"retraining in {run} ended as {result['state']}: {result['reason']}")
    return result


@contextlib.contextmanager
def log_retraining(plan: Retraining) -> Iterator[Show]:
    """Gives what writes the events to the study's log."""
    with log_to_file(plan.folder.log_file, f"retrain: {describe_config(plan.config)}"):
        yield EventLog(len(plan.space.groups)).heard


def plan_unsearched(
    place: StudyPlace, choice: Choice, out: Path | None, executor: Executor, show: Show
) -> Retraining:
    """Makes a study that was never searched ready for a choice from another one. Full fine-tuning, where it
    is one of its anchors, is compared with at the middle of its learning rates. Raises MemControlError."""
    place.space.check_choice(choice)
    refuse_results_among(place.config.data.path, place.folder.path)
    with hold_folder_lock(place.folder.path):
        run_preparation(place.config, place.folder, JobQueue(executor, show))
    full = place.space.list_anchors(place.config.search.anchors).get("full")
    if full is None:
        alone = explain_no_full([])
        return Retraining(place.folder, place.config, place.space, choice, None, out, alone)
    return Retraining(place.folder, place.config, place.space, choice, full[1], out)
