"""Owns the study in memory that Optuna's samplers draw from: the newest records and the front, in the
sampler's own coordinates."""

from __future__ import annotations

import random
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from memcontrol.core.choice import Choice
from memcontrol.core.seeds import derive_seed
from memcontrol.core.space import SearchSpace
from memcontrol.search.surrogate import N_SPREAD, Moves, extrapolate_losses, measure_moves
from memcontrol.study.optuna_private import name_constraint
from memcontrol.study.pareto import Limit
from memcontrol.study.pick import keeps_limits, select_front
from memcontrol.study.record import Record
from memcontrol.study.trials import compute_excesses, make_distributions

N_NEWEST = 1000  # of the newest trials: what a draw by TPE takes grows with what it is shown
_POPULATION = 16
_NO_MOVES: Moves = {}
_GOLDEN = (5**0.5 - 1) / 2
_N_ASKS = 5  # draws of the sampler for one choice


class InMemoryStudy:
    """What a sampler is shown of the records, anew for each draw, so that sampling costs no database reads,
    nothing is half written, and a search that goes on draws what one does that was never interrupted. What is
    kept from one draw to the next is only what would come out the same.

    A choice's learning rate is its position in the method's range; every method has a rank.
    """

    def __init__(self, space: SearchSpace, n_objectives: int, limits: Sequence[Limit], kind: str):
        self.space, self.limits, self.kind = space, limits, kind
        self.directions = [StudyDirection.MINIMIZE] * n_objectives
        self.coordinates = make_distributions(space)
        self.mirrored: dict[int, tuple[Record, FrozenTrial]] = {}  # by number
        # by generation, its members, and the best of all up to it, whose children the next one is
        self.lineage: list[tuple[Sequence[Record], list[FrozenTrial]]] = []
        self.show((), 0)

    def show(self, records: Sequence[Record], seed: int) -> None:
        """Makes ready for the next draw; a random one looks at no records."""
        trials: Sequence[FrozenTrial] = ()
        sampler: optuna.samplers.BaseSampler
        if self.kind == "random":
            sampler = optuna.samplers.RandomSampler(seed)
        elif self.kind == "nsga2":
            sampler = self.make_nsga2(records, seed)
        else:
            trials, sampler = (
                self.mirror(select_shown(records, self.limits)),
                _make_tpe(seed, self.coordinates),
            )
        self.study = optuna.create_study(
            storage=_ShowingStorage(trials), sampler=sampler, directions=self.directions
        )

    def ask_choices(self, n_sampled: int, seed: int) -> Iterator[Choice]:
        """What Optuna's sampler draws; each draw counts as a running trial to the next."""
        for attempt in range(_N_ASKS):
            params = self.study.ask(self.coordinates).params
            if n_sampled < N_SPREAD:
                params = {**params, **_draw_spread_point(n_sampled + attempt, self.space, seed)}
            yield self.space.make_choice_at(params)

    def mirror(self, records: Sequence[Record]) -> list[FrozenTrial]:
        """In the order of the records; what they were stopped at moves with all that ended."""
        before, self.mirrored = self.mirrored, {}
        stopped = [record for record in records if record.state == "PRUNED"]
        moves = measure_moves(records) if stopped else {}
        for place, record in enumerate(records):
            known, trial = before.get(record.number, (None, None))
            if trial is None or known is not record:
                trial = mirror_record(record, self.space, self.limits, moves)
            assert trial is not None, "only such are shown"
            trial.number = place - len(records)  # those that are asked for begin with 0
            self.mirrored[record.number] = record, trial
        for record in stopped:
            self.mirrored[record.number][1].values = extrapolate_losses(record, moves)[0].tolist()
        return [trial for _, trial in self.mirrored.values()]

    def make_nsga2(self, records: Sequence[Record], seed: int) -> _GenerationSampler:
        """Generations are told by the order in which trials ended."""
        ended = [record for record in records if _is_mirrored(record) and record.state != "RUNNING"]
        ended.sort(key=lambda record: (record.ended, record.number))
        sampler, n_full = _GenerationSampler(seed, self.coordinates), len(ended) // _POPULATION
        for generation in range(n_full):
            end = (generation + 1) * _POPULATION
            members = ended[end - _POPULATION : end]
            if generation < len(self.lineage) and self.lineage[generation][0] == members:
                sampler.parents = self.lineage[generation][1]
                continue
            moves = measure_moves(ended[max(end - N_NEWEST, 0) : end])
            sampler.population = self.mirror_members(members, moves, end)
            sampler.parents = sampler.select_parent(self.study, generation + 1)
            sampler.parents.sort(key=lambda trial: trial.number)
            self.lineage[generation:] = [(members, sampler.parents)]
        sampler.generation = n_full
        return sampler

    def mirror_members(self, members: Sequence[Record], moves: Moves, end: int) -> list[FrozenTrial]:
        """Of a generation, after which as many as `end` had ended."""
        trials = [mirror_record(record, self.space, self.limits, moves) for record in members]
        found = [trial for trial in trials if trial is not None]
        for place, trial in enumerate(found):
            trial.number = end - len(found) + place
        return found


