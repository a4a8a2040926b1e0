"""What early stopping saves in searches that really fine-tune: the demo's study at half its budget with forty
trials, on three seeds, with and without it. FOLDER in the environment keeps the runs, to go on with."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import yaml

from benchmarks._problems import hypervolume

SEEDS, N_TRIALS = (0, 1, 2), 40
BUDGET = {"budget_images": 3680, "rounds": 8}
RULES = {"full": None, "early": {}}  # early: the defaults


def run(device: str) -> list[dict]:
    folder = Path(os.environ.get("FOLDER") or tempfile.mkdtemp())
    return [compared(folder, seed) for seed in SEEDS]


def compared(folder: Path, seed: int) -> dict:
    """The two searches of a seed, which have their anchors in common, and so the point that hypervolumes are
    measured from."""
    full, early = (searched(folder, name, rule, seed) for name, rule in RULES.items())
    reference = full.attributes["reference"]
    volumes = {
        name: hypervolume([record.losses for record in study.records() if record.finished], reference)
        for name, study in (("full", full), ("early", early))
    }
    steps = {
        "full": n_steps(folder / "runs" / f"full{seed}", full),
        "early": n_steps(folder / "runs" / f"early{seed}", early),
    }
    n_stopped = sum(record.state == "PRUNED" for record in early.records())
    for study in (full, early):
        study.close()
    return {
        "what": f"seed {seed}",
        "hypervolume_to_full": volumes["early"] / volumes["full"],
        "steps_to_full": steps["early"] / steps["full"],
        "stopped": n_stopped,
        "hypervolume_full": volumes["full"],
        "steps_full": steps["full"],
    }


def searched(folder: Path, name: str, rule: dict | None, seed: int):
    from benchmarks._digits_study import DIGITS_STUDY
    from memcontrol.execution.make import open_executor
    from memcontrol.search.observer import Observer
    from memcontrol.search.orchestrator import search_study
    from memcontrol.study.place import StudyPlace

    study = {
        **DIGITS_STUDY,
        "name": f"{name}{seed}",
        "inner": {**DIGITS_STUDY["inner"], **BUDGET},
        "rewards": {**DIGITS_STUDY["rewards"], "confirm": 0},
        "search": {"trials": N_TRIALS, "workers": 2, "seed": seed, "early_stopping": rule},
    }
    path, runs = folder / f"{name}{seed}.yaml", folder / "runs" / f"{name}{seed}"
    path.write_text(yaml.safe_dump(study))
    if name == "early" and not runs.exists():
        copy_anchors(folder / f"full{seed}.yaml", runs)
    place = StudyPlace.load(path)
    with open_executor(place.config, place.folder.path) as executor:
        search_study(place, executor, Observer()).close()
    return place.open()


def copy_anchors(study_file: Path, early: Path) -> None:
    """A trial's result is found by its choice: what both searches try first need not be trained twice."""
    from memcontrol.study.place import StudyPlace

    place = StudyPlace.load(study_file)
    study = place.open()
    for record in study.records():
        for choice in record.candidates if record.anchor else ():
            shutil.copytree(place.folder.run(choice).path, early / choice.key)
    study.close()


def n_steps(runs: Path, study) -> int:
    """Training steps of the sampled trials."""
    from memcontrol.core.files import read_json
    from memcontrol.core.run_folder import RunFolder

    def of(run: Path) -> int:
        result = read_json(RunFolder(run).result_file)
        return result["n_steps"] if "n_steps" in result else result["rungs"][-1]["n_steps"]

    return sum(
        of(runs / record.choice.key)
        for record in study.records()
        if record.anchor is None and record.state != "FAIL"
    )
