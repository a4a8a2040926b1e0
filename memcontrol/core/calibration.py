"""Owns what a calibration measures, as it travels from a worker: what each short trial cost, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


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
