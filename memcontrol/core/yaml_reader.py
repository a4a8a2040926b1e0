"""Owns reading YAML as people write it: safely, within bounds, each key once, 1e-3 a number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from memcontrol.core.errors import MemControlError

_MOST_NODES, _MOST_DEEP = 100_000, 50  # of what people write; 2**30 in a few aliases of aliases


class _EachKeyOnce(yaml.SafeLoader):
    """The safe loader, but a key given twice is an error: one of the two would be lost in silence. So is what
    is too deep, or too much once its aliases are written out."""

    def __init__(self, text: str):
        super().__init__(text)
        self.n_nodes = self.depth = 0
        self.sizes: dict[int, int] = {}  # of the nodes that are whole, by id

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        before, is_alias = self.n_nodes, self.check_event(yaml.AliasEvent)
        self.depth += 1
        if self.depth > _MOST_DEEP:
            raise yaml.YAMLError(f"nested more than {_MOST_DEEP} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if is_alias and id(node) not in self.sizes:
            raise yaml.YAMLError("an alias stands within what it stands for")
        self.n_nodes += self.sizes[id(node)] if is_alias else 1
        self.sizes.setdefault(id(node), self.n_nodes - before)
        if self.n_nodes > _MOST_NODES:
            raise yaml.YAMLError(f"more than {_MOST_NODES:,} values, those of its aliases among them")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if isinstance(key, str) and keys.count(key) > 1:
                raise yaml.YAMLError(f"key '{key}' is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """What the YAML holds. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=_EachKeyOnce)
    except (ValueError, OverflowError, RecursionError) as error:  # numbers and dates that are none
        raise yaml.YAMLError(str(error)) from None


def read_yaml(path: Path, keys: Sequence[str]) -> dict:
    """The file's mapping; `keys` are those that it may have, for the error. Raises MemControlError."""
    try:
        values = _convert_exponents(parse_yaml(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise MemControlError(
            f"{path}: no such file; give a study file in YAML, see the README for an example"
        ) from None
    except IsADirectoryError:
        # the last: of runs/NAME
        places = (
            path / "study.yaml",
            *sorted(path.glob("*.yaml")),
            path.resolve().parent.parent / f"{path.resolve().name}.yaml",
        )
        raise MemControlError(
            f"{path}: is a folder; give the study file, such as "
            f"{next((place for place in places if place.is_file()), places[0])}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise MemControlError(f"{path}: cannot be read ({error}); give a text file in YAML") from None
    except yaml.YAMLError as error:
        raise MemControlError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        held = "is empty" if values is None else f"holds {type(values).__name__}, not keys"
        raise MemControlError(f"{path}: {held}; a study file has {', '.join(keys)}")
    return values


_MOST_WHOLE = 1e18
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def parse_number(text: str) -> Any:
    return _convert_exponents(parse_yaml(text))


def _convert_exponents(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 and 1e4 as text; people mean a number, and a whole one where it is whole."""
    if isinstance(value, dict):
        return {key: _convert_exponents(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_convert_exponents(inner) for inner in value]
    if not isinstance(value, str) or not _EXPONENT.fullmatch(value):
        return value
    number = float(value)
    return int(number) if number.is_integer() and abs(number) < _MOST_WHOLE else number
