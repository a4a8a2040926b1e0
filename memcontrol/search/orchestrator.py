"""Owns the search loop: keeps trials in flight, collects results, resumes what was interrupted, stops
cleanly."""

from __future__ import annotations

import contextlib
import shutil
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from memcontrol.core.attempts import read_failures
from memcontrol.core.choice import Choice
from memcontrol.core.config import Config, load_config
from memcontrol.core.console import LOG
from memcontrol.core.errors import MemControlError, SpaceExhausted
from memcontrol.core.files import name_full_disk, read_json, write_json
from memcontrol.core.run_folder import (
    CONFIRMED,
    RESULT,
    ROUNDS,
    SPEC,
    locate_study_folder,
    read_judgements,
    refuse_results_among,
)
from memcontrol.core.space import SearchSpace
from memcontrol.core.space_yaml import load_space
from memcontrol.core.spec import Spec, read_spec
from memcontrol.execution.executor import Event, Executor
from memcontrol.execution.job_queue import JobQueue, Show
from memcontrol.search.early_stopping import EarlyStopper
from memcontrol.search.locks import hold_folder_lock
from memcontrol.search.sampler import PrefetchedChoices, Sampler
from memcontrol.search.surrogate import OUTSIDE
from memcontrol.study.database import hold_study_lock, retry_while_away
from memcontrol.study.hypervolume import estimate_hypervolume, find_reference_point, is_flat
from memcontrol.study.pick import require_finished, select_front, select_to_confirm
from memcontrol.study.record import Record
from memcontrol.study.replicates import select_to_replicate
from memcontrol.study.store import Study, is_searched, open_study, resolve_storage_url
from memcontrol.view.dashboard_notes import Publisher

CROWD = 4  # trials in flight for each choice that is drawn ahead: the more there are, the more end at once
N_FAILURES = 3  # this many in a row mean that something other than the choices is wrong


@dataclass
class RunningTrial:
    """A trial that is not finished: the choices it must try, and the results so far by choice."""

    number: int
    candidates: tuple[Choice, ...]
    results: dict[Choice, dict] = field(default_factory=dict)


def search_study(
    config: Config,
    study_file: Path,
    folder: Path,
    executor: Executor,
    show: Show,
    on_study: Callable[[Study], None],
) -> Study:
    """Runs the anchors and config.search.trials sampled trials, those already finished counted in. Returns
    the study.

    Raises MemControlError for what the user must mend; trials not finished stay recorded and run again next
    time.
    """

    def say(line: str) -> None:
        show(make_warning(line))

    url = resolve_storage_url(config, folder, study_file)
    refuse_results_among(config.data.path, folder)
    with hold_folder_lock(folder), name_full_disk(folder), hold_study_lock(url, config.name) as lock:
        if is_searched(config, folder, study_file):
            # names keys that differ before the images are blamed for it
            open_study(config, folder, study_file, create=True).close()
        else:
            # what is wrong with it, or with run folders, is said before anything is made
            read_earlier_front(config, study_file)
            space = load_space(config.space)
            for run in folder.glob(f"*/{SPEC}"):
                replace(read_spec(run.parent), config=config, space=space).check_folder(run.parent)
        jobs = JobQueue(executor, show)
        found = run_preparation(config, folder, jobs)
        study = retry_while_away(
            lambda: open_study(
                config, folder, study_file, create=True, directions=found["directions"], say=say, lock=lock
            ),
            url,
            say,
        )
        study.note("made_with", lambda: found.get("made_with"))
        on_study(study)
        running = Search(config, study, study_file, folder, jobs, show, found["sizes"])
        try:
            running.run()
            running.confirm()
            running.replicate()
        except KeyboardInterrupt:
            running.publisher.publish(over=True)
            raise
        running.publisher.publish(over=True)
    return study


def run_preparation(config: Config, folder: Path, jobs: JobQueue) -> dict:
    """Checks data, base and space in a worker, where their libraries are loaded anyway. Returns the parts'
    `sizes` and the objectives' `directions`."""
    (end,) = jobs.run([{"prepare": str(folder), "config": config.model_dump(mode="json")}])
    if end.kind == "given up":
        raise MemControlError(f"the images and the base could not be read: {end.detail['reason']}")
    return end.detail


def read_earlier_front(config: Config, study_file: Path) -> list[dict] | None:
    """The front of the study that search.warm_start names, less its anchors that no space holds. Raises
    MemControlError."""
    if config.search.warm_start is None:
        return None
    path = study_file.resolve().parent / config.search.warm_start
    try:
        if path.resolve() == study_file.resolve():
            raise MemControlError(
                "is this study itself; name an earlier one, or leave the key out: a search goes on by itself"
            )
        earlier = load_config(path)
        with contextlib.closing(
            open_study(earlier, locate_study_folder(path, earlier.name), path, create=False)
        ) as study:
            records = [record for record in require_finished(study.records()) if record.anchor not in OUTSIDE]
    except MemControlError as error:
        raise MemControlError(f"search.warm_start: {config.search.warm_start}: {error}") from None
    return [record.chosen.as_dict() for record in select_front(records)]


