"""Owns what a person sees while something runs: a search's live display, the bars of other long commands; and
what of it is logged."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from memcontrol.core.choice import Choice
from memcontrol.core.console import LOG
from memcontrol.core.run_folder import RESULT
from memcontrol.execution.executor import END_KINDS, FAILED_KINDS, Event
from memcontrol.study.pick import select_front
from memcontrol.study.record import Record
from memcontrol.study.store import Study
from memcontrol.view.words import describe_choice

REFRESH_SECONDS = 0.5
LOADING = "loading the base, reading the images"


def describe_step(detail: dict) -> str:
    """Where a fine-tuning is: "step 120/230, round 3, loss 0.123, 14 % skipped"."""
    parts = [f"step {detail['done']}/{detail['total']}"]
    if "round" in detail:
        parts.append(f"round {detail['round']}")
    if detail.get("loss") is not None:
        parts.append(f"loss {detail['loss']:.3f}")
    if detail.get("skipped"):
        parts.append(f"{detail['skipped']:.0%} skipped")
    return ", ".join(parts)


class Display:
    """Follows a search's events: a live block on a terminal, else one line for each finished trial."""

    def __init__(self, console: Console, n_sampled: int, n_groups: int, n_workers: int, note: str = LOADING):
        self.console, self.n_sampled, self.n_groups, self.n_workers = console, n_sampled, n_groups, n_workers
        self.records: list[Record] = []
        self.running: dict[str, tuple[str, float]] = {}
        self.study: Study | None = None
        self.done: Counter[int] = Counter()  # runs ended, by trial
        self.lengths: list[float] = []  # seconds
        self.started, self.shown = time.monotonic(), 0.0
        self.begun_at: dict[str, float] = {}
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self.note = note

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

    def on_study(self, study: Study) -> None:
        self.study, self.note = study, ""
        self.read()

    def on_event(self, event: Event) -> None:
        name = event.job.get("trial") or event.job.get("confirm", "")
        if event.kind == "warning":
            self.console.print(Text(f"warning: {event.detail['text']}", style="yellow"))
        elif event.kind == "progress":
            self.begun_at.setdefault(name, time.monotonic())
            share = event.detail["done"] / event.detail["total"]
            training = event.detail["stage"] == "train"
            text = describe_choice(Choice.from_dict(event.job["choice"]), self.n_groups)
            confirming = event.detail["stage"] == "confirm"
            text += " again" if "replicate" in event.job else ""
            said = (
                f"{text}: {describe_step(event.detail)}"
                if training
                else f"{text}: measured again"
                if confirming
                else text
            )
            self.running[name] = (
                said,
                0.8 * share if training else share if confirming else 0.8 + 0.15 * share,
            )
        elif event.kind in FAILED_KINDS and name:
            self.running.pop(name, None)
            said = describe_choice(Choice.from_dict(event.job["choice"]), self.n_groups)
            self.console.print(
                Text(f"warning: {said}: an attempt failed: {event.detail['reason']}", style="yellow"),
                soft_wrap=True,
            )
        elif event.kind in END_KINDS and name:
            self.running.pop(name, None)
            goes_on = event.job.get("rung") and not (Path(event.job["trial"]) / RESULT).exists()
            if not self.live:
                minutes = (time.monotonic() - self.started) / 60
                said = describe_choice(Choice.from_dict(event.job["choice"]), self.n_groups)
                end = (
                    "measured again"
                    if "confirm" in event.job
                    else f"measured at {event.job['rung']:.0%} of its budget"
                    if goes_on
                    else "fine-tuned again"
                    if "replicate" in event.job
                    else "run ended"
                )
                self.console.print(f"{minutes:.1f} min: {said}: {end}", highlight=False, soft_wrap=True)
            if "trial" in event.job and not goes_on:
                self.done[event.job.get("number", -1)] += 1
            # it trains nothing and would make the rest look short
            if "trial" in event.job and not goes_on and event.job["choice"]["method"] != "none":
                self.lengths.append(time.monotonic() - self.begun_at.pop(name, time.monotonic()))
        self.refresh()

    def refresh(self) -> None:
        if time.monotonic() - self.shown < REFRESH_SECONDS:
            return
        self.shown = time.monotonic()
        self.read()
        if self.live:
            self.live.update(self.block(), refresh=True)

    def read(self) -> None:
        if self.study is None:
            return
        before, self.records = (
            {record.number for record in self.records if has_ended(record)},
            self.study.records(),
        )
        for record in self.records:
            if not self.live and has_ended(record) and record.number not in before:
                self.console.print(self.line(record), highlight=False, soft_wrap=True)

    def line(self, record: Record) -> str:
        values = (
            ", ".join(f"{name} {value:.3f}" for name, value in record.values.items())
            or f"{record.state.lower()}: {record.reason}"
        )
        return (
            f"trial {record.number} ({record.anchor or 'sampled'}): "
            f"{describe_choice(record.chosen, self.n_groups)}: {values}"
        )

    def block(self) -> Group:
        n_ended = sum(has_ended(record) for record in self.records)
        total = self.n_sampled + 3
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
        n_begun = sum(record.anchor is None for record in self.records)
        runs = n_open + max(0, self.n_sampled - n_begun) - sum(share for _, share in self.running.values())
        minutes = max(runs, 0) * sum(self.lengths) / len(self.lengths) / self.n_workers / 60
        return f", about {minutes:.1f} min left"


def log_event(event: Event, n_groups: int) -> None:
    """A line for what begins, ends or fails; of progress, the end of each stage, as detail."""
    name = event.job.get("trial") or event.job.get("confirm") or ""
    of_trial = f"trial {event.job['number']}: " if "number" in event.job else ""
    said = (
        f"{of_trial}{Path(name).name}: {describe_choice(Choice.from_dict(event.job['choice']), n_groups)}: "
        if name
        else ""
    )
    if event.kind == "warning":
        LOG.warning("%s", event.detail["text"])
    elif event.kind in FAILED_KINDS:
        LOG.warning("%s%s: %s", said, event.kind, event.detail["reason"])
    elif event.kind in END_KINDS:
        LOG.info("%s%s", said, event.kind)
    elif event.kind == "progress" and event.detail["done"] == event.detail["total"]:
        LOG.debug("%s%s, all of %s", said, event.detail["stage"], event.detail["total"])


class Steps:
    """Bars of a command that does one thing after another: what it is at, and how far."""

    def __init__(self, console: Console):
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
            transient=True,
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_) -> None:
        if self.tasks:  # else it would leave an empty line
            self.progress.stop()

    def show(self, title: str, done: int, total: int) -> None:
        self.progress.start()
        if title not in self.tasks:
            self.tasks[title] = self.progress.add_task(title, total=total)
        self.progress.update(self.tasks[title], completed=done)

    def warn(self, line: str) -> None:
        self.progress.console.print(f"warning: {line}", highlight=False, soft_wrap=True)


def has_ended(record: Record) -> bool:
    return record.state in ("COMPLETE", "PRUNED", "FAIL")


def shorten_path(path: Path) -> str:
    """The path as a person in this folder would write it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
