"""Slurm's jobs over a Slurm that only pretends: what a killed process has left at work is known, taken over,
or cancelled. `tests/nightly/slurm_kills.py` does the same to a real one."""

import subprocess
import sys
import threading
import time

import fake_slurm
import pytest

from memcontrol.config.clusters import SlurmConfig
from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import write_json
from memcontrol.core.jobs import Done, EncodeJob, Lost, PrepareJob, TrialJob
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.execution import slurm_cluster, slurm_commands
from memcontrol.execution.make import make_executor
from memcontrol.execution.slurm_cluster import Slurm
from memcontrol.execution.slurm_commands import list_options, parse_duration
from memcontrol.execution.slurm_job import SlurmFiles, list_records


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm_cluster, "_QUERY_SECONDS", 0.0)
    monkeypatch.setattr(slurm_commands, "_PAUSE_SECONDS", 0.1)
    return fake_slurm.install(tmp_path, monkeypatch)


@pytest.fixture
def folder(tmp_path):
    return StudyFolder(tmp_path / "study").slurm / "search"


@pytest.fixture
def opened(folder):
    """Makes executors; all are closed in the end."""
    made = []

    def make(time_limit_seconds=None):
        made.append(Slurm(SlurmConfig(), 2, time_limit_seconds, folder))
        return made[-1]

    yield make
    for one in made:
        one.close()


def die(executor):
    """As after kill -9: the lock is free, and nothing else was done."""
    executor.lock.release()
    executor.running, executor.left = [], []


def trial(tmp_path, i=0, rung=None):
    choice = Choice(("mid_attention",), "lora", 1e-3 * (1 + i), 2)
    job = TrialJob(tmp_path / "study" / choice.key, choice, i, rung)
    job.folder.mkdir(parents=True, exist_ok=True)
    return job


def finish(job):
    write_json(RunFolder(job.folder).result_file, {"state": "COMPLETE"})


def read_words(state):
    return [job["word"] for job in fake_slurm.list_jobs(state).values()]


def take_events(executor):
    return list(executor.events(0.0))


def test_a_job_is_on_record_before_it_is_submitted_and_until_its_answer_is_heard(
    state, folder, opened, tmp_path
):
    """The pretended sbatch refuses one that is not."""
    job, executor = trial(tmp_path), opened()
    executor.submit(job)
    (files,) = list_records(folder)
    assert files.read_job() == job and files.read_identity() == "1"
    assert list(fake_slurm.list_jobs(state)) == [files.name] and files.name.startswith("memcontrol-study-")
    assert take_events(executor) == [] and executor.count_free() == 1
    finish(job)  # so that what begins finds it done
    fake_slurm.let_begin(state, files.name)
    assert take_events(executor) == [Done(job)] and executor.count_free() == 2
    assert sorted(path.name for path in folder.iterdir()) == ["lock"]
    assert list(job.folder.iterdir()) == [RunFolder(job.folder).result_file], "it wrote something"


def test_what_a_killed_process_has_left_is_taken_over_and_not_submitted_again(state, opened, tmp_path):
    jobs, first = [trial(tmp_path, i) for i in range(2)], opened()
    for job in jobs:
        first.submit(job)
    die(first)
    second = opened()
    assert second.left_at_work == {job.folder for job in jobs} and second.count_free() == 2
    second.submit(jobs[1])
    second.submit(jobs[0])
    assert read_words(state) == ["PENDING"] * 2 and second.count_free() == 0 and not second.left_at_work
    finish(jobs[0])
    fake_slurm.let_begin(state, next(iter(fake_slurm.list_jobs(state))))
    assert take_events(second) == [Done(jobs[0])]


def test_what_is_not_asked_for_again_is_cancelled_at_the_end(state, folder, opened, tmp_path):
    first = opened()
    first.submit(trial(tmp_path))
    die(first)
    second = opened()
    second.submit(trial(tmp_path, 1))
    assert read_words(state) == ["PENDING"] * 2
    second.close()
    assert read_words(state) == ["CANCELLED"] * 2 and not list_records(folder)


def make_prepare_job(tmp_path):
    return PrepareJob(tmp_path / "study", {"name": "study"})


