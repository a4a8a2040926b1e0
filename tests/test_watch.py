"""Status: what runs where, since when, which attempt, how far; silence; pace and time left."""

import json
import os
import re
import socket
from dataclasses import replace

from commands import run

from memcontrol.config.load import load_config
from memcontrol.core.run_folder import RunFolder, StudyFolder, locate_study_folder
from memcontrol.core.space_yaml import load_space
from memcontrol.execution.attempts import begin_attempt, note_failure
from memcontrol.search.locks import hold_folder_lock, is_searching
from memcontrol.study.opening import open_study
from memcontrol.study.orders import ask_to_stop
from memcontrol.study.running import describe_run, estimate_pace, inspect_run

SPACE = load_space("digits")


def test_a_run_says_who_works_on_it_and_how_far(tmp_path, monkeypatch):
    assert describe_run(inspect_run(RunFolder(tmp_path))) == "waits for a place"
    begin_attempt(tmp_path)
    note_failure(tmp_path, "its worker process died (signal 9)")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    begin_attempt(tmp_path).progress("train", 120, 230)
    found = inspect_run(RunFolder(tmp_path))
    assert (found["attempts"], found["host"], found["pid"], found["gpu"]) == (
        2,
        socket.gethostname(),
        os.getpid(),
        "3",
    )
    assert found["failures"] == ["its worker process died (signal 9)"] and found["progress"]["done"] == 120
    said = describe_run(found)
    assert said.startswith(
        f"attempt 2 on {socket.gethostname()}, process {os.getpid()}, GPU 3, since "
    ) and said.endswith("UTC, train 120/230")
    for name in ("attempts.jsonl", "progress.json"):
        (tmp_path / name).write_text(
            re.sub(r"20\d\d-(\d\d-\d\dT)", r"2001-\1", (tmp_path / name).read_text())
        )
    assert re.search(r"silent for \d+ minutes$", describe_run(inspect_run(RunFolder(tmp_path))))
    (tmp_path / "result.json").write_text("{}")
    assert describe_run(inspect_run(RunFolder(tmp_path))) == "finished"


def test_status_of_an_interrupted_search_shows_its_runs(study_file):
    study = study_file()
    config, folder = load_config(study), locate_study_folder(study, "small")
    written = open_study(config, folder, study, create=True)
    candidates = SPACE.list_anchors()["all"]
    written.begin(candidates, SPACE, "all")
    ask_to_stop(written, now=False)
    written.close()
    begin_attempt(folder / candidates[0].key).progress("train", 1, 2)
    text = run("status", study).stdout
    assert "interrupted: 1" in text and "trial 0 interrupted (all) (the next search goes on with it)" in text
    assert (
        f"attempt 1 on {socket.gethostname()}" in text
        and text.count("waits for a place") == len(candidates) - 1
    )
    assert "the last search was stopped: memcontrol stop asked for it (" in text
    with hold_folder_lock(folder):
        said_meanwhile = run("status", study).stdout
    assert "the search ends when its running trials have ended: memcontrol stop" in said_meanwhile
    said = json.loads(run("status", study, "--json").stdout)
    (trial,) = said["trials"]
    assert said["stop"]["value"] == "gently"
    assert (
        not said["searching"]
        and said["study"] == "small"
        and [one["choice"] for one in trial["runs"]] == [choice.as_dict() for choice in candidates]
    )
    assert (
        [one["attempts"] for one in trial["runs"]] == [1, 0, 0]
        and trial["begun"]
        and trial["runs"][0]["progress"]["total"] == 2
    )


def test_pace_counts_what_is_left(study_file):
    study = study_file(search={"trials": 11, "workers": 2})
    config = load_config(study)
    written = open_study(config, study.parent, study, create=True)
    choice = SPACE.choice(SPACE.select_groups("lora"), "lora", 0.5)
    written.begin([choice], SPACE)
    (record,) = written.records()
    written.close()
    assert estimate_pace([record], config.search.trials, 2) == {}
    finished = replace(record, number=1, state="COMPLETE", seconds=120.0)
    # nine to come and one that runs, by two workers
    assert estimate_pace([record, finished], config.search.trials, 2) == {
        "runs_per_hour": 60,
        "minutes_left": 10,
    }
    waiting = replace(record, number=2, state="WAITING")
    assert estimate_pace([record, finished, waiting], 3, 2)["minutes_left"] == 2
    # both fine-tunings are measured at two strengths more, in half a minute each: three of these are left,
    # and of what one that is to come will be measured at, two
    variant = replace(
        record, candidates=(choice.with_settings({"strength": 0.5}),), number=3, state="RUNNING"
    )
    measured = replace(variant, number=4, state="COMPLETE", seconds=30.0)
    known = [finished, replace(finished, number=1), measured, *[variant] * 3]
    assert estimate_pace(known, 2, 1)["minutes_left"] == 1.5
    assert estimate_pace(known, 3, 1)["minutes_left"] == 1.5 + 2 + 1


def test_looking_at_a_search_leaves_no_holder_behind(tmp_path):
    assert not is_searching(tmp_path / "elsewhere", "sqlite://", "s")
    assert not is_searching(tmp_path, "sqlite://", "s") and not StudyFolder(tmp_path).holder_file.exists()
    with hold_folder_lock(tmp_path):
        assert is_searching(tmp_path, "sqlite://", "s") and StudyFolder(tmp_path).holder_file.exists()
