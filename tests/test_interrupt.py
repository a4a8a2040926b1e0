"""Ctrl-C: it ends what runs even where a library swallowed it."""

import signal
import subprocess
import sys

import pytest

from memcontrol.core import interrupt


@pytest.fixture
def handlers():
    """The signal's handler is put back."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


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
