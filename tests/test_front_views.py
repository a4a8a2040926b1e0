"""The front's drawings in PNG, SVG and of plotly against values worked out by hand, for studies written by
hand; and its tables, in Markdown and HTML."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from html import unescape

import numpy as np
import pytest
from PIL import Image

from memcontrol.core.choice import Choice
from memcontrol.core.estimate import Estimate
from memcontrol.core.reward_table import Objective
from memcontrol.dashboard.note_text import write_standings
from memcontrol.search.importance import Effect
from memcontrol.study.record import Record
from memcontrol.view.front_data import list_standings, make_axis, make_front_data, mark_trials
from memcontrol.view.front_plotly import plot_front
from memcontrol.view.front_png import draw_front, draw_front_png
from memcontrol.view.front_svg import draw_front_svg
from memcontrol.view.report_results import render_drivers, render_standings
from memcontrol.view.tables import make_importance_table

N_GROUPS = 4
CHOICES = {
    "none": Choice((), "none", 0.0),
    "all": Choice(("a", "b", "c", "d"), "lora", 1e-3, 4),
    "full": Choice(("*",), "full", 1e-4),
    None: Choice(("a", "b"), "bias", 1e-3),
}


@dataclass
class Study:
    """Trials written by hand, and what a drawing of them must show. `points`: by trial, x and y; `intervals`:
    by trial, x's and y's; `told`: the trials whose intervals are drawn in every drawing; `front`: best in x
    first."""

    objectives: dict
    anchors: dict
    points: dict
    rewards: dict
    intervals: dict
    front: list
    told: set
    pick: int
    x_title: str
    y_title: str
    is_log: tuple

    @property
    def records(self):
        return [
            Record(
                number,
                "COMPLETE",
                (CHOICES[self.anchors.get(number)],),
                self.anchors.get(number),
                CHOICES[self.anchors.get(number)],
                self.objectives,
                self.rewards[number],
            )
            for number in self.points
        ]

    @property
    def data(self):
        records = self.records
        return make_front_data(mark_trials(records, records[self.pick], N_GROUPS), self.objectives)


# A standard error reaches 1.96 times as far on both sides; where an interval was measured, it is as it is.
LOGARITHMIC = Study(
    objectives={"fid": "minimize", "memorization": "minimize"},
    anchors={0: "none", 1: "all", 2: "full"},
    points={0: (100, 0.02), 1: (40, 0.15), 2: (20, 0.5), 3: (30, 0.2), 4: (60, 0.3)},
    rewards={
        0: {"fid": 100, "fid_error": 5, "memorization": 0.02},
        1: {"fid": 40, "fid_error": 2, "memorization": 0.15, "memorization_error": 0.05},
        2: {
            "fid": 20,
            "fid_error": 1,
            "memorization": 0.5,
            "memorization_low": 0.4,
            "memorization_high": 0.7,
        },
        3: {"fid": 30, "fid_error": 1, "memorization": 0.2, "memorization_error": 0.05},
        4: {"fid": 60, "fid_error": 10, "memorization": 0.3, "memorization_error": 0.1},
    },
    intervals={
        0: ((90.2, 109.8), (0.02, 0.02)),
        1: ((36.08, 43.92), (0.052, 0.248)),
        2: ((18.04, 21.96), (0.4, 0.7)),
        3: ((28.04, 31.96), (0.102, 0.298)),
        4: ((40.4, 79.6), (0.104, 0.496)),
    },
    front=[2, 3, 1, 0],
    told={0, 1, 2, 3},
    pick=3,
    x_title="FID (lower is better)",
    y_title="memorization (lower is better)",
    is_log=(True, True),
)
MAXIMISED = Study(
    objectives={"coverage": "maximize", "fid": "minimize"},
    anchors={0: "none", 1: "all", 2: "full"},
    points={0: (0.5, 30), 1: (0.6, 28), 2: (0.8, 40), 3: (0.7, 35), 4: (0.55, 45)},
    rewards={
        0: {"coverage": 0.5, "coverage_low": 0.4, "coverage_high": 0.65, "fid": 30, "fid_error": 1},
        1: {"coverage": 0.6, "fid": 28, "fid_error": 1},
        2: {"coverage": 0.8, "coverage_error": 0.05, "fid": 40, "fid_error": 2},
        3: {"coverage": 0.7, "coverage_error": 0.05, "fid": 35},
        4: {"coverage": 0.55, "coverage_error": 0.01, "fid": 45, "fid_error": 1},
    },
    intervals={
        0: ((0.4, 0.65), (28.04, 31.96)),
        1: ((0.6, 0.6), (26.04, 29.96)),
        2: ((0.702, 0.898), (36.08, 43.92)),
        3: ((0.602, 0.798), (35, 35)),
        4: ((0.5304, 0.5696), (43.04, 46.96)),
    },
    front=[2, 3, 1],
    told={0, 1, 2, 3},
    pick=3,
    x_title="coverage (higher is better)",
    y_title="FID (lower is better)",
    is_log=(False, False),
)


@dataclass
class Drawing:
    """What was read from a drawing: points and pick as (x, y), intervals as (x, y, low, high of x, low, high
    of y), the front as the points that its line joins."""

    points: list
    intervals: list
    front: list
    pick: tuple
    titles: tuple
    is_log_x: bool


def read_png(data):
    from matplotlib import collections, pyplot

    figure, axes = pyplot.subplots()
    draw_front(axes, data, "title")
    scattered = {
        one.get_label(): one.get_offsets().tolist()
        for one in axes.collections
        if isinstance(one, collections.PathCollection)
    }
    pick = scattered.pop("pick")[0]
    flat, upright = (
        one.get_segments() for one in axes.collections if isinstance(one, collections.LineCollection)
    )
    intervals = [
        (v[0][0], h[0][1], h[0][0], h[1][0], v[0][1], v[1][1]) for h, v in zip(flat, upright, strict=True)
    ]
    (line,) = [line for line in axes.lines if line.get_label() == "front"]
    assert line.get_drawstyle() == "steps-post"  # first as far as the next point's x
    titles, is_log = (axes.get_xlabel(), axes.get_ylabel()), axes.get_xscale() == "log"
    assert is_log == (", logarithmic)" in titles[0]) and ", logarithmic)" not in titles[1]
    assert "95 % intervals" in [text.get_text() for text in axes.get_legend().get_texts()]
    numbers = {text.get_text() for text in axes.texts}
    assert numbers == {str(point.trial) for point in data.points}
    pyplot.close(figure)
    points = [tuple(point) for points in scattered.values() for point in points]
    titles = tuple(title.replace(", logarithmic", "") for title in titles)
    return Drawing(points, intervals, line.get_xydata().tolist(), tuple(pick), titles, is_log)


def read_plotly(data):
    figure = plot_front(data, "title")
    traces = {trace.name: trace for trace in figure.data}
    front, pick = traces.pop("front"), traces.pop("pick")
    assert front.line.shape == "hv"
    points, intervals = [], []
    for trace in traces.values():
        points += zip(trace.x, trace.y)
        for i, (x, y) in enumerate(zip(trace.x, trace.y)):
            across, up = trace.error_x, trace.error_y
            ends = (x - across.arrayminus[i], x + across.array[i], y - up.arrayminus[i], y + up.array[i])
            intervals.append((x, y, *ends))
    titles = figure.layout.xaxis.title.text, figure.layout.yaxis.title.text
    is_log = figure.layout.xaxis.type == "log"
    return Drawing(points, intervals, list(zip(front.x, front.y)), (pick.x[0], pick.y[0]), titles, is_log)


def read_svg(data):
    """In the units of its axes, which are read from their ticks."""
    text = draw_front_svg(data)
    root = ElementTree.fromstring(text)
    named = "{http://www.w3.org/2000/svg}"
    labels = [element for element in root.iter(f"{named}text") if element.get("class") != "number"]
    titles = [label.text for label in labels[-2:]]
    is_log = ["logarithmic" in title for title in titles]
    ticks = [element for element in root.iter(f"{named}line") if element.get("class") == "tick"]
    places = {"x": [], "y": []}
    for tick, label in zip(ticks, labels):
        axis = "x" if tick.get("x1") == tick.get("x2") else "y"
        places[axis].append((float(tick.get(f"{axis}1")), float(label.text)))
    read_x, read_y = (make_reader(places[axis], log) for axis, log in zip("xy", is_log))
    points = [numbers(g.get("transform")) for g in root.iter(f"{named}g")]
    bars = [numbers(path.get("d")) for path in root.iter(f"{named}path") if path.get("class") == "error"]
    ring = next(one for one in root.iter(f"{named}circle") if one.get("class") == "pick")
    (line,) = [path.get("d") for path in root.iter(f"{named}path") if path.get("class") == "front"]
    steps = numbers(line)
    assert re.fullmatch(r"M[\d.]+ [\d.]+(H[\d.]+V[\d.]+)*", line)  # first as far as the next point's x
    return Drawing(
        points=[(read_x(x), read_y(y)) for x, y in points],
        intervals=[
            (read_x(x), read_y(y), read_x(left), read_x(right), read_y(low), read_y(high))
            for left, y, right, x, low, high in bars
        ],
        front=[(read_x(x), read_y(y)) for x, y in zip(steps[::2], steps[1::2])],
        pick=(read_x(float(ring.get("cx"))), read_y(float(ring.get("cy")))),
        titles=tuple(title.replace(", logarithmic", "") for title in titles),
        is_log_x=is_log[0],
    )


def numbers(text):
    return [float(number) for number in re.findall(r"[\d.]+", text)]


def make_reader(ticks, is_log):
    """From pixels to values, by the line through the ticks."""
    pixels, values = np.array(ticks).T
    slope, start = np.polyfit(pixels, np.log(values) if is_log else values, 1)
    return lambda pixel: float(np.exp(start + slope * pixel) if is_log else start + slope * pixel)


def assert_same_rows(rows, expected, tolerance):
    assert np.array(sorted(rows)) == pytest.approx(np.array(sorted(expected)), rel=tolerance)


# the SVG's places are rounded to a tenth of a pixel
READERS = {"png": (read_png, 1e-9), "plotly": (read_plotly, 1e-9), "svg": (read_svg, 3e-3)}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("study", [LOGARITHMIC, MAXIMISED], ids=["logarithmic", "maximised"])
def test_each_drawing_shows_points_intervals_front_and_pick(study, reader):
    read, tolerance = READERS[reader]
    drawing = read(study.data)
    assert_same_rows(drawing.points, study.points.values(), tolerance)
    assert drawing.pick == pytest.approx(study.points[study.pick], rel=tolerance)
    assert np.array(drawing.front) == pytest.approx(
        np.array([study.points[number] for number in study.front]), rel=tolerance
    )
    shown = study.points if reader == "plotly" else study.told  # who points at one there sees its interval
    expected = [(*study.points[number], *np.ravel(study.intervals[number])) for number in shown]
    assert_same_rows(drawing.intervals, expected, tolerance)
    assert drawing.titles == (study.x_title, study.y_title)


@pytest.mark.parametrize("study", [LOGARITHMIC, MAXIMISED], ids=["logarithmic", "maximised"])
def test_the_pictures_agree_on_the_logarithmic_axis(study):
    data = study.data
    assert (data.x_axis.is_log, data.y_axis.is_log) == study.is_log
    assert read_png(data).is_log_x == read_svg(data).is_log_x == study.is_log[0]
    assert not read_plotly(data).is_log_x  # one zooms into that one


@pytest.mark.parametrize(
    ("values", "is_log"),
    [((10, 30), False), ((10, 30.1), True), ((0, 5), False), ((-1, 5), False), ((2, 2), False)],
)
def test_an_axis_is_logarithmic_where_values_span_over_three_times_the_smallest(values, is_log):
    assert make_axis(Objective("fid", "minimize"), values).is_log == is_log


@pytest.mark.parametrize("study", [LOGARITHMIC, MAXIMISED], ids=["logarithmic", "maximised"])
def test_the_front_line_goes_where_trials_reach(study):
    """At each corner, some trial is at least as good in both objectives: by comparing with every one."""
    signs = np.array([-1 if way == "maximize" else 1 for way in study.objectives.values()])
    front = [study.points[number] for number in study.front]
    corners = [(after[0], before[1]) for before, after in zip(front, front[1:])]
    for drawing in (read_png(study.data), read_plotly(study.data), read_svg(study.data)):
        drawn = [(after[0], before[1]) for before, after in zip(drawing.front, drawing.front[1:])]
        assert np.array(drawn) == pytest.approx(np.array(corners), rel=3e-3)
    for corner in corners:
        losses = signs * np.array(list(study.points.values()))
        assert (losses <= signs * corner).all(1).any()


def test_the_svg_names_trials_and_keeps_what_others_beat_pale():
    root = ElementTree.fromstring(draw_front_svg(LOGARITHMIC.data))
    shown = {int(g.get("data-trial")): g for g in root.iter("{http://www.w3.org/2000/svg}g")}
    assert {number: g.get("class") for number, g in shown.items()} == {
        0: "point none",
        1: "point all",
        2: "point full",
        3: "point sampled",
        4: "point sampled dim",
    }
    title = shown[3].find("{http://www.w3.org/2000/svg}title").text
    assert (
        title == "trial 3, the pick: bias, lr 0.001, 2/4 groups: FID 30.00 ± 1.00, memorization 0.200 ± 0.050"
    )


def test_the_png_is_written_whole(tmp_path):
    draw_front_png(LOGARITHMIC.data, tmp_path / "front.png", "title")
    assert [path.name for path in tmp_path.iterdir()] == ["front.png"]
    with Image.open(tmp_path / "front.png") as picture:
        assert picture.size == (1050, 750)  # 7 x 5 inches of 150 pixels


@pytest.mark.parametrize("study", [LOGARITHMIC, MAXIMISED], ids=["logarithmic", "maximised"])
def test_the_note_and_the_page_have_the_same_rows_in_their_tables(study):
    trials = mark_trials(study.records, study.records[study.pick], N_GROUPS)
    losses = {
        number: [
            -value if way == "maximize" else value for value, way in zip(point, study.objectives.values())
        ]
        for number, point in study.points.items()
    }
    expected = [n for n in sorted(losses, key=losses.get) if n in study.told or trials[n]["tie"]]
    assert [trial["trial"] for trial in list_standings(trials, study.objectives)] == expected
    note = [line.strip("| ").split(" | ") for line in write_standings(trials, study.objectives).split("\n")]
    page = render_standings({"trials": trials, "objectives": study.objectives, "doubt": ""})
    rows = re.findall(r'<tr class="" data-trial="\d+">(.*?)</tr>', page)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    for said, shown in zip(note[2:], cells, strict=True):
        assert said[:5] == [unescape(cell) for cell in shown[:5]]
    assert [int(row[0]) for row in cells] == expected
    assert sum("**the pick**" in row[-1] for row in note) == page.count("<b>the pick</b>") == 1


def test_a_change_is_named_alike_in_the_table_and_on_the_page():
    value = {"fid": Estimate(1.0, 0.1)}
    effects = [
        Effect("a", False, True, value, 3),
        Effect("method", "lora", "bias", value, 3),
        Effect("rank", 2, 8, value, 3),
        Effect("rate", 0.0, 1.0, value, 3),
    ]
    names = ["a on", "method: lora to bias", "rank: 2 to 8", "learning rate: lowest to highest"]
    assert list(make_importance_table(effects, "s").columns[0].cells) == names
    page = render_drivers(
        {"objectives": {"fid": "minimize"}, "importance": [effect.as_dict() for effect in effects]}
    )
    assert re.findall(r'<tr class=""><td>(.*?)</td>', page) == names


def test_line_of_three_objectives_steps_along_the_two_that_are_drawn():
    """Trials 1 and 3 are on the front by their third objective alone."""
    objectives = {"fid": "minimize", "recall": "maximize", "memorization": "minimize"}
    values = {0: (20, 0.5, 0.4), 1: (30, 0.4, 0.1), 2: (40, 0.7, 0.4), 3: (50, 0.6, 0.0), 4: (60, 0.5, 0.5)}
    records = [
        Record(n, "COMPLETE", (CHOICES[None],), None, CHOICES[None], objectives, dict(zip(objectives, found)))
        for n, found in values.items()
    ]
    data = make_front_data(mark_trials(records, None, N_GROUPS), objectives)
    assert [point.trial for point in data.points if point.is_on_front] == [0, 1, 2, 3]
    assert [point.trial for point in data.front] == [0, 2]
