"""Which executor a config names, and that it is ended."""

import sys

import pytest

from memcontrol.config.load import load_config
from memcontrol.core.errors import MemControlError
from memcontrol.execution import make
from memcontrol.execution.local import Inline, Local, Worker
from memcontrol.execution.make import make_executor, open_executor


def config_with(**search):
    return load_config({"name": "s", "data": "digits", "search": search})


def test_executor_is_the_one_that_the_config_names(tmp_path, monkeypatch):
    monkeypatch.setattr(Worker, "spawn", lambda worker: None)
    assert isinstance(make_executor(config_with(executor="inline", workers=1), tmp_path), Inline)
    local = make_executor(config_with(workers=3, time_limit_minutes=1.5), tmp_path)
    assert isinstance(local, Local) and local.count_free() == 3 and local.time_limit_seconds == 90
    assert make_executor(config_with(workers=1), tmp_path).time_limit_seconds is None


def test_executor_whose_library_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it now fails
    with pytest.raises(MemControlError, match="ray"):
        make_executor(config_with(executor="ray"), tmp_path)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_executor_is_closed_however_the_block_is_left(error, tmp_path, monkeypatch):
    class Closing(Inline):
        closed = 0

        def close(self):
            self.closed += 1

    executor = Closing()
    monkeypatch.setattr(make, "make_executor", lambda config, folder, command: executor)
    try:
        with open_executor(config_with(), tmp_path) as opened:
            assert opened is executor and not executor.closed
            if error:
                raise error
    except KeyboardInterrupt:
        assert error
    assert executor.closed == 1