@pytest.mark.parametrize("kind", ["done", "preparing"])
def test_what_nobody_needs_any_more_is_cancelled_at_once(kind, state, folder, opened, tmp_path):
    """Images may have changed since a preparation has begun."""
    first, job = opened(), trial(tmp_path) if kind == "done" else make_prepare_job(tmp_path)
    first.submit(job)
    die(first)
    if kind == "done":
        finish(job)
    assert not opened().left_at_work and read_words(state) == ["CANCELLED"] and not list_records(folder)


def test_one_that_would_write_the_same_run_is_cancelled_first(state, opened, tmp_path):
    """As when another rung is asked for."""
    first = opened()
    first.submit(trial(tmp_path, rung=0.25))
    first.submit(EncodeJob(tmp_path / "study", {}, 1, "holdout", 0))
    die(first)
    opened().submit(trial(tmp_path))
    assert read_words(state) == ["CANCELLED", "PENDING", "PENDING"]


def test_a_process_that_was_killed_while_it_submitted_finds_its_job_by_name(
    state, folder, opened, tmp_path, monkeypatch
):
    """Which Slurm may hear of only now: sbatch outlives who has begun it."""
    first, job = opened(), trial(tmp_path)
    die(first)
    files = SlurmFiles(folder, "memcontrol-study-0")
    files.note(job)
    slurm_commands.write_script(files, SlurmConfig(), 1)
    late = threading.Timer(1.5, slurm_commands.submit_script, [files])
    late.start()
    second = opened()
    late.join()
    assert second.left_at_work == {job.folder}
    second.submit(job)
    assert read_words(state) == ["PENDING"]


