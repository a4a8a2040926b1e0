"""Owns the reading of a study file, with overrides written as key=value."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from memcontrol.config.base import expand_id
from memcontrol.config.data import expand_path
from memcontrol.config.places import locate_config
from memcontrol.config.problems import explain_problems
from memcontrol.config.study import Config
from memcontrol.core.errors import MemControlError
from memcontrol.core.yaml_reader import parse_number, read_yaml

_EXPAND = {"data": expand_path, "base": expand_id}  # short forms


def load_config(source: Path | str | dict, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file or a mapping, `overrides` ("inner.batch_size=8") applied. Raises
    MemControlError."""
    values = dict(source) if isinstance(source, dict) else read_yaml(Path(source), list(Config.model_fields))
    for override in overrides:
        values = _apply_override(values, override)
    try:
        config = Config.model_validate(values)
        return config if isinstance(source, dict) else locate_config(config, Path(source).resolve().parent)
    except ValidationError as error:
        where = "the config" if isinstance(source, dict) else str(source)
        raise MemControlError(f"{where}: {explain_problems(error.errors(), Config)}") from None


def _apply_override(values: dict, override: str) -> dict:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise MemControlError(f"override '{override}': write it as key=value, for example inner.batch_size=8")
    try:
        return set_at(values, key.split("."), parse_number(text))
    except yaml.YAMLError:
        said = key if key == "storage" else override  # it may hold a password
        raise MemControlError(f"override '{said}' is not valid YAML") from None


def set_at(values: Any, keys: list[str], value: Any) -> dict:
    """`values` with `value` at the dotted place; a short form such as `data: digits` keeps its meaning."""
    inside = values if isinstance(values, dict) else {}
    name, *below = keys
    expanded = _EXPAND.get(name, lambda held: held)(inside.get(name))
    return {**inside, name: set_at(expanded, below, value) if below else value}
