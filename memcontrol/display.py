"""Owns what a person sees of a search: one live display while it runs, a table at its end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from memcontrol.executors import ENDS, Event
from memcontrol.pick import front_of
from memcontrol.space import EVERYTHING, Choice
from memcontrol.study import Record, Study

INTERVAL_SECONDS = 0.5
LOADING = "loading the base, reading the images"


def said_of(choice: Choice, n_groups: int) -> str:
    """The choice in a few words: "lora r4, lr 0.003, 5/7 groups"."""
    if choice.method == "none":
        return "no training"
    rank = f" r{choice.rank}" if choice.rank else ""
    groups = "" if EVERYTHING in choice.groups else f", {len(choice.groups)}/{n_groups} groups"
    return f"{'+'.join(choice.methods)}{rank}, lr {choice.learning_rate:g}{groups}"


def said_of_step(detail: dict) -> str:
    """Where a fine-tuning is: "step 120/230, round 3, loss 0.123, 14 % skipped"."""
    parts = [f"step {detail['done']}/{detail['total']}", f"round {detail['round']}"]
    if detail["loss"] is not None:
        parts.append(f"loss {detail['loss']:.3f}")
    if detail["skipped"]:
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
        self.started, self.shown, self.begun_at = time.monotonic(), 0.0, {}
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
        name = event.job.get("trial", "")
        if event.kind == "warning":
            self.console.print(Text(f"warning: {event.detail['text']}", style="yellow"))
        elif event.kind == "progress":
            self.begun_at.setdefault(name, time.monotonic())
            share = event.detail["done"] / event.detail["total"]
            training = event.detail["stage"] == "train"
            text = said_of(Choice.from_dict(event.job["choice"]), self.n_groups)
            self.running[name] = (f"{text}: {said_of_step(event.detail)}" if training else text, 0.8 * share if training else 0.8 + 0.15 * share)
        elif event.kind in ENDS and name:
            self.running.pop(name, None)
            if not self.live:
                minutes = (time.monotonic() - self.started) / 60
                said = said_of(Choice.from_dict(event.job["choice"]), self.n_groups)
                self.console.print(f"{minutes:.1f} min: {said}: run ended", highlight=False, soft_wrap=True)
            self.done[event.job.get("number", -1)] += 1
            if event.job["choice"]["method"] != "none":  # it trains nothing and would make the rest look short
                self.lengths.append(time.monotonic() - self.begun_at.pop(name, time.monotonic()))
        self.refresh()

    def refresh(self) -> None:
        if time.monotonic() - self.shown < INTERVAL_SECONDS:
            return
        self.shown = time.monotonic()
        self.read()
        if self.live:
            self.live.update(self.block(), refresh=True)

    def read(self) -> None:
        if self.study is None:
            return
        before, self.records = {record.number for record in self.records if ended(record)}, self.study.records()
        for record in self.records:
            if not self.live and ended(record) and record.number not in before:
                self.console.print(self.line(record), highlight=False, soft_wrap=True)

    def line(self, record: Record) -> str:
        values = ", ".join(f"{name} {value:.3f}" for name, value in record.values.items()) or f"{record.state.lower()}: {record.reason}"
        return f"trial {record.number} ({record.anchor or 'sampled'}): {said_of(record.choice, self.n_groups)}: {values}"

    def block(self) -> Group:
        n_ended = sum(ended(record) for record in self.records)
        total = self.n_sampled + 3
        minutes = (time.monotonic() - self.started) / 60
        head = f"{n_ended} of {total} trials done, {len(self.running)} running, {minutes:.1f} min" + self.left()
        lines = [Text(self.note or head, style="bold")]
        for text, share in self.running.values():
            lines.append(Text(f"  {'█' * int(20 * share):<20} {text}"))
        complete = [record for record in self.records if record.finished]
        if complete:
            lines.append(Text("best front so far:"))
            lines += [Text(f"  {self.line(record)}") for record in front_of(complete)]
        return Group(*lines)

    def left(self) -> str:
        """Time left, from the mean of the runs so far: each sampled trial is one run, an anchor one for each choice it tries."""
        if not self.lengths:
            return ""
        n_open = sum(len(record.candidates) - self.done[record.number] for record in self.records if record.state == "RUNNING")
        n_begun = sum(record.anchor is None for record in self.records)
        runs = n_open + max(0, self.n_sampled - n_begun) - sum(share for _, share in self.running.values())
        minutes = max(runs, 0) * sum(self.lengths) / len(self.lengths) / self.n_workers / 60
        return f", about {minutes:.1f} min left"


class Steps:
    """Bars of a command that does one thing after another: what it is at, and how far."""

    def __init__(self, console: Console):
        self.progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Steps:
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def show(self, title: str, done: int, total: int) -> None:
        if title not in self.tasks:
            self.tasks[title] = self.progress.add_task(title, total=total)
        self.progress.update(self.tasks[title], completed=done)

    def warn(self, line: str) -> None:
        self.progress.console.print(f"warning: {line}", highlight=False, soft_wrap=True)


def ended(record: Record) -> bool:
    return record.state in ("COMPLETE", "PRUNED", "FAIL")


COLUMNS = {
    "fid": ("FID", "{:.3f}"), "kid": ("KID", "{:.4f}"), "memorization": ("memorization", "{:.3f}"),
    "copy_rate": ("copied (95 %)", "{:.1%}"), "amd_train": ("to train", "{:.2f}"), "amd_holdout": ("to held out", "{:.2f}"),
    "trained_fraction": ("trained", "{:.2%}"),
}  # fmt: skip


def rewards_table(rows: Sequence[tuple[str, str, dict[str, float]]], title: str) -> Table:
    """A row for each (name, what it is, rewards)."""
    table = Table(title=title, title_justify="left", expand=False)
    table.add_column("trial")
    table.add_column("choice")
    for heading, _ in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, text, rewards in rows:
        table.add_row(name, text, *(cell(key, rewards) for key in COLUMNS))
    return table


def cell(key: str, rewards: dict[str, float]) -> str:
    if key not in rewards:
        return ""
    text = COLUMNS[key][1].format(rewards[key])
    return f"{text} ({rewards['copy_rate_low']:.1%}-{rewards['copy_rate_high']:.1%})" if key == "copy_rate" else text


def study_table(
    records: Sequence[Record], n_groups: int, title: str, picked: Record | None = None, among: Sequence[Record] | None = None
) -> Table:
    """The finished trials of `records`, those on the front (of `among`, or of themselves) marked with *, the pick with >."""
    complete = sorted((record for record in records if record.finished), key=lambda record: tuple(record.values.values()))
    best = {record.number for record in front_of([record for record in among or complete if record.finished])}
    rows = [
        (
            f"{'>' if record is picked else ' '}{'*' if record.number in best else ' '}{record.number}{' ' + record.anchor if record.anchor else ''}",
            said_of(record.choice, n_groups), record.rewards,
        )
        for record in complete
    ]  # fmt: skip
    return rewards_table(rows, title)


def gain_lines(full: dict[str, float], picked: dict[str, float]) -> list[str]:
    """Three lines: FID, memorization distance and copy rate of full fine-tuning against the chosen mask."""
    names = {"fid": "FID", "memorization": "memorization distance", "copy_rate": "copy rate"}
    return [f"{title}: {cell(key, full)} with full fine-tuning, {cell(key, picked)} with the chosen mask" for key, title in names.items()]


def relative(path: Path) -> str:
    """The path as a person in this folder would write it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
