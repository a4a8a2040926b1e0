"""Owns what every view of the front shows: which trials are on it, off it within error only, or picked, and
where they lie over the first two objectives. The drawings in PNG, SVG and of plotly only draw it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memcontrol.core.choice import Choice
from memcontrol.core.reward_table import (
    MAXIMIZE,
    Objective,
    format_reward,
    list_losses,
    list_objectives,
    read_interval,
)
from memcontrol.study.pick import select_front, select_ties
from memcontrol.study.record import Record
from memcontrol.view.marks import MARKS, SAMPLED
from memcontrol.view.words import describe_choice, find_prose_title, find_title

TrialData = dict[str, Any]  # a trial as `report --json` prints it
Interval = tuple[float, float]
LOG_TICKS = (1, 1.5, 2, 3, 5, 7)  # of a logarithmic axis, times the powers of ten


def mark_trials(records: Sequence[Record], picked: Record | None, n_groups: int) -> list[TrialData]:
    """Each record as data, with its choice in words (`said`), and whether it is on the `front` of the
    finished ones, on or off it within error only (`tie`), and the `pick`."""
    complete = [record for record in records if record.finished]
    front = {record.number for record in select_front(complete)}
    ties = {record.number for record in select_ties(complete)}
    return [
        record.as_dict()
        | {
            "said": describe_choice(record.choice, n_groups) if record.choice else "",
            "front": record.number in front,
            "tie": record.number in ties,
            "pick": picked is not None and record.number == picked.number,
        }
        for record in records
    ]


def list_finished(trials: Sequence[TrialData], objectives: Mapping[str, str]) -> list[TrialData]:
    """Best in the first objective first."""
    finished = [trial for trial in trials if trial["state"] == "COMPLETE"]
    return sorted(finished, key=lambda trial: list_losses(trial["values"], objectives))


def list_standings(trials: Sequence[TrialData], objectives: Mapping[str, str]) -> list[TrialData]:
    """The rows of a table of the front: the anchors, and what is on the front, or off it within error
    only."""
    finished = list_finished(trials, objectives)
    return [trial for trial in finished if trial["front"] or trial["tie"] or trial["anchor"]]


def name_standings(trials: Sequence[TrialData]) -> str:
    """What that table is headed with: `Front and anchors`, where any anchor has ended well."""
    return "Front and anchors" if any(trial["anchor"] for trial in trials) else "Front"


def name_places(trial: TrialData) -> list[str]:
    """Where it stands, as tables of the front say it."""
    words = {"front": "front", "tie": "within error"}
    return [word for key, word in words.items() if trial[key]]


def describe_trial(trial: TrialData) -> str:
    name = f", {MARKS[trial['anchor']].title}" if trial["anchor"] else ""
    pick = ", the pick" if trial["pick"] else ""
    values = ", ".join(
        f"{find_prose_title(key)} {format_reward(key, trial['rewards'])}" for key in trial["values"]
    )
    return f"trial {trial['trial']}{name}{pick}: {trial['said']}: {values}"


@dataclass(frozen=True)
class FrontAxis:
    """An objective as an axis. `better`: which way is; `is_log`: the points span so much that a logarithmic
    axis shows them better."""

    name: str
    better: str
    is_log: bool

    @property
    def title(self) -> str:
        return f"{self.name} ({self.better})"

    @property
    def full_title(self) -> str:
        """Of a drawing whose axis is logarithmic where that is better."""
        return f"{self.name} ({self.better}, logarithmic)" if self.is_log else self.title


@dataclass(frozen=True)
class FrontPoint:
    """A finished trial. `kind`: a key of MARKS; `said`: its choice in a few words; `label`: all that is told
    of it; intervals: of 95 %, low and high."""

    trial: int
    kind: str
    choice: Choice
    said: str
    label: str
    x: float
    y: float
    x_interval: Interval
    y_interval: Interval
    is_on_front: bool
    is_pick: bool

    @property
    def is_anchor(self) -> bool:
        return self.kind != SAMPLED

    @property
    def stands_out(self) -> bool:
        """Whether it is on the front or an anchor: among many points only such are drawn with intervals."""
        return self.is_on_front or self.is_anchor


@dataclass(frozen=True)
class FrontData:
    """`front`: the points on it, best in x first, of three objectives or more those that no other beats in
    the two that are drawn; a point beyond the step from one to the next none reaches."""

    points: tuple[FrontPoint, ...]
    front: tuple[FrontPoint, ...]
    x_axis: FrontAxis
    y_axis: FrontAxis

    @property
    def pick(self) -> FrontPoint | None:
        return next((point for point in self.points if point.is_pick), None)


def make_front_data(trials: Sequence[TrialData], objectives: Mapping[str, str]) -> FrontData:
    """Of finished trials, which `mark_trials` gives, over the first two objectives (name to direction)."""
    x, y = list_objectives(objectives)[:2]
    points = [_make_point(trial, x.name, y.name) for trial in trials]
    front: list[FrontPoint] = []
    for point in sorted(points, key=lambda point: (x.to_loss(point.x), y.to_loss(point.y))):
        is_beaten = bool(front) and y.to_loss(point.y) >= y.to_loss(front[-1].y)
        if point.is_on_front and (len(objectives) == 2 or not is_beaten):
            front.append(point)
    return FrontData(
        points=tuple(points),
        front=tuple(front),
        x_axis=make_axis(x, [point.x for point in points]),
        y_axis=make_axis(y, [point.y for point in points]),
    )


def _make_point(trial: TrialData, x_name: str, y_name: str) -> FrontPoint:
    return FrontPoint(
        trial=trial["trial"],
        kind=trial["anchor"] or SAMPLED,
        choice=Choice.from_dict(trial["choice"]),
        said=trial["said"],
        label=describe_trial(trial),
        x=trial["values"][x_name],
        y=trial["values"][y_name],
        x_interval=read_interval(x_name, trial["rewards"]),
        y_interval=read_interval(y_name, trial["rewards"]),
        is_on_front=trial["front"],
        is_pick=trial["pick"],
    )


def list_xy(points: Sequence[FrontPoint]) -> tuple[list[float], list[float]]:
    return [point.x for point in points], [point.y for point in points]


def measure_reaches(values: Sequence[float], intervals: Sequence[Interval]) -> list[list[float]]:
    """How far the intervals go below and above the values."""
    return [
        [value - low for value, (low, _) in zip(values, intervals)],
        [high - value for value, (_, high) in zip(values, intervals)],
    ]


def make_axis(objective: Objective, values: Sequence[float]) -> FrontAxis:
    better = "higher is better" if objective.direction == MAXIMIZE else "lower is better"
    return FrontAxis(find_title(objective.name), better, is_log=0 < 3 * min(values) < max(values))
