"""Owns what a person sees of a search: one live display while it runs, a table at its end."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from memcontrol.effects import Effect
from memcontrol.estimate import Estimate, spearman
from memcontrol.executors import ENDS, FAILURES, Event
from memcontrol.figures import FIGURES, MINIMIZE, direction_of, written
from memcontrol.notes import said_of
from memcontrol.picking import front_of, ties_of
from memcontrol.replicates import spread_of
from memcontrol.saying import LOG
from memcontrol.space import Choice
from memcontrol.spec import RESULT
from memcontrol.study import Record, Study

INTERVAL_SECONDS = 0.5
N_RANKED = 12  # trials that a rank correlation needs to say anything
LOADING = "loading the base, reading the images"


def said_of_step(detail: dict) -> str:
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
            text = said_of(Choice.from_dict(event.job["choice"]), self.n_groups)
            confirming = event.detail["stage"] == "confirm"
            text += " again" if "replicate" in event.job else ""
            said = f"{text}: {said_of_step(event.detail)}" if training else f"{text}: measured again" if confirming else text
            self.running[name] = (said, 0.8 * share if training else share if confirming else 0.8 + 0.15 * share)
        elif event.kind in FAILURES and name:
            self.running.pop(name, None)
            said = said_of(Choice.from_dict(event.job["choice"]), self.n_groups)
            self.console.print(Text(f"warning: {said}: an attempt failed: {event.detail['reason']}", style="yellow"), soft_wrap=True)
        elif event.kind in ENDS and name:
            self.running.pop(name, None)
            goes_on = event.job.get("rung") and not (Path(event.job["trial"]) / RESULT).exists()
            if not self.live:
                minutes = (time.monotonic() - self.started) / 60
                said = said_of(Choice.from_dict(event.job["choice"]), self.n_groups)
                end = "measured again" if "confirm" in event.job else f"measured at {event.job['rung']:.0%} of its budget" if goes_on else "fine-tuned again" if "replicate" in event.job else "run ended"
                self.console.print(f"{minutes:.1f} min: {said}: {end}", highlight=False, soft_wrap=True)
            if "trial" in event.job and not goes_on:
                self.done[event.job.get("number", -1)] += 1
            if "trial" in event.job and not goes_on and event.job["choice"]["method"] != "none":  # it trains nothing and would make the rest look short
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
        return f"trial {record.number} ({record.anchor or 'sampled'}): {said_of(record.chosen, self.n_groups)}: {values}"

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


def log_event(event: Event, n_groups: int) -> None:
    """A line for what begins, ends or fails; of progress, the end of each stage, as detail."""
    name = event.job.get("trial") or event.job.get("confirm") or ""
    of_trial = f"trial {event.job['number']}: " if "number" in event.job else ""
    said = f"{of_trial}{Path(name).name}: {said_of(Choice.from_dict(event.job['choice']), n_groups)}: " if name else ""
    if event.kind == "warning":
        LOG.warning("%s", event.detail["text"])
    elif event.kind in FAILURES:
        LOG.warning("%s%s: %s", said, event.kind, event.detail["reason"])
    elif event.kind in ENDS:
        LOG.info("%s%s", said, event.kind)
    elif event.kind == "progress" and event.detail["done"] == event.detail["total"]:
        LOG.debug("%s%s, all of %s", said, event.detail["stage"], event.detail["total"])


class Steps:
    """Bars of a command that does one thing after another: what it is at, and how far."""

    def __init__(self, console: Console):
        self.progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True)
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


def ended(record: Record) -> bool:
    return record.state in ("COMPLETE", "PRUNED", "FAIL")


COLUMNS = ("fid", "kid", "memorization", "copy_rate", "amd_train", "amd_holdout", "trained_fraction")
DROPPED = ("amd_holdout", "amd_train", "kid", "trained_fraction")  # in this order, where there is no room
WIDE = 10_000


@dataclass(frozen=True)
class RewardsTable:
    """A row for each (name, what it is, rewards): the usual figures, and whatever else is an objective; on a narrow terminal fewer of them, so
    that what a row is stays to be read."""

    rows: Sequence[tuple[str, str, dict[str, float]]]
    title: str
    objectives: Sequence[str] = ()
    note: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [*(name for name in self.objectives if name not in COLUMNS), *COLUMNS]
        for name in DROPPED:
            if Measurement.get(console, options.update(max_width=WIDE), self.table(columns)).maximum <= options.max_width:
                break
            columns = [other for other in columns if other != name or other in self.objectives]
        yield self.table(columns)

    def table(self, columns: Sequence[str]) -> Table:
        table = Table(title=self.title, title_justify="left", expand=False, caption=self.note, caption_justify="left")
        table.add_column("trial", no_wrap=True)
        table.add_column("choice", min_width=14)
        for name in columns:
            table.add_column(FIGURES[name].title if name in FIGURES else name, justify="right", min_width=8)
        for name, text, rewards in self.rows:
            table.add_row(name, text, *(written(key, rewards) for key in columns))
        return table


def importance_table(effects: Sequence[Effect], name: str) -> Table:
    """What each change does to each objective; what cannot be told from nothing (within two standard errors) is dim."""
    table = Table(title=f"{name}: what drives which reward", title_justify="left")
    table.add_column("change")
    for objective in effects[0].effects if effects else ():
        table.add_column(FIGURES[objective].title if objective in FIGURES else objective, justify="right")
    table.add_column("choices", justify="right")
    for effect in effects:
        change = f"{effect.coordinate} on" if effect.high is True else f"{effect.coordinate}: {effect.low} to {effect.high}"
        cells = [
            Text(f"{value:+.3g} ± {value.error:.2g}", style="bold" if abs(value) > 2 * (value.error or 0) else "dim") for value in effect.effects.values()
        ]
        table.add_row(change.replace("rate: 0.0 to 1.0", "learning rate: lowest to highest"), *cells, str(effect.n_choices))
    return table


def study_table(
    records: Sequence[Record], n_groups: int, title: str, picked: Record | None = None, among: Sequence[Record] | None = None
) -> RewardsTable:
    """The finished trials of `records`: those on the front (of `among`, or of themselves) marked with *, those that are on or off
    it within error only with =, the pick with >, and with + those measured again."""
    complete = sorted((record for record in records if record.finished), key=lambda record: tuple(record.losses))
    others = [record for record in among or complete if record.finished]
    marks = {record.number: "*" for record in front_of(others)} | {record.number: "=" for record in ties_of(others)}
    rows = [
        (
            f"{'>' if record is picked else ' '}{marks.get(record.number, ' ')}{'+' if record.confirmed else ' '}{record.number}"
            f"{' ' + record.anchor if record.anchor else ''}",
            said_of(record.chosen, n_groups), record.rewards,
        )
        for record in complete
    ]  # fmt: skip
    note = "* on the front, = on or off it within error only, + measured again over fresh draws" + (", > the pick" if picked else "")
    return RewardsTable(rows, title, list(complete[0].objectives) if complete else (), note)


def gain_lines(full: dict[str, float], picked: dict[str, float], apart: dict[str, Estimate]) -> list[str]:
    """Three lines: FID, memorization distance and copy rate of full fine-tuning against the chosen mask, and their difference."""
    names = {"fid": "FID", "memorization": "memorization distance", "copy_rate": "copy rate"}
    return [
        f"{title}: {written(key, full)} with full fine-tuning, {written(key, picked)} with the chosen mask{said_apart(key, apart)}"
        for key, title in names.items()
    ]


def said_apart(name: str, apart: dict[str, Estimate]) -> str:
    """"; difference -4.2 (-5.3 to -3.1), paired over prompts", and whether it is one."""
    if name not in apart:
        return ""
    value, form = apart[name], FIGURES[name].form.replace(":", ":+")
    tie = ", a tie" if value.holds_zero else ""
    return f"; difference {form.format(value)} ({form.format(value.low)} to {form.format(value.high)}{tie})"


def differences_table(apart: dict[str, Estimate], first: dict[str, float], second: dict[str, float], title: str) -> Table:
    """A row for each figure: both runs' values, the difference, its interval, and which run is better beyond it."""
    table = Table(title=title, title_justify="left", expand=False)
    for heading in ("figure", "first", "second", "first - second", "95 %, paired over prompts", "better"):
        table.add_column(heading)
    for name, value in apart.items():
        form = FIGURES[name].form.replace(":", ":+") if name in FIGURES else "{:+.3f}"
        better = "tie" if value.holds_zero else "first" if (value < 0) == (direction_of(name) == MINIMIZE) else "second"
        title, interval = FIGURES[name].title if name in FIGURES else name, f"{form.format(value.low)} to {form.format(value.high)}"
        table.add_row(title, written(name, first), written(name, second), form.format(value), interval, better)
    return table


