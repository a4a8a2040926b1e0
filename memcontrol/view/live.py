"""Owns what a person sees while something runs: a search's live display, the bars of other long commands; and
what of it is logged."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from rich import progress as bars
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from memcontrol.core.console import LOG, say
from memcontrol.core.jobs import (
    END_EVENTS,
    ConfirmJob,
    EncodeJob,
    Event,
    Failed,
    PrepareJob,
    Progress,
    TrialJob,
    Warned,
)
from memcontrol.core.run_folder import RunFolder
from memcontrol.search.observer import Observer
from memcontrol.study.pick import select_front
from memcontrol.study.record import Record
from memcontrol.study.store import Study
from memcontrol.view.words import describe_choice

_REFRESH_SECONDS = 0.5
LOADING = "loading the base, reading the images"
_SAID_EVERY_SECONDS = 10
_STAGES = {
    "train": (0.0, 0.8),
    "confirm": (0.0, 1.0),
}  # of a job: where in its time a stage begins, and its length
_PREPARATIONS = {
    "read": "reading images",
    "encode": "encoding images and captions",
    "describe": "features of real images",
    "calibrate": "calibrating with short trials",
}
_SCORING = (0.8, 0.15)  # any other stage of a trial


def describe_stage(name: str) -> str:
    """Of what is done before the first trial."""
    return _PREPARATIONS.get(name, name)


def describe_step(event: Progress) -> str:
    """Where a fine-tuning is: "step 120/230, round 3, loss 0.123, 14% skipped"."""
    parts = [f"step {event.done}/{event.total}"]
    if event.round is not None:
        parts.append(f"round {event.round}")
    if event.loss is not None:
        parts.append(f"loss {event.loss:.3f}")
    if event.skipped:
        parts.append(f"{event.skipped:.0%} skipped")
    return ", ".join(parts)


class Display(Observer):
    """Follows a search's events: a live block on a terminal, else one line for each finished trial."""

    def __init__(self, console: Console, n_sampled: int, n_groups: int, n_workers: int, note: str = LOADING):
        self.console, self.n_sampled, self.n_groups, self.n_workers = console, n_sampled, n_groups, n_workers
        self.records: list[Record] = []
        self.running: dict[
            Path, tuple[str, float]
        ] = {}  # what is said of a run, and the share of it that is done
        self.study: Study | None = None
        self.done: Counter[int] = Counter()  # runs ended, by trial
        self.lengths: list[float] = []  # seconds
        self.started = self.said = time.monotonic()
        self.shown = 0.0
        self.begun_at: dict[Path, float] = {}
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self.note = note
        self.has_picture = False

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
            self.refresh()
        else:
            self.console.print(self.note)
        return self

    def __exit__(self, *_) -> None:
        self.read()
        if self.live:
            self.live.stop()

    def opened(self, study: Study) -> None:
        self.study, self.note = study, ""
        self.read()

    def heard(self, event: Event) -> None:
        job = event.job
        if isinstance(event, Warned):
            self.console.print(Text(f"warning: {event.text}", style="yellow"))
        elif isinstance(job, (PrepareJob, EncodeJob)):
            self.show_preparation(event, job)
        elif isinstance(job, (TrialJob, ConfirmJob)):
            if isinstance(event, Progress):
                self.show_progress(event, job)
            elif isinstance(event, Failed):
                self.show_failure(event, job)
            elif isinstance(event, END_EVENTS):
                self.show_end(job)
        self.refresh()

    def show_preparation(self, event: Event, job: PrepareJob | EncodeJob) -> None:
        """How far a worker is with its share of what is made before the first trial."""
        place = job.folder / f"encoding {job.index}" if isinstance(job, EncodeJob) else job.folder
        if isinstance(event, Progress) and event.total:
            said = f"{describe_stage(event.stage)} ({event.done} of {event.total})"
            self.running[place] = said, event.done / event.total
            if not self.live:
                self.say_preparation(said, event.done == event.total)
        elif isinstance(event, END_EVENTS):
            self.running.pop(place, None)

    def say_preparation(self, text: str, is_over: bool) -> None:
        """A line now and then, and one at the end of what took long enough to have had one."""
        now = time.monotonic()
        if is_over or now - self.said >= _SAID_EVERY_SECONDS:
            say(self.console, f"{(now - self.started) / 60:.1f} min: {text}")
            self.said = now

    def show_progress(self, event: Progress, job: TrialJob | ConfirmJob) -> None:
        self.begun_at.setdefault(job.folder, time.monotonic())
        begin, length = _STAGES.get(event.stage, _SCORING)
        self.running[job.folder] = self.describe_run(event, job), begin + length * event.done / event.total

    def describe_run(self, event: Progress, job: TrialJob | ConfirmJob) -> str:
        text = describe_choice(job.choice, self.n_groups)
        if isinstance(job, ConfirmJob):
            return f"{text}: measured again"
        text += "" if job.replicate is None else " again"
        return f"{text}: {describe_step(event)}" if event.stage == "train" else text

    def show_failure(self, event: Failed, job: TrialJob | ConfirmJob) -> None:
        self.running.pop(job.folder, None)
        text = describe_choice(job.choice, self.n_groups)
        line = Text(f"warning: {text}: an attempt failed: {event.reason}", style="yellow")
        self.console.print(line, soft_wrap=True)

    def show_end(self, job: TrialJob | ConfirmJob) -> None:
        self.running.pop(job.folder, None)
        if not self.live:
            minutes = (time.monotonic() - self.started) / 60
            text = describe_choice(job.choice, self.n_groups)
            say(self.console, f"{minutes:.1f} min: {text}: {_name_end(job)}")
        self.say_first_picture(job)
        if isinstance(job, TrialJob) and not _goes_on(job):
            self.done[-1 if job.number is None else job.number] += 1
            if job.choice.method != "none":  # it trains nothing and would make the rest look short
                self.lengths.append(time.monotonic() - self.begun_at.pop(job.folder, time.monotonic()))

    def say_first_picture(self, job: TrialJob | ConfirmJob) -> None:
        """Of the first run that trained: something to look at while the others go on."""
        picture = RunFolder(job.folder).pairs_picture
        if not self.has_picture and job.choice.method != "none" and picture.is_file():
            say(self.console, f"first images, beside their nearest training images: {shorten_path(picture)}")
            self.has_picture = True

    def refresh(self) -> None:
        if time.monotonic() - self.shown < _REFRESH_SECONDS:
            return
        self.shown = time.monotonic()
        self.read()
        if self.live:
            self.live.update(self.block(), refresh=True)

    def read(self) -> None:
        if self.study is None:
            return
        before = {record.number for record in self.records if _has_ended(record)}
        self.records = self.study.records()
        for record in self.records:
            if not self.live and _has_ended(record) and record.number not in before:
                say(self.console, self.line(record))

    def line(self, record: Record) -> str:
        values = ", ".join(f"{name} {value:.3f}" for name, value in record.values.items())
        text = describe_choice(record.chosen, self.n_groups)
        what = values or f"{record.state.lower()}: {record.reason}"
        return f"trial {record.number} ({record.origin}): {text}: {what}"

    def block(self) -> Group:
        n_ended = sum(_has_ended(record) for record in self.records)
        total = self.n_sampled + sum(record.anchor is not None for record in self.records)
        minutes = (time.monotonic() - self.started) / 60
        head = (
            f"{n_ended} of {total} trials done, {len(self.running)} running, {minutes:.1f} min" + self.left()
        )
        lines = [Text(self.note or head, style="bold")]
        for text, share in self.running.values():
            lines.append(Text(f"  {'█' * int(20 * share):<20} {text}"))
        complete = [record for record in self.records if record.finished]
        if complete:
            lines.append(Text("best front so far:"))
            lines += [Text(f"  {self.line(record)}") for record in select_front(complete)]
        return Group(*lines)

    def left(self) -> str:
        """Time left, from the mean of the runs so far: each sampled trial is one run, an anchor one for each
        choice it tries."""
        if not self.lengths:
            return ""
        n_open = sum(
            len(record.candidates) - self.done[record.number]
            for record in self.records
            if record.state == "RUNNING"
        )
        n_begun = sum(record.is_sampled for record in self.records)
        runs = n_open + max(0, self.n_sampled - n_begun) - sum(share for _, share in self.running.values())
        minutes = max(runs, 0) * sum(self.lengths) / len(self.lengths) / self.n_workers / 60
        return f", about {minutes:.1f} min left"


