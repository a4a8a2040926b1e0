"""Owns the runs of one search: the folder, the spec and the job of each choice."""

from __future__ import annotations

from dataclasses import dataclass

from memcontrol.config.settings import configure_choice
from memcontrol.config.spec import Spec
from memcontrol.config.study import Config
from memcontrol.core.choice import Choice
from memcontrol.core.jobs import TrialJob
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.core.space import SearchSpace


@dataclass(frozen=True)
class TrialRuns:
    """What all runs of a search have in common."""

    config: Config
    space: SearchSpace
    folder: StudyFolder
    n_train: int

    def locate(self, choice: Choice) -> RunFolder:
        return self.folder.run(choice)

    def make_spec(self, choice: Choice, purpose: str = "search") -> Spec:
        config = configure_choice(self.config, choice)
        return Spec(config, self.space, choice, self.folder.path, purpose, "holdout", self.n_train)

    def check(self, choice: Choice) -> None:
        """Raises MemControlError where the choice's folder holds what another config or space made."""
        self.make_spec(choice).check_folder(self.locate(choice).path)

    def make_job(self, choice: Choice, number: int, rung: float | None) -> TrialJob:
        folder = self.locate(choice).path
        self.make_spec(choice).write(folder)
        return TrialJob(folder, choice, number, rung)

    def has_replicate(self, choice: Choice, i: int) -> bool:
        """Raises MemControlError where its folder holds what another config or space made."""
        run = self.locate(choice).replicate(i)
        self.make_spec(choice, f"search replicate {i}").check_folder(run.path)
        return run.has_result

    def make_replicate_job(self, choice: Choice, number: int, i: int) -> TrialJob:
        """The i-th further fine-tuning of the choice, from a seed of its own."""
        folder = self.locate(choice).replicate(i).path
        self.make_spec(choice, f"search replicate {i}").write(folder)
        return TrialJob(folder, choice, number, replicate=i)
