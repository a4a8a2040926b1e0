"""Ctrl-C: it ends what runs even where a library swallowed it."""

import signal
import subprocess
import sys

import pytest

from memcontrol.core import interrupt


@pytest.fixture
def handlers():
    """The signal's handler is put back, and what prints of errors that nothing can catch."""
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    yield
    signal.signal(signal.SIGINT, before)
    sys.unraisablehook = hook


@pytest.mark.parametrize(
    "before, after",
    [(signal.default_int_handler, interrupt.on_interrupt), (signal.SIG_IGN, signal.SIG_IGN)],
    ids=["in front", "in the background"],
)
def test_interrupt_is_remembered_unless_it_is_ignored(before, after, handlers):
    signal.signal(signal.SIGINT, before)
    interrupt.remember()
    assert signal.getsignal(signal.SIGINT) is after


def test_interrupt_is_raised_at_once_and_again_at_the_next_check(monkeypatch):
    monkeypatch.setattr(interrupt, "pressed", False)
    interrupt.check()
    with pytest.raises(KeyboardInterrupt):
        interrupt.on_interrupt(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        interrupt.check()


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
