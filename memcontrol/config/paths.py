"""Owns how a study file names other files: relative to its folder, inside the name of a feature network."""

from __future__ import annotations

import os
from pathlib import Path

_OF_FILES = ("torchscript", "sscd")  # feature networks whose name holds a file's path


def take_name(path: str) -> str:
    return Path(path).name if os.path.isabs(path) else path


def find_beside(given: str, folder: Path) -> str:
    """Its absolute path, where it is a file or folder as seen from `folder`."""
    return str((folder / given).absolute()) if (folder / given).exists() else given


def locate_extractor(name: str, folder: Path) -> str:
    """A feature network's name with the absolute path of its file, where it has one."""
    kind, colon, rest = name.partition(":")
    path, comma, options = rest.partition(",")
    if not colon:
        return name
    found = str((folder / path).absolute()) if kind in _OF_FILES else find_beside(path, folder)
    return f"{kind}:{found}{comma}{options}"
