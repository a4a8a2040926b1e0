"""Owns the recipe for peft itself."""

from __future__ import annotations

from typing import Any

from memcontrol.recipes.patterns import merge_names
from memcontrol.recipes.plan import RecipePlan, group_modules, measure_alpha
from memcontrol.recipes.refusals import check_plan, take_rank
from memcontrol.recipes.wording import write_comment

_PEFT_CLASSES = {
    "lora": "LoraConfig",
    "dora": "LoraConfig",
    "loha": "LoHaConfig",
    "lokr": "LoKrConfig",
    "oft": "OFTConfig",
    "ia3": "IA3Config",
    "ln_tuning": "LNTuningConfig",
}


def write_peft_config(plan: RecipePlan) -> dict[str, str]:
    """A config for `inject_adapter_in_model` or diffusers' `add_adapter`: `target_modules` as one regular
    expression for whole names, sizes of single layers by `rank_pattern` and `alpha_pattern`
    (peft/utils/other.py, get_pattern_key)."""
    check_plan(plan, [plan.architecture], tuple(_PEFT_CLASSES))
    rates = group_modules(plan, lambda target: target.rate)
    given = ", ".join(f"{key}={value!r}" for key, value in _list_peft_arguments(plan).items())
    name = _PEFT_CLASSES[plan.method]
    lines = [
        f"from peft import {name}\n",
        f"config = {name}({given})",
        f"base = {plan.base!r}",
        f"learning_rate = {next(iter(rates))}",
    ]
    if len(rates) > 1:
        others = {"|".join(merge_names(names)): rate for rate, names in list(rates.items())[1:]}
        lines.append(f"learning_rate_of_others = {others!r}  # by whole names")
    lines += [
        f"steps, batch_size = {plan.steps}, {plan.batch_size}",
        f"schedule, warmup_steps = {plan.schedule!r}, {plan.warmup_steps}",
        f"weight_decay, max_grad_norm = {plan.weight_decay}, {plan.max_grad_norm}",
    ]
    return {"recipe.py": write_comment(*plan.notes) + "\n".join(lines) + "\n"}


def _list_peft_arguments(plan: RecipePlan) -> dict[str, Any]:
    targets: dict[str, Any] = {"target_modules": "|".join(merge_names(plan.modules))}
    if plan.method == "ia3":
        return targets | {"feedforward_modules": []}
    if plan.method == "ln_tuning":
        return targets
    if plan.method == "oft":
        return targets | {"r": 0, "oft_block_size": take_rank(plan), "use_cayley_neumann": False}
    sizes = group_modules(plan, lambda target: (target.rank, measure_alpha(target)))
    (rank, alpha), *others = sizes
    patterns = {size: "|".join(f"^{name}" for name in merge_names(sizes[size])) for size in others}
    has_alpha = "lora_alpha" if plan.method in ("lora", "dora") else "alpha"
    given = targets | {"r": rank, has_alpha: alpha}
    if patterns:
        given["rank_pattern"] = {name: size[0] for size, name in patterns.items()}
        given["alpha_pattern"] = {name: size[1] for size, name in patterns.items()}
    return given | ({"use_dora": True} if plan.method == "dora" else {})
