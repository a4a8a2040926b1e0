"""Owns the pieces that pages are made of: the page around them, sections, paragraphs, tables, pictures in the
text, and the style sheets and scripts that lie beside this module."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path


def read_asset(name: str) -> str:
    """The text of a style sheet or script of this package."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def render_document(title: str, style: str, body: str, policy: str = "") -> str:
    """A whole page. `policy`: what the browser may load for it (Content-Security-Policy)."""
    guard = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n' if policy else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{guard}<title>{escape(title)}</title><style>\n{style}</style></head>"
        f"<body>\n{body}\n</body></html>\n"
    )


def render_section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def render_paragraph(text: str, kind: str = "") -> str:
    """Of plain text, in which `...` is code."""
    return f"<p class={kind}>{render_code(text)}</p>" if kind else f"<p>{render_code(text)}</p>"


def render_code(text: str) -> str:
    return re.sub("`(.+?)`", r"<code>\1</code>", escape(text))


def render_table(heads: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    """`heads`: plain text; `rows`: HTML."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table class="{kind}">{table}</table></div>'


def render_row(cells: Sequence[str], trial: int | None = None, kind: str = "") -> str:
    """Of HTML; all cells but the first are kept on one line. `trial`: what the row tells of."""
    marks = f' data-trial="{trial}"' if trial is not None else ""
    first, rest = cells[0], "".join(f"<td class=n>{cell}</td>" for cell in cells[1:])
    return f'<tr class="{kind}"{marks}><td>{first}</td>{rest}</tr>'


def render_definitions(rows: Mapping[str, str]) -> str:
    """Of plain text; what is empty is left out."""
    parts = [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items() if value]
    return f"<dl>{''.join(parts)}</dl>"


def render_list(lines: Sequence[str], kind: str = "") -> str:
    """Of plain text."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul class={kind}>{items}</ul>" if kind else f"<ul>{items}</ul>"


def make_data_uri(kind: str, content: bytes) -> str:
    """Content of a media type as an address that needs no network."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
