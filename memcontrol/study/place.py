"""Owns a study's place: its file, its config, its folder and its database, read once by each command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from memcontrol.config.load import load_config
from memcontrol.config.settings import load_study_space
from memcontrol.config.study import Config
from memcontrol.core.run_folder import StudyFolder, locate_study_folder
from memcontrol.core.space import SearchSpace
from memcontrol.study.opening import is_searched, open_study, resolve_storage_url
from memcontrol.study.store import Study


@dataclass(frozen=True)
class StudyPlace:
    """A study file as it is now, overrides applied, and where its results lie."""

    file: Path
    config: Config

    @classmethod
    def load(cls, file: str | Path, overrides: Sequence[str] = (), name: str | None = None) -> StudyPlace:
        """`overrides` are values such as "inner.batch_size=8"; `name` is another than the file's. Raises
        MemControlError."""
        named = [] if name is None else [f"name={json.dumps(name)}"]
        return cls(Path(file), load_config(Path(file), [*overrides, *named]))

    @cached_property
    def folder(self) -> StudyFolder:
        return StudyFolder(locate_study_folder(self.file, self.config.name))

    @property
    def is_beside_file(self) -> bool:
        """Whether the folder is the study file's own, which a person made, and has more in it."""
        return self.folder.path == self.file.resolve().parent

    @cached_property
    def url(self) -> str:
        """Of the database. Raises MemControlError where the config's is none."""
        return resolve_storage_url(self.config, self.folder.path, self.file)

    @cached_property
    def space(self) -> SearchSpace:
        return load_study_space(self.config)

    def is_searched(self) -> bool:
        """Whether the database holds the study."""
        return is_searched(self.config, self.folder.path, self.file)

    def open(self) -> Study:
        """The study as it was searched: its stored config counts, not later edits of the file. Raises
        MemControlError where there is none."""
        return open_study(self.config, self.folder.path, self.file, create=False)