def figures_table() -> Table:
    """Every figure: its name in a study file, direction, interval, cost, meaning; * for those that can be objectives."""
    table = Table(expand=False)
    for heading in ("name (* can be an objective)", "better", "interval", "cost", "meaning"):
        table.add_column(heading)
    for name, figure in FIGURES.items():
        table.add_row(f"{'*' if figure.objective else ' '} {name}", figure.direction, figure.interval, figure.cost, figure.meaning)
    return table


def cheap_line(records: Sequence[Record]) -> str:
    """How well the loss gap, which needs no sampling, ranks the trials as memorization does; empty for fewer than N_RANKED trials."""
    pairs = [(record.searched["loss_gap"], record.searched["memorization"]) for record in records if record.finished and "loss_gap" in record.searched]
    if len(pairs) < N_RANKED:
        return ""
    found = spearman(*zip(*pairs))
    return (
        f"over {len(pairs)} trials the loss gap, which needs no sampling, ranks as memorization does with a Spearman correlation of "
        f"{found:.2f} ({found.low:.2f} to {found.high:.2f})"
    )


def spread_line(records: Sequence[Record]) -> str:
    """How far fine-tunings of the same choice lie apart; empty where none was repeated."""
    spread = spread_of(records)
    if spread is None:
        return ""
    titles = (FIGURES[name].title if name in FIGURES else name for name in records[0].objectives)
    n = sum(len(record.replicates) for record in records)
    parts = ", ".join(f"{title} {value:.3g} ± {value / math.sqrt(2 * n):.2g}" for title, value in zip(titles, spread))  # of normal errors
    return f"standard deviation between fine-tunings of the same choice ({n} more on the front): {parts}"


def relative(path: Path) -> str:
    """The path as a person in this folder would write it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
