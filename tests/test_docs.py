"""The pages as a site, built without a warning and walked link by link; and every command that any page
names, asked of the real parser and, where the README's test does not run it, run."""

import argparse
import contextlib
import json
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from commands import run
from simulated import Simulated, search
from test_orchestrate import study_in
from test_readme import PAGES, ROOT, name_page

from memcontrol.cli.parser import make_parser, parse_arguments
from memcontrol.commands.trials import list_rows

COMMAND = re.compile(r"(?:\$ |ExecStart=\S*/|exec )?((?:memcontrol|make) .*)")
ASIDE = {  # blocks of these kinds show no command to type
    "text",
    "python",
    "yaml",
}
AT_NIGHT = "memcontrol search"  # those of `sh` blocks: tests/nightly/pages.py
ELSEWHERE = {  # other tests run these, each with what it needs
    "memcontrol audit --model runs/": "test_readme, of the tutorial",
    "memcontrol dashboard xrays.yaml --storage": "test_database, as a role that only reads",
    "memcontrol dashboard xrays.yaml --prefix": "test_guard",
    "memcontrol stop": "test_operate, on a search that runs",
}


def find_fenced(page):
    """Each command that a page shows in a block, with the block's kind."""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.S | re.M):
        for line in block.splitlines() if kind not in ASIDE else ():
            if match := COMMAND.fullmatch(line):
                yield kind, match[1]


def find_spans(page):
    """Each command with arguments that a page's sentences name."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for span in re.findall(r"`([^`]+)`", prose):
        if match := COMMAND.fullmatch(" ".join(span.split())):
            yield match[1]


def find_target(command):
    """Fails where `make` has none of that name."""
    done = subprocess.run(["make", "--dry-run", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_the_parser_takes_every_command_of_a_page(page, monkeypatch, capsys):
    for _, command in find_fenced(page):
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            find_target(command.partition(" #")[0])
            continue
        monkeypatch.setattr(sys, "argv", words)
        try:
            parse_arguments(make_parser())
        except SystemExit:
            pytest.fail(f"{command}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_the_parser_knows_every_command_that_a_sentence_names(page):
    """Its command and its options: such a command may leave out what it needs."""
    for command in find_spans(page):
        if command.startswith("make "):
            find_target(command)
            continue
        parser = make_parser()
        for word in shlex.split(command)[1:]:
            nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
            if word == "COMMAND":  # any
                break
            if nested:
                assert word in nested[0].choices, command
                parser = nested[0].choices[word]
            elif word.startswith("-"):
                assert word.partition("=")[0] in parser._option_string_actions, command


def test_every_command_of_a_block_is_run_somewhere(tmp_path):
    """Plain blocks: test_readme. Here those of `sh` blocks that take no fine-tuning, on a study that was
    searched, or rather simulated."""
    file = study_in(tmp_path, trials=12).rename(tmp_path / "xrays.yaml")
    search(file, Simulated(2)).close()
    choice = json.loads(run("front", file, "--json", check=True).stdout)[0]["choice"]
    (tmp_path / "choice.json").write_text(json.dumps(choice | {"learning_rate": 0.00123}))
    ran = set()
    pages = [page for page in PAGES if page.name != "gallery.md"]
    shown = [command for page in pages for kind, command in find_fenced(page) if kind == "sh"]
    for command in sorted(shown, key=lambda command: command.startswith("memcontrol clean")):
        words = shlex.split(command, comments=True)[1:]
        if not command.startswith((AT_NIGHT, *ELSEWHERE)):
            done = run(*words, *["--yes"] * (words[0] == "clean"), cwd=tmp_path)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            ran.add(words[0])
    assert ran == {"importance", "fork", "enqueue", "drop", "clean"}


class Page(HTMLParser):
    """What a page of the site names: `ids` that one can go to, `links` to follow, `parts` that it loads."""

    def __init__(self, path):
        super().__init__()
        self.path, self.ids, self.links, self.parts = path, set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in {"img", "script", "link"}:
            self.parts += [given[name] for name in ("src", "href") if name in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages of the site, by file."""
    out = tmp_path_factory.mktemp("site")
    (line,) = re.findall(r"\bpython -m sphinx .*", (ROOT / "Makefile").read_text())
    words = line.replace("build/doctrees", f"{out}-doctrees").replace("build/site", str(out)).split()[1:]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "-W" in words, done.stdout + done.stderr
    return {path: Page(path) for path in out.rglob("*.html") if "_static" not in path.parts}


def test_the_gallery_shows_what_is_recorded():
    text = (ROOT / "docs/gallery.md").read_text()
    shown = set(re.findall(r"\]\(gallery/([^)]*)\)", text))
    assert shown == {path.name for path in (ROOT / "docs/gallery").iterdir()}
    for path in (ROOT / "docs/gallery").glob("*.svg"):
        said = "".join(ElementTree.parse(path).getroot().itertext()).replace("\xa0", " ")
        (command,) = re.findall(r"\$ (memcontrol .*?) *\n", said)
        assert f"```sh\n{command.rstrip()}\n```" in text, path.name


def test_every_page_is_in_the_site_and_reached_from_the_first(site):
    (out,) = [path.parent for path in site if path.name == "index.html"]
    reached, open_ = set(), [out / "index.html"]
    while open_:
        path = open_.pop()
        if path in site and path not in reached:
            reached.add(path)
            links = (unquote(urlsplit(link).path) for link in site[path].links if "://" not in link)
            open_ += [(path.parent / link).resolve() for link in links if link]
    for page in PAGES:
        assert out / page.relative_to(ROOT).with_suffix(".html") in reached, page


def test_every_link_of_the_site_leads_somewhere(site):
    for path, page in site.items():
        for link in (*page.links, *page.parts):
            parts = urlsplit(link)
            if parts.scheme == "data" or link.startswith("http") and link in page.links:
                continue
            assert not parts.scheme, f"{path.name} asks elsewhere for {link}"
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert there.is_file(), f"{path.name}: {link}"
            if parts.fragment and there in site:
                assert unquote(parts.fragment) in site[there].ids, f"{path.name}: {link}"


def test_the_columns_of_trials_are_those_that_the_tutorial_lists(tmp_path):
    file = study_in(tmp_path, trials=1, anchors=["none"], over={"inner.weight_decay": [0, 0.01]})
    with contextlib.closing(search(file, Simulated())) as study:
        names = list(list_rows(study)[0])
    page = (ROOT / "docs" / "tutorial.md").read_text().partition("### The columns of `trials`")[2]
    cells = re.findall(r"^\| (`.*?) \|", page.partition("##")[0], re.M)
    listed = re.findall(r"`([\w.]+)`", " ".join(cells))
    assert [name for name in listed if "." not in name] == [name for name in names if "." not in name]
    begun = {name.partition(".")[0] for name in listed if "." in name}
    assert begun == {name.partition(".")[0] for name in names if "." in name} | {"per_group", "confirmed"}
