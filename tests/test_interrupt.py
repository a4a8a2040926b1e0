"""Ctrl-C, SIGTERM and SIGHUP: they end what runs even where a library swallowed them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from memcontrol.core import interrupt

USUAL = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


@pytest.fixture
def handlers():
    """The signals' handlers are put back, and what prints of errors that nothing can catch."""
    before, hook = {number: signal.getsignal(number) for number in USUAL}, sys.unraisablehook
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    sys.unraisablehook = hook


@pytest.mark.parametrize("number", USUAL)
def test_interrupt_is_remembered_unless_it_is_ignored(number, handlers):
    """SIGINT is in the background, SIGHUP under nohup."""
    for before, after in ((USUAL[number], interrupt.on_interrupt), (signal.SIG_IGN, signal.SIG_IGN)):
        signal.signal(number, before)
        interrupt.remember()
        assert signal.getsignal(number) is after


def test_interrupt_is_raised_at_once_and_again_at_the_next_check(monkeypatch):
    monkeypatch.setattr(interrupt, "came", None)
    interrupt.check()
    with pytest.raises(KeyboardInterrupt):
        interrupt.on_interrupt(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        interrupt.check()


TWICE = (
    "import os, signal, time\nfrom memcontrol.core import interrupt\ninterrupt.remember()\n"
    "try:\n os.kill(os.getpid(), signal.SIGTERM)\n time.sleep(9)\nexcept KeyboardInterrupt: pass\n"
    "time.sleep({})\nos.kill(os.getpid(), signal.SIGHUP)\nprint('goes on')"
)


@pytest.mark.parametrize("seconds, code, said", [(0, 0, "goes on\n"), (1.2, 129, "")])
def test_a_second_signal_ends_at_once_unless_it_comes_with_the_first(seconds, code, said):
    done = subprocess.run([sys.executable, "-c", TWICE.format(seconds)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, said, "")


LOST = """
import fcntl, os, sys, termios, time
from pathlib import Path
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from memcontrol.core import interrupt
interrupt.remember()
Path(sys.argv[1]).write_text("")
try:
    time.sleep(30)
except KeyboardInterrupt:
    print("nobody reads this", flush=True)
    print("nor this", file=sys.stderr, flush=True)
    Path(sys.argv[1]).write_text(interrupt.name_signal())
    sys.exit(interrupt.count_exit_status())
"""


def test_what_is_said_to_a_terminal_that_was_closed_goes_nowhere(tmp_path):
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", LOST, tmp_path / "said"], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    while not (tmp_path / "said").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.close(ours)
    assert process.wait(timeout=30) == 129 and (tmp_path / "said").read_text() == "SIGHUP"


def test_interrupt_that_a_library_swallowed_ends_the_search_all_the_same():
    """A library that catches KeyboardInterrupt in a callback of its own, as it happens now and then, must not
    keep a search alive."""
    code = (
        "import os, signal\nfrom memcontrol.core import interrupt\ninterrupt.remember()\n"
        "try:\n os.kill(os.getpid(), signal.SIGINT)\n while True: pass\nexcept KeyboardInterrupt: pass\n"
        "try:\n interrupt.check()\nexcept KeyboardInterrupt: print('remembered')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.stdout == "remembered\n"


def test_interrupt_where_nothing_can_catch_it_prints_no_traceback_and_other_errors_do():
    code = (
        "import os, signal\nfrom memcontrol.core import interrupt\ninterrupt.remember()\n"
        "class Interrupted:\n def __del__(self): os.kill(os.getpid(), signal.SIGINT); [0 for _ in range(9)]\n"
        "class Broken:\n def __del__(self): raise ValueError('seen')\n"
        "one = Interrupted()\ndel one\n{}"
        "try:\n interrupt.check()\nexcept KeyboardInterrupt: print('remembered')"
    )
    for more, is_quiet in (("", True), ("one = Broken()\ndel one\n", False)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(more)],
            capture_output=True,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert done.stdout == "remembered\n" and ("ValueError: seen" not in done.stderr) == is_quiet
        assert "KeyboardInterrupt" not in done.stderr and (not is_quiet or not done.stderr)
