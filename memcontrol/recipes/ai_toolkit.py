"""Owns the recipe for ai-toolkit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from memcontrol.core.errors import MemControlError
from memcontrol.recipes.plan import UNET_WIDTHS, RecipePlan
from memcontrol.recipes.refusals import check_plan, join_values, take_alpha, take_rank, take_rate
from memcontrol.recipes.wording import write_comment

_AI_TOOLKIT = {
    "sd15": "sd1",
    "sd2": "sd2",
    "sdxl": "sdxl",
    "sd3": "sd3",
    "flux": "flux",
    "pixart": "pixart_sigma",
}


def write_ai_toolkit(plan: RecipePlan) -> dict[str, str]:
    """toolkit/lora_special.py: a layer is trained where an entry of `only_if_contains` is a part of its name,
    which begins with `transformer.` or `lora_unet.`; adapters of transformers have alpha = rank; kernels
    larger than 1 x 1 have a rank of their own, `conv`."""
    check_plan(plan, _AI_TOOLKIT, ("lora",))
    rank, alpha, rate = take_rank(plan), take_alpha(plan), take_rate(plan)
    is_unet = plan.architecture in UNET_WIDTHS
    if not is_unet and alpha != rank:
        both = join_values([alpha, rank])
        raise MemControlError(
            f"it has adapters of transformers whose alpha = rank, and the choice has {both}"
        )
    network: dict[str, Any] = {"type": "lora", "linear": rank, "linear_alpha": alpha}
    if any(".attentions." not in f".{name}" for name in plan.modules) and is_unet:
        network |= {"conv": rank, "conv_alpha": alpha}  # without it residual blocks are not looked at
    network |= {"transformer_only": False, "network_kwargs": {"only_if_contains": _list_contained(plan)}}
    train = {
        "batch_size": plan.batch_size,
        "steps": plan.steps,
        "lr": rate,
        "lr_scheduler": plan.schedule,
        "optimizer": "adamw",
        "optimizer_params": {"weight_decay": plan.weight_decay},
        "max_grad_norm": plan.max_grad_norm,
        "train_unet": True,
        "train_text_encoder": False,
    }
    process = {
        "type": "sd_trainer",
        "training_folder": "output",
        "network": network,
        "datasets": [_drop_empty({"folder_path": "IMAGES", "resolution": plan.resolution})],
        "train": train,
        "model": {"name_or_path": plan.base, "arch": _AI_TOOLKIT[plan.architecture]},
    }
    job = {"job": "extension", "config": {"name": plan.name, "process": [process]}}
    unsaid = [f"its schedules have no warm-up, and the trial had one of {plan.warmup_steps} steps"]
    notes = (*plan.notes, *(unsaid if plan.warmup_steps else ()))
    head = write_comment("python run.py recipe.yaml; datasets.folder_path is yours to name", *notes)
    return {"recipe.yaml": head + yaml.safe_dump(job, sort_keys=False, width=1000)}


def _drop_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _list_contained(plan: RecipePlan) -> list[str]:
    """Whole names, without what the trainer may put before them. Raises MemControlError where one is a part
    of another layer's."""
    prefix = "unet." if plan.architecture in UNET_WIDTHS else "transformer."
    outside = [
        f"{prefix}{name}" for name, adapted in plan.names.items() if adapted and name not in plan.modules
    ]
    for name in plan.modules:
        if longer := next((other for other in outside if f"{prefix}{name}" in other), None):
            raise MemControlError(
                f"it has filters by parts of names, and that for '{name}' would take '{longer}' too"
            )
    return [f"{prefix}{name}" for name in plan.modules]
