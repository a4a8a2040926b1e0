"""Owns the pictures of docs/gallery.md: commands as a terminal shows them, a report, and the dashboard.

    python docs/record.py terminal             run the page's commands on the page's study, picture by picture
    python docs/record.py pages STUDY.yaml     the report and the dashboard of a study, such as the demo's

The page says what is run: a block of one command, then the pictures of it. `NAME.svg` is the terminal when
the command has ended, `NAME-live.svg` the fullest screen that a display showed while it ran. The dashboard
needs Chromium and `memcontrol[test]`.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PAGE = Path(__file__).parent / "gallery.md"
_PICTURES = _PAGE.parent / "gallery"
_COLUMNS, _ROWS = 80, 50
_SHOWN = "~/studies"  # in place of the folder that the commands run in
_STUDY = "digits.yaml"  # which the page writes its only block of YAML to
_MEMCONTROL = [sys.executable, "-m", "memcontrol.cli"]
_SETTLED_MILLISECONDS = 8000  # after which a dashboard has drawn what it asked for
_CONTROL = re.compile(r"(\x1b\[[\d;?]*[A-Za-z]|\r?\n|\r)")
_FONTS = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)  # which would be fetched from elsewhere


def record_terminal(folder: Path) -> None:
    """Writes each picture of a command, having run them in the page's order in `folder`."""
    text = _PAGE.read_text(encoding="utf-8")
    (study,) = re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (folder / _STUDY).write_text(study, encoding="utf-8")
    for command, names in find_recordings(text):
        print(f"$ {command}", flush=True)
        output = run_in_terminal(shlex.split(command, comments=True)[1:], folder)
        screens = list(show_screens(output.replace(str(folder), _SHOWN)))
        for name in names:
            screen = max(screens[:-1], key=count_signs) if name.endswith("-live") else screens[-1]
            write_picture(_PICTURES / f"{name}.svg", command, screen)


def find_recordings(text: str) -> list[tuple[str, list[str]]]:
    """Of a page: each command with a picture of its own, and the names of its pictures."""
    blocks = re.split(r"^```sh\n(memcontrol .*)\n```$", text, flags=re.MULTILINE)[1:]
    pictures = (re.findall(r"\]\(gallery/([\w-]+)\.svg\)", after) for after in blocks[1::2])
    return [(command, names) for command, names in zip(blocks[::2], pictures, strict=True) if names]


def run_in_terminal(arguments: list[str], folder: Path) -> str:
    """What a command writes, escapes included, where it finds a terminal of _COLUMNS columns."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in {"COLUMNS", "NO_COLOR"}}
    process = subprocess.Popen(
        [*_MEMCONTROL, *arguments],
        cwd=folder,
        env=environment | {"TERM": "xterm-256color"},
        stdin=subprocess.DEVNULL,
        stdout=inner,
        stderr=inner,
    )
    os.close(inner)
    output = b"".join(iter(lambda: read_some(outer), b""))
    os.close(outer)
    process.wait()
    return output.decode()


def read_some(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # so Linux says that nobody holds the other end any more
        return b""


def show_screens(output: str) -> Iterator[list[str]]:
    """The lines on the terminal each time before a display wipes some of them, and at the end. Knows the
    controls that rich writes; colours are left in the lines."""
    lines, at = [""], 0
    for token in _CONTROL.split(output):
        if token.endswith("\n"):
            at += 1
            lines += [""] * (at == len(lines))
        elif token.endswith("A") and token.startswith("\x1b"):
            at = max(0, at - int(token[2:-1] or 1))
        elif token.endswith("K") and token.startswith("\x1b"):
            yield list(lines)
            lines[at] = ""
        elif token.endswith("m") or not token.startswith(("\x1b", "\r")):
            lines[at] += token
    yield lines


def count_signs(screen: list[str]) -> int:
    return sum(len(_CONTROL.sub("", line)) for line in screen)


def write_picture(path: Path, command: str, screen: list[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), color_system="truecolor")
    console.print(Text(f"$ {command}", style="bold"))
    console.print(Text.from_ansi("\n".join(screen).rstrip()))
    path.parent.mkdir(exist_ok=True)
    svg = console.export_svg(title="", unique_id=path.stem)
    path.write_text(_FONTS.sub("", svg), encoding="utf-8")


def record_pages(study: Path) -> None:
    """Writes the study's report, and pictures of its dashboard: of the study, its note and the pick."""
    _PICTURES.mkdir(exist_ok=True)
    report = _PICTURES / "report.html"
    subprocess.run([*_MEMCONTROL, "report", study, report], check=True)
    report.chmod(0o644)  # of digits that anyone has
    picked = subprocess.run([*_MEMCONTROL, "pick", study, "--json"], check=True, stdout=subprocess.PIPE)
    number = json.loads(picked.stdout)["trial"]
    views = {"dashboard": "", "dashboard-note": "/note", "dashboard-trial": f"/trials?numbers={number}"}
    with serve_dashboard(study) as address, open_browser() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address)  # with the token, which a cookie carries from here on
        for name, path in views.items():
            page.goto(address.partition("?")[0] + path)
            page.wait_for_timeout(_SETTLED_MILLISECONDS)
            write_image(_PICTURES / f"{name}.png", page.screenshot())


def write_image(path: Path, png: bytes) -> None:
    """In as many colours as a page of text and points needs: a third of the bytes."""
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


@contextmanager
def serve_dashboard(study: Path) -> Iterator[str]:
    """The address of the study's dashboard, which ends with the block."""
    process = subprocess.Popen(
        [*_MEMCONTROL, "--quiet", "dashboard", study, "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    try:
        yield process.stdout.readline().strip()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


@contextmanager
def open_browser():
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the pictures of docs/gallery.md.")
    what = parser.add_subparsers(dest="what", required=True)
    terminal = what.add_parser("terminal", help="commands, as a terminal shows them")
    terminal.add_argument("--folder", type=Path, help="where they run and leave the study (default: nowhere)")
    pages = what.add_parser("pages", help="a report and the dashboard of a study that was searched")
    pages.add_argument("study", type=Path)
    args = parser.parse_args()
    if args.what == "pages":
        record_pages(args.study)
    elif args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
        record_terminal(args.folder.resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            record_terminal(Path(folder))


if __name__ == "__main__":
    main()
