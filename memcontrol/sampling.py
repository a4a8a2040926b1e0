"""Owns what is tried next: choices drawn from a study's records by one of Optuna's samplers, none of them twice."""

from __future__ import annotations

import itertools
import random
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

from memcontrol import interrupt
from memcontrol.errors import SpaceExhausted
from memcontrol.pareto import Limit, front
from memcontrol.seeds import seed_of
from memcontrol.space import Choice, SearchSpace
from memcontrol.study import CONSTRAINT, Record, distributions, excesses

N_SPREAD = 6  # sampled trials before the sampler models anything
GOLDEN = (5**0.5 - 1) / 2
N_ASKS = 5  # draws of the sampler for one choice; where all are known, choices on the front are changed
N_FLIPS, N_FLIPS_ALIKE = 1000, 50
OUTSIDE = ("none", "full")  # anchors that no point of the space stands for


class Sampler:
    """Draws choices, never one that was asked for before: a pure function of the records and the seed; for `random`, of how many
    there are and the seed, whatever came of them.

    A study in memory mirrors the records in the sampler's own coordinates (position in the method's learning-rate range,
    rank for every method), so that sampling costs no database reads and nothing is half written. It lives as long as the search:
    copying a thousand trials into a new one would take longer than drawing. The last record always counts as running, so that
    with one worker the same is drawn whether its trial had ended by then or not.
    """

    def __init__(self, space: SearchSpace, seed: int, n_objectives: int, limits: Sequence[Limit] = (), kind: str = "tpe"):
        self.space, self.seed, self.limits, self.kind = space, seed, limits, kind
        self.mirror = optuna.create_study(directions=["minimize"] * n_objectives)
        self.mirrored: dict[int, tuple[int, Record]] = {}  # the mirror's trial id, and what it mirrors, by number

    def draw(self, records: Sequence[Record]) -> Choice:
        """The next choice. Raises SpaceExhausted when the space seems to hold no further one."""
        return self.prepared(records)()

    def prepared(self, records: Sequence[Record]) -> Callable[[], Choice]:
        """The draw, to be made in any thread before the next is prepared."""
        records = [*records[:-1], *(record.as_running() for record in records[-1:])]
        seed = seed_of(self.seed, "suggest", len(records)) % 2**32
        self.mirror.sampler = multivariate_tpe(seed) if self.kind == "tpe" else optuna.samplers.RandomSampler(seed)
        if self.kind != "random":
            for record in records:
                self.follow(record)
        known: dict[frozenset[str], list[Choice]] = defaultdict(list)
        for record in records:
            for choice in record.candidates:
                known[frozenset(choice.groups)].append(choice)
        n_sampled = sum(record.anchor is None for record in records)
        return lambda: self.drawn(known, n_sampled, parents_of(records), seed)

    def drawn(self, known: dict[frozenset[str], list[Choice]], n_sampled: int, parents: Sequence[Choice], seed: int) -> Choice:
        for choice in itertools.chain(self.asked(n_sampled, seed), self.flipped(parents, seed)):
            is_known = any(choice.same_as(other) for other in known[frozenset(choice.groups)])
            if (choice.groups or self.space.always) and not is_known:
                return choice
        raise SpaceExhausted(f"space '{self.space.name}': {N_FLIPS} draws gave no choice that was not tried before; the space is exhausted")

    def asked(self, n_sampled: int, seed: int) -> Iterator[Choice]:
        """What the sampler draws; each draw counts as a running trial to the next."""
        trials = []
        try:
            for attempt in range(N_ASKS):
                trials.append(self.mirror.ask(distributions(self.space)))
                params = trials[-1].params
                if n_sampled < N_SPREAD:
                    params = {**params, **spread(n_sampled + attempt, self.space, seed)}
                yield self.space.choice_at(params)
        finally:
            for trial in trials:
                self.mirror.tell(trial, state=TrialState.FAIL)

    def flipped(self, parents: Sequence[Choice], seed: int) -> Iterator[Choice]:
        """Choices on the front with one coordinate changed, then two and more: where a sampler repeats itself, it has come to
        such a place."""
        rng = random.Random(seed)
        options = {**self.space.coordinates(), "rate": ()}
        for attempt in range(N_FLIPS if parents else 0):
            point = self.space.point_of(rng.choice(parents))
            for name in rng.sample(list(options), min(len(options), 1 + attempt // N_FLIPS_ALIKE)):
                others = [option for option in options[name] if option != point[name]]
                point[name] = rng.random() if name == "rate" else rng.choice(others or [point[name]])
            yield self.space.choice_at(point)

    def follow(self, record: Record) -> None:
        """Brings the mirror up to date with a record."""
        trial_id, state = self.mirrored.get(record.number, (None, ""))
        if state == record.state:
            return
        storage, frozen = self.mirror._storage, mirrored(record, self.space, self.limits)
        if trial_id is None and frozen is not None:
            trial_id = storage.create_new_trial(self.mirror._study_id, frozen)
        elif trial_id is not None and frozen is None:
            storage.set_trial_state_values(trial_id, TrialState.FAIL)
        elif trial_id is not None:
            for name, excess in frozen.system_attrs.items():
                storage.set_trial_system_attr(trial_id, name, excess)
            storage.set_trial_state_values(trial_id, frozen.state, frozen.values)
        self.mirrored[record.number] = trial_id, record.state


class Ahead:
    """Choices drawn in a thread while trials run, so that a free worker finds one ready."""

    def __init__(self, sampler: Sampler):
        self.sampler, self.pool = sampler, ThreadPoolExecutor(1, "sampler")
        self.ready: deque[Choice] = deque()
        self.drawing: Future[Choice] | None = None

    def prepare(self, records: Sequence[Record], n_wanted: int) -> None:
        """Begins a draw where fewer than `n_wanted` choices are ready; those that are count as running trials."""
        self.gather()
        if self.drawing is None and len(self.ready) < n_wanted:
            ahead = [Record(len(records) + i, "RUNNING", (choice,)).as_running() for i, choice in enumerate(self.ready)]
            self.drawing = self.pool.submit(self.sampler.prepared([*records, *ahead]))

    def take(self, records: Sequence[Record]) -> Choice:
        """The next choice; waits for it where none is ready. Raises SpaceExhausted."""
        while not self.ready:
            self.prepare(records, 1)
            if self.drawing is not None:
                wait([self.drawing], timeout=0.1)
            interrupt.check()
        return self.ready.popleft()

    def gather(self) -> None:
        if self.drawing is not None and self.drawing.done():
            drawing, self.drawing = self.drawing, None
            self.ready.append(drawing.result())

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def parents_of(records: Sequence[Record]) -> list[Choice]:
    """Choices on the front, among those that the space holds; before there is one, all of these."""
    own = [record for record in records if record.choice is not None and record.anchor not in OUTSIDE]
    finished = [record for record in own if record.finished]
    return [record.choice for record in ([finished[i] for i in front([record.losses for record in finished])] or own)]


def spread(i: int, space: SearchSpace, seed: int) -> dict[str, Any]:
    """The i-th of the first choices: methods and ranks in turn, learning rates evenly over their range (golden-ratio
    steps), each group on with probability 3/4, since a mask of few groups rarely learns enough to be compared."""
    turn, rng = i // len(space.methods), random.Random(seed_of(seed, "spread", i))
    point = {}
    for name, options in space.coordinates().items():
        if name in space.groups:
            point[name] = rng.random() < 0.75
        elif name == "method":
            point[name] = options[i % len(options)]
        elif name.endswith("rank"):
            point[name] = options[(len(options) // 2 + turn) % len(options)]
        else:
            point[name] = rng.choice(options)
    return point | {"rate": (0.5 + turn * GOLDEN) % 1}


def multivariate_tpe(seed: int) -> optuna.samplers.BaseSampler:
    """Multivariate TPE with a constant liar for the trials still running (Watanabe 2023, arXiv 2304.11127)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(multivariate=True, constant_liar=True, n_startup_trials=N_SPREAD, seed=seed)


def mirrored(record: Record, space: SearchSpace, limits: Sequence[Limit] = ()) -> optuna.trial.FrozenTrial | None:
    """The record in the sampler's coordinates; None where it has none: the anchors outside the space, failures."""
    choice = record.choice
    if choice is None or record.anchor in OUTSIDE or record.state not in ("COMPLETE", "RUNNING"):
        return None
    values = record.losses if record.finished else None
    constraints = {f"{CONSTRAINT}{name}": excess for name, excess in excesses(record.rewards if record.finished else {}, limits).items()}
    return create_trial(
        state=TrialState[record.state], params=space.point_of(choice), distributions=distributions(space), values=values, system_attrs=constraints
    )  # fmt: skip
