"""Owns the audit's page: audit.html and audit.json."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from memcontrol.core.files import replace_file, write_json
from memcontrol.core.reward_table import REWARDS, format_reward

N_SHOWN = 24


def write_audit(found: dict, pairs: Iterable[tuple[np.ndarray, np.ndarray]], out: Path) -> None:
    """Writes out/audit.json and the self-contained out/audit.html; `pairs` are the generated and the training
    image, uint8 [3, H, W], of each of the first copies."""
    cards = "".join(render_pair(one, *pair) for one, pair in zip(found["copies"], pairs))
    write_json(out / "audit.json", found)
    with replace_file(out / "audit.html") as part:
        part.write_text(render_audit(found, cards), encoding="utf-8")


def render_pair(one: dict, generated: np.ndarray, training: np.ndarray) -> str:
    mark = "copy" if one["copy"] else "like"
    return (
        f'<figure class="{mark}"><img src="{encode_png(generated)}" alt="generated"><img '
        f'src="{encode_png(training)}" alt="training">'
        f"<figcaption>{html.escape(one['generated'])}<br>{html.escape(one['training'])}<br>"
        f"distance {one['distance']:.2f}, {one['of_holdout']:.2f} of held out</figcaption></figure>"
    )


def encode_png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


AUDIT_REWARDS = (
    "clear_copy_rate",
    "copy_rate",
    "copy_rate_features",
    "memorization_pixels",
    "memorization_features",
    "amd_train",
    "amd_holdout",
    "amd_holdout_train",
    "mq",
    "carlini_rate",
    "authpct",
    "authpct_holdout",
    "extraction_component",
    "extraction_component_holdout",
    "extraction_clique",
    "extraction_clique_holdout",
    "fid",
    "kid",
    "recall",
)


AUDIT_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #c22; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.verdict { font-size: 1.15rem; border-left: 4px solid var(--line); padding-left: .8rem; }
table { border-collapse: collapse; width: 100%; } td, th { border-bottom: 1px solid var(--line); padding: .3rem .6rem .3rem 0; text-align: left; vertical-align: top; }
.pairs { display: flex; flex-wrap: wrap; gap: .8rem; } figure { margin: 0; width: 10.5rem; font-size: .75rem; overflow-wrap: anywhere; }
figure img { width: 5rem; image-rendering: pixelated; margin-right: 2px; } .copy img { outline: 2px solid var(--bad); outline-offset: -2px; }
@media print { figure { break-inside: avoid; } }
"""


def render_audit(found: dict, cards: str) -> str:
    rewards, sizes = found["rewards"], ", ".join(f"{n:,} {title}" for title, n in found["sizes"].items())
    rows = "".join(
        f"<tr><td>{REWARDS[name].title}</td><td>{format_reward(name, rewards)}</td><td>{REWARDS[name].meaning}</td></tr>"
        for name in AUDIT_REWARDS
        if name in rewards
    )
    twins = "".join(
        f"<li>{html.escape(a)} and {html.escape(b)}</li>"
        for a, b in (pair["images"] for pair in found["duplicates"])
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Audit of copying</title><style>{AUDIT_STYLE}</style></head><body>
<h1>Audit of copying</h1><p class="verdict">{html.escape(found["verdict"])}</p>
<p>{sizes} images, brought to {found["side"]} x {found["side"]} pixels; features by {html.escape(found["extractor"])}.</p>
<h2>Figures</h2><table><tr><th>figure</th><th>value (95 %)</th><th>meaning</th></tr>{rows}</table>
<h2>Most suspicious images beside their nearest training images</h2><p>Framed in red: nearer than 99 % of real images are.</p><div class="pairs">{cards}</div>
<h2>Training images that are nearly the same</h2>{f"<ul>{twins}</ul>" if twins else "<p>None were found.</p>"}
<h2>What this cannot see</h2><ul>{"".join(f"<li>{html.escape(line)}</li>" for line in found["cannot_see"])}</ul>
</body></html>
"""
