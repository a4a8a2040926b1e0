"""Owns the Choice: which groups of layers are trained, by which method, how fast."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from memcontrol.core.errors import MemControlError

RANKED = ("lora", "dora", "loha", "lokr", "oft")  # their size is a rank; of oft, the block size
SEARCHED_METHODS = (*RANKED, "ia3", "ln_tuning", "svdiff", "difffit", "attention", "norm", "bias", "full")
_METHODS = ("none", *SEARCHED_METHODS)
Anchor = Literal["none", "all", "full"]
ANCHORS: tuple[Anchor, ...] = ("none", "all", "full")  # what a search runs first, unless told otherwise
EVERYTHING = "*"  # stands for the whole denoiser, in the anchor `full`
SAME_RATE = math.log(1.1)  # learning rates within 10 % count as the same choice


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
    whole denoiser.
    """

    groups: tuple[str, ...]
    method: str
    learning_rate: float
    rank: int | None = None
    per_group: tuple[tuple[str, Setting], ...] = ()

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
    def key(self) -> str:
        """Eight hexadecimal digits that name the choice's folder."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:8]

    def is_same_as(self, other: Choice) -> bool:
        """The same groups, each with the same method and rank, at learning rates within 10 %."""
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
        return (
            {**values, "per_group": {group: asdict(setting) for group, setting in self.per_group}}
            if self.per_group
            else values
        )

    @classmethod
    def from_dict(cls, values: dict) -> Choice:
        """Raises MemControlError where a key is missing, unknown or of the wrong kind."""
        try:
            differing = tuple(
                (group, Setting(**{**setting, "learning_rate": float(setting["learning_rate"])}))
                for group, setting in values.get("per_group", {}).items()
            )
            rate = float(values["learning_rate"])
            choice = cls(
                **{**values, "groups": tuple(values["groups"]), "learning_rate": rate, "per_group": differing}
            )
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
