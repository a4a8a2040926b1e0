"""Owns the study of the digits that the tables here are of: more images than the demo has, trained longer."""

from __future__ import annotations

from memcontrol.commands.demo import DEMO_STUDY

DIGITS_STUDY = {
    **DEMO_STUDY,
    "data": {"path": "digits", "train": 35, "holdout": 881, "test": 881},
    "inner": {"budget_images": 7360, "batch_size": 32, "caption_dropout": 0.0},
    "rewards": {**DEMO_STUDY["rewards"], "confirm": 2},
}
