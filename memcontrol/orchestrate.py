"""Owns the search loop: keeps trials in flight, collects results, resumes what was interrupted, stops cleanly."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from memcontrol import interrupt
from memcontrol.config import Config
from memcontrol.errors import MemControlError, SpaceExhausted
from memcontrol.executors import ENDS, Event, Executor
from memcontrol.files import disk_full_named, read_json, write_json
from memcontrol.pick import to_confirm
from memcontrol.space import Choice, SearchSpace, load_space
from memcontrol.spec import CONFIRMED, RESULT, Spec
from memcontrol.study import Record, Study, is_searched, open_study, suggest

Show = Callable[[Event], None]
N_FAILURES = 3  # this many in a row mean that something other than the choices is wrong


@dataclass
class Open:
    """A trial that is not finished: the choices it must try, and the results so far by choice."""

    number: int
    candidates: tuple[Choice, ...]
    results: dict[Choice, dict] = field(default_factory=dict)


def search(config: Config, study_file: Path, folder: Path, executor: Executor, show: Show, on_study: Callable[[Study], None]) -> Study:
    """Runs the anchors and config.search.trials sampled trials, those already finished counted in. Returns the study.

    Raises MemControlError for what the user must mend; trials not finished stay recorded and run again next time.
    """
    with only_one(folder), disk_full_named(folder):
        if is_searched(config, folder, study_file):
            open_study(config, folder, study_file, create=True)  # names keys that differ before the images are blamed for it
        found = prepared(config, folder, executor, show)
        study = open_study(config, folder, study_file, create=True, directions=found["directions"])
        on_study(study)
        running = Search(config, study, folder, executor, show, found["sizes"])
        running.run()
        running.confirm()
    return study


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "search.lock", timeout=0):
            yield
    except Timeout:
        raise MemControlError(f"another search is running in {folder}; wait for it or stop it first") from None


def is_searching(folder: Path) -> bool:
    """Whether a search holds the folder."""
    try:
        with only_one(folder):
            return False
    except MemControlError:
        return True


def prepared(config: Config, folder: Path, executor: Executor, show: Show) -> dict:
    """Checks data, base and space in a worker, where their libraries are loaded anyway. Returns the parts' `sizes` and the
    objectives' `directions`."""
    executor.submit({"prepare": str(folder), "config": config.model_dump(mode="json")})
    while True:
        interrupt.check()
        for event in executor.events(1.0):
            show(event)
            if event.kind in ENDS:
                refuse_stop(event)
                return event.detail


def refuse_stop(event: Event) -> None:
    if event.kind in ("stop", "lost"):
        raise MemControlError(event.detail["reason"])


class Search:
    """The state of one running search."""

    def __init__(self, config: Config, study: Study, folder: Path, executor: Executor, show: Show, sizes: dict[str, int]):
        self.config, self.study, self.folder, self.executor, self.show = config, study, folder, executor, show
        self.space: SearchSpace = load_space(config.space)
        self.n_train = max(1, round(sizes["train"] * config.search.train_fraction))
        self.open: dict[int, Open] = {}
        self.waiting: deque[tuple[int, Choice]] = deque()
        self.n_failures = 0
        self.exhausted = False

    def run(self) -> None:
        records = self.study.records()
        for record in records:
            if record.state == "RUNNING":
                self.resume(record)
        for anchor, candidates in self.space.anchors().items():
            if not any(record.anchor == anchor for record in records):
                self.admit(self.study.begin(candidates, self.space, anchor), tuple(candidates))
        while self.fill() or self.open:
            interrupt.check()
            for event in self.executor.events(1.0):
                self.show(event)
                if event.kind in ENDS:
                    self.ended(event)
                    self.fill()

    def resume(self, record: Record) -> None:
        """Takes up an interrupted trial: the same choices, less those whose result is already there."""
        self.admit(record.number, record.candidates)

    def admit(self, number: int, candidates: tuple[Choice, ...]) -> None:
        self.open[number] = Open(number, candidates)
        for choice in candidates:
            if (self.run_folder(choice) / RESULT).exists():
                self.collect(number, choice)
            else:
                self.waiting.append((number, choice))

    def fill(self) -> bool:
        """Gives every free place a job, sampling new choices as needed. Whether anything is left to wait for."""
        while self.executor.free():
            if not self.waiting and not self.sample():
                break
            number, choice = self.waiting.popleft()
            spec = Spec(self.config, self.space, choice, self.folder, "search", "holdout", self.n_train)
            self.executor.submit({**spec.as_job(self.run_folder(choice)), "number": number})
        return bool(self.open)

    def sample(self) -> bool:
        records = self.study.records()
        if sum(record.anchor is None and record.state != "FAIL" for record in records) >= self.config.search.trials:
            return False
        try:
            choice = suggest(records, self.space, self.config.search.seed, len(self.config.rewards.objectives), self.study.limits)
        except SpaceExhausted as error:
            if not self.exhausted:
                self.show(Event({}, "warning", {"text": str(error)}))
            self.exhausted = True
            return False
        self.admit(self.study.begin([choice], self.space), (choice,))
        return bool(self.waiting)

    def ended(self, event: Event) -> None:
        if event.kind == "lost":
            write_json(Path(event.job["trial"]) / RESULT, {"state": "FAIL", "choice": event.job["choice"], **event.detail})
        else:
            refuse_stop(event)
        self.collect(event.job["number"], Choice.from_dict(event.job["choice"]))

    def collect(self, number: int, choice: Choice) -> None:
        """Takes a result in; when all of a trial's candidates have one, the study records its end."""
        result = read_json(self.run_folder(choice) / RESULT)
        trial = self.open[number]
        trial.results[choice] = result
        self.n_failures = self.n_failures + 1 if result["state"] == "FAIL" else 0
        if len(trial.results) == len(trial.candidates):
            self.study.finish(number, [trial.results[candidate] for candidate in trial.candidates])
            del self.open[number]
        if self.n_failures >= N_FAILURES:
            raise MemControlError(f"{N_FAILURES} trials in a row failed, the last with {result['reason']}")

    def confirm(self) -> None:
        """Measures the trials on the front over fresh draws, until every one that is on it was: a search picks lucky ones."""
        while self.config.rewards.confirm and (wanted := to_confirm(self.study.records(), self.study.limits)):
            waiting = deque(wanted)
            n_left = len(waiting)
            while n_left:
                interrupt.check()
                while waiting and self.executor.free():
                    n_left -= self.begin_confirming(waiting.popleft())
                for event in self.executor.events(1.0) if n_left else ():
                    self.show(event)
                    if event.kind in ENDS:
                        refuse_stop(event)
                        self.confirmed(event.job["number"], Path(event.job["confirm"]))
                        n_left -= 1

    def begin_confirming(self, record: Record) -> bool:
        """Gives the executor the job, unless it was done before an interruption. Whether it was."""
        run, job = self.run_folder(record.choice), {"number": record.number, "choice": record.choice.as_dict()}
        done = (run / CONFIRMED).exists()
        if done:
            self.confirmed(record.number, run)
        else:
            self.executor.submit({**job, "confirm": str(run)})
        return done

    def confirmed(self, number: int, run: Path) -> None:
        self.study.confirm(number, read_json(run / CONFIRMED)["rewards"])

    def run_folder(self, choice: Choice) -> Path:
        return self.folder / choice.key
