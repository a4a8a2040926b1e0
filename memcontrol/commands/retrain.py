"""Owns retraining: the same trial on the whole training set, scored on test data, beside full fine-tuning at
the same budget."""

from __future__ import annotations

from pathlib import Path

from memcontrol.core.choice import Choice
from memcontrol.core.config import Config
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import read_json
from memcontrol.core.run_folder import RESULT
from memcontrol.core.space_yaml import load_space
from memcontrol.core.spec import Spec
from memcontrol.execution.executor import Executor
from memcontrol.execution.job_queue import N_TRIES, JobQueue, Show

BASELINE = "baseline"


def run_retraining(
    config: Config,
    choice: Choice,
    full: Choice,
    folder: Path,
    out: Path,
    baseline: Path,
    executor: Executor,
    show: Show,
) -> dict[str, dict]:
    """Runs the choice in `out` and full fine-tuning in `baseline`, once where both are the same; what is
    finished there is kept.

    As many passes over the data as in the search, so the budget grows with the training set. Returns both
    results. Raises MemControlError.
    """
    n_train = len(read_json(folder / "split.json")["parts"]["train"])
    budget = round(config.inner.budget_images / config.search.train_fraction)
    larger = config.replaced({"inner.budget_images": budget})
    space, runs = load_space(config.space), {"pick": (choice, out), BASELINE: (full, baseline)}
    specs = {
        run: Spec(larger, space, wanted, folder, "retrain", "test", n_train) for wanted, run in runs.values()
    }
    jobs = [spec.as_job(run) for run, spec in specs.items() if not has_result(run, spec)]
    for event in JobQueue(executor, show).run(jobs):
        if event.kind == "given up":
            raise MemControlError(
                f"retraining in {event.job['trial']} failed {N_TRIES} times: {event.detail['reason']}"
            )
    return {name: read_complete_result(run) for name, (_, run) in runs.items()}


def has_result(run: Path, spec: Spec) -> bool:
    """Whether the folder holds the spec's result; another's is refused rather than written over."""
    if not (run / RESULT).exists():
        return False
    stored = read_json(run / RESULT)
    if Choice.from_dict(stored["choice"]) != spec.choice:
        raise MemControlError(f"{run} holds the result of another choice; give another folder with --out")
    spec.check_folder(run)
    return stored["state"] == "COMPLETE"


def read_complete_result(run: Path) -> dict:
    result = read_json(run / RESULT)
    if result["state"] != "COMPLETE":
        raise MemControlError(f"retraining in {run} ended as {result['state']}: {result['reason']}")
    return result
