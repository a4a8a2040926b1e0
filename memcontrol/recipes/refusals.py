"""Owns what several trainers refuse: a base or a method that they lack, and several values of what
they have one of."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from memcontrol.core.errors import MemControlError
from memcontrol.recipes.plan import ARCHITECTURES, RecipePlan, list_values, measure_alpha


def check_plan(plan: RecipePlan, known: Collection[str], methods: Collection[str]) -> None:
    """Raises MemControlError: the trainer does not know the base, or has not the method."""
    if plan.architecture not in known:
        name = ARCHITECTURES.get(plan.architecture, f"a {plan.architecture}")
        raise MemControlError(f"it does not train {name} by parts")
    used = list(dict.fromkeys(target.method for target in plan.targets))
    if len(used) > 1:
        raise MemControlError(f"it trains by one method at a time, and the choice has {' and '.join(used)}")
    if used[0] not in methods:
        raise MemControlError(f"it has no method {used[0]}; here it has {', '.join(methods)}")


def take_rate(plan: RecipePlan) -> float:
    """The learning rate that all layers share. Raises MemControlError where they have several."""
    rates = list_values(target.rate for target in plan.targets)
    if len(rates) > 1:
        raise MemControlError(
            f"it has one learning rate for all layers, and the choice has {join_values(rates)}"
        )
    return rates[0]


def take_rank(plan: RecipePlan) -> int:
    """The rank that all layers share. Raises MemControlError where they have several."""
    ranks = list_values(target.rank for target in plan.targets)
    if len(ranks) > 1:
        raise MemControlError(f"it has one rank for all layers, and the choice has {join_values(ranks)}")
    return ranks[0]


def take_alpha(plan: RecipePlan) -> float:
    """The alpha that all layers share. Raises MemControlError where they have several."""
    alphas = list_values(measure_alpha(target) for target in plan.targets)
    if len(alphas) > 1:
        raise MemControlError(f"it has one alpha for all layers, and the choice has {join_values(alphas)}")
    return alphas[0]


def join_values(values: Iterable[Any]) -> str:
    """As a refusal says them."""
    return " and ".join(f"{value:g}" for value in values)
