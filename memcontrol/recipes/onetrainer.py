"""Owns the recipe for OneTrainer."""

from __future__ import annotations

import json

from memcontrol.recipes.patterns import merge_names
from memcontrol.recipes.plan import RecipePlan
from memcontrol.recipes.refusals import check_plan, take_alpha, take_rank, take_rate

_ONETRAINER = {
    "sd15": "STABLE_DIFFUSION_15",
    "sd2": "STABLE_DIFFUSION_21",
    "sdxl": "STABLE_DIFFUSION_XL_10_BASE",
    "sd3": "STABLE_DIFFUSION_3",
    "flux": "FLUX_DEV_1",
    "pixart": "PIXART_SIGMA",
    "sana": "SANA",
}


def write_onetrainer(plan: RecipePlan) -> dict[str, str]:
    """modules/util/ModuleFilter.py: `layer_filter` is split at commas, and each regular expression searched
    for in the names of Linear and Conv2d (modules/module/LoRAModule.py). Training ends after epochs, of full
    batches alone (mgds' AspectBatchSorting)."""
    check_plan(plan, _ONETRAINER, ("lora", "dora", "loha"))
    kind = {"dora": "LORA"}.get(plan.method, plan.method.upper())
    values = {
        "training_method": "LORA",
        "model_type": _ONETRAINER[plan.architecture],
        "base_model_name": plan.base,
        "output_model_destination": f"models/{plan.name}.safetensors",
        "output_model_format": "SAFETENSORS",
        "peft_type": kind,
        "lora_rank": take_rank(plan),
        "lora_alpha": take_alpha(plan),
        "lora_decompose": plan.method == "dora",
        "lora_decompose_output_axis": True,  # as published, and as peft
        "layer_filter": ",".join(f"(^|[.]){pattern}$" for pattern in merge_names(plan.modules)),
        "layer_filter_preset": "custom",
        "layer_filter_regex": True,
        "learning_rate": take_rate(plan),
        "learning_rate_scheduler": plan.schedule.upper(),
        "learning_rate_warmup_steps": plan.warmup_steps,
        "batch_size": plan.batch_size,
        "epochs": plan.epochs,
        "clip_grad_norm": plan.max_grad_norm,
        "optimizer": {"optimizer": "ADAMW", "weight_decay": plan.weight_decay},
        **{part: {"train": False} for part in ("text_encoder", "text_encoder_2", "text_encoder_3")},
        **({"resolution": str(plan.resolution)} if plan.resolution else {}),
    }
    return {"recipe.json": f"{json.dumps(values, indent=2)}\n"}
