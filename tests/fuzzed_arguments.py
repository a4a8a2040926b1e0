"""Command lines whose strings are drawn at random, run in this process: a result, or one clear line."""

import argparse
import contextlib
import io
import os
import random
import sys

from memcontrol.cli import main
from memcontrol.cli.parser import make_parser

PIECES = (
    *("[", "]", "[/", "[/y]", "[red]", "{", "}", "{0}", "%s", "%(prog)s", "'", '"', "`", "\\", "\n", "\r\n"),
    *(
        "\t",
        "\x1b[31m",
        "\x07",
        "\udcff",
        "\udc80\udcfe",
        "é",
        "日本",
        "\u202e",
        " ",
        "  ",
        "=",
        "+",
        "-",
        "--",
    ),
    *(
        "@",
        "#",
        "&a",
        "*a",
        "!!python/object",
        ": ",
        "- ",
        "~",
        "/",
        "//",
        "..",
        ".",
        "a",
        "0",
        "-1",
        "1e999",
    ),
    *(
        "nan",
        "null",
        "tiny",
        "digits",
        "hf://",
        "://",
        "://u:p@",
        "?",
        "$HOME",
        ";",
        "|",
        "x" * 300,
        "x" * 5000,
    ),
)
WHOLE = (
    "",
    " ",
    "-",
    "--",
    "--help=",
    "-x",
    "[" * 60,
    "{a: " * 60,
    "9" * 5000,
    "2001-99-99",
    "&a [*a]",
    "..",
)
LASTING = (
    "completion",
    "demo",
    "dashboard",
)  # what runs on, whatever it is given; asked with an option too much


def draw_text(rng):
    if rng.random() < 0.2:
        return rng.choice(WHOLE)
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 5)))


def list_commands():
    """Each command's name, with the numbers of its positional arguments and its options that take a value."""
    (subparsers,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, parser in subparsers.choices.items():
        taking = [
            action for action in parser._actions if action.nargs != 0 and action.help != argparse.SUPPRESS
        ]
        positional = [action for action in taking if not action.option_strings]
        yield name, len(positional), [action.option_strings[-1] for action in taking if action.option_strings]


def draw_words(rng, study):
    """A command line; some name a study that is there, so that what follows is looked at."""
    name, n, options = rng.choice(list(list_commands()))
    words = [draw_text(rng) for _ in range(n)]
    if n and rng.random() < 0.4:
        words[0] = str(study)
    if name == "spaces":
        words = [rng.choice(("show", "check")), draw_text(rng)]
        options = ["--base"]
    for option in rng.sample(options, min(len(options), rng.randint(0, 2))):
        words += [option, draw_text(rng)]
    if name == "search":
        words = [
            words[0],
            *(f"{draw_text(rng)}={draw_text(rng)}" for _ in range(rng.randint(1, 2))),
            *words[1:],
        ]
    return [name, *words, *(["--no-such"] if name in LASTING else [])]


def run_case(seed, folder):
    """What is wrong with how the case ends, in ASCII; empty where nothing is."""
    rng = random.Random(seed)
    study = folder / "a [v2][" / "s.yaml"
    study.parent.mkdir(exist_ok=True)
    study.write_text("name: s\ndata: digits\nspace: digits\nbase: tiny\n")
    words = draw_words(rng, study)
    out, said = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace") for _ in range(2))
    before = sys.argv, os.getcwd()
    sys.argv = ["memcontrol", *words]
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            code = main()
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        return ascii(f"{words}: {type(error).__name__}: {error}")
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
    said.flush()
    text = said.buffer.getvalue().decode("utf-8", "backslashreplace")
    lines = [line for line in text.split("\n") if line and not line.startswith("warning: ")]
    if code not in (0, 1, 2) or "Traceback" in text:
        return ascii(f"{words}: {code}: {text}")
    if code and not (lines and lines[-1].startswith("memcontrol") and len(lines[-1]) > 20):
        return ascii(f"{words}: {code}: {text}")
    if code and len([line for line in lines if line.startswith("memcontrol")]) != 1:
        return ascii(f"{words}: {code}: {text}")
    return ""