class _ShowingStorage(optuna.storages.InMemoryStorage):
    """Shows ready trials beside those that are asked for: writing them, Optuna would copy each deeply."""

    def __init__(self, trials: Sequence[FrozenTrial]):
        super().__init__()
        self.trials = trials

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        shown = [trial for trial in self.trials if states is None or trial.state in states]
        return shown + super().get_all_trials(study_id, deepcopy, states)


def _select_sampled(coordinates: Mapping[str, BaseDistribution]) -> dict[str, BaseDistribution]:
    """As a sampler would gather them from all trials that it is shown."""
    return {name: one for name, one in sorted(coordinates.items()) if not one.single()}


class _GenerationSampler(optuna.samplers.NSGAIISampler):
    """NSGA-II (Deb et al. 2002) that is told what generation it is in and whose children it draws."""

    def __init__(self, seed: int, coordinates: Mapping[str, BaseDistribution]):
        super().__init__(population_size=_POPULATION, seed=seed)
        self.coordinates = _select_sampled(coordinates)
        self.generation, self.population, self.parents = 0, [], []  # type: ignore[var-annotated]

    def get_trial_generation(self, study: optuna.Study, trial: FrozenTrial) -> int:
        return self.generation

    def get_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return self.population

    def get_parent_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return self.parents

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self.coordinates


class _SpaceTPESampler(optuna.samplers.TPESampler):
    """Knows the coordinates, which it would otherwise compare over all trials at every draw."""

    coordinates: dict[str, BaseDistribution]

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self.coordinates


def _make_tpe(seed: int, coordinates: Mapping[str, BaseDistribution]) -> _SpaceTPESampler:
    """Multivariate TPE with a constant liar for the trials still running (Watanabe 2023, arXiv
    2304.11127)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = _SpaceTPESampler(
            multivariate=True, constant_liar=True, n_startup_trials=N_SPREAD, seed=seed
        )
    sampler.coordinates = _select_sampled(coordinates)
    return sampler


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


def _is_mirrored(record: Record) -> bool:
    """Not what lies outside the space, other measurements of a fine-tuning, failures."""
    is_stopped = record.state == "PRUNED" and bool(record.rungs)
    if record.choice is None or not (is_stopped or record.state in ("COMPLETE", "RUNNING")):
        return False
    return not (record.is_outside or record.is_variant)


def select_shown(records: Sequence[Record], limits: Sequence[Limit] = ()) -> list[Record]:
    """Of those that can be shown to a sampler, the newest N_NEWEST, and of the older ones those that run or
    are on the front, of all or of those that keep the limits."""
    own = [record for record in records if _is_mirrored(record)]
    if len(own) <= N_NEWEST:
        return own
    complete = [record for record in own if record.finished]
    front = select_front(complete)
    if limits:
        front += select_front([record for record in complete if keeps_limits(record, limits)])
    best, older = {record.number for record in front}, own[:-N_NEWEST]
    older = [record for record in older if record.state == "RUNNING" or record.number in best]
    return older + own[-N_NEWEST:]


def mirror_record(
    record: Record, space: SearchSpace, limits: Sequence[Limit] = (), moves: Moves = _NO_MOVES
) -> FrozenTrial | None:
    """The record in the sampler's coordinates, one that was stopped early with what it promised; None where
    it is not shown."""
    if not _is_mirrored(record):
        return None
    values = None
    if record.state != "RUNNING":
        values = record.losses if record.finished else extrapolate_losses(record, moves)[0].tolist()
    constraints = {
        name_constraint(name): excess
        for name, excess in compute_excesses(record.rewards if record.finished else {}, limits).items()
    }
    return FrozenTrial(
        number=record.number,
        trial_id=record.number,
        state=TrialState.RUNNING if values is None else TrialState.COMPLETE,
        value=None,
        values=values,
        params=space.find_point(record.chosen),
        distributions={},  # the samplers know the coordinates
        user_attrs={},
        system_attrs=constraints,
        intermediate_values={},
        datetime_start=None,
        datetime_complete=None,
    )
