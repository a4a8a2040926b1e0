"""Owns what a trial says of the bound that its fine-tuning kept to."""

from __future__ import annotations

from typing import Any

from memcontrol.config.settings import knows_bound
from memcontrol.config.spec import Spec
from memcontrol.core.bound import NO_BOUND
from memcontrol.core.reward_table import EPSILON
from memcontrol.training.privacy import Account, open_account
from memcontrol.training.shard import Material


def open_trial_account(spec: Spec, material: Material) -> Account | None:
    """None where nothing is trained, or without a bound. Raises MemControlError."""
    inner = spec.config.inner
    is_private = inner.privacy is not None and spec.choice.method != "none"
    return open_account(inner, material.name_units()) if is_private else None


def list_bound(spec: Spec, material: Material, steps: int) -> dict[str, float]:
    """The rewards of the bound after so many steps, and what its words need; a study in which no fine-tuning
    has one has none. The untrained base tells nothing of anybody."""
    account = open_trial_account(spec, material)
    if account is not None:
        return {
            EPSILON: account.find_epsilon(steps),
            "privacy_delta": account.delta,
            "privacy_units": account.n_units,
            "privacy_images": len(material.name_units()),
            "privacy_secret": float(account.is_secret),
        }
    if not knows_bound(spec.config, spec.space):
        return {}
    return {EPSILON: 0.0 if spec.choice.method == "none" else NO_BOUND}


def describe_bound(spec: Spec, material: Material, steps: int) -> dict[str, Any]:
    """As result.json has it under `privacy`; empty where there is no bound."""
    account = open_trial_account(spec, material)
    return {"privacy": account.describe(steps)} if account else {}
