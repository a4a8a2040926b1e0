"""Owns the tables that are printed, and the lines below them: trials, retrained runs, differences, rewards,
what drives what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from memcontrol.core.estimate import Estimate, spearman
from memcontrol.core.reward_table import MINIMIZE, REWARDS, find_direction, format_reward
from memcontrol.search.importance import Effect
from memcontrol.study.pareto import Limit
from memcontrol.study.pick import keeps_limits, select_front, select_ties
from memcontrol.study.record import Record
from memcontrol.study.replicates import estimate_spread
from memcontrol.view.words import describe_choice, find_title

_N_RANKED = 12  # trials that a rank correlation needs to say anything
_COLUMNS = (
    "fid",
    "kid",
    "utility",
    "memorization",
    "copy_rate",
    "membership_auc",
    "epsilon",
    "amd_train",
    "amd_holdout",
    "trained_fraction",
)
_DROPPED = (
    "amd_holdout",
    "amd_train",
    "kid",
    "trained_fraction",
    "epsilon",
    "membership_auc",
)  # in this order, where there is no room
_WIDE = 10_000
_READABLE = 120  # columns in which five of a table can be read


@dataclass(frozen=True)
class RewardsTable:
    """A row for each (name, what it is, rewards): the usual rewards, and whatever else is an objective; on a
    narrow terminal fewer of them, so that what a row is stays to be read."""

    rows: Sequence[tuple[str, str, dict[str, float]]]
    title: str
    objectives: Sequence[str] = ()
    note: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [*(name for name in self.objectives if name not in _COLUMNS), *_COLUMNS]
        columns = [name for name in columns if any(name in rewards for *_, rewards in self.rows)] or columns
        for name in _DROPPED:
            if self.measure_width(columns, console, options) <= options.max_width:
                break
            columns = [other for other in columns if other != name or other in self.objectives]
        yield self.make_table(columns)

    def measure_width(self, columns: Sequence[str], console: Console, options: ConsoleOptions) -> int:
        """Of the whole table, where nothing had to be shortened."""
        return Measurement.get(console, options.update(max_width=_WIDE), self.make_table(columns)).maximum

    def make_table(self, columns: Sequence[str]) -> Table:
        table = Table(
            title=self.title, title_justify="left", expand=False, caption=self.note, caption_justify="left"
        )
        table.add_column("trial", no_wrap=True)
        table.add_column("choice", min_width=12, overflow="fold")
        for name in columns:
            title = find_title(name)
            widest = max(8, *map(len, title.split()))
            table.add_column(title, justify="right", min_width=widest, overflow="fold")
        for name, text, rewards in self.rows:
            table.add_row(name, text, *(format_reward(key, rewards) for key in columns))
        return table


def make_importance_table(effects: Sequence[Effect], name: str) -> Table:
    """What each change does to each objective; what can be told from nothing (beyond two standard errors) has
    a *."""
    title, note = f"{name}: what drives which reward", "* beyond two standard errors"
    table = Table(title=title, title_justify="left", caption=note, caption_justify="left")
    table.add_column("change", overflow="fold")
    for objective in effects[0].effects if effects else ():
        table.add_column(find_title(objective), justify="right", overflow="fold")
    table.add_column("choices", justify="right")
    for effect in effects:
        cells = [_format_effect(value) for value in effect.effects.values()]
        table.add_row(effect.label, *cells, str(effect.n_choices))
    return table


def _format_effect(value: Estimate) -> Text:
    mark = "*" if _is_clear(value) else " "
    return Text(f"{value:+.3g} ± {value.error or 0:.2g} {mark}", style="bold" if mark == "*" else "")


def _is_clear(value: Estimate) -> bool:
    return abs(value.value) > 2 * (value.error or 0)


def describe_clear_effects(effects: Sequence[Effect], file: str, records: Sequence[Record]) -> str:
    """How many effects are lost in their errors, which fall with the root of the number of trials, and the
    command that halves these; empty where none is."""
    every = [value for effect in effects for value in effect.effects.values()]
    n_clear = sum(map(_is_clear, every))
    if n_clear == len(every):
        return ""
    # What they are learnt from, measurements of a fine-tuning at other settings included; --trials counts
    # fine-tunings that are sampled.
    n_ended = sum(record.state in ("COMPLETE", "PRUNED") and not record.is_outside for record in records)
    n_sampled = sum(record.fills_place for record in records)
    return (
        f"{n_clear} of {len(every)} effects are clear after {n_ended} trials; four times as many about "
        f"halve the errors: memcontrol search {file} --trials {4 * n_sampled}"
    )


def make_study_table(
    records: Sequence[Record],
    n_groups: int,
    title: str,
    picked: Record | None = None,
    among: Sequence[Record] | None = None,
    limits: Sequence[Limit] = (),
) -> RewardsTable:
    """The finished trials of `records`: those on the front (of `among`, or of themselves) marked with *,
    those that are on or off it within error only with = beside, the pick with >, with + those measured again,
    and with ! those that keep not all `limits`."""
    complete = sorted((record for record in records if record.finished), key=lambda record: record.losses)
    others = [record for record in among or complete if record.finished]
    front = {record.number for record in select_front(others)}
    ties = {record.number for record in select_ties(others)}
    rows = [
        (
            _mark_trial(
                record,
                picked is not None and record.number == picked.number,
                record.number in front,
                record.number in ties,
            )
            + ("" if keeps_limits(record, limits) else " !"),
            describe_choice(record.chosen, n_groups),
            record.rewards,
        )
        for record in complete
    ]
    note = "* on the front, = on it (*=) or off it within error only, + measured again over fresh draws"
    if picked:
        note += ", > the pick"
    if limits:
        note += f", ! not within {', '.join(map(str, limits))} (rewards.limits)"
    return RewardsTable(rows, title, list(complete[0].objectives) if complete else (), note)


def _mark_trial(record: Record, is_picked: bool, is_on_front: bool, is_tied: bool) -> str:
    """Such as ">*=+12 all": the pick, on the front, but for its error, measured again, trial 12, the anchor
    `all`. Each mark has its own place."""
    name = f"{record.number} {record.anchor}" if record.anchor else str(record.number)
    marks = ((is_picked, ">"), (is_on_front, "*"), (is_tied, "="), (bool(record.confirmed), "+"))
    return "".join(mark if holds else " " for holds, mark in marks) + name


def describe_gains(full: dict[str, float], picked: dict[str, float], apart: dict[str, Estimate]) -> list[str]:
    """A line each: FID, memorization distance, copy rate and membership of full fine-tuning against the
    chosen mask, and their difference."""
    names = {
        "fid": "FID",
        "utility": "utility (AUROC; 0.5: chance)",
        "memorization": "memorization distance",
        "copy_rate": "copy rate",
        "membership_auc": "membership AUC (0.5: nothing is told)",
    }
    return [
        f"{title}: {format_reward(key, full)} with full fine-tuning, {format_reward(key, picked)} "
        f"with the chosen mask{_describe_difference(key, apart)}"
        for key, title in names.items()
        if key in full and key in picked
    ]


def _describe_difference(name: str, apart: dict[str, Estimate]) -> str:
    """ "; difference -4.2 (-5.3 to -3.1), paired over prompts", and whether it is one."""
    if name not in apart:
        return ""
    value = apart[name]
    difference, interval = _format_difference(name, value)
    return f"; difference {difference} ({interval}{', a tie' if value.holds_zero else ''})"


def _format_difference(name: str, value: Estimate) -> tuple[str, str]:
    """The difference and its interval, signed, in the form of the reward."""
    form = REWARDS[name].form.replace(":", ":+") if name in REWARDS else "{:+.3f}"
    return form.format(value), f"{form.format(value.low)} to {form.format(value.high)}"


def make_differences_table(
    apart: dict[str, Estimate], first: dict[str, float], second: dict[str, float], title: str
) -> Table:
    """A row for each reward: both runs' values, the difference, its interval, and which run is better beyond
    it."""
    table = Table(title=title, title_justify="left", expand=False)
    for heading in ("reward", "first", "second", "first - second", "95 %, paired over prompts", "better"):
        table.add_column(heading, overflow="fold")
    for name, value in apart.items():
        both = format_reward(name, first), format_reward(name, second)
        table.add_row(find_title(name), *both, *_format_difference(name, value), _name_better(name, value))
    return table


def _name_better(name: str, value: Estimate) -> str:
    """Which run is, by the difference of the first from the second."""
    if value.holds_zero:
        return "tie"
    is_first = (value.value < 0) == (find_direction(name) == MINIMIZE)
    return "first" if is_first else "second"


class RewardList:
    """Every reward: its name in a study file, direction, interval, cost, meaning; * for those that can be
    objectives. On a narrow terminal less, so that it can be read."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = ["better", "interval", "cost", "meaning"]
        note = "* can be an objective"
        if options.max_width < _READABLE:
            names = ["better", "meaning"]
            note += "; interval and cost of each: a wider terminal, or --json"
        table = Table(expand=False, caption=note, caption_justify="left")
        table.add_column("name", no_wrap=True)  # it is typed
        for name in names:
            table.add_column(name, overflow="fold")
        for name, reward in REWARDS.items():
            told = {
                "better": reward.direction,
                "interval": reward.interval,
                "cost": reward.cost,
                "meaning": reward.meaning,
            }
            mark = "*" if reward.objective else " "
            table.add_row(f"{mark} {name}", *(told[column] for column in names))
        yield table


