"""Owns the table of trainers, and which of them can hold a recipe plan."""

from __future__ import annotations

from collections.abc import Callable

from memcontrol.core.errors import MemControlError
from memcontrol.recipes.ai_toolkit import write_ai_toolkit
from memcontrol.recipes.diffusers_scripts import write_diffusers_call
from memcontrol.recipes.kohya import write_kohya
from memcontrol.recipes.onetrainer import write_onetrainer
from memcontrol.recipes.peft_config import write_peft_config
from memcontrol.recipes.plan import RecipePlan
from memcontrol.recipes.simpletuner import write_simpletuner

TRAINERS: dict[str, Callable[[RecipePlan], dict[str, str]]] = {
    "kohya": write_kohya,
    "ai-toolkit": write_ai_toolkit,
    "onetrainer": write_onetrainer,
    "simpletuner": write_simpletuner,
    "diffusers": write_diffusers_call,
    "peft": write_peft_config,
}


def write_recipe(plan: RecipePlan, trainer: str) -> dict[str, str]:
    """File name to text: the plan as that trainer's own config. The first file is the main one. Raises
    MemControlError: the trainer cannot express the plan; what, why, and which can."""
    if trainer not in TRAINERS:
        raise MemControlError(f"trainer '{trainer}' is unknown; allowed: {', '.join(TRAINERS)}")
    try:
        return TRAINERS[trainer](plan)
    except MemControlError as error:
        able = [name for name, write in TRAINERS.items() if _can(write, plan)]
        cure = f"{' and '.join(able)} can" if able else "none of them can: use `retrain` and `export`"
        raise MemControlError(f"no recipe for {trainer}: {error}; {cure}") from None


def _can(write: Callable[[RecipePlan], dict[str, str]], plan: RecipePlan) -> bool:
    try:
        write(plan)
    except MemControlError:
        return False
    return True
