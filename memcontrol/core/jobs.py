"""Owns what goes between a search and its workers: jobs, the events that tell what becomes of them, and what
a calibration measured; as dataclasses, and as JSON where they cross to another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from memcontrol.core.choice import Choice
from memcontrol.core.run_folder import RunFolder


@dataclass(frozen=True)
class Job:
    """Something to be done in a folder, by a worker that knows no more than this and what lies in the
    folder."""

    folder: Path
    kind: ClassVar[str]

    @property
    def log_name(self) -> str:
        """Of the file in the folder that takes whatever is printed."""
        return "log.txt"

    def to_json(self) -> dict[str, Any]:
        return {"job": self.kind} | {part.name: _dump(getattr(self, part.name)) for part in fields(self)}

    def is_done(self) -> bool:
        """Whether what it asks for lies in its folder, as where another process did it meanwhile."""
        return False


@dataclass(frozen=True)
class PrepareJob(Job):
    """Checks base, space, rewards and images, and splits these. Ends with `Prepared`."""

    config: dict[str, Any]  # as JSON has it
    kind: ClassVar[str] = "prepare"


@dataclass(frozen=True)
class CalibrateJob(PrepareJob):
    """Runs short trials. Ends with `Calibrated`."""

    kind: ClassVar[str] = "calibrate"


@dataclass(frozen=True)
class EncodeJob(Job):
    """Makes, with the others of its kind, the latents, encodings and reference features that trials look at:
    of the first `n_train` training images, and of the part that is their `reference`. In the study's folder,
    which the others have too: `index` tells them apart. Ends with `Done`."""

    config: dict[str, Any]  # as JSON has it
    n_train: int
    reference: str
    index: int
    kind: ClassVar[str] = "encode"


@dataclass(frozen=True)
class TrialJob(Job):
    """One fine-tuning with its scoring, or its way to a rung (a share of its budget). `number` is the study's
    trial, where it is one's; `replicate` says which further fine-tuning of its choice this is."""

    choice: Choice
    number: int | None = None
    rung: float | None = None
    replicate: int | None = None
    kind: ClassVar[str] = "trial"

    def is_done(self) -> bool:
        return RunFolder(self.folder).has_come_to(self.rung)


@dataclass(frozen=True)
class ConfirmJob(Job):
    """Scores a finished trial again over fresh draws."""

    choice: Choice
    number: int
    kind: ClassVar[str] = "confirm"

    def is_done(self) -> bool:
        return RunFolder(self.folder).confirmed_file.is_file()


@dataclass(frozen=True)
class HelpJob(Job):
    """A share of a trial that another process leads: the shards of one rank among `size`, or, where there is
    the `port` of a meeting, that rank's part of the base and of each batch, in the whole trial or in what
    `confirms` it. Nothing is said of it."""

    rank: int
    size: int
    rung: float | None
    port: int | None = None
    confirms: bool = False
    kind: ClassVar[str] = "help"

    @property
    def log_name(self) -> str:
        return f"log-{self.rank}.txt"


@dataclass(frozen=True)
class Event:
    """What is said of a job; of none, where it is the search itself that speaks. Each job ends in exactly one
    of END_EVENTS; the queue of jobs tries FAILED_EVENTS again."""

    job: Job | None
    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """All but the job, which the reader knows."""
        told = {part.name: _dump(getattr(self, part.name)) for part in fields(self) if part.name != "job"}
        return {"event": self.kind} | told


@dataclass(frozen=True)
class Progress(Event):
    """How far a job is. While it trains: its round, the last loss, and the share of images skipped in the
    round."""

    stage: str
    done: int
    total: int
    round: int | None = None
    loss: float | None = None
    skipped: float | None = None
    kind: ClassVar[str] = "progress"


@dataclass(frozen=True)
class Warned(Event):
    text: str
    kind: ClassVar[str] = "warning"


@dataclass(frozen=True)
class Prepared(Event):
    """`sizes` of the parts, the objectives' `directions`, and the versions that a study is `made_with`."""

    sizes: dict[str, int]
    directions: list[str]
    made_with: dict[str, str] = field(default_factory=dict)
    kind: ClassVar[str] = "prepared"


@dataclass(frozen=True)
class Calibrated(Event):
    calibration: dict[str, Any]
    kind: ClassVar[str] = "calibrated"


@dataclass(frozen=True)
class Done(Event):
    kind: ClassVar[str] = "done"


@dataclass(frozen=True)
class Stopped(Event):
    """What only the user can mend."""

    reason: str
    kind: ClassVar[str] = "stop"


@dataclass(frozen=True)
class Failed(Event):
    """The attempt raised."""

    reason: str
    traceback: str = ""
    kind: ClassVar[str] = "failed"


@dataclass(frozen=True)
class Lost(Failed):
    """The attempt's process, node or time came to an end."""

    kind: ClassVar[str] = "lost"


@dataclass(frozen=True)
class Overtaken(Event):
    """Another process has taken the trial over, and does what the job asks for: no failure."""

    reason: str
    kind: ClassVar[str] = "overtaken"


@dataclass(frozen=True)
class GivenUp(Failed):
    """The last of several attempts failed."""

    kind: ClassVar[str] = "given up"


_FAILED_EVENTS = (Failed, Lost)
END_EVENTS = (Prepared, Calibrated, Done, Stopped, Overtaken, *_FAILED_EVENTS)
_JOBS = {kind.kind: kind for kind in (PrepareJob, CalibrateJob, EncodeJob, TrialJob, ConfirmJob, HelpJob)}
_EVENTS = {kind.kind: kind for kind in (Progress, Warned, *END_EVENTS, GivenUp)}


def parse_job(values: dict[str, Any]) -> Job:
    """What `Job.to_json` gave."""
    rest = {name: value for name, value in values.items() if name != "job"}
    rest["folder"] = Path(rest["folder"])
    if "choice" in rest:
        rest["choice"] = Choice.from_dict(rest["choice"])
    return _JOBS[values["job"]](**rest)


def parse_event(values: dict[str, Any], job: Job | None) -> Event:
    """What `Event.to_json` gave, of that job."""
    rest = {name: value for name, value in values.items() if name != "event"}
    return _EVENTS[values["event"]](job, **rest)


def _dump(value: Any) -> Any:
    if isinstance(value, Choice):
        return value.as_dict()
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class TrialCost:
    """Of one short trial: seconds of a step; before the first, the ends of its rounds with them, which do not
    grow with the budget; after the last. Bytes of its samples, of the rest that is kept, of the weights among
    that, and of its checkpoints while it trains."""

    setup_seconds: float
    step_seconds: float
    after_seconds: float
    samples_bytes: int
    rest_bytes: int
    weights_bytes: int
    rounds_bytes: int


@dataclass(frozen=True)
class Calibration:
    """What one worker found. `by_kind` holds the short trials, each of one batch of samples, by what they
    train: an anchor's name (`none` whether it is one of the search's or not) or "sampled"; `two_batches`
    trains nothing and samples twice as much."""

    start_seconds: float  # before the first short trial
    batch_size: int  # samples in a batch
    shared_bytes: int  # what all trials have in common
    peak_mib: float
    by_kind: dict[str, tuple[TrialCost, ...]]
    two_batches: TrialCost

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """The inverse of `as_dict`, also after a journey as JSON."""
        by_kind = {
            kind: tuple(TrialCost(**cost) for cost in costs) for kind, costs in values["by_kind"].items()
        }
        return cls(**{**values, "by_kind": by_kind, "two_batches": TrialCost(**values["two_batches"])})
