"""One search of a study at a time, wherever it is begun, and looks that need no right but to read."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from commands import run
from simulated import Simulated, search
from test_foreign import Between
from test_orchestrate import study_in

import memcontrol
from memcontrol.core.errors import MemControlError
from memcontrol.search.locks import hold_folder_lock, is_searching
from memcontrol.search.observer import Observer
from memcontrol.search.orchestrator import search_study
from memcontrol.study.place import StudyPlace


def test_two_folders_that_share_a_sqlite_file_do_not_search_one_study_at_a_time(tmp_path):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        file = study_in(tmp_path / name)
        values = yaml.safe_load(file.read_text())
        file.write_text(yaml.safe_dump({**values, "storage": "sqlite:///../one.db?timeout=60"}))
        files.append(file)

    def begin_another(job):
        place = StudyPlace.load(files[1])
        assert is_searching(place.folder.path, place.url, "s")
        with pytest.raises(MemControlError, match="is being searched by another process; wait for it"):
            search(files[1], Simulated())

    search(files[0], Between(5, begin_another)).close()
    place = StudyPlace.load(files[1])
    assert not is_searching(place.folder.path, place.url, "s")


def test_a_second_search_is_refused_before_it_begins_a_worker(tmp_path, monkeypatch):
    file = study_in(tmp_path)
    monkeypatch.setattr("memcontrol.commands.search.open_executor", None)
    with hold_folder_lock(StudyPlace.load(file).folder.path, workers=1):
        with pytest.raises(MemControlError, match="another search is running in .*; wait for it or stop it"):
            memcontrol.search(file, quiet=True)


LOOK = """
import sys
from pathlib import Path
from memcontrol.search.locks import is_searching
from memcontrol.search.observer import Observer
from memcontrol.search.orchestrator import search_study
from memcontrol.study.place import StudyPlace
import os
os.setuid(65534)
place = StudyPlace.load(sys.argv[1])
print(is_searching(place.folder.path, place.url, "s"))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("is_held", [False, True])
def test_who_may_only_read_a_folder_sees_whether_it_is_searched(is_held):
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        file = study_in(folder)
        search(file, Simulated()).close()
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)  # as its owner may choose
        lock = folder / "runs" / "s" / "search.lock"
        with open(lock, "rb+") as held:
            if is_held:
                fcntl.flock(held, fcntl.LOCK_EX)
            done = subprocess.run(
                [sys.executable, "-c", LOOK, file], capture_output=True, text=True, cwd="/", env=readable()
            )
        assert done.stdout.strip() == str(is_held), done.stderr[-500:]
        shutil.rmtree(folder / "runs")


def readable():
    return {**os.environ, "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}


def test_the_pace_is_that_of_the_search_that_runs(tmp_path):
    """It may have been given other numbers than the file has."""
    file, told = study_in(tmp_path), []

    def look(job):
        told.append(json.loads(run("status", file, "--json", check=True).stdout))

    executor = Between(12, look)
    executor.seconds = 60.0
    place = StudyPlace.load(file, ["search.trials=29", "search.workers=4"])
    search_study(place, executor, Observer()).close()
    (seen,) = told
    sampled = [trial for trial in seen["trials"] if trial["anchor"] is None]
    n_left = 29 - len(sampled) + sum(trial["state"] == "RUNNING" for trial in sampled)
    assert seen["searching"] and 200 < seen["runs_per_hour"] <= 4 * 60  # one run in ten is longer
    assert seen["minutes_left"] * seen["runs_per_hour"] / 60 / 4 == pytest.approx(-(-n_left // 4))