def _goes_on(job: TrialJob | ConfirmJob) -> bool:
    """Whether the job was the way to a rung, and the trial has not ended there."""
    return isinstance(job, TrialJob) and bool(job.rung) and not RunFolder(job.folder).has_result


def _name_end(job: TrialJob | ConfirmJob) -> str:
    if isinstance(job, ConfirmJob):
        return "measured again"
    if _goes_on(job):
        return f"measured at {job.rung:.0%} of its budget"
    return "run ended" if job.replicate is None else "fine-tuned again"


class EventLog(Observer):
    """A line in the log for what begins, ends or fails; of progress, the end of each stage, as detail."""

    def __init__(self, n_groups: int):
        self.n_groups = n_groups

    def heard(self, event: Event) -> None:
        if isinstance(event, Warned):
            LOG.warning("%s", event.text)
        elif isinstance(event, Failed):
            LOG.warning("%s%s: %s", self.name_job(event), event.kind, event.reason)
        elif isinstance(event, END_EVENTS):
            LOG.info("%s%s", self.name_job(event), event.kind)
        elif isinstance(event, Progress) and event.done == event.total:
            LOG.debug("%s%s, all of %s", self.name_job(event), event.stage, event.total)

    def name_job(self, event: Event) -> str:
        job = event.job
        if not isinstance(job, (TrialJob, ConfirmJob)):
            return ""
        trial = "" if job.number is None else f"trial {job.number}: "
        return f"{trial}{job.folder.name}: {describe_choice(job.choice, self.n_groups)}: "


class Steps:
    """Bars of a command that does one thing after another: what it is at, and how far; where nothing can be
    drawn again, a line now and then."""

    def __init__(self, console: Console):
        self.progress = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            console=console,
            transient=True,
        )
        self.tasks: dict[str, bars.TaskID] = {}
        self.last_said = time.monotonic()

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_) -> None:
        if self.tasks:  # else it would leave an empty line
            self.progress.stop()

    def show(self, title: str, done: int, total: int) -> None:
        if not self.progress.console.is_terminal:
            self.say_now_and_then(f"{title}: {done} of {total}")
            return
        self.progress.start()
        if title not in self.tasks:
            self.tasks[title] = self.progress.add_task(title, total=total)
        self.progress.update(self.tasks[title], completed=done)

    def say_now_and_then(self, line: str) -> None:
        if time.monotonic() - self.last_said >= _SAID_EVERY_SECONDS:
            say(self.progress.console, line)
            self.last_said = time.monotonic()

    def warn(self, line: str) -> None:
        say(self.progress.console, f"warning: {line}")


def _has_ended(record: Record) -> bool:
    return record.state in ("COMPLETE", "PRUNED", "FAIL")


def shorten_path(path: Path) -> str:
    """The path as a person in this folder would write it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