def test_a_job_whose_record_is_gone_leaves_and_writes_nothing(state, folder, opened, tmp_path):
    """Slurm may hear of it even later."""
    executor, job = opened(), trial(tmp_path)
    executor.submit(job)
    (files,) = list_records(folder)
    script = files.script.read_text()
    executor.close()
    files.script.write_text(script)
    fake_slurm.let_begin(state, files.name)
    assert read_words(state) == ["COMPLETED"] and not list(job.folder.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == ["lock", files.script.name]


def test_a_job_that_ends_without_an_answer_is_lost_with_the_last_that_it_printed(
    state, folder, opened, tmp_path
):
    executor, job = opened(), trial(tmp_path)
    executor.submit(job)
    (files,) = list_records(folder)
    files.log.write_text("Traceback\nImportError: libcudart.so\n")
    fake_slurm.change_job(state, files.name, word="FAILED")
    (end,) = take_events(executor)
    assert isinstance(end, Lost) and end.traceback == "Traceback\nImportError: libcudart.so"
    assert end.reason == (
        "Slurm job 1 ended as FAILED without a result; the last that it printed: ImportError: libcudart.so "
        f"(see {files.log})"
    )


def test_the_time_limit_goes_on_counting_across_processes(state, folder, opened, tmp_path):
    first, job = opened(), trial(tmp_path)
    first.submit(job)
    die(first)
    (name,) = fake_slurm.list_jobs(state)
    fake_slurm.change_job(state, name, word="RUNNING", used="1:59")
    second = opened(120.0)
    second.submit(job)
    assert take_events(second) == [] and read_words(state) == ["RUNNING"]
    fake_slurm.change_job(state, name, used="2:01")
    assert take_events(second) == [] and read_words(state) == ["CANCELLED"]
    (end,) = take_events(second)
    assert isinstance(end, Lost) and end.reason == "it ran longer than search.time_limit_minutes (2)"


@pytest.mark.parametrize(
    "text, seconds",
    [("0:07", 7), ("59:01", 3541), ("2:00:03", 7203), ("3-01:00:00", 262800), ("INVALID", 0), ("", 0)],
)
def test_durations_are_read_as_squeue_prints_them(text, seconds):
    assert parse_duration(text) == seconds


def test_what_sbatch_refuses_is_the_users_to_mend(state, folder, opened, tmp_path):
    executor = opened()
    (state / "broken").write_text("invalid partition specified: gpus")
    with pytest.raises(MemControlError, match="sbatch refuses the job: .*invalid partition.*; check the sl"):
        executor.submit(trial(tmp_path))
    assert executor.count_free() == 2 and not list_records(folder) and not read_words(state)


@pytest.mark.parametrize(
    "words", ["Unable to contact slurm controller (connect failure)", "Socket timed out on send/recv"]
)
def test_a_controller_that_is_away_is_asked_again_and_gets_no_job_twice(words, state, opened, tmp_path):
    """One that did not answer in time may have taken the job."""
    executor = opened()
    (state / "broken").write_text(words)
    executor.submit(trial(tmp_path))
    assert read_words(state) == ["PENDING"] and executor.count_free() == 1


def test_a_second_process_of_a_kind_leaves_the_jobs_of_the_first_alone(state, opened, tmp_path):
    first, second = opened(), None
    first.submit(trial(tmp_path))
    second = opened()
    assert second.folder.name == "search-2" and not second.left_at_work
    second.submit(trial(tmp_path, 1))
    second.close()
    assert read_words(state) == ["PENDING", "CANCELLED"]


def test_what_another_command_was_killed_over_is_cancelled_where_nobody_goes_on_with_it(
    state, folder, opened, tmp_path
):
    """A preparation, but no retraining."""
    other = Slurm(SlurmConfig(), 2, None, folder.with_name("retrain"))
    other.submit(make_prepare_job(tmp_path))
    other.submit(trial(tmp_path))
    opened()
    assert read_words(state) == ["PENDING"] * 2, "its process lives"
    die(other)
    opened()
    assert read_words(state) == ["CANCELLED", "PENDING"]


def test_where_trials_run_elsewhere_now_slurms_jobs_are_cancelled(state, folder, opened, tmp_path):
    from test_make import config_with

    first = opened()
    first.submit(trial(tmp_path))
    die(first)
    make_executor(config_with(executor="inline"), tmp_path / "study").close()
    assert read_words(state) == ["CANCELLED"] and not list_records(folder)


def test_without_slurm_it_is_said_in_one_line(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MemControlError, match="no Slurm is here .sbatch is not found.; run the search on a"):
        Slurm(SlurmConfig(), 1, None, folder)


def test_options_are_those_of_sbatch_and_extra_has_the_last_word(tmp_path):
    settings = SlurmConfig(
        partition="gpu", gres="gpu:1", memory_gb=1.5, extra={"qos": "long", "nodes": 2, "mail_type": "END"}
    )
    options = list_options(SlurmFiles(tmp_path / "50% done", "a"), settings, 1)
    assert {name: options[name] for name in ("partition", "gres", "mem", "qos", "nodes", "mail-type")} == {
        "partition": "gpu",
        "gres": "gpu:1",
        "mem": "1536M",
        "qos": "long",
        "nodes": "2",
        "mail-type": "END",
    }
    assert "50%% done" in options["output"] and "account" not in options


ASKED = """
import os, signal, sys
from pathlib import Path
from memcontrol.core import interrupt
from memcontrol.execution import slurm_job
def work(values, loaded):
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    interrupt.end_if_terminated()
slurm_job.collect_events = work
slurm_job._main()
"""


@pytest.mark.parametrize("signal_name, is_requeued", [("SIGUSR2", True), ("SIGTERM", False)])
def test_only_a_job_whose_time_is_over_asks_to_be_begun_again(
    signal_name, is_requeued, state, folder, tmp_path, monkeypatch
):
    """One that is cancelled leaves for good."""
    scontrol, said = state.parent / "bin" / "scontrol", tmp_path / "said"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {said}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    files = SlurmFiles(folder, "a")
    files.note(trial(tmp_path))
    words = [sys.executable, "-c", ASKED, files.record, signal_name]
    assert subprocess.run(words).returncode == 143
    assert said.exists() == is_requeued and (not is_requeued or said.read_text() == "requeue 17\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    said.unlink(missing_ok=True)
    assert subprocess.run(words).returncode == 143 and not said.exists(), "it is requeued for ever"


def test_squeue_that_does_not_answer_is_waited_for(state, opened, tmp_path, monkeypatch):
    first, job = opened(), trial(tmp_path)
    first.submit(job)
    die(first)
    squeue = state.parent / "bin" / "squeue"
    works = squeue.read_text()
    squeue.write_text("#!/bin/sh\nexit 1\n")
    threading.Timer(0.5, squeue.write_text, [works]).start()
    began = time.monotonic()
    assert opened().left_at_work == {job.folder} and time.monotonic() - began >= 0.4
    monkeypatch.setattr(slurm_commands, "_PATIENCE_SECONDS", 0.2)
    squeue.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(MemControlError, match="jobs of an earlier search may be at work, and squeue does no"):
        slurm_commands.wait_for_states(["a"])
