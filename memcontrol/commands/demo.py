"""Owns the demo's study: the settings that make copying and its cure visible in minutes on two slow cores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from memcontrol.config.study import NAME
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import make_private_folder

DEMO_STUDY: dict[str, Any] = {
    "name": "demo",
    "base": "tiny",
    "data": {"path": "digits", "train": 24, "holdout": 881, "test": 881},
    "space": "digits",
    "inner": {"budget_images": 2560, "batch_size": 16, "caption_dropout": 0.0},
    "rewards": {
        "objectives": ["fid", "memorization"],
        "n_samples": 256,
        "confirm": 1,
        "sampling_steps": 5,
        "guidance": 2.0,
    },
    "search": {"trials": 4, "workers": 2, "seed": 0},
}


def write_demo_study(out: Path, seed: int, trials: int | None, workers: int | None) -> Path:
    """Writes out/study.yaml. Returns its path. Raises MemControlError."""
    name = out.resolve().name  # a study named after its folder keeps everything in it
    study = {
        **DEMO_STUDY,
        "name": name if re.fullmatch(NAME, name) else DEMO_STUDY["name"],
        "search": {**DEMO_STUDY["search"], "seed": seed},
    }
    for key, value in (("trials", trials), ("workers", workers)):
        if value is not None:
            study["search"][key] = value
    path = out / "study.yaml"
    try:
        make_private_folder(out)
        path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise MemControlError(f"{path} cannot be written: {error.strerror}") from None
    return path
