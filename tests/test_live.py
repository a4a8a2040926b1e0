"""What a person sees while a search runs: shares and times by hand, lines word by word, from made-up events
and records."""

import io
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from simulated import Clock

from memcontrol.core.choice import Choice
from memcontrol.core.console import LOG
from memcontrol.core.jobs import (
    ConfirmJob,
    Done,
    Failed,
    GivenUp,
    Lost,
    Prepared,
    PrepareJob,
    Progress,
    TrialJob,
    Warned,
)
from memcontrol.core.run_folder import RunFolder
from memcontrol.study.record import Record
from memcontrol.view import live
from memcontrol.view.live import Display, EventLog, Steps, describe_step, shorten_path

CHOICE = Choice(("up_attention", "mid_attention"), "lora", 3e-3, 4)
OTHER = Choice(("up_attention",), "attention", 1e-4)
NONE = Choice((), "none", 0.0)
TEXT = "lora r4, lr 0.003, 2/7 groups"
OBJECTIVES = {"fid": "minimize", "memorization": "minimize"}


class Standing:
    """A study that has these records."""

    def __init__(self, *records):
        self.stand, self.n_read = list(records), 0

    def records(self):
        self.n_read += 1
        return self.stand


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(live, "time", clock)
    return clock


def make_display(is_terminal=False, n_sampled=4, n_workers=2):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=100, color_system=None)
    return Display(console, n_sampled, 7, n_workers)


def read(display):
    return display.console.file.getvalue()


def render(display):
    """The lines of the live block."""
    console = Console(file=io.StringIO(), width=100)
    console.print(display.block())
    return console.file.getvalue().splitlines()


def make_record(number, state="COMPLETE", anchor=None, candidates=(CHOICE,), **keys):
    choice = candidates[0] if len(candidates) == 1 else None
    searched = {"fid": 12.0 - number, "memorization": 0.1} if state == "COMPLETE" else {}
    return Record(number, state, candidates, anchor, choice, OBJECTIVES, searched, **keys)


def run_for(display, clock, job, seconds):
    """A run that is heard of first, and ends that much later."""
    display.heard(Progress(job, "train", 0, 10))
    clock.sleep(seconds)
    display.heard(Done(job))


@pytest.mark.parametrize(
    "stage, done, total, share",
    [
        ("train", 0, 10, 0.0),
        ("train", 5, 10, 0.4),
        ("train", 10, 10, 0.8),
        ("sample", 0, 4, 0.8),
        ("sample", 2, 4, 0.875),
        ("score", 4, 4, 0.95),
    ],
)
def test_share_of_a_trial_is_that_of_its_stages(clock, tmp_path, stage, done, total, share):
    display = make_display()
    display.heard(Progress(TrialJob(tmp_path, CHOICE, 3), stage, done, total))
    assert display.running[tmp_path][1] == pytest.approx(share)


def test_share_of_a_confirmation_is_that_of_its_one_stage(clock, tmp_path):
    display = make_display()
    display.heard(Progress(ConfirmJob(tmp_path, CHOICE, 3), "confirm", 1, 4))
    assert display.running == {tmp_path: (f"{TEXT}: measured again", 0.25)}


def test_step_says_what_is_known_of_it():
    assert describe_step(Progress(None, "train", 3, 10)) == "step 3/10"
    event = Progress(None, "train", 120, 230, round=3, loss=0.12345, skipped=0.142)
    assert describe_step(event) == "step 120/230, round 3, loss 0.123, 14% skipped"
    assert describe_step(replace(event, skipped=0.0)) == "step 120/230, round 3, loss 0.123"


def test_run_says_its_step_while_it_trains_and_that_it_is_a_replicate(clock, tmp_path):
    display, job = make_display(), TrialJob(tmp_path, CHOICE, 3)
    said = lambda event: display.describe_run(event, event.job)  # noqa: E731
    assert said(Progress(job, "train", 3, 10)) == f"{TEXT}: step 3/10"
    assert said(Progress(job, "sample", 3, 10)) == TEXT
    again = replace(job, replicate=0)
    assert said(Progress(again, "train", 3, 10)) == f"{TEXT} again: step 3/10"


def test_block_has_a_bar_for_each_run_and_the_front(clock, tmp_path):
    display = make_display(is_terminal=True)
    assert render(display) == ["loading the base, reading the images"]
    display.opened(Standing(make_record(0, anchor="none", candidates=(NONE,)), make_record(1, "RUNNING")))
    clock.sleep(90)
    display.heard(Progress(TrialJob(tmp_path / "a", CHOICE, 1), "train", 5, 10))
    display.heard(Progress(TrialJob(tmp_path / "b", OTHER, 2), "sample", 0, 10))
    assert render(display) == [
        "1 of 5 trials done, 2 running, 1.5 min",
        f"  {'█' * 8}{' ' * 12} {TEXT}: step 5/10",
        f"  {'█' * 16}{' ' * 4} attention, lr 0.0001, 1/7 groups",
        "best front so far:",
        "  trial 0 (none): no training: fid 12.000, memorization 0.100",
    ]


