"""Owns early stopping: what a trial showed at a rung, and whether it goes on, told by the trials that have come there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memcontrol.config import Config, EarlyStopping
from memcontrol.figures import MAXIMIZE, error_of
from memcontrol.files import read_json, write_json
from memcontrol.spec import JUDGED


@dataclass(frozen=True)
class Shown:
    """What a trial had reached at a rung: each objective as a loss (less is better), its standard error, and what each sample added
    to it, where that is known. All trials have the same prompts and noise."""

    number: int
    losses: tuple[float, ...]
    errors: tuple[float, ...]
    contributions: tuple[np.ndarray | None, ...] = ()

    @classmethod
    def of(cls, number: int, rewards: dict[str, float], objectives: dict[str, str], images: Mapping[str, np.ndarray] = {}) -> Shown:
        signs = {name: -1.0 if direction == MAXIMIZE else 1.0 for name, direction in objectives.items()}
        added = tuple(sign * images[name] if name in images else None for name, sign in signs.items())
        return cls(number, tuple(sign * rewards[name] for name, sign in signs.items()), tuple(error_of(name, rewards) for name in signs), added)

    def beaten_by(self, other: Shown, beyond: float) -> bool:
        """Whether the other one is better in every objective, by more than `beyond` standard errors of the difference: in pairs over
        the samples where that is possible."""
        return all(other.losses[i] + beyond * self.error_of_difference(other, i) < self.losses[i] for i in range(len(self.losses)))

    def error_of_difference(self, other: Shown, i: int) -> float:
        mine, theirs = (shown.contributions[i] if shown.contributions else None for shown in (self, other))
        if mine is None or theirs is None or len(mine) != len(theirs):
            return math.hypot(self.errors[i], other.errors[i])
        return float(np.std(mine - theirs, ddof=1)) / math.sqrt(len(mine))


def rung_file(rung: float) -> str:
    return f"rung-{rung:g}.json"


def contributions_at(folder: Path, rung: float) -> Mapping[str, np.ndarray]:
    path = (folder / rung_file(rung)).with_suffix(".npz")
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def rungs_of(folder: Path, config: Config) -> list[dict]:
    """What the trial was measured at, rung by rung: its share of the budget, and the objectives there with what is told of their errors."""
    rule, names = config.search.early_stopping, config.rewards.names
    paths = [folder / rung_file(rung) for rung in rule.rungs] if rule else []
    measured = [read_json(path) for path in paths if path.is_file()]
    return [{**one, "rewards": {key: value for key, value in one["rewards"].items() if key.startswith(names)}} for one in measured]


def judgements(folder: Path) -> list[dict]:
    """What was decided at the trial's rungs: rung, goes_on, beaten_by, n_peers."""
    return read_json(folder / JUDGED) if (folder / JUDGED).is_file() else []


def verdict(own: Shown, peers: Sequence[Shown], rule: EarlyStopping) -> tuple[list[int], bool]:
    """Who beats a trial, and whether it stops: where at least `beaten_by` of its peers, of whom there are `min_peers` or more, beat it in
    every objective. With two objectives no ranking by one number exists, and what few beat may still lie on the front."""
    beaten = [peer.number for peer in peers if own.beaten_by(peer, rule.beyond)]
    return beaten, len(peers) >= rule.min_peers and len(beaten) >= rule.beaten_by * len(peers)


def judge(folder: Path, rung: float, own: Shown, peers: Sequence[Shown], rule: EarlyStopping) -> dict:
    """Decides whether a trial goes on beyond a rung, and writes it down before anybody acts on it: what was decided once stays so,
    whatever peers come later and whoever dies."""
    known = next((one for one in judgements(folder) if one["rung"] == rung), None)
    if known:
        return known
    beaten, stops = verdict(own, peers, rule)
    found = {"rung": rung, "goes_on": not stops, "beaten_by": beaten, "n_peers": len(peers)}
    write_json(folder / JUDGED, [*judgements(folder), found])
    return found


class Stops:
    """Who goes on in one search. `runs` are the folders of the trials that may be stopped, by number."""

    def __init__(self, config: Config, objectives: dict[str, str], runs: dict[int, Path]):
        self.config, self.rule, self.objectives, self.runs = config, config.search.early_stopping, objectives, runs

    def next_rung(self, number: int, run: Path) -> float | None:
        """The rung to train to; none: to the end."""
        if self.rule is None or number not in self.runs:
            return None
        judged = {judgement["rung"] for judgement in judgements(run)}
        return next((rung for rung in self.rule.rungs if rung not in judged), None)

    def goes_on(self, number: int, run: Path) -> bool:
        """Judges the trial at each rung that it has come to."""
        if self.rule is None or number not in self.runs:
            return True
        return all(judge(run, *self.shown(number, run, one["rung"]), self.rule)["goes_on"] for one in rungs_of(run, self.config))

    def shown(self, number: int, run: Path, rung: float) -> tuple[float, Shown, list[Shown]]:
        """The rung, what the trial showed there, and what all others did."""
        found = {
            other: Shown.of(other, one["rewards"], self.objectives, contributions_at(folder, rung))
            for other, folder in self.runs.items() for one in rungs_of(folder, self.config) if one["rung"] == rung
        }  # fmt: skip
        return rung, found.pop(number), list(found.values())

    def said(self, run: Path) -> dict:
        """What the result of a trial that stopped says of it."""
        last, measured = judgements(run)[-1], rungs_of(run, self.config)
        beaten = ", ".join(map(str, last["beaten_by"]))
        text = f"stopped at {last['rung']:.0%} of its budget: beaten in every objective by {len(last['beaten_by'])} of {last['n_peers']} trials ({beaten})"
        return {"reason": text, "rungs": measured, "seconds": sum(one["seconds"] for one in measured)}
