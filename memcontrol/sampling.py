"""Owns what is tried next: choices drawn from a study's records by one of Optuna's samplers, none of them twice."""

from __future__ import annotations

import itertools
import random
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState, create_trial
from scipy.special import ndtr

from memcontrol import interrupt
from memcontrol.errors import MemControlError, SpaceExhausted
from memcontrol.figures import error_of
from memcontrol.gp import expected_gain, fitted
from memcontrol.pareto import Limit, front
from memcontrol.points import Points
from memcontrol.seeds import seed_of
from memcontrol.space import Choice, SearchSpace
from memcontrol.stopping import Shown
from memcontrol.study import CONSTRAINT, Record, distributions, excesses

N_GP = 250  # trials up to which a Gaussian process is fitted: its cost grows with the cube of their number
N_RANDOM, N_CLIMBS, N_BEST = 300, 4, 8  # of the choices that it looks at
N_TAKES = 9
GENERATION, POPULATION = "NSGAIISampler:generation", 16
N_SPREAD = 6  # sampled trials before the sampler models anything
GOLDEN = (5**0.5 - 1) / 2
N_ASKS = 5  # draws of the sampler for one choice; where all are known, choices on the front are changed
N_FLIPS, N_FLIPS_ALIKE = 1000, 50
OUTSIDE = ("none", "full")  # anchors that no point of the space stands for


