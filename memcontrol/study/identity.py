"""Owns what a study is about: the content of its space, images, base, feature network and own rewards. The
database holds it beside the config, so that nothing else is ever mixed with its trials or shown for them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from memcontrol.config.differing import flatten_keys
from memcontrol.config.settings import complete_space, load_study_space
from memcontrol.config.study import Config
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import read_json
from memcontrol.core.image_parts import DIGITS
from memcontrol.core.published import HUB
from memcontrol.core.run_folder import StudyFolder
from memcontrol.core.space import SearchSpace
from memcontrol.core.space_yaml import dump_space, name_space, parse_space

_LONGEST = 200  # characters of a value that is shown
_N_LOOKED_INTO, _N_BYTES = 64, 65_536  # files of a folder, and how much of each end of one


def describe_study(config: Config, folder: StudyFolder, directions: Sequence[str] = ()) -> dict[str, Any]:
    """What the config and the study's folder are about now; parts that are not known yet, or not here, are
    left out. Raises MemControlError for a space that is none."""
    known = {
        "space": _describe_space(load_study_space(config)),
        "own_rewards": _describe_own_rewards(config, directions),
        "data": _describe_data(folder),
        "base": {key: value for key, value in folder.read_pins().items() if key != "id"},
        "extractor": read_json(folder.extractor_file) if folder.extractor_file.is_file() else None,
    }
    return {key: value for key, value in known.items() if value}


def describe_listing(config: Config) -> str:
    """A digest of the names and sizes of all files below data.path, and of the beginnings and ends of some;
    empty where there is nothing."""
    path = Path(config.data.path)
    if config.data.path == DIGITS or config.data.path.startswith(HUB) or not path.exists():
        return ""
    files = sorted(place for place in path.rglob("*") if place.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for place in files:
        name = os.fsencode(place.relative_to(path))
        digest.update(name + f" {place.stat().st_size}\n".encode())
    for place in files[:: 1 + len(files) // _N_LOOKED_INTO]:
        digest.update(_read_ends(place))
    return digest.hexdigest()[:16]


def _read_ends(path: Path) -> bytes:
    with open(path, "rb") as file:
        first = file.read(_N_BYTES)
        file.seek(max(path.stat().st_size - _N_BYTES, 0))
        return first + file.read(_N_BYTES)


def _describe_space(space: SearchSpace) -> dict[str, Any]:
    """All of it that trials depend on."""
    return {key: value for key, value in dump_space(space).items() if key != "description"}


def read_space(about: Mapping[str, Any], config: Config) -> SearchSpace:
    """The space as the study was searched in, whatever its file holds now."""
    if "space" not in about:  # of a study from before it was kept
        return load_study_space(config)
    return complete_space(parse_space(about["space"], name_space(config.space)), config)


def _describe_own_rewards(config: Config, directions: Sequence[str]) -> dict[str, Any]:
    """By name: a digest of the file, and the direction where it is known."""
    found: dict[str, Any] = {}
    for name, place in config.rewards.functions.items():
        file = Path(place.rpartition(":")[0])
        source = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else "no such file"
        found[name] = {"source": source}
        if directions:
            found[name]["direction"] = directions[config.rewards.names.index(name)]
    return found


def _describe_data(folder: StudyFolder) -> dict[str, Any]:
    """The images by the content of each part, as split.json has them."""
    data = folder.summarize_data()
    if not data:
        return {}
    return {"resolution": data["resolution"]} | {
        part: f"{told['images']} images, {told['digest']}" for part, told in data["parts"].items()
    }


def find_differences(stored: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Of what both know: "space.groups.up.alpha (1.0 there, 2.0 here)"."""
    both = stored.keys() & found.keys()
    there, here = ({key: told[key] for key in sorted(both)} for told in (stored, found))
    a, b = flatten_keys(there), flatten_keys(here)
    return [
        _tell_values(key, a.get(key), b.get(key))
        for key in dict.fromkeys((*a, *b))
        if a.get(key) != b.get(key) and not _is_unsaid(key, a, b)
    ]


def _tell_values(key: str, a: Any, b: Any) -> str:
    """Of two lists, what only one of them has."""
    if isinstance(a, list) and isinstance(b, list):
        only = [one for one in a if one not in b], [one for one in b if one not in a]
        a, b = only if any(only) else (a, b)
    return f"{key} ({_shorten_value(a)} there, {_shorten_value(b)} here)"


def _is_unsaid(key: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether one side does not know a direction yet, which is read from code in a worker."""
    return key.endswith(".direction") and (key not in a or key not in b)


def _shorten_value(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def explain_differences(name: str, differing: Collection[str], file: Path) -> MemControlError:
    """Why a search of the study is refused, and the ways on."""
    return MemControlError(
        f"study '{name}' was begun with another config: {'; '.join(differing)}; restore these keys, begin a "
        f"study of another name (memcontrol search {file} --name NAME), or take over the trials that stay "
        f"valid (memcontrol fork {file} --as NAME)"
    )


def refuse_foreign_data(
    stored: Config, about: Mapping[str, Any], given: Config, folder: StudyFolder, file: Path
) -> None:
    """Raises MemControlError where the study in the database is about other images than those of this file
    and folder: it is another one of the same name."""
    here, differing = _describe_data(folder), []
    if "data" not in about:  # of a study from before it was kept
        return
    if here:
        differing = find_differences({"data": about["data"]}, {"data": here})
    elif (there := stored.path_as_written) != given.path_as_written:
        differing = [f"data.path ({there} there, {given.path_as_written} here)"]
    elif (listing := describe_listing(given)) and about.get("listing", listing) != listing:
        differing = [f"the files of data.path, {given.data.path}"]
    if differing:
        raise MemControlError(
            f"study '{given.name}' in this database is about other images than {file}: "
            f"{'; '.join(differing)}; give this one another name (name: in the file, or --name NAME), or "
            "name the database that was searched"
        )
