"""Owns the recipe for diffusers' example scripts."""

from __future__ import annotations

import shlex
from typing import Any

from memcontrol.core.errors import MemControlError
from memcontrol.recipes.patterns import find_suffixes
from memcontrol.recipes.plan import UNET_WIDTHS, RecipePlan
from memcontrol.recipes.refusals import check_plan, join_values, take_alpha, take_rank, take_rate
from memcontrol.recipes.wording import name_schedule, write_comment

_SCRIPTS = {
    "sd15": "text_to_image/train_text_to_image_lora.py",
    "sd2": "text_to_image/train_text_to_image_lora.py",
    "sdxl": "text_to_image/train_text_to_image_lora_sdxl.py",
    "sd3": "dreambooth/train_dreambooth_lora_sd3.py",
    "flux": "dreambooth/train_dreambooth_lora_flux.py",
    "sana": "dreambooth/train_dreambooth_lora_sana.py",
}
_WITH_ALPHA = ("flux", "sana")  # their --lora_alpha is 4 unless given; in the other scripts it is the rank
_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


def write_diffusers_call(plan: RecipePlan) -> dict[str, str]:
    """A script of diffusers' examples: those of transformers split `--lora_layers` at commas into peft's list
    of endings; those of U-Nets train the attention projections of all blocks."""
    check_plan(plan, _SCRIPTS, ("lora",))
    rank, alpha, rate = take_rank(plan), take_alpha(plan), take_rate(plan)
    options: dict[str, Any] = {"pretrained_model_name_or_path": plan.base, "rank": rank}
    if plan.architecture in _WITH_ALPHA and alpha == int(alpha):
        options["lora_alpha"] = int(alpha)
    elif alpha != rank:
        raise MemControlError(f"it has alpha = rank, and the choice has {join_values([alpha, rank])}")
    if plan.architecture not in UNET_WIDTHS:
        options["lora_layers"] = ",".join(find_suffixes(plan))
    elif {name for name in plan.names if f".{name}".endswith(_ATTENTION)} != plan.modules.keys():
        raise MemControlError("it trains the attention projections of all of a U-Net's blocks, no fewer")
    options |= {
        "learning_rate": rate,
        **name_schedule(plan),
        "max_train_steps": plan.steps,
        "train_batch_size": plan.batch_size,
        "adam_weight_decay": plan.weight_decay,
        "max_grad_norm": plan.max_grad_norm,
        **({"resolution": plan.resolution} if plan.resolution else {}),
    }
    lines = [f"accelerate launch examples/{_SCRIPTS[plan.architecture]}"]
    lines += [f"--{key}={shlex.quote(str(value))}" for key, value in options.items()]
    head = write_comment("to be completed by the options that name your images and the output", *plan.notes)
    return {"recipe.sh": head + " \\\n  ".join(lines) + "\n"}
