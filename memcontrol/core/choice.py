"""Owns the Choice: which groups of layers are trained, by which method, how fast, under which settings."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from memcontrol.core.errors import MemControlError

RANKED = ("lora", "dora", "loha", "lokr", "oft")  # their size is a rank; of oft, the block size
SEARCHED_METHODS = (*RANKED, "ia3", "ln_tuning", "svdiff", "difffit", "attention", "norm", "bias", "full")
_METHODS = ("none", *SEARCHED_METHODS)
Anchor = Literal["none", "all", "full"]
ANCHORS: tuple[Anchor, ...] = ("none", "all", "full")  # what a search runs first, unless told otherwise
EVERYTHING = "*"  # stands for the whole denoiser, in the anchor `full`
SAME_RATE = math.log(1.1)  # learning rates within 10 % count as the same choice
STRENGTH_KEY, CHECKPOINT_KEY = "strength", "checkpoint"  # settings that no config has
BUDGET_KEY = "inner.budget_images"
OF_TRAINING = "inner."  # how the keys of settings begin that a fine-tuning depends on
Frozen = str | int | float | bool | None | tuple  # a setting's value; a mapping as its sorted pairs


def freeze(value: Any) -> Frozen:
    """A setting's value as something that can be hashed."""
    return tuple((key, freeze(value[key])) for key in sorted(value)) if isinstance(value, Mapping) else value


def thaw(value: Frozen) -> Any:
    """What `freeze` was given."""
    return {key: thaw(inside) for key, inside in value} if isinstance(value, tuple) else value


def say_setting(value: Any) -> str:
    """A setting's value in words: "0.01", "off", "bins 20, ratio 1.5"; "on" where defaults are all of it."""
    if value is None or isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {say_setting(inside)}" for key, inside in value.items()) or "on"
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


@dataclass(frozen=True)
class Setting:
    """How one group is trained."""

    method: str
    learning_rate: float
    rank: int | None = None

    def is_same_as(self, other: Setting) -> bool:
        """The same method and rank, at a learning rate within 10 %."""
        if (self.method, self.rank) != (other.method, other.rank):
            return False
        return (
            self.learning_rate == other.learning_rate
            or abs(math.log(self.learning_rate / other.learning_rate)) <= SAME_RATE
        )


@dataclass(frozen=True)
class Choice:
    """Which groups are trained, how, and how fast; `per_group` holds the groups that differ from the rest.

    Without groups only what the space always trains is trained; `none` trains nothing; the group * is the
    whole denoiser. `settings` are values of the config's keys that are this choice's own, by key and frozen,
    and the `strength` and `checkpoint` of the model that is measured.
    """

    groups: tuple[str, ...]
    method: str
    learning_rate: float
    rank: int | None = None
    per_group: tuple[tuple[str, Setting], ...] = ()
    settings: tuple[tuple[str, Frozen], ...] = ()

    @property
    def default(self) -> Setting:
        return Setting(self.method, self.learning_rate, self.rank)

    def setting(self, group: str) -> Setting:
        return dict(self.per_group).get(group, self.default)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods in use, each once."""
        return tuple(dict.fromkeys(self.setting(group).method for group in self.groups)) or (self.method,)

    @property
    def strength(self) -> float:
        """s of W0 + s (W - W0), which is what is measured (WiSE-FT: Wortsman et al. 2022, arXiv
        2109.01903)."""
        return float(dict(self.settings).get(STRENGTH_KEY, 1.0))  # type: ignore[arg-type]

    @property
    def checkpoint(self) -> float:
        """The share of the budget after which the model is taken."""
        return float(dict(self.settings).get(CHECKPOINT_KEY, 1.0))  # type: ignore[arg-type]

    @property
    def overrides(self) -> dict[str, Any]:
        """Its values of the config's keys."""
        return {key: thaw(value) for key, value in self.settings if "." in key}

    @property
    def trained(self) -> Choice:
        """The choice whose fine-tuning this one is measured on: less the settings that need no training."""
        return replace(self, settings=tuple(one for one in self.settings if one[0].startswith(OF_TRAINING)))

    @property
    def is_variant(self) -> bool:
        """Whether it is another choice's fine-tuning, measured at other settings."""
        return bool(self.settings) and self.trained != self

    @property
    def is_outside(self) -> bool:
        """Whether no point of a space stands for it: no training, and full fine-tuning."""
        return self.method == "none" or EVERYTHING in self.groups

    def with_settings(self, settings: Mapping[str, Frozen]) -> Choice:
        """With further settings, which come before those of the same keys."""
        return replace(self, settings=tuple(sorted({**dict(self.settings), **settings}.items())))

    @property
    def key(self) -> str:
        """Eight hexadecimal digits that name the choice's folder."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:8]

    def is_same_as(self, other: Choice) -> bool:
        """The same groups, each with the same method and rank, at learning rates within 10 %, under the same
        settings."""
        if self.settings != other.settings:
            return False
        if set(self.groups) != set(other.groups) or "none" in (self.method, other.method):
            return self.method == other.method == "none"
        return self.default.is_same_as(other.default) and all(
            self.setting(group).is_same_as(other.setting(group)) for group in self.groups
        )

    def as_dict(self) -> dict[str, Any]:
        values = {
            "groups": list(self.groups),
            "learning_rate": self.learning_rate,
            "method": self.method,
            "rank": self.rank,
        }
        if self.per_group:
            values["per_group"] = {group: asdict(setting) for group, setting in self.per_group}
        if self.settings:
            values["settings"] = {key: thaw(value) for key, value in self.settings}
        return values

    @classmethod
    def from_dict(cls, values: dict) -> Choice:
        """Raises MemControlError where a key is missing, unknown or of the wrong kind."""
        try:
            differing = tuple(
                (group, Setting(**{**setting, "learning_rate": float(setting["learning_rate"])}))
                for group, setting in values.get("per_group", {}).items()
            )
            own = {
                "groups": tuple(values["groups"]),
                "learning_rate": float(values["learning_rate"]),
                "per_group": differing,
                "settings": freeze(dict(values.get("settings", {}))),
            }
            choice = cls(**{**values, **own})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise MemControlError(
                f"choice {values!r} is not complete ({error}); it needs groups, method, "
                "learning_rate and, for lora, rank"
            ) from None
        for setting in (choice.default, *(setting for _, setting in choice.per_group)):
            _check_setting(setting)
        return choice


def _check_setting(setting: Setting) -> None:
    if setting.method not in _METHODS:
        raise MemControlError(f"choice: method '{setting.method}' is unknown; allowed: {', '.join(_METHODS)}")
    if setting.method in RANKED and not (type(setting.rank) is int and setting.rank > 0):
        raise MemControlError(f"choice: method {setting.method} needs a whole-number rank")
