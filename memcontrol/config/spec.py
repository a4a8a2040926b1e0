"""Owns a trial's specification: the file that names everything a trial depends on, written before it and read
by it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memcontrol.config.base import BaseConfig
from memcontrol.config.differing import find_differing_keys
from memcontrol.config.load import load_config
from memcontrol.config.places import locate_config
from memcontrol.config.study import Config
from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import read_json, write_json
from memcontrol.core.image_parts import DIGITS
from memcontrol.core.published import HUB, publish_config
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.core.seeds import derive_seed
from memcontrol.core.space import SearchSpace
from memcontrol.core.space_yaml import dump_space, name_space, parse_space
from memcontrol.core.version import __version__

# keys that say which trials there are and how they are chosen: a run is the same whatever they are
OF_STUDY = (
    "name",
    "space",
    "rewards.objectives",
    "rewards.limits",
    "rewards.force",
    "search.sampler",
    "search.over",
    "search.weigh_cost",
    "search.warm_start",
)


@dataclass(frozen=True)
class Spec:
    """All that a trial depends on. `reference` names the part that rewards compare with: holdout in a search,
    test after it."""

    config: Config
    space: SearchSpace
    choice: Choice
    study_folder: Path
    purpose: str
    reference: str
    n_train: int

    @property
    def seed(self) -> int:
        return derive_seed(self.config.search.seed, self.choice.trained.key, self.purpose)

    @property
    def sampling_seed(self) -> int:
        """Shared by all trials of a purpose: the same prompts and noise for everyone."""
        return derive_seed(self.config.search.seed, "sampling", self.purpose)

    @property
    def pinned_base(self) -> BaseConfig:
        """The base at the commit that the study began with, if the Hub has it."""
        commit = StudyFolder(self.study_folder).read_pins().get("commit")
        base = self.config.base
        return base.model_copy(update={"revision": commit}) if commit else base

    def description(self) -> dict[str, Any]:
        """What it was trained with."""
        return {
            "version": __version__,
            "config": self.config.dump_as_written(),
            "choice": self.choice.as_dict(),
            "space": dump_space(self.space),
        }

    def describe_published(self) -> dict[str, Any]:
        """The same where it leaves this machine: no paths, and the images by no name of their own."""
        config = publish_config(self.config.dump_as_written())
        path = config["data"]["path"]
        known = path if path == DIGITS or path.startswith(HUB) else "private images"
        return self.description() | {"config": {**config, "data": {**config["data"], "path": known}}}

    def write(self, folder: Path) -> None:
        """Writes the spec into the trial's folder. Raises MemControlError where
        the folder is another one's."""
        self.check_folder(folder)
        rest = {
            "study_folder": express_path(self.study_folder, folder, self.study_folder),
            "paths_from": self.config.folder and express_path(self.config.folder, folder, self.study_folder),
            "purpose": self.purpose,
            "reference": self.reference,
            "n_train": self.n_train,
        }
        write_json(RunFolder(folder).spec_file, self.description() | rest)

    def check_folder(self, folder: Path) -> None:
        """Raises MemControlError where the folder holds a run that another config or space made: its rewards
        are not this one's."""
        run = RunFolder(folder)
        if not run.spec_file.is_file():
            return
        there, stopped = read_spec(folder), run.judged_file.is_file()
        differing = find_differing_keys(
            there.config, self.config, OF_STUDY if stopped else (*OF_STUDY, "search.early_stopping")
        )
        functions = [
            {Path(place).name for place in config.rewards.functions.values()}
            for config in (there.config, self.config)
        ]
        differing += ["rewards.objectives (other functions)"] if functions[0] != functions[1] else []
        differing += (
            ["what the space's groups hold"] if _dump_groups(there.space) != _dump_groups(self.space) else []
        )
        if differing:
            raise MemControlError(
                f"{folder} holds a run of study '{there.config.name}' with another config: "
                f"{'; '.join(differing)}; restore these keys, choose another name, or remove that folder"
            )


def _dump_groups(space: SearchSpace) -> dict[str, Any]:
    """All of a space that a run depends on."""
    return {key: value for key, value in dump_space(space).items() if key != "over"}


def express_path(path: Path, folder: Path, study_folder: Path) -> str:
    """As it is seen from a run's folder, which moves with the study's where it lies in that."""
    path, folder = path.resolve(), folder.resolve()
    is_within = folder.is_relative_to(study_folder.resolve())
    return os.path.relpath(path, folder) if is_within else str(path)


def read_spec(folder: Path) -> Spec:
    """Raises MemControlError where the folder is no trial's."""
    path = RunFolder(folder).spec_file
    if not path.is_file():
        raise MemControlError(
            f"{folder} is no run folder: it has no {path.name}; `front --json` and `retrain` name run folders"
        )
    values = read_json(path)
    config = load_config(values["config"])
    if paths_from := values.get("paths_from"):  # older specs have absolute paths
        config = locate_config(config, (folder / paths_from).resolve())
    return Spec(
        config,
        parse_space(values["space"], name_space(config.space)),
        Choice.from_dict(values["choice"]),
        (folder / values["study_folder"]).resolve(),
        values["purpose"],
        values["reference"],
        values["n_train"],
    )