def make_warning(line: str) -> Event:
    return Event({}, "warning", {"text": line})


def is_judged(record: Record) -> bool:
    """Anchors are what others are compared with, and never stop."""
    return record.anchor is None and record.choice is not None


class Search:
    """The state of one running search."""

    def __init__(
        self,
        config: Config,
        study: Study,
        study_file: Path,
        folder: Path,
        jobs: JobQueue,
        show: Show,
        sizes: dict[str, int],
    ):
        self.config, self.study, self.folder, self.jobs, self.show = config, study, folder, jobs, show
        self.space: SearchSpace = load_space(config.space)
        self.n_train = max(1, round(sizes["train"] * config.search.train_fraction))
        self.open: dict[int, RunningTrial] = {}
        self.waiting: deque[tuple[int, Choice]] = deque()
        search, n_objectives = config.search, len(config.rewards.objectives)
        first = [
            Choice.from_dict(choice)
            for choice in study.note("warm_start", lambda: read_earlier_front(config, study_file)) or []
        ]
        self.ahead = PrefetchedChoices(
            Sampler(self.space, search.seed, n_objectives, study.limits, search.sampler, first)
        )
        if n_lost := len(first) - len(self.ahead.sampler.first):
            self.show(
                make_warning(
                    f"{n_lost} of {len(first)} choices on the front of {search.warm_start} have groups "
                    f"or methods that space '{config.space}' lacks, and are not tried "
                    "(search.warm_start)"
                )
            )
        self.stops = EarlyStopper(
            config,
            study.objectives,
            {
                record.number: self.run_folder(record.chosen)
                for record in study.records()
                if is_judged(record)
            },
        )
        self.publisher = Publisher(study, self.space, folder)
        self.exhausted = self.flat = False
        self.n_looked_at = 0  # ended trials, when the hypervolume was last computed
        self.n_failures = 0

    def run(self) -> None:
        records = self.study.records()
        for record in records:
            if record.state == "RUNNING":
                self.resume(record)
        for anchor, candidates in self.space.anchors().items():
            if not any(record.anchor == anchor for record in records):
                self.admit(self.study.begin(candidates, self.space, anchor), tuple(candidates))
        with contextlib.closing(self.ahead):
            while self.fill() or self.open:
                for event in self.jobs.ends():
                    self.ended(event)
                    self.fill()
                self.publisher.look()

    def resume(self, record: Record) -> None:
        """Takes up an interrupted trial: the same choices, less those whose result is already there."""
        self.admit(record.number, record.candidates)

    def admit(self, number: int, candidates: tuple[Choice, ...]) -> None:
        self.open[number] = RunningTrial(number, candidates)
        for choice in candidates:
            # an edited space may be behind what is there
            self.spec(choice).check_folder(self.run_folder(choice))
            self.advance(number, choice)

    def fill(self) -> bool:
        """Gives every free place a job, sampling new choices as needed. Whether anything is left to wait
        for."""
        while self.jobs.room() > 0:
            if not self.waiting:
                if not self.sample():
                    break
                continue  # its result may have been there already, from before the database was lost
            number, choice = self.waiting.popleft()
            run = self.run_folder(choice)
            self.jobs.add(
                {**self.spec(choice).as_job(run), "number": number, "rung": self.stops.next_rung(number, run)}
            )
        if not self.waiting:
            with contextlib.suppress(SpaceExhausted):
                self.ahead.prepare(
                    self.study.records(),
                    min(self.n_left(), max(1, len(self.open) // CROWD)),
                    self.config.search.workers > 1,
                )
        return bool(self.open)

    def n_left(self) -> int:
        """How many choices are still to be sampled; those that failed are sampled anew."""
        if self.exhausted or self.is_flat():
            return 0
        return self.config.search.trials - sum(
            record.anchor is None and record.state != "FAIL" for record in self.study.records()
        )

    def is_flat(self) -> bool:
        """Whether the hypervolume has stopped growing, where that ends the search. Once it has, nothing is
        begun any more."""
        n, records = self.config.search.stop_when_flat, self.study.records()
        n_ended = sum(record.state != "RUNNING" for record in records)
        reference = self.study.note("reference", lambda: find_reference_point(records))
        if n and reference and not self.flat and n_ended > self.n_looked_at:
            self.n_looked_at, self.flat = n_ended, is_flat(records, reference, n)
            if self.flat:
                self.show(
                    make_warning(
                        f"the hypervolume, {estimate_hypervolume(records, reference):.4g}, has not "
                        f"grown beyond its noise in {n} trials: the search ends (search.stop_when_flat)"
                    )
                )
        return self.flat

    def sample(self) -> bool:
        """Begins a trial of a new choice. Whether there was one to begin."""
        if self.n_left() <= 0:
            return False
        try:
            choice = self.ahead.take(self.study.records(), self.config.search.workers > 1)
        except SpaceExhausted as error:
            self.show(make_warning(str(error)))
            self.exhausted = True
            return False
        number = self.study.begin([choice], self.space)
        self.stops.runs[number] = self.run_folder(choice)
        self.admit(number, (choice,))
        return True

    def ended(self, event: Event) -> None:
        choice, folder = Choice.from_dict(event.job["choice"]), Path(event.job["trial"])
        if event.kind == "given up" and not (folder / RESULT).exists():
            said = {
                "reason": f"{len(read_failures(folder))} attempts failed, the last: {event.detail['reason']}",
                "traceback": event.detail.get("traceback"),
            }
            write_json(folder / RESULT, {"state": "FAIL", "choice": choice.as_dict(), **said})
        self.advance(event.job["number"], choice)

    def advance(self, number: int, choice: Choice) -> None:
        """Takes in what a choice's folder holds: a result, or a rung where it is judged; one that goes on
        waits for a place, before all that have not begun."""
        run = self.run_folder(choice)
        if not (run / RESULT).exists() and not self.stops.goes_on(number, run):
            write_json(run / RESULT, {"state": "PRUNED", "choice": choice.as_dict(), **self.stops.said(run)})
            shutil.rmtree(run / ROUNDS, ignore_errors=True)
        if (run / RESULT).exists():
            self.collect(number, choice)
        elif read_judgements(run):
            self.waiting.appendleft((number, choice))
        else:
            self.waiting.append((number, choice))

    def collect(self, number: int, choice: Choice) -> None:
        """Takes a result in; when all of a trial's candidates have one, the study records its end."""
        result = read_json(self.run_folder(choice) / RESULT)
        trial = self.open[number]
        trial.results[choice] = result
        if len(trial.results) == len(trial.candidates):
            self.study.finish(number, [trial.results[candidate] for candidate in trial.candidates])
            del self.open[number]
            ended = self.study.kept[number]
            LOG.info(
                "trial %d %s: %s",
                number,
                ended.state,
                ", ".join(f"{name} {value:.6g}" for name, value in ended.values.items()) or ended.reason,
            )
            self.n_failures = self.n_failures + 1 if self.study.kept[number].state == "FAIL" else 0
        if self.n_failures >= N_FAILURES:
            self.publisher.publish(over=True)
            raise MemControlError(
                f"{N_FAILURES} trials in a row failed for good, the last: {result['reason']}; mend "
                "what is behind it, and the same command goes on with "
                "further choices"
            )

    def confirm(self) -> None:
        """Measures the trials on the front over fresh draws, until every one that is on it was: a search
        picks lucky ones."""
        while self.config.rewards.confirm and (
            wanted := select_to_confirm(self.study.records(), self.study.limits)
        ):
            runs = {record.number: self.run_folder(record.chosen) for record in wanted}
            jobs = [
                {
                    "confirm": str(runs[record.number]),
                    "choice": record.chosen.as_dict(),
                    "number": record.number,
                }
                for record in wanted
                # it may be there from before an interruption
                if not (runs[record.number] / CONFIRMED).exists()
            ]
            for event in self.jobs.run(jobs):
                if event.kind == "given up":
                    raise MemControlError(
                        f"trial {event.job['number']} could not be measured again: {event.detail['reason']}"
                    )
            for number, run in runs.items():
                self.study.confirm(number, read_json(run / CONFIRMED)["rewards"])

    def replicate(self) -> None:
        """Fine-tunes the trials on the front, and full fine-tuning, again from other seeds, as often as
        search.replicates says: how much of a reward is the choice's own, and how much luck."""
        n, wanted = (
            self.config.search.replicates,
            select_to_replicate(self.study.records(), self.config.search.replicates),
        )
        jobs = [
            {
                **self.spec(record.chosen, f"search replicate {i}").as_job(self.replicate_folder(record, i)),
                "number": record.number,
                "replicate": i,
            }
            for record in wanted
            for i in range(n)
            if not (self.replicate_folder(record, i) / RESULT).exists()
        ]
        for record in wanted:
            for i in range(n):
                self.spec(record.chosen, f"search replicate {i}").check_folder(
                    self.replicate_folder(record, i)
                )
        for event in self.jobs.run(jobs):
            if event.kind == "given up":
                raise MemControlError(
                    f"trial {event.job['number']} could not be fine-tuned again: {event.detail['reason']}"
                )
        for record in wanted:
            results = [read_json(self.replicate_folder(record, i) / RESULT) for i in range(n)]
            self.study.replicate(
                record.number, [result["rewards"] for result in results if result["state"] == "COMPLETE"]
            )

    def replicate_folder(self, record: Record, i: int) -> Path:
        return self.run_folder(record.chosen) / f"replicate-{i}"

    def spec(self, choice: Choice, purpose: str = "search") -> Spec:
        return Spec(self.config, self.space, choice, self.folder, purpose, "holdout", self.n_train)

    def run_folder(self, choice: Choice) -> Path:
        return self.folder / choice.key
