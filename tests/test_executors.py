"""One contract for every executor: a job ends exactly once, progress on the way; and what local adds: workers
may die."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from memcontrol.config.load import load_config
from memcontrol.config.spec import Spec
from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import read_json, write_json
from memcontrol.core.jobs import (
    END_EVENTS,
    Calibrated,
    CalibrateJob,
    ConfirmJob,
    Done,
    EncodeJob,
    Failed,
    GivenUp,
    HelpJob,
    Lost,
    Overtaken,
    Prepared,
    PrepareJob,
    Progress,
    Stopped,
    TrialJob,
    Warned,
    parse_event,
    parse_job,
)
from memcontrol.core.run_folder import RunFolder, locate_study_folder
from memcontrol.core.space_yaml import load_space
from memcontrol.execution import job_queue, worker
from memcontrol.execution.attempts import (
    Superseded,
    begin_attempt,
    note_failure,
    read_attempts,
    read_failures,
    read_progress,
)
from memcontrol.execution.executor import Executor, pick_time_limit
from memcontrol.execution.job_queue import JobQueue
from memcontrol.execution.local import Inline, Local, Worker, choose_gpus
from memcontrol.execution.make import count_workers, describe_sharing, make_executor
from memcontrol.execution.worker import run_job

CHOICE = Choice(("mid_attention",), "lora", 1e-3, 2)


@pytest.fixture(scope="session")
def ray_cluster():
    """Three nodes of one core each on this machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    import ray

    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(params=["inline", "local", "ray"])
def executor(request, tmp_path):
    address = request.getfixturevalue("ray_cluster").address if request.param == "ray" else None
    made = make_executor(
        small(search={"executor": request.param, "workers": 1}, ray={"address": address}), tmp_path
    )
    yield made
    made.close()


def small(**keys):
    from conftest import SMALL

    return load_config({"name": "small", **SMALL, **keys})


def prepare_job(folder, **keys):
    return PrepareJob(folder, small(**keys).model_dump(mode="json"))


def until_end(executor, also=lambda event: None):
    while True:
        events = []
        for event in executor.events(1.0):
            events.append(event)
            also(event)
        ends = [event for event in events if isinstance(event, END_EVENTS)]
        if ends:
            assert len(ends) == 1
            return ends[0]


class TestContract:
    def test_jobs_end_once_and_free_their_place(self, executor, tmp_path):
        assert executor.count_free() == 1
        executor.submit(prepare_job(tmp_path))
        assert executor.count_free() == 0
        end = until_end(executor)
        assert (
            isinstance(end, Prepared)
            and end.sizes == {"train": 32, "holdout": 40, "test": 48}
            and executor.count_free() == 1
        )
        choice, kinds = CHOICE, set()
        spec = Spec(small(), load_space("digits"), choice, tmp_path, "search", "holdout", 32)
        spec.write(tmp_path / choice.key)
        job = TrialJob(tmp_path / choice.key, choice, 7)
        executor.submit(job)
        end = until_end(executor, lambda event: kinds.add(type(event)))
        assert end == Done(job) and Progress in kinds
        assert (RunFolder(tmp_path / choice.key).result_file).is_file()
        (attempt,) = read_attempts(tmp_path / choice.key)
        assert (
            attempt["host"]
            and attempt["started"]
            and (attempt["pid"] == os.getpid()) == isinstance(executor, Inline)
        )

    def test_a_trial_goes_to_its_rung_and_then_on(self, executor, tmp_path):
        rules = {
            "search": {"early_stopping": {"rungs": [0.4], "n_samples": 16}},
            "inner": {"budget_images": 80, "batch_size": 8},
        }
        config, choice = small(**rules), CHOICE
        executor.submit(prepare_job(tmp_path))
        until_end(executor)
        run = tmp_path / choice.key
        Spec(config, load_space("digits"), choice, tmp_path, "search", "holdout", 32).write(run)
        executor.submit(TrialJob(run, choice, rung=0.4))
        assert isinstance(until_end(executor), Done) and not RunFolder(run).result_file.exists()
        (at_rung,) = RunFolder(run).read_rungs(config.search.rungs, config.rewards.names)
        executor.submit(TrialJob(run, choice))
        assert isinstance(until_end(executor), Done)
        result = read_json(RunFolder(run).result_file)
        assert result["rungs"] == [at_rung] and (at_rung["n_steps"], result["n_steps"]) == (4, 10)
        # none was taken twice
        assert [row["steps"] for row in read_json(RunFolder(run).training_file)["shards"]] == [2] * 5

    def test_what_breaks_is_a_failed_attempt_with_its_traceback(self, executor, tmp_path):
        executor.submit(ConfirmJob(tmp_path / "none", CHOICE, 7))
        end = until_end(executor)
        assert isinstance(end, Stopped) and "is no run folder" in end.reason
        executor.submit(PrepareJob(tmp_path, 7))
        end = until_end(executor)
        assert (
            isinstance(end, Failed)
            and "Traceback" in end.traceback
            and "log.txt" in end.reason
            and executor.count_free() == 1
        )

    def test_a_users_error_ends_the_job_with_its_line(self, executor, tmp_path):
        executor.submit(prepare_job(tmp_path, base="./none-such"))
        end = until_end(executor)
        assert isinstance(end, Stopped) and "no such folder" in end.reason and executor.count_free() == 1


