"""Owns a user's own rewards, and the check of a study's objectives and limits."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

from memcontrol.config.rewards import RewardsConfig
from memcontrol.core.errors import MemControlError, RewardFailed
from memcontrol.core.estimate import Estimate, strip_end
from memcontrol.core.reward_table import DIRECTIONS, MAXIMIZE, MINIMIZE, OBJECTIVES, find_direction
from memcontrol.scoring.evidence import Evidence


def reward(direction: str = MINIMIZE):
    """Says which way a reward of a user's own is better: @reward(direction="maximize"). Without it, less is
    better, as under @reward alone."""
    if callable(direction):
        return reward()(direction)
    if direction not in (MINIMIZE, MAXIMIZE):
        raise MemControlError(f"a reward's direction is '{direction}'; allowed: {MINIMIZE}, {MAXIMIZE}")

    def mark(function):
        function.direction = direction
        return function

    return mark


def compute_own_reward(place: str, evidence: Evidence) -> Estimate | float:
    """An Estimate keeps its error. Raises RewardFailed where the function fails or gives no finite number."""
    function = load_own_reward(place)
    try:
        value = function(evidence)
    except Exception as error:
        raise RewardFailed(f"reward {place} failed: {type(error).__name__}: {error}") from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        shown = number if isinstance(value, Estimate) else value
        raise RewardFailed(f"reward {place} gave {shown!r}; it must give a finite number")
    return value if isinstance(value, Estimate) else number


def load_own_reward(place: str) -> Callable[[Evidence], Estimate | float]:
    """The function of FILE.py:FUNCTION. Raises MemControlError where there is none, or the file breaks."""
    path, _, name = place.rpartition(":")
    if not Path(path).is_file():
        raise MemControlError(
            f"rewards.objectives: '{place}': no such file {path}; write FILE.py:FUNCTION, beside "
            "the study file"
        )
    spec = importlib.util.spec_from_file_location(f"memcontrol_reward_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise MemControlError(
            f"rewards.objectives: '{place}': {path} is no Python file; write FILE.py:FUNCTION"
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise MemControlError(
            f"rewards.objectives: {path} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(module, name, None)):
        raise MemControlError(f"rewards.objectives: {path} has no function '{name}'")
    return getattr(module, name)


def find_directions(rewards: RewardsConfig) -> list[str]:
    """Which way each objective is better. Raises MemControlError where a user's function is not there."""
    return [
        _find_own_direction(objective) if ":" in objective else find_direction(objective)
        for objective in rewards.objectives
    ]


def _find_own_direction(place: str) -> str:
    return getattr(load_own_reward(place), "direction", MINIMIZE)


def check_rewards(rewards: RewardsConfig, n_features: int) -> None:
    """Raises MemControlError for an unknown objective or limit, or too few samples for the FID to rank by
    anything but chance."""
    for name, objective in zip(rewards.names, rewards.objectives):
        if ":" in objective:
            load_own_reward(objective)
        elif name not in OBJECTIVES:
            raise MemControlError(
                f"rewards.objectives: '{name}' is unknown; allowed: {', '.join(OBJECTIVES)}, or "
                "FILE.py:FUNCTION"
            )
    if len(set(rewards.names)) < len(rewards.names):
        raise MemControlError(f"rewards.objectives: {', '.join(rewards.names)} names one twice")
    for name in rewards.limits:
        if strip_end(name) not in (*DIRECTIONS, *rewards.names):
            raise MemControlError(
                f"rewards.limits: '{name}' is unknown; allowed: "
                f"{', '.join((*DIRECTIONS, *rewards.functions))}"
            )
    for name in ("clip_score", "extraction_component", "extraction_clique"):
        key = name.split("_")[0]
        if name in (*rewards.objectives, *rewards.limits) and not getattr(rewards, key):
            raise MemControlError(
                f"'{name}' is measured only where rewards.{key} says how; see docs/study-file.md"
            )
    if "fid" in rewards.objectives and rewards.n_samples < 4 * n_features and not rewards.force:
        raise MemControlError(
            f"rewards.n_samples is {rewards.n_samples}: fid over {n_features} features needs at "
            f"least {4 * n_features} to rank by anything "
            "but chance; raise it, use kid or fd_pca, or set rewards.force=true"
        )