def describe_rank_agreement(records: Sequence[Record]) -> str:
    """How well the loss gap, which needs no sampling, ranks the trials as memorization does; empty for fewer
    than N_RANKED trials."""
    pairs = [
        (record.searched["loss_gap"], record.searched["memorization"])
        for record in records
        if record.finished and "loss_gap" in record.searched
    ]
    if len(pairs) < _N_RANKED:
        return ""
    found = spearman(*zip(*pairs))
    return (
        f"over {len(pairs)} trials the loss gap, which needs no sampling, ranks as memorization "
        f"does with a Spearman correlation of {found:.2f} ({found.low:.2f} to {found.high:.2f})"
    )


def describe_spread(records: Sequence[Record]) -> str:
    """How far fine-tunings of the same choice lie apart; empty where none was repeated."""
    spread = estimate_spread(records)
    if spread is None:
        return ""
    n = sum(len(record.replicates) for record in records)
    root = math.sqrt(2 * n)  # by which the standard error of a normal standard deviation is smaller
    parts = [
        f"{find_title(name)} {value:.3g} ± {value / root:.2g}"
        for name, value in zip(records[0].objectives, spread)
    ]
    said = f"standard deviation between fine-tunings of the same choice ({n} more on the front)"
    return f"{said}: {', '.join(parts)}"
