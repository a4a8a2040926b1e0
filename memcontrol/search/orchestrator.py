"""Owns the search loop: keeps trials in flight, collects results, resumes what was interrupted, stops
cleanly."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from memcontrol.config.settings import is_allowed, load_study_space
from memcontrol.config.spec import read_spec
from memcontrol.config.study import Config
from memcontrol.core.choice import Choice
from memcontrol.core.console import LOG
from memcontrol.core.errors import FolderFull, MemControlError, SearchEnded, SpaceExhausted, TrialsKeepFailing
from memcontrol.core.files import name_full_disk, remove_parts, write_json
from memcontrol.core.jobs import EncodeJob, Event, GivenUp, Prepared, PrepareJob, TrialJob, Warned
from memcontrol.core.run_folder import StudyFolder, refuse_results_among
from memcontrol.execution.attempts import read_failures
from memcontrol.execution.executor import Executor
from memcontrol.execution.job_queue import JobQueue
from memcontrol.execution.make import count_workers, describe_sharing
from memcontrol.search.dropping import Dropper
from memcontrol.search.early_stopping import EarlyStopper
from memcontrol.search.folder_bound import FolderBound
from memcontrol.search.locks import hold_folder_lock
from memcontrol.search.observer import Observer
from memcontrol.search.operating import Operator
from memcontrol.search.remeasuring import confirm_front, replicate_front
from memcontrol.search.runs import TrialRuns
from memcontrol.search.sampler import PrefetchedChoices, Sampler
from memcontrol.study.database import hold_study_lock, retry_while_away
from memcontrol.study.foreign import describe_foreign
from memcontrol.study.hypervolume import estimate_hypervolume, find_reference_point, is_flat
from memcontrol.study.opening import open_study
from memcontrol.study.orders import clear_orders
from memcontrol.study.pick import require_finished, select_front
from memcontrol.study.place import StudyPlace
from memcontrol.study.record import Record
from memcontrol.study.retries import N_TRIALS, list_given_up, select_to_try_again
from memcontrol.study.store import Study

_CROWD = 4  # trials in flight for each choice that is drawn ahead: the more there are, the more end at once
_DAY_SECONDS = 86_400
_N_FAILURES = 3  # this many in a row mean that something other than the choices is wrong


def search_study(
    place: StudyPlace, executor: Executor, observer: Observer, hours: float | None = None
) -> Study:
    """Runs the anchors and config.search.trials sampled trials, those already finished counted in. Returns
    the study.

    Raises SearchEnded after so many `hours`, or where an operator asks for it, and MemControlError for what
    the user must mend; trials not finished stay recorded and run again next time.
    """
    config, url = place.config, place.url

    def warn(line: str) -> None:
        observer.heard(Warned(None, line))

    refuse_results_among(config.data.path, place.folder.path)
    with (
        hold_folder_lock(
            place.folder.path, trials=config.search.trials, workers=count_workers(config.search)
        ),
        name_full_disk(place.folder.path),
        hold_study_lock(url, config.name) as lock,
    ):
        _remove_halves(place.folder)
        # What is wrong with the config is said before the images are read and anything is made.
        _check_place(place)

        # Images, base and space are checked in a worker, where their libraries are loaded anyway.
        jobs = JobQueue(executor, observer.heard)
        operator = Operator(place, jobs, warn, hours)
        prepared = run_preparation(config, place.folder, jobs)

        study = retry_while_away(
            lambda: open_study(
                config,
                place.folder.path,
                place.file,
                create=True,
                directions=prepared.directions,
                say=warn,
                lock=lock,
            ),
            url,
            warn,
        )
        study.note("made_with", lambda: prepared.made_with or None)
        study.publish_missing()
        operator.open(study)
        observer.opened(study)
        if sharing := describe_sharing(config.search):
            warn(sharing)

        # What all trials look at; then trials, and what is done again of the best of them.
        running = Search(place, study, jobs, observer, prepared.sizes)
        with _ending(observer):
            run_encoding(config, place.folder, running.runs.n_train, "holdout", jobs)
            running.run()
            confirm_front(study, running.runs, jobs)
            replicate_front(study, running.runs, jobs, running.bound)
            running.dropper.drop_at_the_end()
    return study


def _remove_halves(folder: StudyFolder) -> None:
    """What killed processes have left half written. Artifacts are written by this process alone; a run may
    have a worker, on any machine."""
    remove_parts(folder.artifacts)
    for run in folder.list_runs():
        remove_parts(run.path, _DAY_SECONDS)


def _check_place(place: StudyPlace) -> None:
    """Raises MemControlError: keys that differ from the study's own, an earlier study that is not there, runs
    of another config in the folder."""
    if place.is_searched():
        with contextlib.closing(
            open_study(place.config, place.folder.path, place.file, create=True)
        ) as study:
            clear_orders(study)  # what is asked for from now on is for this search
        return
    _read_earlier_front(place)
    space = load_study_space(place.config)
    for run in place.folder.list_runs():
        replace(read_spec(run.path), config=place.config, space=space).check_folder(run.path)


@contextlib.contextmanager
def _ending(observer: Observer) -> Iterator[None]:
    """Tells that the search is over, where what was found can still be shown."""
    try:
        yield
    except (KeyboardInterrupt, TrialsKeepFailing, FolderFull, SearchEnded):
        observer.over()
        raise
    except BaseException:
        observer.broken_off()
        raise
    observer.over()


def run_preparation(config: Config, folder: StudyFolder, jobs: JobQueue) -> Prepared:
    """Checks data, base and space, and splits the images. Raises MemControlError."""
    (end,) = jobs.run([PrepareJob(folder.path, config.model_dump(mode="json"))])
    if isinstance(end, GivenUp):
        raise MemControlError(f"the images and the base could not be read: {end.reason}")
    assert isinstance(end, Prepared), "a preparation ends with its result"
    return end


def run_encoding(config: Config, folder: StudyFolder, n_train: int, reference: str, jobs: JobQueue) -> None:
    """Has all workers make, together, the latents, encodings and reference features that trials look at.
    Raises MemControlError."""
    n, values = max(jobs.count_room(), 1), config.model_dump(mode="json")
    wanted = [EncodeJob(folder.path, values, n_train, reference, index) for index in range(n)]
    for end in jobs.run(wanted):
        if isinstance(end, GivenUp):
            raise MemControlError(f"the images could not be encoded: {end.reason}")


def _read_earlier_front(place: StudyPlace) -> list[dict] | None:
    """The front of the study that search.warm_start names, less its anchors that no space holds. Raises
    MemControlError."""
    name = place.config.search.warm_start
    if name is None:
        return None
    path = place.file.resolve().parent / name
    try:
        if path.resolve() == place.file.resolve():
            raise MemControlError(
                "is this study itself; name an earlier one, or leave the key out: a search goes on by itself"
            )
        with contextlib.closing(StudyPlace.load(path).open()) as study:
            records = [record for record in require_finished(study.records()) if not record.is_outside]
    except MemControlError as error:
        raise MemControlError(f"search.warm_start: {name}: {error}") from None
    return [record.chosen.as_dict() for record in select_front(records)]


@dataclass
class RunningTrial:
    """A trial that is not finished: the choices it must try, and the results so far by choice."""

    number: int
    candidates: tuple[Choice, ...]
    results: dict[Choice, dict] = field(default_factory=dict)


def _is_judged(record: Record) -> bool:
    """Anchors are what others are compared with, and never stop; variants are not trained."""
    return record.is_sampled and record.choice is not None and not record.dropped


class Search:
    """The state of one running search."""

    def __init__(
        self, place: StudyPlace, study: Study, jobs: JobQueue, observer: Observer, sizes: dict[str, int]
    ):
        self.config, self.study, self.jobs, self.observer = place.config, study, jobs, observer
        self.space = load_study_space(self.config)
        n_train = self.config.search.count_train(sizes["train"])
        self.runs = TrialRuns(self.config, self.space, place.folder, n_train)
        self.dropper = Dropper(study, self.runs)
        self.bound = FolderBound(place.folder, self.config.search.disk_gb)
        self.open: dict[int, RunningTrial] = {}
        self.in_flight: set[Path] = set()  # run folders
        self.waiting: deque[tuple[int, Choice]] = deque()
        self.ahead = self.make_sampler(place)
        judged = {
            record.number: self.runs.locate(record.chosen) for record in study.records() if _is_judged(record)
        }
        self.stops = EarlyStopper(self.config, study.objectives, judged)
        self.exhausted = self.flat = self.nearly_full = False
        self.passed_over: set[int] = set()  # trials of other programs that were told of
        self.n_looked_at = 0  # ended trials, when the hypervolume was last computed
        self.n_failures = 0

    @property
    def n_workers(self) -> int:
        return self.jobs.n_places or count_workers(self.config.search)

    def make_sampler(self, place: StudyPlace) -> PrefetchedChoices:
        """One that begins with the front of an earlier study, where the config names one."""
        search, n_objectives = self.config.search, len(self.config.rewards.objectives)
        stored = self.study.note("warm_start", lambda: _read_earlier_front(place)) or []
        first = [Choice.from_dict(choice) for choice in stored]
        allows = functools.cache(functools.partial(is_allowed, self.config))
        sampler = Sampler(
            self.space,
            search.seed,
            n_objectives,
            self.study.limits,
            search.sampler,
            first,
            allows,
            search.weigh_cost,
        )
        if n_lost := len(first) - len(sampler.first):
            self.warn(
                f"{n_lost} of {len(first)} choices on the front of {search.warm_start} have groups or "
                f"methods that space '{self.config.space}' lacks, and are not tried (search.warm_start)"
            )
        return PrefetchedChoices(sampler)

    def warn(self, line: str) -> None:
        self.observer.heard(Warned(None, line))

    def run(self) -> None:
        # Interrupted trials first, then the anchors and what failed; as places become free, what others ask
        # for, and sampled ones.
        records = self.study.records()
        for record in records:
            if record.state == "RUNNING":
                self.admit(record.number, record.candidates)  # less those whose result is already there
        for anchor, candidates in self.space.list_anchors(self.config.search.anchors).items():
            if not any(record.anchor == anchor for record in records):
                self.admit(self.study.begin(candidates, self.space, anchor), tuple(candidates))
        for record in select_to_try_again(records, self.config.search.anchors):
            if record.anchor or record.is_variant or self.n_left() > 0:
                self.try_again(record)
        for record in records:
            self.begin_variants(record)
        for record in list_given_up(records, self.config.search.anchors):
            self.warn(
                f"the anchor '{record.anchor}' has failed in {N_TRIALS} trials and is left alone; once what "
                f"is behind it is mended, memcontrol fork tries it anew: {record.reason}"
            )
        if line := describe_foreign(list(self.study.foreign.values())):
            self.warn(line)
        left = self.jobs.executor.left_at_work  # these take no further place
        self.waiting = deque(sorted(self.waiting, key=lambda one: self.runs.locate(one[1]).path not in left))
        with contextlib.closing(self.ahead):
            while self.fill() or self.open:
                for event in self.jobs.collect_ends():
                    self.end(event)
                    self.fill()
                self.observer.tick()
            self.jobs.look()  # what is held back is left to the next search

    def try_again(self, record: Record) -> None:
        """Begins a further trial of choices that an earlier search gave up."""
        for choice in record.candidates:
            self.runs.locate(choice).forget_failure()
        number = self.study.begin(record.candidates, self.space, record.anchor)
        self.warn(f"trial {record.number} failed, and is tried again as trial {number}: {record.reason}")
        self.watch(number, record)
        self.admit(number, record.candidates)

    def begin_variants(self, record: Record) -> None:
        """Has a fine-tuning that has ended well be measured at the other settings that need no training, as
        trials of their own; before anything else is trained."""
        if not record.finished or record.is_variant:
            return
        if not (variants := self.space.list_variants(record.chosen)):
            return
        known = {choice for other in self.study.records() for choice in other.candidates}
        for choice in reversed(variants):
            if choice not in known:
                self.admit(self.study.begin([choice], self.space), (choice,))

    def watch(self, number: int, record: Record) -> None:
        """Sampled trials may be stopped early."""
        if _is_judged(record):
            self.stops.watch(number, self.runs.locate(record.candidates[0]))

    def take_enqueued(self) -> bool:
        """Begins the trials that other programs have enqueued, as far as the space has them and they are new.
        Whether there was one."""
        found = [trial for trial in self.study.find_enqueued() if trial.number not in self.passed_over]
        if not found:
            return False
        records = [record for record in self.study.records() if record.state != "WAITING"]
        known = {choice for record in records for choice in record.candidates}
        n_before = len(self.open)
        for trial in found:
            try:
                choice = trial.read_choice(self.space)
                if choice in known:
                    raise MemControlError("its choice is that of another trial")
            except MemControlError as error:
                self.passed_over.add(trial.number)
                who = "another program" if trial.choice is None else "somebody"
                self.warn(f"trial {trial.number}, which {who} enqueued, is passed over: {error}")
                continue
            known.add(choice)
            number = self.study.claim(trial, choice)
            self.stops.watch(number, self.runs.locate(choice))
            self.admit(number, (choice,))
        return len(self.open) > n_before

    def admit(self, number: int, candidates: tuple[Choice, ...]) -> None:
        self.open[number] = RunningTrial(number, candidates)
        for choice in candidates:
            self.runs.check(choice)  # an edited space may be behind what is there
            self.advance(number, choice)

    def fill(self) -> bool:
        """Gives every free place a job, sampling new choices as needed. Whether anything is left to wait
        for. Raises FolderFull where there is nothing, since the folder is full."""
        while self.jobs.count_room() > 0 and self.has_space():
            if not self.waiting:
                if not self.take_enqueued() and not self.sample():
                    break
                continue  # its result may have been there already, from before the database was lost
            number, choice = self.waiting.popleft()
            if number in self.study.dropped:
                self.open.pop(number, None)
                continue
            rung = self.stops.next_rung(number, self.runs.locate(choice))
            self.in_flight.add(self.runs.locate(choice).path)
            self.jobs.add(self.runs.make_job(choice, number, rung))
        if not self.waiting:
            self.draw_ahead()
        return bool(self.open)

    def has_space(self) -> bool:
        """Whether the next trial keeps the bound on the folder; where it does not, what runs ends first.
        Raises FolderFull once nothing runs."""
        if self.config.search.disk_gb is None or not (self.waiting or self.n_left() > 0):
            return True
        if not self.nearly_full and (line := self.bound.describe_nearly_full(self.in_flight)):
            self.nearly_full = True
            self.warn(line)
        method = self.waiting[0][1].method if self.waiting else None
        reason = self.bound.explain_no_room(method, self.in_flight)
        if reason and not self.in_flight:
            raise FolderFull(reason)
        return not reason

    def draw_ahead(self) -> None:
        n_wanted = min(self.n_left(), max(1, len(self.open) // _CROWD))
        with contextlib.suppress(SpaceExhausted):
            self.ahead.prepare(self.study.records(), n_wanted, self.n_workers > 1)

    def n_left(self) -> int:
        """How many choices are still to be sampled; those that failed are sampled anew."""
        if self.exhausted or self.is_flat():
            return 0
        return self.config.search.trials - sum(record.fills_place for record in self.study.records())

    def is_flat(self) -> bool:
        """Whether the hypervolume has stopped growing, where that ends the search. Once it has, nothing is
        begun any more."""
        n, records = self.config.search.stop_when_flat, self.study.records()
        n_ended = sum(record.state != "RUNNING" for record in records)
        reference = self.study.note("reference", lambda: find_reference_point(records))
        if n and reference and not self.flat and n_ended > self.n_looked_at:
            self.n_looked_at, self.flat = n_ended, is_flat(records, reference, n)
            if self.flat:
                self.warn(
                    f"the hypervolume, {estimate_hypervolume(records, reference):.4g}, has not grown beyond "
                    f"its noise in {n} trials: the search ends (search.stop_when_flat)"
                )
        return self.flat

    def sample(self) -> bool:
        """Begins a trial of a new choice. Whether there was one to begin."""
        if self.n_left() <= 0:
            return False
        try:
            choice = self.ahead.take(self.study.records(), self.n_workers > 1)
        except SpaceExhausted as error:
            self.warn(str(error))
            self.exhausted = True
            return False
        number = self.study.begin([choice], self.space)
        self.stops.watch(number, self.runs.locate(choice))
        self.admit(number, (choice,))
        return True

    def end(self, event: Event) -> None:
        job = event.job
        assert isinstance(job, TrialJob) and job.number is not None, "nothing else is in flight here"
        run = self.runs.locate(job.choice)
        self.in_flight.discard(run.path)
        if isinstance(event, GivenUp) and not run.has_result:
            n = len(read_failures(run.path))
            reason = f"{n} attempts failed, the last: {event.reason}" if n else event.reason
            told = {"reason": reason, "traceback": event.traceback or None}
            write_json(run.result_file, {"state": "FAIL", "choice": job.choice.as_dict(), **told})
        self.advance(job.number, job.choice)

    def advance(self, number: int, choice: Choice) -> None:
        """Takes in what a choice's folder holds: a result, or a rung where it is judged; one that goes on
        waits for a place, before all that have not begun."""
        if number not in self.open:  # dropped while another of its choices ran
            return
        self.stops.leave_out(self.study.dropped)
        run = self.runs.locate(choice)
        if not run.has_result and not self.stops.goes_on(number, run):
            told = self.stops.describe(run)
            write_json(run.result_file, {"state": "PRUNED", "choice": choice.as_dict(), **told})
            shutil.rmtree(run.rounds, ignore_errors=True)
        if run.has_result:
            self.collect(number, choice)
        elif run.read_judgements() or choice.is_variant:
            self.waiting.appendleft((number, choice))
        else:
            self.waiting.append((number, choice))

    def collect(self, number: int, choice: Choice) -> None:
        """Takes a result in; when all of a trial's candidates have one, the study records its end."""
        trial = self.open[number]
        trial.results[choice] = self.runs.locate(choice).read_result()
        if len(trial.results) == len(trial.candidates):
            results = [trial.results[candidate] for candidate in trial.candidates]
            recorded_as = self.study.finish(number, results)
            del self.open[number]
            self.note_end(self.study.record(recorded_as))
            self.begin_variants(self.study.record(recorded_as))
            self.dropper.drop_checkpoints(choice)
            for run in self.dropper.drop_on_the_way():
                self.bound.forget(run)
        if self.n_failures >= _N_FAILURES:
            raise TrialsKeepFailing(
                f"{_N_FAILURES} trials in a row failed for good, the last: "
                f"{trial.results[choice]['reason']}; "
                f"mend what is behind it, and the same command tries them again, {N_TRIALS} times in all"
            )

    def note_end(self, record: Record) -> None:
        values = ", ".join(f"{name} {value:.6g}" for name, value in record.values.items())
        LOG.info("trial %d %s: %s", record.number, record.state, values or record.dropped or record.reason)
        self.n_failures = self.n_failures + 1 if record.state == "FAIL" else 0