def test_terminal_shows_the_block_and_no_line_of_its_own(clock, tmp_path):
    with make_display(is_terminal=True) as display:
        display.opened(Standing(make_record(0)))
        job = TrialJob(tmp_path, CHOICE, 1)
        display.heard(Progress(job, "train", 5, 10))
        clock.sleep(1)
        display.heard(Progress(job, "train", 6, 10))
        display.heard(Done(job))
    assert f"{TEXT}: step 6/10" in read(display) and "run ended" not in read(display)


def test_elsewhere_there_is_a_line_for_each_end_and_none_on_the_way(clock, tmp_path):
    study = Standing(make_record(0, "RUNNING", "none", (NONE,)))
    with make_display() as display:
        display.opened(study)
        job = TrialJob(tmp_path, CHOICE, 1)
        display.heard(Progress(job, "train", 5, 10))
        study.stand = [
            make_record(0, "COMPLETE", "none", (NONE,)),
            make_record(1, "PRUNED", reason="the loss is not finite"),
            make_record(2, "FAIL", reason="3 attempts failed"),
            make_record(3, "RUNNING"),
        ]
        clock.sleep(30)
        display.heard(Done(job))
    assert read(display).splitlines() == [
        "loading the base, reading the images",
        f"0.5 min: {TEXT}: run ended",
        "trial 0 (none): no training: fid 12.000, memorization 0.100",
        f"trial 1 (sampled): {TEXT}: pruned: the loss is not finite",
        f"trial 2 (sampled): {TEXT}: fail: 3 attempts failed",
    ]


def test_study_is_read_twice_a_second_at_most(clock, tmp_path):
    display, study = make_display(), Standing()
    display.opened(study)
    for _ in range(10):
        display.heard(Progress(TrialJob(tmp_path, CHOICE, 1), "train", 5, 10))
        clock.sleep(0.1)
    assert study.n_read == 1 + 2


def test_end_of_a_rung_is_no_end_of_a_run(clock, tmp_path):
    display, job = make_display(), TrialJob(tmp_path, CHOICE, 3, rung=0.25)
    run_for(display, clock, job, 60)
    assert read(display).endswith(f"{TEXT}: measured at 25% of its budget\n")
    assert display.running == {} and display.done[3] == 0 and display.lengths == []
    clock.sleep(1000)  # it waits for a place
    on = replace(job, rung=None)
    run_for(display, clock, on, 60)
    assert read(display).endswith(f"{TEXT}: run ended\n")
    assert display.done[3] == 1 and len(display.lengths) == 1


def test_run_that_is_stopped_at_its_rung_has_ended(clock, tmp_path):
    display = make_display()
    RunFolder(tmp_path).result_file.write_text("{}")
    run_for(display, clock, TrialJob(tmp_path, CHOICE, 3, rung=0.25), 60)
    assert read(display).endswith(f"{TEXT}: run ended\n")
    assert display.done[3] == 1 and display.lengths == [60]


def test_end_says_what_was_done_again(clock, tmp_path):
    display = make_display()
    display.heard(Done(TrialJob(tmp_path, CHOICE, 3, replicate=1)))
    assert read(display).endswith(f"{TEXT}: fine-tuned again\n")
    display.heard(Done(ConfirmJob(tmp_path, CHOICE, 3)))
    assert read(display).endswith(f"{TEXT}: measured again\n")
    assert display.done == {3: 1}  # a confirmation trains nothing


def test_failed_attempt_and_warning_are_shown(clock, tmp_path):
    display, job = make_display(), TrialJob(tmp_path, CHOICE, 3)
    for kind in (Failed, Lost):
        display.heard(Progress(job, "train", 5, 10))
        display.heard(kind(job, f"[{kind.kind}]"))
        assert read(display).endswith(f"warning: {TEXT}: an attempt failed: [{kind.kind}]\n")
        assert display.running == {} and display.lengths == [] and not display.done
    display.heard(Warned(None, "the [database] is away"))
    assert read(display).endswith("warning: the [database] is away\n")