class Sampler:
    """Draws choices, never one that was asked for before: a pure function of the records and the seed; for `random`, of how many
    there are and the seed, whatever came of them.

    `auto` is a Gaussian process with expected hypervolume improvement as long as there are two objectives, some N_GP trials and time
    for it, and multivariate TPE otherwise. Optuna's samplers draw from a study in memory that mirrors the records in the sampler's
    own coordinates (position in the method's learning-rate range, rank for every method), so that sampling costs no database
    reads and nothing is half written. It lives as long as the search: copying a thousand trials into a new one would take longer
    than drawing. The last record always counts as running, so that with one worker the same is drawn whether its trial had
    ended by then or not.
    """

    def __init__(self, space: SearchSpace, seed: int, n_objectives: int, limits: Sequence[Limit] = (), kind: str = "auto", first: Sequence[Choice] = ()):
        if kind == "gp" and n_objectives != 2:
            raise MemControlError(f"search.sampler: gp models two objectives, and there are {n_objectives}; use auto or tpe")
        self.space, self.seed, self.limits, self.kind, self.n_objectives = space, seed, limits, kind, n_objectives
        self.first = [choice for choice in map(self.within, first) if choice is not None]
        self.mirror = optuna.create_study(directions=["minimize"] * n_objectives)
        self.mirrored: dict[int, tuple[int, str]] = {}  # the mirror's trial id, and the state it mirrors, by number
        self.n_mirrored = 0  # trials that ended well
        self.points = Points(space)

    def draw(self, records: Sequence[Record], hurried: bool = False) -> Choice:
        """The next choice. Raises SpaceExhausted when the space seems to hold no further one."""
        return self.prepared(records, hurried)()

    def prepared(self, records: Sequence[Record], hurried: bool = False) -> Callable[[], Choice]:
        """The draw, to be made in any thread before the next is prepared. A hurried one is cheap."""
        records = [*records[:-1], *(record.as_running() for record in records[-1:])]
        seed = seed_of(self.seed, "suggest", len(records)) % 2**32
        known: dict[frozenset[str], list[Choice]] = defaultdict(list)
        for record in records:
            for choice in record.candidates:
                known[frozenset(choice.groups)].append(choice)
        if self.first and (new := next((choice for choice in self.first if not is_known(choice, known)), None)):
            return lambda: new
        n_sampled = sum(record.anchor is None for record in records)
        if self.kind == "gp" or (self.kind == "auto" and self.n_objectives == 2 and len(records) <= N_GP and not hurried):
            evidence = evidence_of(records, self.points, self.limits) if n_sampled >= N_SPREAD else None
            if evidence and len(evidence.values) >= N_SPREAD:
                return lambda: self.drawn(known, itertools.chain(modelled(evidence, self.points, seed), self.flipped(parents_of(records), seed)))
        self.mirror.sampler = SAMPLERS[self.kind](seed)
        if self.kind != "random":
            ended = [record for record in records if record.finished]
            for record in records:
                self.follow(record, ended)
        return lambda: self.drawn(known, itertools.chain(self.asked(n_sampled, seed), self.flipped(parents_of(records), seed)))

    def drawn(self, known: dict[frozenset[str], list[Choice]], choices: Iterable[Choice]) -> Choice:
        for choice in choices:
            if (choice.groups or self.space.always) and not is_known(choice, known):
                return choice
        raise SpaceExhausted(f"space '{self.space.name}': {N_FLIPS} draws gave no choice that was not tried before; the space is exhausted")

    def within(self, choice: Choice) -> Choice | None:
        """The choice of another study as this space has it, its learning rate within the range; None where it has not all of it."""
        try:
            own = self.space.choice_at(self.space.point_of(choice))
        except (KeyError, MemControlError):
            return None
        return own if own.groups and set(own.groups) == set(choice.groups) and own.methods == choice.methods else None

    def asked(self, n_sampled: int, seed: int) -> Iterator[Choice]:
        """What Optuna's sampler draws; each draw counts as a running trial to the next."""
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

    def follow(self, record: Record, ended: Sequence[Record]) -> None:
        """Brings the mirror up to date with a record."""
        trial_id, state = self.mirrored.get(record.number, (None, ""))
        if state == record.state:
            return
        storage, frozen = self.mirror._storage, mirrored(record, self.space, self.limits, ended)
        if trial_id is None and frozen is not None:
            trial_id = storage.create_new_trial(self.mirror._study_id, frozen)
        elif trial_id is not None and frozen is None:
            storage.set_trial_state_values(trial_id, TrialState.FAIL)
        elif trial_id is not None:
            if frozen.state == TrialState.COMPLETE:
                storage.set_trial_system_attr(trial_id, GENERATION, self.n_mirrored // POPULATION)
                self.n_mirrored += 1
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
        self.takes: deque[tuple[float, float]] = deque(maxlen=N_TAKES)  # when, and how long it waited

    def prepare(self, records: Sequence[Record], n_wanted: int, may_hurry: bool = True) -> None:
        """Begins a draw where fewer than `n_wanted` choices are ready; those that are count as running trials."""
        self.gather()
        if self.drawing is None and len(self.ready) < n_wanted:
            ahead = [Record(len(records) + i, "RUNNING", (choice,)).as_running() for i, choice in enumerate(self.ready)]
            self.drawing = self.pool.submit(self.sampler.prepared([*records, *ahead], may_hurry and self.is_late()))

    def is_late(self) -> bool:
        """Whether workers have spent more than a tenth of the time waiting for choices."""
        return len(self.takes) == N_TAKES and sum(waited for _, waited in self.takes) > 0.1 * (self.takes[-1][0] - self.takes[0][0])

    def take(self, records: Sequence[Record], may_hurry: bool = True) -> Choice:
        """The next choice; waits for it where none is ready. With one worker nothing may be hurried, or what is drawn would depend on the
        clock. Raises SpaceExhausted."""
        started = time.monotonic()
        while not self.ready:
            self.prepare(records, 1, may_hurry)
            if self.drawing is not None:
                wait([self.drawing], timeout=0.1)
            interrupt.check()
        self.takes.append((time.monotonic(), time.monotonic() - started))
        return self.ready.popleft()

    def gather(self) -> None:
        if self.drawing is not None and self.drawing.done():
            drawing, self.drawing = self.drawing, None
            self.ready.append(drawing.result())

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def is_known(choice: Choice, known: dict[frozenset[str], list[Choice]]) -> bool:
    return any(choice.same_as(other) for other in known.get(frozenset(choice.groups), ()))


def parents_of(records: Sequence[Record]) -> list[Choice]:
    """Choices on the front, among those that the space holds; before there is one, all of these."""
    own = [record for record in records if record.choice is not None and record.anchor not in OUTSIDE]
    finished = [record for record in own if record.finished]
    return [record.choice for record in ([finished[i] for i in front([record.losses for record in finished])] or own)]


def nsga2(seed: int) -> optuna.samplers.BaseSampler:
    """NSGA-II (Deb et al. 2002); what generation a trial belongs to is told by the mirror, in the order of their ends."""
    return optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)


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


@dataclass(frozen=True)
class Evidence:
    """What a model learns from: the rows of N trials that ended, their losses and these losses' errors [N, 2]; by how much they exceed
    each limit [N, limits]; the rows of those that run."""

    rows: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    excesses: np.ndarray
    pending: np.ndarray


def evidence_of(records: Sequence[Record], points: Points, limits: Sequence[Limit]) -> Evidence | None:
    """None before any trial ended well. A trial that was stopped early counts as what it promised, one that diverged as the worst that
    was seen."""
    own = [record for record in records if record.choice is not None and record.anchor not in OUTSIDE]
    ended = [record for record in own if record.finished]
    if not ended:
        return None
    stopped = [record for record in own if record.state == "PRUNED" and record.rungs]
    diverged = [record for record in own if record.state == "PRUNED" and not record.rungs]
    values, errors = np.array([record.losses for record in ended]), np.array([errors_of(record) for record in ended])
    over = np.array([list(excesses(record.rewards, limits).values()) for record in ended])
    promises = [promise(record, ended) for record in stopped]
    return Evidence(
        rows=np.array([points.row(record.choice) for record in ended + stopped + diverged]),
        values=np.concatenate([values, *(promised[None] for promised, _ in promises), np.repeat(values.max(0)[None], len(diverged), 0)]),
        errors=np.concatenate([errors, *(error[None] for _, error in promises), np.repeat(errors.max(0)[None], len(diverged), 0)]),
        excesses=np.concatenate([over, np.repeat(over.mean(0)[None], len(stopped), 0), np.repeat(over.max(0)[None], len(diverged), 0)]),
        pending=np.array([points.row(record.choice) for record in own if record.state == "RUNNING"]),
    )