@pytest.fixture
def local():
    made = Local(1, time_limit_seconds=120)
    yield made
    made.close()


def test_a_worker_that_dies_loses_its_job_and_is_started_again(local, tmp_path):
    local.submit(prepare_job(tmp_path))
    os.kill(local.workers[0].process.pid, signal.SIGKILL)
    end = until_end(local)
    assert (
        isinstance(end, Lost)
        and end.reason == "its worker process died (signal 9)"
        and local.count_free() == 1
    )
    local.submit(prepare_job(tmp_path))
    assert isinstance(until_end(local), Prepared)


def test_what_lies_in_the_working_directory_is_no_module_of_a_worker(tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise RuntimeError('not the standard library')")
    monkeypatch.chdir(tmp_path)
    made = Local(1, folder=tmp_path / "study")
    try:
        made.submit(prepare_job(tmp_path / "study"))
        assert isinstance(until_end(made), Prepared)
    finally:
        made.close()


@pytest.mark.parametrize(("n_cores", "n_workers", "n_threads"), [(1, 1, 1), (8, 2, 4), (3, 2, 1), (1, 2, 1)])
def test_workers_share_the_cores_that_this_process_may_use(monkeypatch, n_cores, n_workers, n_threads):
    """Not all that the machine has: under taskset or Slurm threads would fight for fewer."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(n_cores)))
    monkeypatch.setattr(Worker, "spawn", lambda worker: None)
    made = Local(n_workers)
    assert {worker.n_threads for worker in made.workers} == {n_threads}


def test_what_a_worker_prints_before_its_first_job_is_kept_and_told_where_it_dies(tmp_path, monkeypatch):
    """Here of a library that is broken."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "queue.py").write_text("raise ImportError('libcudart.so: no such file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"), prepend=os.pathsep)
    made = Local(1, folder=tmp_path)
    try:
        made.submit(prepare_job(tmp_path))
        end, log = until_end(made), tmp_path / "worker-0.txt"
    finally:
        made.close()
    assert isinstance(end, Lost) and "died (exit code 1) before its first job" in end.reason
    assert end.reason.endswith(f"ImportError: libcudart.so: no such file (see {log})")
    assert "Traceback" in log.read_text() and "libcudart" in log.read_text()


def test_a_job_that_is_frozen_past_its_time_limit_is_ended_for_good(local, tmp_path):
    local.time_limit_seconds = 3
    local.submit(TrialJob(tmp_path, CHOICE))
    frozen = local.workers[0].process
    os.kill(frozen.pid, signal.SIGSTOP)
    end = until_end(local)
    assert isinstance(end, Lost) and "longer than search.time_limit_minutes (0.05)" in end.reason
    assert frozen.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    "listed, executor, processes, workers, expected",
    [
        ("0,1,2,3", "local", 1, None, 4),
        ("0,1,2,3", "local", 2, None, 2),
        ("0", "local", 2, None, 1),
        ("GPU-8f3a,GPU-11bc", "local", 1, None, 2),
        ("", "local", 1, None, 2),  # hides all GPUs
        ("-1", "local", 1, None, 2),
        ("0,1,2,3", "local", 1, 7, 7),
        ("0,1,2,3", "slurm", 1, None, 2),
        ("0,1,2,3", "ray", 1, None, 2),
    ],
)
def test_without_a_number_there_is_a_worker_for_each_gpu(
    monkeypatch, listed, executor, processes, workers, expected
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    keys = {"executor": executor, "processes": processes, "workers": workers}
    assert count_workers(small(search=keys).search) == expected


@pytest.mark.parametrize("hidden", ["", "-1", "GPU-8f3a", "MIG-11bc", "NoDevFiles"])
def test_what_is_hidden_stays_hidden_in_workers(monkeypatch, hidden):
    """Whatever device files there are; what a process was given stands in /proc."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [Path("/dev/nvidia0"), Path("/dev/nvidia1")])
    made = Local(2)
    try:
        for worker in made.workers:
            given = Path(f"/proc/{worker.process.pid}/environ").read_bytes().decode().split("\0")
            assert f"CUDA_VISIBLE_DEVICES={hidden}" in given
    finally:
        made.close()


def test_workers_that_share_a_gpu_are_told_of(monkeypatch):
    def tell(listed, **keys):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        return describe_sharing(small(search=keys).search)

    assert (
        "2 workers share 1 GPU: each loads the base and needs a trial's memory for itself, so that a card "
        in (tell("0", workers=2))
    )
    assert "must hold 2 times as much" in tell("0,1", workers=3)
    assert not tell("0,1", workers=2) and not tell("0") and not tell("", workers=2)
    assert not tell("0", workers=2, executor="slurm") and not tell("0", processes=2)


def test_a_search_says_once_that_its_workers_share_a_gpu(monkeypatch, tmp_path):
    from simulated import Simulated, search
    from test_orchestrate import study_in

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    said = []
    search(study_in(tmp_path, workers=2), Simulated(2), said.append).close()
    assert len([event for event in said if "2 workers share 1 GPU" in getattr(event, "text", "")]) == 1


def test_gpus_are_dealt_out_in_turn(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [choose_gpus(i)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["2", "5", "2"]


class Scripted(Executor):
    """Ends jobs as a script says, one after another."""

    def __init__(self, *script):
        self.script, self.taken = list(script), []

    def count_free(self):
        return 1

    def submit(self, job):
        self.taken.append(job)

    def events(self, timeout_seconds):
        kind = self.script.pop(0)
        told = {} if kind is Done else {"reason": f"{kind.kind} {len(self.taken)}"}
        yield kind(self.taken[-1], **told)

    def close(self): ...


class TestJobs:
    def test_what_fails_twice_is_tried_a_third_time(self, tmp_path):
        job, executor = TrialJob(tmp_path, CHOICE), Scripted(Failed, Lost, Done)
        (end,) = JobQueue(executor, lambda event: None).run([job])
        assert end == Done(job) and executor.taken == [job] * 3
        assert [failure["reason"] for failure in read_failures(tmp_path)] == ["failed 1", "lost 2"]

    def test_three_failures_are_the_end_even_across_orchestrators(self, tmp_path):
        job = TrialJob(tmp_path, CHOICE)
        note_failure(tmp_path, "before")
        executor = Scripted(Failed, Lost)
        (end,) = JobQueue(executor, lambda event: None).run([job])
        assert end == GivenUp(job, "lost 2")

    def test_what_the_user_must_mend_ends_it_all(self, tmp_path):
        with pytest.raises(MemControlError, match="stop 1"):
            list(JobQueue(Scripted(Stopped), lambda event: None).run([ConfirmJob(tmp_path, CHOICE, 0)]))


class Elsewhere(Executor):
    """Its first job is always overtaken; the rest are done."""

    def __init__(self):
        self.taken, self.running = [], []

    def count_free(self):
        return 1

    def submit(self, job):
        self.taken.append(job)
        self.running.append(job)

    def events(self, timeout_seconds):
        for job in self.running:
            yield Overtaken(job, "another has it") if len(self.taken) == 1 else Done(job)
        self.running = []

    def close(self): ...


class TestOvertaken:
    """A worker that was thought dead, or that another orchestrator has left behind, is at the same trial."""

    def test_its_result_is_waited_for_and_is_no_failure(self, tmp_path):
        job, executor = TrialJob(tmp_path, CHOICE), Elsewhere()
        attempt = begin_attempt(tmp_path)
        late = threading.Timer(1.5, write_json, [RunFolder(tmp_path).result_file, {"state": "COMPLETE"}])
        late.start()
        (end,) = JobQueue(executor, lambda event: None).run([job])
        late.join()
        assert end == Done(job) and executor.taken == [job] and attempt.is_current()
        assert not read_failures(tmp_path)

    def test_where_nothing_is_heard_of_it_the_job_is_handed_out_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr(job_queue, "_SILENT_SECONDS", 0.5)
        job, executor = TrialJob(tmp_path, CHOICE), Elsewhere()
        (end,) = JobQueue(executor, lambda event: None).run([job])
        assert end == Done(job) and executor.taken == [job] * 2 and not read_failures(tmp_path)

    def test_a_superseded_attempt_says_so(self, tmp_path, monkeypatch):
        def overtaken(job, loaded, say):
            attempt = begin_attempt(job.folder)
            begin_attempt(job.folder)
            attempt.check()

        monkeypatch.setitem(worker._RUN, TrialJob, overtaken)
        said, job = [], TrialJob(tmp_path, CHOICE)
        run_job(job, None, said.append)
        assert [(type(event), event.job) for event in said] == [(Overtaken, job)]


@pytest.mark.parametrize(
    "job, name, value",
    [
        (TrialJob(Path(), CHOICE), "result.json", {"state": "COMPLETE"}),
        (TrialJob(Path(), CHOICE), "result.json", {"state": "PRUNED"}),
        (TrialJob(Path(), CHOICE, rung=0.25), "rung-0.25.json", {}),
        (TrialJob(Path(), CHOICE, rung=0.25), "result.json", {"state": "COMPLETE"}),
        (ConfirmJob(Path(), CHOICE, 0), "confirmed.json", {}),
    ],
)
def test_a_worker_that_finds_its_work_done_leaves_and_writes_nothing(job, name, value, tmp_path):
    """It needs no models, and gets none."""
    job, said = replace(job, folder=tmp_path), []
    write_json(tmp_path / name, value)
    run_job(job, None, said.append)
    assert said == [Done(job)] and [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "job, names",
    [
        (TrialJob(Path(), CHOICE), ["rung-0.25.json"]),
        (TrialJob(Path(), CHOICE, rung=0.5), ["rung-0.25.json"]),
        (TrialJob(Path(), CHOICE), ["result.json", "dropped.json"]),  # its weights are asked for again
        (ConfirmJob(Path(), CHOICE, 0), ["result.json"]),
    ],
)
def test_what_lacks_something_is_not_done(job, names, tmp_path):
    for name in names:
        write_json(tmp_path / name, {"state": "COMPLETE"})
    assert not replace(job, folder=tmp_path).is_done()
    write_json(tmp_path / "result.json", {"state": "FAIL"})
    assert not TrialJob(tmp_path, CHOICE).is_done(), "a failure may be tried again"


def test_a_process_that_dies_when_all_is_done_is_no_failure(tmp_path):
    class Dying(Scripted):
        def submit(self, job):
            super().submit(job)
            write_json(RunFolder(job.folder).result_file, {"state": "COMPLETE"})

    job = TrialJob(tmp_path, CHOICE)
    (end,) = JobQueue(Dying(Lost), lambda event: None).run([job])
    assert end == Done(job) and not read_failures(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_actors_end_with_their_orchestrator(number, ray_cluster, study_file):
    study = study_file(
        inner={"budget_images": 10_000_000},
        search={"workers": 1, "executor": "ray"},
        ray={"address": ray_cluster.address},
    )
    folder = locate_study_folder(study, "small")
    words = [sys.executable, "-m", "memcontrol.cli", "search", study]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as search:
        while not (begun := list(folder.glob("*/progress.json"))):
            assert search.poll() is None
            time.sleep(0.2)
        search.send_signal(number)
        assert search.wait(timeout=60) == (143 if number == signal.SIGTERM else -number)
    (attempt,) = read_attempts(begun[0].parent)
    deadline = time.monotonic() + 60
    while psutil.pid_exists(attempt["pid"]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not psutil.pid_exists(attempt["pid"]) and not (begun[0].parent / "failures.json").exists()


def test_what_lies_in_the_working_directory_is_no_module_of_an_actor(ray_cluster, tmp_path):
    """`torch` is imported when the actor is there, and Ray puts the driver's directory first."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('not the library')")
    code = (
        "import sys\nfrom pathlib import Path\nfrom memcontrol.config.load import load_config\n"
        "from memcontrol.core.jobs import END_EVENTS, PrepareJob\n"
        "from memcontrol.execution.make import make_executor\n"
        "config = load_config({'name': 's', 'search': {'executor': 'ray', 'workers': 1},"
        " 'data': {'path': 'digits', 'train': 32, 'holdout': 40, 'test': 48},"
        " 'ray': {'address': sys.argv[1]}})\n"
        "folder = Path('study').absolute()\nexecutor = make_executor(config, folder)\n"
        "executor.submit(PrepareJob(folder, config.model_dump(mode='json')))\n"
        "while not (ends := [e for e in executor.events(1) if isinstance(e, END_EVENTS)]): pass\n"
        "executor.close()\nprint(ends[0])"
    )
    words = [sys.executable, "-P", "-c", code, ray_cluster.address]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("Prepared("), done


def test_a_second_attempt_takes_a_folder_over(tmp_path):
    """As when a worker that was frozen wakes up: it writes nothing more."""
    first = begin_attempt(tmp_path)
    first.progress("train", 1, 10)
    assert read_progress(tmp_path)["done"] == 1
    second = begin_attempt(tmp_path)
    assert second.is_current() and not first.is_current() and read_progress(tmp_path) is None
    first.written_at = 0.0
    with pytest.raises(Superseded):
        first.progress("train", 2, 10)
    with open(tmp_path / "attempts.jsonl", "a") as file:
        file.write('{"identity": "cut sh')
    assert second.is_current() and len(read_attempts(tmp_path)) == 2


def test_a_job_of_which_nothing_is_known_yet_is_no_error(tmp_path):
    """A second attempt has not said anything, and what the first one said no longer counts."""
    from memcontrol.execution.ray_cluster import Place, Ray
    from memcontrol.execution.slurm_cluster import Running, Slurm
    from memcontrol.execution.slurm_job import SlurmFiles

    begin_attempt(tmp_path).progress("train", 1, 2)
    begin_attempt(tmp_path)
    job = TrialJob(tmp_path, CHOICE)
    ray, slurm, told = object.__new__(Ray), object.__new__(Slurm), Progress(job, "train", 1, 2)
    ray.time_limit_seconds = slurm.time_limit_seconds = None
    slurm.states = {}
    assert list(ray.watched(Place(job=job, told=told, began=0.0), job)) == []
    assert list(slurm.watched(Running(job, SlurmFiles(tmp_path, "a"), told=told))) == []


def test_preparing_has_no_time_limit(tmp_path):
    trial = TrialJob(tmp_path, CHOICE)
    assert pick_time_limit(trial, 3.0) == 3.0 and pick_time_limit(trial, None) is None
    assert pick_time_limit(PrepareJob(tmp_path, {}), 3.0) is None


JOBS = [
    PrepareJob(Path("study"), {"name": "a"}),
    EncodeJob(Path("study"), {"name": "a"}, 10, "holdout", 1),
    CalibrateJob(Path("study"), {"name": "a"}),
    TrialJob(Path("study/run"), CHOICE, 7, 0.25, 1),
    ConfirmJob(Path("study/run"), CHOICE, 7),
    HelpJob(Path("study/run"), 1, 4, None),
]
EVENTS = [
    Progress(JOBS[2], "train", 3, 10, 2, 0.25, 0.5),
    Warned(None, "coarse"),
    Prepared(JOBS[0], {"train": 8}, ["minimize"], {"torch": "2"}),
    Calibrated(JOBS[1], {"start": 1.0}),
    Done(JOBS[2]),
    Stopped(JOBS[2], "mend it"),
    Failed(JOBS[2], "broke", "Traceback"),
    Lost(JOBS[2], "gone"),
    Overtaken(JOBS[2], "another is at it"),
    GivenUp(JOBS[2], "broke thrice", "Traceback"),
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.kind)
def test_a_job_crosses_to_another_process_unchanged(job):
    assert parse_job(json.loads(json.dumps(job.to_json()))) == job


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_an_event_crosses_back_unchanged(event):
    assert parse_event(json.loads(json.dumps(event.to_json())), event.job) == event
