"""Owns the site: which of the repository's pages it has, each at its place, and the order that one reads in.

`make docs` builds it into build/site with Sphinx, which reads the names in this file.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from memcontrol.core.version import __version__

_ROOT = Path(__file__).parent.parent
_NAVIGATION = {
    "Begin": ["docs/tutorial", "docs/gallery"],
    "Your study": [
        "docs/study-file",
        "docs/searching",
        "docs/inner-loop",
        "docs/rewards",
        "docs/methods-and-models",
        "search_spaces/README",
        "docs/memory",
        "docs/cluster",
        "storage/README",
    ],
    "A model that is there": ["docs/audit"],
    "Reference": ["docs/cli", "docs/python-api"],
    "How it is made": [
        "docs/architecture",
        "docs/comparison",
        "benchmarks/README",
        "benchmarks/evidence/README",
        "CONTRIBUTING",
        "CHANGELOG",
    ],
}

project = "MemControl"
version = release = __version__
root_doc = "README"  # as index.html too
extensions = ["myst_parser"]
# A page that is here but not above is a warning. Other folders are not even looked into: they may be large.
include_patterns = ["*.md", "docs/*.md", "*/README.md", "benchmarks/evidence/README.md"]
exclude_patterns = [
    path.name
    for path in _ROOT.iterdir()
    if path.is_dir() and path.name not in {"docs", "search_spaces", "storage", "benchmarks"}
]
myst_heading_anchors = 4  # named as a forge names them
html_theme = "furo"
html_title = f"MemControl {version}"
html_theme_options = {"top_of_page_buttons": []}
html_copy_source = html_show_copyright = False


def setup(app) -> None:
    app.connect("source-read", _add_navigation)
    app.connect("html-page-context", _open_files)
    app.connect("build-finished", _copy_front_page)


def _add_navigation(app, name: str, source: list[str]) -> None:
    """The README is the front page, and the forge's too, which would show a table of contents as code."""
    if name == root_doc:
        source[0] += "".join(_write_contents(title, pages) for title, pages in _NAVIGATION.items())


def _write_contents(title: str, pages: list[str]) -> str:
    return "\n".join(["", "```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```", ""])


def _open_files(app, name: str, template: str, context: dict, doctree) -> None:
    """A link to a file (a report, a licence) shows it, where Sphinx would have it saved."""
    if "body" in context:
        context["body"] = context["body"].replace(' download=""', "")


def _copy_front_page(app, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))
