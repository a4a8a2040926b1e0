"""The commands of the pages that fine-tune, where the README's test does not run them: searches, on any
images; and the gallery's, recorded anew.

`python -m pytest tests/nightly/pages.py`
"""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run
from test_docs import AT_NIGHT, find_fenced
from test_readme import PAGES, ROOT, name_page, with_small_budget


def list_searches(page):
    return [command for kind, command in find_fenced(page) if kind == "sh" and command.startswith(AT_NIGHT)]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if list_searches(page) and page.name != "gallery.md"], ids=name_page
)
def test_every_search_of_a_page_runs_in_its_order(page, tmp_path, photographs):
    photographs(40, "images/xrays")
    run("init", "images/xrays", cwd=tmp_path, check=True)
    with_small_budget(tmp_path / "xrays.yaml", executor="local")
    for command in list_searches(page):
        done = run(*shlex.split(command, comments=True)[1:], cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_the_gallery_can_be_recorded_anew(tmp_path):
    """Elsewhere: the pictures of the repository stay."""
    for path in ("docs/gallery.md", "docs/record.py"):
        there = tmp_path / path
        there.parent.mkdir(exist_ok=True)
        there.write_text((ROOT / path).read_text())
    subprocess.run([sys.executable, tmp_path / "docs/record.py", "terminal"], check=True)
    made = {path.name for path in Path(tmp_path, "docs/gallery").iterdir()}
    assert made == {path.name for path in (ROOT / "docs/gallery").glob("*.svg")}
