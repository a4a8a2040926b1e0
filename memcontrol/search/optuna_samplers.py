"""Owns the study in memory that Optuna's samplers draw from: a mirror of the records in the sampler's own
coordinates."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

from memcontrol.core.choice import Choice
from memcontrol.core.reward_table import MINIMIZE
from memcontrol.core.seeds import derive_seed
from memcontrol.core.space import SearchSpace
from memcontrol.search.surrogate import N_SPREAD, extrapolate_losses
from memcontrol.study.optuna_private import GENERATION, add_trial, get_storage, name_constraint
from memcontrol.study.pareto import Limit
from memcontrol.study.record import Record
from memcontrol.study.trials import compute_excesses, make_distributions

_POPULATION = 16
_GOLDEN = (5**0.5 - 1) / 2
_N_ASKS = 5  # draws of the sampler for one choice


class InMemoryStudy:
    """Position in the method's learning-rate range, rank for every method: so sampling costs no database
    reads and nothing is half written. It lives as long as the search: copying a thousand trials into a new
    one would take longer than drawing."""

    def __init__(self, space: SearchSpace, n_objectives: int, limits: Sequence[Limit], kind: str):
        self.space, self.limits, self.kind = space, limits, kind
        self.n_objectives = n_objectives
        self.begin_anew()

    def begin_anew(self) -> None:
        self.study = optuna.create_study(directions=[MINIMIZE] * self.n_objectives)
        # the study's trial id, where it has one, and the state it mirrors, by number
        self.mirrored: dict[int, tuple[int | None, str]] = {}
        self.n_mirrored = 0  # trials that ended well

    def has_changed(self, record: Record) -> bool:
        """Whether it is another than it ended as, since an operator has dropped it, or had it count again."""
        _, state = self.mirrored.get(record.number, (None, record.state))
        return state != record.state and state not in ("RUNNING", "WAITING")

    def show(self, records: Sequence[Record], seed: int) -> None:
        """Makes ready for the next draw; a random one looks at no records."""
        if any(self.has_changed(record) for record in records):
            self.begin_anew()
        self.study.sampler = _SAMPLERS[self.kind](seed)
        if self.kind != "random":
            ended = [record for record in records if record.finished]
            for record in records:
                self.follow(record, ended)

    def ask_choices(self, n_sampled: int, seed: int) -> Iterator[Choice]:
        """What Optuna's sampler draws; each draw counts as a running trial to the next."""
        trials = []
        try:
            for attempt in range(_N_ASKS):
                trials.append(self.study.ask(make_distributions(self.space)))
                params = trials[-1].params
                if n_sampled < N_SPREAD:
                    params = {**params, **_draw_spread_point(n_sampled + attempt, self.space, seed)}
                yield self.space.make_choice_at(params)
        finally:
            for trial in trials:
                self.study.tell(trial, state=TrialState.FAIL)

    def follow(self, record: Record, ended: Sequence[Record]) -> None:
        """Brings the mirror up to date with a record."""
        trial_id, state = self.mirrored.get(record.number, (None, ""))
        if state == record.state:
            return
        storage, frozen = get_storage(self.study), mirror_record(record, self.space, self.limits, ended)
        if trial_id is None and frozen is not None:
            trial_id = add_trial(self.study, frozen)
        elif trial_id is not None and frozen is None:
            storage.set_trial_state_values(trial_id, TrialState.FAIL)
        elif trial_id is not None and frozen is not None:
            if frozen.state == TrialState.COMPLETE:
                storage.set_trial_system_attr(trial_id, GENERATION, self.n_mirrored // _POPULATION)
                self.n_mirrored += 1
            for name, excess in frozen.system_attrs.items():
                storage.set_trial_system_attr(trial_id, name, excess)
            storage.set_trial_state_values(trial_id, frozen.state, frozen.values)
        self.mirrored[record.number] = trial_id, record.state


def _make_nsga2(seed: int) -> optuna.samplers.BaseSampler:
    """NSGA-II (Deb et al. 2002); what generation a trial belongs to is told by the mirror, in the order of
    their ends."""
    return optuna.samplers.NSGAIISampler(population_size=_POPULATION, seed=seed)


def _make_tpe(seed: int) -> optuna.samplers.BaseSampler:
    """Multivariate TPE with a constant liar for the trials still running (Watanabe 2023, arXiv
    2304.11127)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            multivariate=True, constant_liar=True, n_startup_trials=N_SPREAD, seed=seed
        )


_SAMPLERS = {
    "auto": _make_tpe,
    "gp": _make_tpe,
    "tpe": _make_tpe,
    "nsga2": _make_nsga2,
    "random": optuna.samplers.RandomSampler,
}


def _draw_spread_point(i: int, space: SearchSpace, seed: int) -> dict[str, Any]:
    """The i-th of the first choices: methods and ranks in turn, learning rates evenly over their range
    (golden-ratio steps), each group on with probability 3/4, since a mask of few groups rarely learns enough
    to be compared."""
    turn, rng = i // len(space.methods), random.Random(derive_seed(seed, "spread", i))
    point = {}
    for name, options in space.list_coordinates().items():
        if name in space.groups:
            point[name] = rng.random() < 0.75
        elif name == "method":
            point[name] = options[i % len(options)]
        elif name.endswith("rank"):
            point[name] = options[(len(options) // 2 + turn) % len(options)]
        else:
            point[name] = rng.choice(options)
    return point | {"rate": (0.5 + turn * _GOLDEN) % 1}


def mirror_record(
    record: Record, space: SearchSpace, limits: Sequence[Limit] = (), ended: Sequence[Record] = ()
) -> optuna.trial.FrozenTrial | None:
    """The record in the sampler's coordinates, one that was stopped early with what it promised; None where
    it has none: what lies outside the space, other measurements of a fine-tuning, failures."""
    choice, is_stopped = record.choice, record.state == "PRUNED" and bool(record.rungs)
    if (
        choice is None
        or record.is_outside
        or record.is_variant
        or not (is_stopped or record.state in ("COMPLETE", "RUNNING"))
    ):
        return None
    values = (
        extrapolate_losses(record, ended)[0].tolist()
        if is_stopped
        else record.losses
        if record.finished
        else None
    )
    constraints = {
        name_constraint(name): excess
        for name, excess in compute_excesses(record.rewards if record.finished else {}, limits).items()
    }
    return create_trial(
        state=TrialState.RUNNING if values is None else TrialState.COMPLETE,
        params=space.find_point(choice),
        distributions=make_distributions(space),
        values=values,
        system_attrs=constraints,
    )
