"""Owns how anchors and sampled masks look wherever the front is drawn: their names, and colours that
colour-blind people tell apart (Okabe and Ito's)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class _Mark:
    """`symbol` is plotly's, `marker` matplotlib's, `shape` in SVG around 0, 0."""

    title: str
    colour: str
    symbol: str
    marker: str
    shape: str


SAMPLED = "sampled"
MARKS = {
    SAMPLED: _Mark("sampled mask", "#0072B2", "circle", "o", '<circle r="5"/>'),
    "none": _Mark("no training", "#7f7f7f", "square", "s", '<rect x="-5" y="-5" width="10" height="10"/>'),
    "all": _Mark("plain PEFT (all)", "#E69F00", "triangle-up", "^", '<path d="M0 -7 6 5 -6 5Z"/>'),
    "full": _Mark("full fine-tuning", "#D55E00", "diamond", "D", '<path d="M0 -7 7 0 0 7 -7 0Z"/>'),
}
PICK = "#009E73"
