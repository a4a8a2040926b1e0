"""Owns what of a study may leave this machine: names in place of paths, nothing of its cluster."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HUB = "hf://"  # how data.path begins that names a dataset of Hugging Face's
_OF_A_CLUSTER = ("ray", "slurm", "storage")
_SCHEME = re.compile(r"(hf://|[a-z][a-z-]*:)?(.*)", re.DOTALL)  # such as torchscript:PATH,side=288
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # what Hugging Face's hub calls a model
_OF_THE_HUB = ("base", "id", "config", "clip", "extractor")  # keys that may hold one
_PATH_IN_TEXT = re.compile(r"(?<![\w/.:])~?/(?:[^\s/:;,'\"()<>]+/)*(?=[^\s/:;,'\"()<>])")


def publish_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config as JSON may be given away: names of files and folders in place of where they lie, and
    nothing of the cluster that it ran on."""
    return {key: _take_names(key, value) for key, value in values.items() if key not in _OF_A_CLUSTER}


def _take_names(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _take_names(name, inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_take_names(key, inner) for inner in value]
    return publish_name(value, key in _OF_THE_HUB) if isinstance(value, str) else value


def publish_name(given: str, may_be_hub: bool = False) -> str:
    """What the hub calls it, where it may be the hub's, or the name of a file or folder, whichever `given`
    is."""
    scheme, rest = _SCHEME.fullmatch(given).groups(default="")  # type: ignore[union-attr]
    is_hub = may_be_hub and _HUB_NAME.fullmatch(rest) and not Path(rest).exists()
    if "/" not in rest or is_hub or scheme == HUB:
        return given
    return scheme + rest.rstrip("/").rpartition("/")[2]


def list_own_places(folder: Path, images: str) -> tuple[Path, ...]:
    """What a sentence about a study may name of this machine: its `folder`, where its images lie
    (`data.path`), and whose home that is."""
    return folder, folder.parent, Path(images), Path.home()


def hide_paths(text: str, *places: Path) -> str:
    """A sentence with the names of files and folders in place of where they lie: below `places`, whatever is
    in their names, and wherever a path has no spaces."""
    for place in sorted(map(str, places), key=len, reverse=True):
        text = text.replace(f"{place}/", "").replace(place, Path(place).name)
    return _PATH_IN_TEXT.sub("", text)
