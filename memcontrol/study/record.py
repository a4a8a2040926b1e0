"""Owns one trial as the study knows it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.reward_table import list_errors, list_losses
from memcontrol.core.run_folder import StudyFolder

DROPPED = "DROPPED"  # the state of a trial that an operator took out; Optuna has none for it


@dataclass(frozen=True)
class Record:
    """One trial of the study. An anchor tries several choices and stands for the best; `choice` is None until
    it has one."""

    number: int
    state: str
    candidates: tuple[Choice, ...]
    anchor: str | None = None
    choice: Choice | None = None
    objectives: dict[str, str] = field(default_factory=dict)  # name to direction
    searched: dict[str, float] = field(default_factory=dict)  # rewards as the search measured them
    confirmed: dict[str, float] = field(default_factory=dict)  # and over fresh draws, for trials on the front
    replicates: tuple[dict[str, float], ...] = ()  # rewards of the same choice fine-tuned from other seeds
    rungs: tuple[dict, ...] = ()  # what was measured on the way: rung, rewards
    reason: str = ""
    seconds: float = 0.0
    begun: str = ""  # local time, as ISO 8601
    ended: str = ""
    dropped: str = ""  # why it counts for nothing; its state is then DROPPED
    enqueued: bool = False  # somebody asked for it: `memcontrol enqueue`, or another program
    folder: Path = field(default=Path(), compare=False, repr=False)  # the study's

    @property
    def finished(self) -> bool:
        return self.state == "COMPLETE"

    @cached_property
    def is_variant(self) -> bool:
        """Whether it is another trial's fine-tuning, measured at other settings."""
        return len(self.candidates) == 1 and self.candidates[0].is_variant

    @property
    def origin(self) -> str:
        """What it is: an anchor's name, "variant", which needs no training of its own, "enqueued" or
        "sampled"."""
        if self.anchor or self.is_variant:
            return self.anchor or "variant"
        return "enqueued" if self.enqueued else "sampled"

    @property
    def is_outside(self) -> bool:
        """Whether no point of the space stands for it."""
        return self.anchor in ("none", "full") or (self.choice is not None and self.choice.is_outside)

    @property
    def is_sampled(self) -> bool:
        """Whether it is one of the trials that `search.trials` counts, as those are that were enqueued."""
        return self.anchor is None and not self.is_variant

    @property
    def fills_place(self) -> bool:
        """Whether it is one of search.trials: for one that failed or was dropped another is sampled."""
        return self.is_sampled and self.state not in ("FAIL", DROPPED)

    @property
    def chosen(self) -> Choice:
        """The choice of a trial that has one, as every finished one does. Raises MemControlError."""
        if self.choice is None:
            raise MemControlError(f"trial {self.number} has no choice yet; ask again when it has ended")
        return self.choice

    @property
    def run(self) -> Path:
        """The folder of the choice's fine-tuning, for `export` and `compare`."""
        return StudyFolder(self.folder).run(self.chosen).path

    @property
    def rewards(self) -> dict[str, float]:
        """The best that is known."""
        return self.confirmed or self.searched

    @property
    def values(self) -> dict[str, float]:
        """The objectives among them."""
        return {name: self.rewards[name] for name in self.objectives} if self.finished else {}

    @cached_property
    def losses(self) -> list[float]:
        """The values, with those that are maximised negated: less is better in each."""
        return list_losses(self.rewards, self.objectives) if self.finished else []

    @cached_property
    def errors(self) -> list[float]:
        """The standard errors of the losses; 0 where nothing is known of one."""
        return list_errors(self.rewards, self.objectives)

    def as_running(self) -> Record:
        """As it was before it ended; one that was dropped stays so."""
        if self.dropped:
            return self
        choice = self.candidates[0] if len(self.candidates) == 1 else None
        return Record(
            self.number,
            "RUNNING",
            self.candidates,
            self.anchor,
            choice,
            self.objectives,
            begun=self.begun,
            enqueued=self.enqueued,
            folder=self.folder,
        )

    def as_dropped(self, why: str) -> Record:
        return replace(self, state=DROPPED, dropped=why)

    def as_dict(self) -> dict[str, Any]:
        """The form of every --json."""
        return {
            "trial": self.number,
            "state": self.state,
            "values": self.values,
            "choice": self.choice.as_dict() if self.choice else None,
            "run": str(self.run) if self.choice else None,
            "anchor": self.anchor,
            "origin": self.origin,
            "rewards": self.rewards,
            "confirmed": bool(self.confirmed),
            "searched": self.searched,
            "replicates": list(self.replicates),
            "reason": self.reason or None,
            "dropped": self.dropped or None,
            "seconds": self.seconds,
            "begun": self.begun,
            "ended": self.ended or None,
        }


def add_result(record: Record, result: dict) -> Record:
    choice = Choice.from_dict(result["choice"]) if "choice" in result else record.choice
    return replace(
        record,
        choice=choice,
        searched=result.get("rewards", {}),
        rungs=tuple(result.get("rungs", ())),
        reason=result.get("reason", ""),
        seconds=result.get("seconds", 0.0),
    )


def format_time(when) -> str:
    return when.isoformat(timespec="seconds") if when else ""