def test_time_left_is_that_of_the_runs_left_at_the_mean_length(clock, tmp_path):
    """Runs of 60 and 120 seconds; two of an anchor's three choices and three sampled trials are open, and
    half of one is done."""
    display = make_display(n_sampled=4, n_workers=2)
    assert display.left() == ""
    display.opened(
        Standing(
            make_record(0, anchor="none", candidates=(NONE,)),
            make_record(1, "RUNNING", "all", (CHOICE, OTHER, replace(OTHER, learning_rate=1e-3))),
            make_record(2, anchor="full", candidates=(OTHER,)),
            make_record(3),
        )
    )
    run_for(display, clock, TrialJob(tmp_path / "none", NONE, 0), 1)  # it would make the rest look short
    run_for(display, clock, TrialJob(tmp_path / "a", CHOICE, 1), 60)
    run_for(display, clock, TrialJob(tmp_path / "b", OTHER, 2), 120)
    display.heard(Progress(TrialJob(tmp_path / "c", OTHER, 1), "train", 5, 8))
    minutes = (2 + 3 - 0.5) * 1.5 / 2
    assert display.left() == f", about {minutes:.1f} min left" == ", about 3.4 min left"


def test_time_left_is_none_once_all_is_begun_and_done(clock, tmp_path):
    display = make_display(n_sampled=1)
    display.opened(Standing(make_record(3)))
    run_for(display, clock, TrialJob(tmp_path, CHOICE, 3), 60)
    display.heard(Progress(ConfirmJob(tmp_path, CHOICE, 3), "confirm", 1, 4))
    assert display.left() == ", about 0.0 min left"


@pytest.fixture
def log(caplog, monkeypatch):
    """What the events were logged as: (level, line)."""
    monkeypatch.setattr(LOG, "handlers", [caplog.handler])
    monkeypatch.setattr(LOG, "propagate", False)
    caplog.set_level(logging.DEBUG, LOG.name)

    def hear(*events):
        caplog.clear()
        for event in events:
            EventLog(7).heard(event)
        return [(record.levelname, record.getMessage()) for record in caplog.records]

    return hear


def test_log_tells_ends_failures_and_warnings(log):
    job = TrialJob(Path("runs/s/KEY"), CHOICE, 3)
    name = f"trial 3: KEY: {TEXT}: "
    assert log(Done(job)) == [("INFO", f"{name}done")]
    assert log(Failed(job, "why")) == [("WARNING", f"{name}failed: why")]
    assert log(Lost(job, "why")) == [("WARNING", f"{name}lost: why")]
    assert log(GivenUp(job, "why")) == [("WARNING", f"{name}given up: why")]
    assert log(Done(ConfirmJob(job.folder, CHOICE, 3))) == [("INFO", f"{name}done")]
    assert log(Done(replace(job, number=None))) == [("INFO", f"KEY: {TEXT}: done")]  # of `retrain`
    assert log(Prepared(PrepareJob(job.folder, {}), {}, [])) == [("INFO", "prepared")]
    assert log(Warned(None, "the database is away")) == [("WARNING", "the database is away")]


def test_log_tells_of_progress_the_end_of_each_stage(log):
    job = TrialJob(Path("runs/s/KEY"), CHOICE, 3)
    steps = [Progress(job, "train", done, 3) for done in (1, 2, 3)]
    assert log(*steps, Progress(job, "sample", 1, 2)) == [("DEBUG", f"trial 3: KEY: {TEXT}: train, all of 3")]


def test_steps_have_a_bar_each_and_leave_nothing():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with Steps(console):
        pass
    assert console.file.getvalue() == ""
    with Steps(console) as steps:
        steps.show("reading", 1, 2)
        steps.show("reading", 2, 2)
        steps.show("comparing", 1, 4)
        steps.warn("[one] is broken")
        assert [(task.description, task.completed) for task in steps.progress.tasks] == [
            ("reading", 2),
            ("comparing", 1),
        ]
    assert "warning: [one] is broken" in console.file.getvalue()


def test_steps_are_lines_now_and_then_where_nothing_can_be_drawn_again(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(live, "time", clock)
    console = Console(file=io.StringIO(), width=80)
    with Steps(console) as steps:
        for done in range(1, 7):
            clock.now += 4
            steps.show("reading", done, 6)
    assert console.file.getvalue().splitlines() == ["reading: 3 of 6", "reading: 6 of 6"]


def test_path_is_written_as_a_person_in_the_folder_would(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shorten_path(tmp_path / "runs" / "a") == "runs/a"
    assert shorten_path(Path("/elsewhere/a")) == "/elsewhere/a"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_first_pictures_are_told_once_when_the_first_run_that_trained_ends(clock, tmp_path, is_terminal):
    display = make_display(is_terminal)
    for name, choice in (("base", NONE), ("a", CHOICE), ("b", OTHER)):
        (tmp_path / name).mkdir()
        RunFolder(tmp_path / name).pairs_picture.touch()
        run_for(display, clock, TrialJob(tmp_path / name, choice, 1), 10)
    said = read(display).replace("\n", "")
    assert said.count("first images") == 1 and str(tmp_path / "a") in said
