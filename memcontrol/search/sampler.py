"""Owns what is tried next: choices drawn from a study's records by a model or one of Optuna's samplers, none
of them twice."""

from __future__ import annotations

import itertools
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from threadpoolctl import threadpool_limits

from memcontrol.core import interrupt
from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError, SpaceExhausted
from memcontrol.core.seeds import derive_seed
from memcontrol.core.space import SearchSpace
from memcontrol.search.encoding import SpaceEncoding
from memcontrol.search.optuna_samplers import InMemoryStudy
from memcontrol.search.surrogate import N_SPREAD, gather_training_set, propose_choices
from memcontrol.study.pareto import Limit
from memcontrol.study.pick import select_front
from memcontrol.study.record import Record

_N_GP = 250  # trials up to which a Gaussian process is fitted: its cost grows with the cube of their number
_N_TAKES = 9
_N_FLIPS, _N_FLIPS_ALIKE = 1000, 50  # changes of choices on the front, where every other draw is known


class Sampler:
    """Draws choices, never one that was asked for before: a pure function of the records and the seed; for
    `random`, of how many there are and the seed, whatever came of them.

    `auto` is a Gaussian process with expected hypervolume improvement as long as there are two objectives,
    some N_GP trials and time for it, and multivariate TPE otherwise. The last trial always counts as
    running, so that with one worker the same is drawn whether it had ended by then or not.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int,
        n_objectives: int,
        limits: Sequence[Limit] = (),
        kind: str = "auto",
        first: Sequence[Choice] = (),
        allows: Callable[[Choice], bool] = lambda choice: True,
        weigh_cost: bool = True,
    ):
        if kind == "gp" and n_objectives != 2:
            raise MemControlError(
                f"search.sampler: gp models two objectives, and there are {n_objectives}; use auto or tpe"
            )
        self.space = space
        self.seed = seed
        self.limits = limits
        self.kind = kind
        self.n_objectives = n_objectives
        self.allows = allows
        self.weigh_cost = weigh_cost
        self.first = [choice for choice in map(self.fit_choice, first) if choice is not None]
        self.encoding, self.mirror = SpaceEncoding(space), InMemoryStudy(space, n_objectives, limits, kind)

    def draw(self, records: Sequence[Record], hurried: bool = False) -> Choice:
        """The next choice. Raises SpaceExhausted when the space seems to hold no further one."""
        return self.prepare_draw(records, hurried)()

    def prepare_draw(self, records: Sequence[Record], hurried: bool = False) -> Callable[[], Choice]:
        """The draw, to be made in any thread before the next is prepared. A hurried one is cheap."""
        records = _hide_last(records)
        n_trained = sum(not record.is_variant for record in records)
        seed = derive_seed(self.seed, "suggest", n_trained) % 2**32
        known: dict[frozenset[str], list[Choice]] = defaultdict(list)
        for record in records:
            for choice in record.candidates:
                known[frozenset(choice.groups)].append(choice)
        if self.first and (
            new := next((choice for choice in self.first if self.is_new(choice, known)), None)
        ):
            return lambda: new
        n_sampled = sum(record.is_sampled for record in records)
        if self.kind == "gp" or (
            self.kind == "auto" and self.n_objectives == 2 and len(records) <= _N_GP and not hurried
        ):
            training_set = (
                gather_training_set(records, self.encoding, self.limits) if n_sampled >= N_SPREAD else None
            )
            if training_set and len(training_set.values) >= N_SPREAD:
                return lambda: self.pick_new(
                    known,
                    itertools.chain(
                        propose_choices(training_set, self.encoding, seed, self.weigh_cost),
                        self.flip_choices(_select_parents(records), seed),
                    ),
                )
        self.mirror.show(records, seed)
        return lambda: self.pick_new(
            known,
            itertools.chain(
                self.mirror.ask_choices(n_sampled, seed), self.flip_choices(_select_parents(records), seed)
            ),
        )

    def pick_new(self, known: dict[frozenset[str], list[Choice]], choices: Iterable[Choice]) -> Choice:
        # matrices this small are done seven times sooner by one thread, which also leaves the cores to the
        # workers
        with threadpool_limits(1):
            for choice in choices:
                if (choice.groups or self.space.always) and self.is_new(choice, known):
                    return choice
        raise SpaceExhausted(
            f"space '{self.space.name}': {_N_FLIPS} draws gave no choice that was not tried before; "
            "the space is exhausted"
        )

    def is_new(self, choice: Choice, known: dict[frozenset[str], list[Choice]]) -> bool:
        """Whether it was not asked for before, and its settings go together."""
        return not _is_known(choice, known) and self.allows(choice)

    def fit_choice(self, choice: Choice) -> Choice | None:
        """The choice of another study as this space has it, its learning rate within the range; None where it
        has not all of it."""
        try:
            own = self.space.make_choice_at(self.space.find_point(choice))
        except (KeyError, MemControlError):
            return None
        return (
            own
            if own.groups and set(own.groups) == set(choice.groups) and own.methods == choice.methods
            else None
        )

    def flip_choices(self, parents: Sequence[Choice], seed: int) -> Iterator[Choice]:
        """Choices on the front with one coordinate changed, then two and more: where a sampler repeats
        itself, it has come to such a place."""
        rng = random.Random(seed)
        options = {**self.space.list_coordinates(), "rate": ()}
        for attempt in range(_N_FLIPS if parents else 0):
            point = self.space.find_point(rng.choice(parents))
            for name in rng.sample(list(options), min(len(options), 1 + attempt // _N_FLIPS_ALIKE)):
                others = [option for option in options[name] if option != point[name]]
                point[name] = rng.random() if name == "rate" else rng.choice(others or [point[name]])
            yield self.space.make_choice_at(point)


class PrefetchedChoices:
    """Choices drawn in a thread while trials run, so that a free worker finds one ready."""

    def __init__(self, sampler: Sampler):
        self.sampler, self.pool = sampler, ThreadPoolExecutor(1, "sampler")
        self.ready: deque[Choice] = deque()
        self.drawing: Future[Choice] | None = None
        self.takes: deque[tuple[float, float]] = deque(maxlen=_N_TAKES)  # when, and how long it waited

    def prepare(self, records: Sequence[Record], n_wanted: int, may_hurry: bool = True) -> None:
        """Begins a draw where fewer than `n_wanted` choices are ready; those that are count as running
        trials."""
        self.gather()
        if self.drawing is None and len(self.ready) < n_wanted:
            ahead = [
                Record(len(records) + i, "RUNNING", (choice,)).as_running()
                for i, choice in enumerate(self.ready)
            ]
            self.drawing = self.pool.submit(
                self.sampler.prepare_draw([*records, *ahead], may_hurry and self.is_late())
            )

    def is_late(self) -> bool:
        """Whether workers have spent more than a tenth of the time waiting for choices."""
        return len(self.takes) == _N_TAKES and sum(waited for _, waited in self.takes) > 0.1 * (
            self.takes[-1][0] - self.takes[0][0]
        )

    def take(self, records: Sequence[Record], may_hurry: bool = True) -> Choice:
        """The next choice; waits for it where none is ready. With one worker nothing may be hurried, or what
        is drawn would depend on the clock. Raises SpaceExhausted."""
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


def _hide_last(records: Sequence[Record]) -> list[Record]:
    """With the last trial that is trained as running, and without what its fine-tuning is measured at
    beside."""
    last = next((record for record in reversed(records) if not record.is_variant), None)
    if last is None:
        return []
    hidden = {choice.trained for choice in last.candidates}
    return [
        record.as_running() if record is last else record
        for record in records
        if not (record.is_variant and record.candidates[0].trained in hidden)
    ]


def _is_known(choice: Choice, known: dict[frozenset[str], list[Choice]]) -> bool:
    return any(choice.is_same_as(other) for other in known.get(frozenset(choice.groups), ()))


def _select_parents(records: Sequence[Record]) -> list[Choice]:
    """Choices on the front, among those that the space holds; before there is one, all of these."""
    own = [record for record in records if record.choice is not None and not record.is_outside]
    front = select_front([record for record in own if record.finished])
    return list(dict.fromkeys(record.chosen.trained for record in front or own))