def errors_of(record: Record) -> list[float]:
    return [error_of(name, record.rewards) for name in record.objectives]


def promise(record: Record, ended: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """The losses that a trial would have reached, and their errors: those at its last rung, moved by as much as those moved from there to
    their end that did end."""
    rung, objectives = record.rungs[-1]["rung"], record.objectives
    own = Shown.of(record.number, record.rungs[-1]["rewards"], objectives)
    moves = [
        np.subtract(other.losses, Shown.of(other.number, one["rewards"], objectives).losses)
        for other in ended for one in other.rungs if one["rung"] == rung
    ]  # fmt: skip
    if not moves:
        return np.array(own.losses), np.array(own.errors)
    return np.add(own.losses, np.median(moves, axis=0)), np.hypot(own.errors, np.std(moves, axis=0))


def modelled(evidence: Evidence, points: Points, seed: int) -> Iterator[Choice]:
    """Choices by how much hypervolume they promise, those that should keep the limits: random ones and the neighbours of the
    front, then the neighbours of the best of these."""
    rng, pending = random.Random(seed), evidence.pending.reshape(-1, len(points.names) + 1)
    seen, believed, none = points.seen(evidence.rows), points.seen(pending), np.zeros(len(evidence.rows))
    processes = [fitted(seen, evidence.values[:, i], evidence.errors[:, i], believed, points.owner) for i in (0, 1)]
    guards = [fitted(seen, column, none, believed, points.owner) for column in evidence.excesses.T if np.ptp(column) > 0]
    there = np.concatenate([seen, believed])
    means = np.stack([process.predict(there)[0] for process in processes], 1)  # what the values would be without their noise
    allowed = np.all([guard.predict(there)[0] <= 0 for guard in guards], axis=0) if guards else np.full(len(there), True)
    reference = means.max(0) + 0.1 * np.ptp(means, 0)
    best = means[allowed][front(means[allowed].tolist())] if allowed.any() else reference[None]

    def score(rows: np.ndarray) -> np.ndarray:
        chance = np.ones(len(rows))
        for mean, sd in (guard.predict(points.seen(rows)) for guard in guards):
            chance *= ndtr(-mean / sd)
        means, sds = zip(*(process.predict(points.seen(rows)) for process in processes))
        return expected_gain(means, sds, best, reference) * chance

    parents = np.concatenate([evidence.rows, pending])[front(means.tolist())]
    rows = points.canonical(np.concatenate([points.random(N_RANDOM, rng), *(points.neighbours(row) for row in parents)]))
    scores = score(rows)
    climbed: set[bytes] = set()
    for _ in range(N_CLIMBS):
        top = [row for row in rows[np.argsort(-scores, kind="stable")[:N_BEST]] if row.tobytes() not in climbed]
        if not top:
            break
        climbed |= {row.tobytes() for row in top}
        new = points.canonical(np.concatenate([points.neighbours(row) for row in top]))
        rows, scores = np.concatenate([rows, new]), np.concatenate([scores, score(new)])
    for i in np.argsort(-scores, kind="stable"):
        yield points.choice(rows[i])


def multivariate_tpe(seed: int) -> optuna.samplers.BaseSampler:
    """Multivariate TPE with a constant liar for the trials still running (Watanabe 2023, arXiv 2304.11127)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(multivariate=True, constant_liar=True, n_startup_trials=N_SPREAD, seed=seed)


SAMPLERS = {"auto": multivariate_tpe, "gp": multivariate_tpe, "tpe": multivariate_tpe, "nsga2": nsga2, "random": optuna.samplers.RandomSampler}


def mirrored(record: Record, space: SearchSpace, limits: Sequence[Limit] = (), ended: Sequence[Record] = ()) -> optuna.trial.FrozenTrial | None:
    """The record in the sampler's coordinates, one that was stopped early with what it promised; None where it has none: the anchors
    outside the space, failures."""
    choice, is_stopped = record.choice, record.state == "PRUNED" and bool(record.rungs)
    if choice is None or record.anchor in OUTSIDE or not (is_stopped or record.state in ("COMPLETE", "RUNNING")):
        return None
    values = promise(record, ended)[0].tolist() if is_stopped else record.losses if record.finished else None
    constraints = {f"{CONSTRAINT}{name}": excess for name, excess in excesses(record.rewards if record.finished else {}, limits).items()}
    return create_trial(
        state=TrialState.RUNNING if values is None else TrialState.COMPLETE, params=space.point_of(choice), distributions=distributions(space),
        values=values, system_attrs=constraints,
    )  # fmt: skip
