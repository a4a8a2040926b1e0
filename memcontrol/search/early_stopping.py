"""Owns early stopping: what a trial showed at a rung, and whether it goes on, told by the trials that have
come there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memcontrol.config.search import EarlyStopping
from memcontrol.config.study import Config
from memcontrol.core.files import write_json
from memcontrol.core.reward_table import list_errors, list_losses, list_objectives
from memcontrol.core.run_folder import RunFolder


@dataclass(frozen=True)
class RungResult:
    """What a trial had reached at a rung: each objective as a loss (less is better), its standard error, and
    what each sample added to it, where that is known. All trials have the same prompts and noise."""

    number: int
    losses: tuple[float, ...]
    errors: tuple[float, ...]
    contributions: tuple[np.ndarray | None, ...] = ()

    @classmethod
    def of(
        cls,
        number: int,
        rewards: dict[str, float],
        objectives: dict[str, str],
        images: Mapping[str, np.ndarray] = {},
    ) -> RungResult:
        """`objectives`: name to direction; `images`: what each sample adds to a reward, by name."""
        losses, errors = list_losses(rewards, objectives), list_errors(rewards, objectives)
        added = [
            objective.sign * images[objective.name] if objective.name in images else None
            for objective in list_objectives(objectives)
        ]
        return cls(number, tuple(losses), tuple(errors), tuple(added))

    def beaten_by(self, other: RungResult, beyond: float) -> bool:
        """Whether the other one is better in every objective, by more than `beyond` standard errors of the
        difference: in pairs over the samples where that is possible."""
        return all(
            other.losses[i] + beyond * self.measure_difference_error(other, i) < self.losses[i]
            for i in range(len(self.losses))
        )

    def measure_difference_error(self, other: RungResult, i: int) -> float:
        mine, theirs = self.find_contributions(i), other.find_contributions(i)
        if mine is None or theirs is None or len(mine) != len(theirs):
            return math.hypot(self.errors[i], other.errors[i])
        return float(np.std(mine - theirs, ddof=1)) / math.sqrt(len(mine))

    def find_contributions(self, i: int) -> np.ndarray | None:
        """What each sample added to the i-th objective, where that is known."""
        return self.contributions[i] if self.contributions else None


def weigh_peers(own: RungResult, peers: Sequence[RungResult], rule: EarlyStopping) -> tuple[list[int], bool]:
    """Who beats a trial, and whether it stops: where at least `beaten_by` of its peers, of whom there are
    `min_peers` or more, beat it in every objective. With two objectives no ranking by one number exists, and
    what few beat may still lie on the front."""
    beaten = [peer.number for peer in peers if own.beaten_by(peer, rule.beyond)]
    return beaten, len(peers) >= rule.min_peers and len(beaten) >= rule.beaten_by * len(peers)


def judge_trial(
    run: RunFolder, rung: float, own: RungResult, peers: Sequence[RungResult], rule: EarlyStopping
) -> dict:
    """Decides whether a trial goes on beyond a rung, and writes it down before anybody acts on it: what was
    decided once stays so, whatever peers come later and whoever dies."""
    known = next((one for one in run.read_judgements() if one["rung"] == rung), None)
    if known:
        return known
    beaten, stops = weigh_peers(own, peers, rule)
    judgement = {"rung": rung, "goes_on": not stops, "beaten_by": beaten, "n_peers": len(peers)}
    write_json(run.judged_file, [*run.read_judgements(), judgement])
    return judgement


class EarlyStopper:
    """Who goes on in one search. `runs` are the folders of the trials that may be stopped, by number."""

    def __init__(self, config: Config, objectives: dict[str, str], runs: dict[int, RunFolder]):
        self.config, self.rule = config, config.search.early_stopping
        self.objectives, self.runs = objectives, runs
        self.found: dict[tuple[int, float], RungResult] = {}  # by trial and rung

    def watch(self, number: int, run: RunFolder) -> None:
        """From now on the trial may be stopped."""
        self.runs[number] = run

    def leave_out(self, numbers: Iterable[int]) -> None:
        """These beat nobody any more."""
        for number in numbers:
            self.runs.pop(number, None)

    def next_rung(self, number: int, run: RunFolder) -> float | None:
        """The rung to train to; none: to the end."""
        if self.rule is None or number not in self.runs:
            return None
        judged = {judgement["rung"] for judgement in run.read_judgements()}
        return next((rung for rung in self.rule.rungs if rung not in judged), None)

    def goes_on(self, number: int, run: RunFolder) -> bool:
        """Judges the trial at each rung that it has come to."""
        if self.rule is None or number not in self.runs:
            return True
        return all(
            judge_trial(run, *self.compare_at(number, run, one["rung"]), self.rule)["goes_on"]
            for one in self.read_rungs(run)
        )

    def compare_at(
        self, number: int, run: RunFolder, rung: float
    ) -> tuple[float, RungResult, list[RungResult]]:
        """The rung, what the trial showed there, and what all others did."""
        shown = ((other, self.find_result(other, rung)) for other in self.runs)
        found = {other: result for other, result in shown if result is not None}
        return rung, found.pop(number), list(found.values())

    def find_result(self, number: int, rung: float) -> RungResult | None:
        """What a trial showed at a rung, which is read once: there are as many to compare with as trials."""
        run = self.runs[number]
        if (number, rung) not in self.found and run.rung_file(rung).is_file():
            rewards = {one["rung"]: one["rewards"] for one in self.read_rungs(run)}[rung]
            images = run.read_rung_contributions(rung)
            self.found[number, rung] = RungResult.of(number, rewards, self.objectives, images)
        return self.found.get((number, rung))

    def read_rungs(self, run: RunFolder) -> list[dict]:
        return run.read_rungs(self.config.search.rungs, self.config.rewards.names)

    def describe(self, run: RunFolder) -> dict:
        """What the result of a trial that stopped says of it."""
        last, measured = run.read_judgements()[-1], self.read_rungs(run)
        beaten = ", ".join(map(str, last["beaten_by"]))
        text = (
            f"stopped at {last['rung']:.0%} of its budget: beaten in every objective by "
            f"{len(last['beaten_by'])} of {last['n_peers']} trials ({beaten})"
        )
        return {"reason": text, "rungs": measured, "seconds": sum(one["seconds"] for one in measured)}
