"""Owns where the files lie that a study file names: absolute paths, and names that stay as folders move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memcontrol.config.base import locate_base
from memcontrol.config.paths import find_beside, locate_extractor, take_name
from memcontrol.config.strict import get_value
from memcontrol.config.study import Config
from memcontrol.core.image_parts import DIGITS
from memcontrol.core.published import HUB
from memcontrol.core.space_yaml import name_space


def locate_config(config: Config, folder: Path) -> Config:
    """With absolute paths: all that a study file has lie relative to its folder, since workers run elsewhere.
    What is no file there is left as it is where it may be a name: of the Hub, of a shipped space."""
    rewards, path = config.rewards, config.data.path
    found = {
        "data.path": path if path == DIGITS or path.startswith(HUB) else str(folder / path),
        "base": locate_base(config.base, folder),
        "space": str(folder / config.space) if config.space.endswith((".yaml", ".yml")) else config.space,
        "rewards.objectives": tuple(
            f"{folder / objective.rpartition(':')[0]}:{name}" if ":" in objective else objective
            for objective, name in zip(rewards.objectives, rewards.names)
        ),
        "rewards.extractor": locate_extractor(rewards.extractor, folder),
        "rewards.clip": rewards.clip and find_beside(rewards.clip, folder),
    }
    return config.placed(found, folder)


def adopt_places(stored: Config, given: Config) -> Config:
    """A stored config with the paths that the study file has now: images may move, and what is named alike is
    where the file says."""
    if given.folder is None:
        return stored
    names, own = name_files(stored), name_files(given)
    alike = {
        key: written
        for key, written in given.paths_as_written.items()
        if key == "data.path" or names[key] == own[key] or get_value(stored, key) == written
    }
    return locate_config(stored.replaced(alike), given.folder)


def name_files(config: Config) -> dict[str, Any]:
    """Each key that may hold a path, by the names of files. A base's revision may come and go: base.json has
    the commit."""
    base, rewards = config.base, config.rewards
    kind, colon, rest = rewards.extractor.partition(":")
    return {
        "data.path": config.data.path,
        "base": str(base.model_copy(update={"id": take_name(base.id), "revision": None})),
        "space": name_space(config.space),
        "rewards.objectives": [Path(objective).name for objective in rewards.objectives],
        "rewards.extractor": f"{kind}{colon}{take_name(rest)}",
        "rewards.clip": rewards.clip and take_name(rewards.clip),
    }
