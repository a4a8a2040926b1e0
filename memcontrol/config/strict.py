"""Owns what the models of a study file have in common: no unknown keys, values at dotted keys, and the
kinds of numbers."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
UpToOne = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), use_attribute_docstrings=True
    )

    def replaced(self, values: Mapping[str, Any]) -> Self:
        """A copy with other values at dotted keys, such as {"inner.batch_size": 8}; they are not validated.
        Raises KeyError for a key that is not there, also for one inside a setting that is off."""
        copy = self
        for key, value in values.items():
            copy = _replace_at(copy, key.split("."), value)
        return copy


def get_value(model: Strict, key: str) -> Any:
    """What a config has at a dotted key."""
    return functools.reduce(getattr, key.split("."), model)


def _replace_at(model: Strict, keys: Sequence[str], value: Any) -> Any:
    """A copy of `model` with the value at the nested keys."""
    name, *inside = keys
    if not isinstance(model, Strict) or name not in type(model).model_fields:
        raise KeyError(name)
    new = _replace_at(getattr(model, name), inside, value) if inside else value
    return model.model_copy(update={name: new})
