"""The report's layout: nothing is wider than its page and no label lies on another, in Chromium and, of the
charts, by arithmetic."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest
from reported import FULL, MASK, OBJECTIVES, make_facts, make_rewards, make_study

from memcontrol.view.front_data import make_front_data
from memcontrol.view.front_labels import place_labels
from memcontrol.view.front_svg import draw_front_svg
from memcontrol.view.report import render_page

SIZES = {"as in a demo": 4, "two hundred": 200}
# names what is wider than the page, the tables that must be scrolled, and texts of charts that lie on others
# or beyond their chart
MEASURE = """() => {
  const width = document.documentElement.clientWidth, box = e => e.getBoundingClientRect();
  const wide = [...document.querySelectorAll('body *')]
    .filter(e => !e.closest('svg *') && !e.closest('.wide, pre') && box(e).right > width + 1);
  const scrolled = [...document.querySelectorAll('.wide:has(table)')]
    .filter(e => e.scrollWidth > e.clientWidth + 1);
  const apart = (a, b) => a.left >= b.right - .5 || b.left >= a.right - .5
    || a.top >= b.bottom - 1.5 || b.top >= a.bottom - 1.5;
  const over = [];
  for (const chart of document.querySelectorAll('.chart svg')) {
    const texts = [...chart.querySelectorAll('text')], field = box(chart);
    texts.forEach((one, i) => {
      const a = box(one);
      if (a.left < field.left - 1 || a.right > field.right + 1 || a.top < field.top - 1) over.push(one);
      texts.slice(i + 1).forEach(other => { if (!apart(a, box(other))) over.push(one, other) });
    });
  }
  const name = e => `${e.tagName} ${e.textContent.slice(0, 40)}`;
  return [wide.map(name), scrolled.map(e => name(e.closest('section').querySelector('h2'))),
    over.map(name), scrolled.filter(e => e.closest('.lay')).map(name)];
}"""


def make_page(n_trials):
    again = [(FULL, make_rewards(26.8, 52, 0.99, p=0.001)), (MASK, make_rewards(25.5, 1, 0.69))]
    return render_page(make_facts(make_study(n_trials), again), False)


@pytest.mark.parametrize("n_trials", SIZES.values(), ids=SIZES)
def test_nothing_is_wider_than_the_page_and_no_label_lies_on_another(chromium, tmp_path, n_trials):
    """On a phone tables behind the first page may be scrolled; from the width of the text on none is."""
    path = tmp_path / "page.html"
    path.write_text(make_page(n_trials))
    page = chromium.new_page()
    page.goto(path.as_uri())
    for width in (390, 1024, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        wide, scrolled, over, scrolled_first = page.evaluate(MEASURE)
        assert wide == over == scrolled_first == [], width
        assert width == 390 or scrolled == [], width
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 within its margins
    assert page.evaluate(MEASURE)[:3] == [[], [], []]
    page.close()


def read_texts(svg):
    """Of each text that stands upright, what box it fills: a letter no wider than 0.64 of its height."""
    for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        if text.get("transform") is None:
            size = 11 if text.get("class") == "number" else 14
            half, x, y = len(text.text) * size * 0.32, float(text.get("x")), float(text.get("y"))
            left = {"middle": x - half, "end": x - 2 * half}[text.get("text-anchor")]
            yield text.text, (left, y - 0.8 * size, left + 2 * half, y + 0.2 * size)


def overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@pytest.mark.parametrize("n_trials", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("stretch", [1, 1e4])
def test_numbers_and_ticks_of_the_front_leave_each_other_room(n_trials, stretch):
    """Where values span five powers of ten, too."""
    records = make_study(n_trials)
    for record in records[::3]:
        record.searched["memorization"] *= stretch
    trials = make_facts(records)["trials"]
    data = make_front_data(trials, OBJECTIVES)
    svg = draw_front_svg(data)
    boxes = list(read_texts(svg))
    assert [(a, b) for (a, one), (b, two) in itertools.combinations(boxes, 2) if overlap(one, two)] == []
    numbered = set(map(int, re.findall(r'class="number"[^>]*>(\d+)<', svg)))
    told = {point.trial for point in data.points if point.stands_out}
    assert numbered <= (told if n_trials > 40 else {point.trial for point in data.points})
    assert len(numbered & told) >= 0.8 * len(told)


def test_a_label_stands_beside_its_mark_and_on_no_other():
    """By distance: of points that are far from each other, each has its number within its own
    surroundings."""
    data = make_front_data(make_facts(make_study(4))["trials"], OBJECTIVES)
    places = {point.trial: (100.0 * i + 50, 60.0) for i, point in enumerate(data.points)}
    placed = place_labels(data.points, places, (0, 0, 1000, 120), 10, 5)
    assert placed.keys() == places.keys()
    for trial, label in placed.items():
        x, y = places[trial]
        assert 5 < max(abs(label.x - x), abs(label.y - y)) < 30 and not label.has_line
