"""Owns the account of a private fine-tuning: how much noise its steps need, and the epsilon of those that it
took.

Notations

unit: What the bound is about, an image or a group with all its images; U: how many there are.
q: The chance with which a step draws each unit, inner.batch_size / U.
sigma: The noise multiplier; noise has the standard deviation sigma clip in each number of a step's sum.
epsilon, delta: With a chance of 1 - delta no weights are more than exp(epsilon) times as likely with a unit
as without it (one is added or removed; U itself is taken to be known).
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from memcontrol.config.inner import InnerConfig
from memcontrol.config.methods import PrivacyConfig
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import read_json, write_json

_TOLERANCE = 0.01  # of epsilon, below which the noise is searched no further
_SEED_BITS = 128
# Renyi orders: Opacus' own, and higher ones, without which no epsilon below 0.2 could be shown
_ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(12, 64), *(2.0**k for k in range(6, 13)))
_COARSE = (1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 4096)  # quickly asked


@dataclass(frozen=True)
class Account:
    """What the bound of one fine-tuning rests on. `unit`: image or group; `is_secret`: whether its noise came
    from the operating system's chance, without which there is no bound against who knows the seed."""

    unit: str
    n_units: int
    delta: float
    noise: float  # sigma
    clip: float
    rate: float  # q
    multiplicity: int
    is_secret: bool

    def find_epsilon(self, steps: int) -> float:
        return count_epsilon(self.noise, self.rate, steps, self.delta)

    def describe(self, steps: int) -> dict[str, Any]:
        """As result.json has it."""
        return {
            "epsilon": self.find_epsilon(steps),
            "delta": self.delta,
            "unit": self.unit,
            "units": self.n_units,
            "noise": self.noise,
            "clip": self.clip,
            "rate": self.rate,
            "steps": steps,
            "multiplicity": self.multiplicity,
            "accountant": "rdp",
            "secret": self.is_secret,
        }


def open_account(inner: InnerConfig, units: Sequence[str]) -> Account:
    """Of a fine-tuning on images of these units (their names, one for each image), with as much noise as all
    its steps need. Raises MemControlError."""
    rule, n = inner.privacy, len(set(units))
    assert rule is not None, "only a private fine-tuning has an account"
    unit = "image" if n == len(units) else "group"
    if inner.batch_size > n:
        raise MemControlError(
            f"inner.batch_size is {inner.batch_size} and there are {n} training {unit}s, of which "
            "inner.privacy draws each once a step at most; lower it"
        )
    delta, rate = _choose_delta(rule, n, unit), inner.batch_size / n
    noise = find_noise(rule.epsilon, delta, rate, inner.budget_steps)
    return Account(unit, n, delta, noise, rule.clip, rate, rule.multiplicity, rule.seed is None)


def _choose_delta(rule: PrivacyConfig, n: int, unit: str) -> float:
    """1 / (10 U), unless another is given: a tenth of what a model has that gives one unit in U away, and
    less than U^-1.1 for any U below 10^10."""
    if rule.delta == "auto":
        return 1 / (10 * n)
    if rule.delta >= 1 / n:
        raise MemControlError(
            f"inner.privacy.delta is {rule.delta:g} and there are {n} training {unit}s: a model that gave "
            f"one of them away would keep to it; give less than {1 / n:.2g}, or auto"
        )
    return rule.delta


@lru_cache(maxsize=64)
def find_noise(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The least sigma, to a hundredth of epsilon, whose steps keep within it. Raises MemControlError."""
    near = _search_noise(epsilon, delta, rate, steps, _COARSE)
    # any order gives a bound: the one that gives the best is not far from here
    _, best = _ask_accountant(near, rate, steps, delta)
    place = _ORDERS.index(best)
    return _search_noise(epsilon, delta, rate, steps, _ORDERS[max(place - 3, 0) : place + 4])


def _search_noise(epsilon: float, delta: float, rate: float, steps: int, orders: Sequence[float]) -> float:
    search = _import_accountants().utils.get_noise_multiplier
    tolerance, alphas = min(_TOLERANCE, epsilon * _TOLERANCE), list(orders)
    try:
        with _take_any_order():
            return search(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=rate,
                steps=steps,
                epsilon_tolerance=tolerance,
                alphas=alphas,
            )
    except ValueError:
        raise MemControlError(
            f"inner.privacy.epsilon is {epsilon:g} with delta {delta:.2g}: no noise gives so little over "
            f"{steps} steps; raise epsilon, or delta"
        ) from None


@lru_cache(maxsize=64)
def count_epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """The epsilon of so many steps, by the Renyi divergences of the sampled Gaussian mechanism (Mironov et
    al. 2019, arXiv 1908.10530), as Opacus adds them up."""
    return max(_ask_accountant(noise, rate, steps, delta)[0], 0.0) if steps else 0.0


def _ask_accountant(noise: float, rate: float, steps: int, delta: float) -> tuple[float, float]:
    """Epsilon, and the order that gives it."""
    accountant = _import_accountants().RDPAccountant()
    accountant.history = [(noise, rate, steps)]
    with _take_any_order():
        return accountant.get_privacy_spent(delta=delta, alphas=list(_ORDERS))


def _take_any_order() -> warnings.catch_warnings:
    """Opacus warns where the best of the orders is the first or last: the bound holds all the same."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _import_accountants() -> Any:
    try:
        import opacus.accountants.utils
    except ImportError:
        raise MemControlError(
            "inner.privacy needs Opacus, whose accountant adds up what the steps tell; pip install "
            "'memcontrol[privacy]', or take inner.privacy out"
        ) from None
    return opacus.accountants


def keep_seed(path: Path, rule: PrivacyConfig) -> int:
    """What noise and draws of units follow from. Drawn by the operating system, it is kept in a file of its
    owner's alone as long as the fine-tuning may go on: a step that is taken again after a kill has the same
    noise, where other noise on the same gradient would let both be compared."""
    if rule.seed is not None:
        return rule.seed
    if not path.exists():
        write_json(path, secrets.randbits(_SEED_BITS))
    return read_json(path)
