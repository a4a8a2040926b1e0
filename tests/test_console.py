"""How much is said and where: the console, JSON, and a search's log file."""

import io
import json
import os

import pytest
from rich.console import Console

from memcontrol.core import console
from memcontrol.core.console import LOG, log_to_file, make_console, print_json, say, warn
from memcontrol.core.files import write_json


@pytest.fixture
def screen():
    return Console(file=io.StringIO(), width=20, force_terminal=True)


def write(path, *lines):
    """The log file after a block that logs these."""
    with log_to_file(path, "a test"):
        for line in lines:
            LOG.info(line)
    return path.read_text().splitlines()


def test_names_that_are_no_utf8_are_logged_and_stored(tmp_path, capsys):
    name = os.fsdecode(b"bad\xff.png")  # as Python gives the byte
    assert write(tmp_path / "log.txt", name)[-2].endswith("INFO bad\\udcff.png")
    assert not capsys.readouterr().err
    write_json(tmp_path / "x.json", {"name": name, "plain": "\\udcff é"})
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"name": name, "plain": "\\udcff é"}


def test_line_is_said_as_it_is(screen):
    text = "runs/[red]a[/red] took 12.5 s and is far longer than the screen is wide"
    say(screen, text)
    assert screen.file.getvalue() == f"{text}\n"


def test_warning_begins_with_the_word(screen):
    warn(screen, "[x] is away")
    assert "warning: [x] is away" in screen.file.getvalue()


@pytest.mark.parametrize("level, is_quiet", [("quiet", True), ("normal", False), ("verbose", False)])
def test_console_is_quiet_where_the_process_is(level, is_quiet, monkeypatch, capsys):
    monkeypatch.setattr(console, "level", level)
    monkeypatch.delenv("COLUMNS", raising=False)
    made = make_console()
    assert made.quiet == is_quiet and made.width == 150  # stderr is no terminal here
    say(made, "said")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "" if is_quiet else "said\n")


def test_json_is_one_document_that_any_reader_takes(capsys):
    print_json({"name": "Röntgen", "values": [1, None]})
    text = capsys.readouterr().out
    assert json.loads(text) == {"name": "Röntgen", "values": [1, None]} and "Röntgen" in text
    with pytest.raises(ValueError):
        print_json(float("nan"))  # no JSON


def test_log_says_what_begins_and_how_it_ended_and_goes_on(tmp_path):
    path = tmp_path / "runs" / "search.log"
    lines = write(path, "one")
    assert [line.split(" INFO ")[1] for line in lines[1:]] == ["one", "ended"]
    assert " INFO memcontrol " in lines[0] and lines[0].endswith(" begins: a test")
    assert write(path, "two")[:3] == lines
    assert not LOG.handlers and LOG.propagate, "a program's own logging is as it was"


@pytest.mark.parametrize(
    "error, words", [(KeyboardInterrupt(), "ended by Ctrl-C"), (OSError("why"), "ended by OSError: why")]
)
def test_log_says_what_ended_it(tmp_path, error, words):
    with pytest.raises(type(error)), log_to_file(tmp_path / "log", "a test"):
        raise error
    assert (tmp_path / "log").read_text().splitlines()[-1].endswith(words)


def test_log_is_heard_where_verbose_with_details_and_without_warnings(tmp_path, monkeypatch, capsys):
    """Warnings are shown on the screen anyway."""
    for level, heard in (("normal", []), ("verbose", ["detail", "ended"])):
        monkeypatch.setattr(console, "level", level)
        with log_to_file(tmp_path / level, "a test"):
            LOG.debug("detail")
            LOG.warning("away")
        said = capsys.readouterr().err.splitlines()[1:]
        assert [line.split(" ", 3)[3] for line in said] == heard
        kept = [line.split(" ", 3)[3] for line in (tmp_path / level).read_text().splitlines()[1:]]
        assert kept == [*heard[:1], "away", "ended"]
