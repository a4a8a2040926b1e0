"""Owns a trial's rewards as a whole: measured, and pooled over draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

import numpy as np

from memcontrol.core.estimate import Estimate, Measured, pool_estimates
from memcontrol.core.reward_table import UTILITIES
from memcontrol.scoring.evidence import WHOLE, Evidence
from memcontrol.scoring.measures import MEASURES, combine_copy_rates, find_worst
from memcontrol.scoring.own_rewards import compute_own_reward


def score_evidence(evidence: Evidence, functions: Mapping[str, str] = {}) -> Measured:
    """Every reward of one fine-tuned model, Estimates where they know an error, and a user's own by name from
    FILE.py:FUNCTION.

    Raises MemControlError.
    """
    measured: Measured = {}
    for measure in MEASURES:
        measured |= measure(evidence)
    return measured | {name: compute_own_reward(place, evidence) for name, place in functions.items()}


def collect_contributions(measured: Mapping[str, Estimate | float]) -> dict[str, np.ndarray]:
    """What each generated image adds to a reward, where that is known: name to [N]."""
    return {
        name: value.contributions
        for name, value in measured.items()
        if isinstance(value, Estimate) and value.contributions is not None
    }


def collect_labels(measured: Mapping[str, Estimate | float]) -> dict[str, np.ndarray]:
    """What a reward's statistic is under permuted labels, where that is known: name to [1 + B]."""
    return {
        name: value.labels
        for name, value in measured.items()
        if isinstance(value, Estimate) and value.labels is not None
    }


def pool_scores(draws: Sequence[Measured]) -> Measured:
    """The rewards of one model over several draws of samples: means, with the errors that are left."""
    pooled = {name: _pool_reward([draw[name] for draw in draws]) for name in draws[0]}
    # of the same held-out images each time: no draw adds to it
    pooled["authpct_holdout"] = draws[0]["authpct_holdout"]
    pooled |= {name: _pool_utility(draws, name) for name in UTILITIES if name in draws[0]}
    distances = (_require_estimate(pooled, f"memorization_{space}") for space in WHOLE)
    return pooled | {"copying": combine_copy_rates(pooled), "memorization": find_worst(*distances)}


def _pool_reward(values: Sequence[Estimate | float]) -> Estimate | float:
    """The mean over draws; an Estimate where every draw gave one."""
    estimates = [value for value in values if isinstance(value, Estimate)]
    return pool_estimates(estimates) if len(estimates) == len(values) else mean(map(float, values))


def _pool_utility(draws: Sequence[Measured], name: str) -> Estimate:
    """The mean: its error is that of the reference, the same in each draw, and of what draws differ by."""
    estimates = [_require_estimate(draw, name) for draw in draws]
    values = [one.value for one in estimates]
    common = mean(one.error or 0.0 for one in estimates)
    apart = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(mean(values), math.hypot(common, apart))


def _require_estimate(measured: Measured, name: str) -> Estimate:
    value = measured[name]
    assert isinstance(value, Estimate), f"{name} has no error"
    return value
