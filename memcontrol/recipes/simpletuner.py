"""Owns the recipe for SimpleTuner."""

from __future__ import annotations

import json

from memcontrol.recipes.patterns import find_suffixes
from memcontrol.recipes.plan import RecipePlan
from memcontrol.recipes.refusals import check_plan, take_alpha, take_rank, take_rate
from memcontrol.recipes.wording import name_schedule

_SIMPLETUNER = {"sd15": "sd1x", "sd2": "sd2x", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux", "sana": "sana"}


def write_simpletuner(plan: RecipePlan) -> dict[str, str]:
    """simpletuner/helpers/models/common.py: `peft_lora_target_modules` is peft's list of endings, of names as
    in diffusers; one rank and one alpha. Its PixArt takes LyCORIS alone."""
    check_plan(plan, _SIMPLETUNER, ("lora", "dora"))
    values = {
        "model_type": "lora",
        "model_family": _SIMPLETUNER[plan.architecture],
        "pretrained_model_name_or_path": plan.base,
        "lora_type": "standard",
        "lora_rank": take_rank(plan),
        "lora_alpha": take_alpha(plan),
        "peft_lora_target_modules": find_suffixes(plan),
        "use_dora": plan.method == "dora",
        "learning_rate": take_rate(plan),
        **name_schedule(plan),
        "max_train_steps": plan.steps,
        "num_train_epochs": 0,
        "train_batch_size": plan.batch_size,
        "max_grad_norm": plan.max_grad_norm,
        "optimizer_config": f"weight_decay={plan.weight_decay}",
        **({"resolution": plan.resolution} if plan.resolution else {}),
    }
    return {"config.json": f"{json.dumps(values, indent=2)}\n"}
