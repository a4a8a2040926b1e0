"""Owns what several trainers' configs word alike: the schedule and the comment."""

from __future__ import annotations

from typing import Any

from memcontrol.recipes.plan import RecipePlan


def name_schedule(plan: RecipePlan) -> dict[str, Any]:
    """As diffusers.optimization calls it, which sd-scripts, SimpleTuner and diffusers' scripts use."""
    constant = "constant_with_warmup" if plan.warmup_steps else "constant"
    name = "cosine" if plan.schedule == "cosine" else constant
    return {"lr_scheduler": name, "lr_warmup_steps": plan.warmup_steps}


def write_comment(*lines: str) -> str:
    return "".join(f"# {line}\n" for line in lines)
