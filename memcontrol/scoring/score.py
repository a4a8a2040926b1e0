"""Owns a trial's rewards as a whole: measured, pooled over draws, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from memcontrol.core.estimate import Estimate, pool_estimates
from memcontrol.scoring.copying import (
    hits_p_value,
)
from memcontrol.scoring.evidence import Evidence
from memcontrol.scoring.measures import MEASURES, add_worst
from memcontrol.scoring.own_rewards import compute_own_reward


def score_evidence(evidence: Evidence, functions: Mapping[str, str] = {}) -> dict[str, float]:
    """Every figure of one fine-tuned model, Estimates where they know an error, and a user's own by name from
    FILE.py:FUNCTION.

    Raises MemControlError.
    """
    found = {name: value for function in MEASURES for name, value in function(evidence).items()}
    return found | {name: compute_own_reward(place, evidence) for name, place in functions.items()}


def flatten_rewards(found: Mapping[str, float]) -> dict[str, float]:
    """Plain numbers: each value, and beside it NAME_error, or NAME_low and NAME_high, and NAME_p."""
    numbers: dict[str, float] = {}
    for name, value in found.items():
        error, low, high, p = (getattr(value, key, None) for key in ("error", "low", "high", "p"))
        ends = {f"{name}_error": error} if error is not None else {f"{name}_low": low, f"{name}_high": high}
        numbers |= {
            key: float(x) for key, x in ({name: value} | ends | {f"{name}_p": p}).items() if x is not None
        }
    return numbers


def collect_contributions(found: Mapping[str, float]) -> dict[str, np.ndarray]:
    """What each generated image adds to a figure, where that is known: name to [N]."""
    return {
        name: value.contributions
        for name, value in found.items()
        if isinstance(value, Estimate) and value.contributions is not None
    }


def pool_scores(draws: Sequence[dict[str, float]]) -> dict[str, float]:
    """The figures of one model over several draws of samples: means, with the errors that are left."""
    found: dict[str, Any] = {name: pool_reward([draw[name] for draw in draws]) for name in draws[0]}
    # of the same held-out images each time: no draw adds to it
    found["authpct_holdout"] = draws[0]["authpct_holdout"]
    for name in ("copy_rate", "copy_rate_features"):
        found[name].p = hits_p_value(found[name], int(found["copy_rate_n_real"]))
    return add_worst(found)


def pool_reward(values: Sequence[float]) -> float:
    estimates = [value for value in values if isinstance(value, Estimate)]
    return pool_estimates(estimates) if len(estimates) == len(values) else mean(values)
