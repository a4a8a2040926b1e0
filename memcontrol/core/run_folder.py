"""Owns the files of a study's folder and of a run's: their names, and what is read from them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memcontrol.core.config import DIGITS, PARTS, Config
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import read_json


def locate_study_folder(study_file: Path, name: str) -> Path:
    """Where results go: runs/NAME beside the study file, or the file's own folder if that already is called
    NAME."""
    parent = study_file.resolve().parent
    return parent if parent.name == name else parent / "runs" / name


def refuse_results_among(source: str, folder: Path) -> None:
    """Raises MemControlError where a study's folder lies among its images: its pictures would count as images
    the next time."""
    images = Path(source)
    places = [images / part for part in PARTS if (images / part).is_dir()] or [images]
    if source != DIGITS and any(folder.resolve().is_relative_to(place.resolve()) for place in places):
        raise MemControlError(
            f"results would go to {folder}, among the images of data.path, '{source}', and count as "
            "images themselves; move the study file out of there, "
            f"for example to {images.resolve().parent}"
        )


def summarize_data(folder: Path) -> dict[str, Any]:
    """The images as the study's split.json knows them: source, resolution, and for each part its number of
    `images` and the `digest` of their contents; empty where it is not on this machine."""
    path = folder / "split.json"
    if not path.is_file():
        return {}
    stored = read_json(path)
    return {
        "source": stored["source"],
        "resolution": stored["resolution"],
        "parts": {name: summarize_part(rows) for name, rows in stored["parts"].items()},
    }


def summarize_part(rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    lines = "\n".join(f"{row['digest']} {row['caption']}" for row in rows)
    return {"images": len(rows), "digest": hashlib.sha256(lines.encode()).hexdigest()[:16]}


SPEC, RESULT, SAMPLES, TRAINING, CONFIRMED = (
    "spec.json",
    "result.json",
    "samples.npz",
    "training.json",
    "confirmed.json",
)
CONTRIBUTIONS = "contributions.npz"
JUDGED = "judged.json"  # whether it goes on beyond each rung
SAMPLES_PICTURE, PAIRS_PICTURE = "samples.png", "pairs.png"
NETWORK = "network.json"  # the denoiser's blocks, in the study's folder
ROUNDS = "rounds"  # the folder of a trial's checkpoints, until its result is there


def name_rung_file(rung: float) -> str:
    return f"rung-{rung:g}.json"


def read_rung_contributions(folder: Path, rung: float) -> Mapping[str, np.ndarray]:
    path = (folder / name_rung_file(rung)).with_suffix(".npz")
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def read_rungs(folder: Path, config: Config) -> list[dict]:
    """What the trial was measured at, rung by rung: its share of the budget, and the objectives there with
    what is told of their errors."""
    rule, names = config.search.early_stopping, config.rewards.names
    paths = [folder / name_rung_file(rung) for rung in rule.rungs] if rule else []
    measured = [read_json(path) for path in paths if path.is_file()]
    return [
        {**one, "rewards": {key: value for key, value in one["rewards"].items() if key.startswith(names)}}
        for one in measured
    ]


def read_judgements(folder: Path) -> list[dict]:
    """What was decided at the trial's rungs: rung, goes_on, beaten_by, n_peers."""
    return read_json(folder / JUDGED) if (folder / JUDGED).is_file() else []
