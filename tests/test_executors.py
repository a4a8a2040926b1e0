"""One contract for every executor: a job ends exactly once, progress on the way; and what local adds: workers
may die."""

import os
import signal

import pytest

from memcontrol.core.attempts import (
    Superseded,
    begin_attempt,
    note_failure,
    read_attempts,
    read_failures,
    read_progress,
)
from memcontrol.core.choice import Choice
from memcontrol.core.config import load_config
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import read_json
from memcontrol.core.run_folder import RESULT, TRAINING, read_rungs
from memcontrol.core.space_yaml import load_space
from memcontrol.core.spec import Spec
from memcontrol.execution.executor import END_KINDS, Event, Executor, pick_time_limit
from memcontrol.execution.job_queue import JobQueue
from memcontrol.execution.local import Inline, Local, choose_gpus
from memcontrol.execution.make import make_executor


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
    return {"prepare": str(folder), "config": small(**keys).model_dump(mode="json")}


def until_end(executor, also=lambda event: None):
    while True:
        events = []
        for event in executor.events(1.0):
            events.append(event)
            also(event)
        ends = [event for event in events if event.kind in END_KINDS]
        if ends:
            assert len(ends) == 1
            return ends[0]


class TestContract:
    def test_jobs_end_once_and_free_their_place(self, executor, tmp_path):
        assert executor.free() == 1
        executor.submit(prepare_job(tmp_path))
        assert executor.free() == 0
        end = until_end(executor)
        assert (
            end.kind == "prepared"
            and end.detail["sizes"] == {"train": 32, "holdout": 40, "test": 48}
            and executor.free() == 1
        )
        choice, kinds = Choice(("mid_attention",), "lora", 1e-3, 2), []
        spec = Spec(small(), load_space("digits"), choice, tmp_path, "search", "holdout", 32)
        job = spec.as_job(tmp_path / choice.key) | {"number": 7}
        executor.submit(job)
        end = until_end(executor, lambda event: kinds.append(event.kind))
        assert end.kind == "done" and end.job == job and "progress" in kinds
        assert (tmp_path / choice.key / RESULT).is_file()
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
        config, choice = small(**rules), Choice(("mid_attention",), "lora", 1e-3, 2)
        executor.submit(prepare_job(tmp_path))
        until_end(executor)
        run = tmp_path / choice.key
        job = Spec(config, load_space("digits"), choice, tmp_path, "search", "holdout", 32).as_job(run)
        executor.submit({**job, "rung": 0.4})
        assert until_end(executor).kind == "done" and not (run / RESULT).exists()
        (at_rung,) = read_rungs(run, config)
        executor.submit({**job, "rung": None})
        assert until_end(executor).kind == "done"
        result = read_json(run / RESULT)
        assert result["rungs"] == [at_rung] and (at_rung["n_steps"], result["n_steps"]) == (4, 10)
        # none was taken twice
        assert [row["steps"] for row in read_json(run / TRAINING)["shards"]] == [2] * 5

    def test_what_breaks_is_a_failed_attempt_with_its_traceback(self, executor, tmp_path):
        executor.submit({"confirm": str(tmp_path / "none")})
        end = until_end(executor)
        assert end.kind == "stop" and "is no run folder" in end.detail["reason"]
        executor.submit({"prepare": str(tmp_path), "config": 7})
        end = until_end(executor)
        assert (
            end.kind == "failed"
            and "Traceback" in end.detail["traceback"]
            and "log.txt" in end.detail["reason"]
            and executor.free() == 1
        )

    def test_a_users_error_ends_the_job_with_its_line(self, executor, tmp_path):
        executor.submit(prepare_job(tmp_path, base="./none-such"))
        end = until_end(executor)
        assert end.kind == "stop" and "no such folder" in end.detail["reason"] and executor.free() == 1


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
        end.kind == "lost"
        and end.detail["reason"] == "its worker process died (signal 9)"
        and local.free() == 1
    )
    local.submit(prepare_job(tmp_path))
    assert until_end(local).kind == "prepared"


def test_a_job_that_is_frozen_past_its_time_limit_is_ended_for_good(local, tmp_path):
    local.time_limit_seconds = 3
    local.submit({"trial": str(tmp_path)})
    frozen = local.workers[0].process
    os.kill(frozen.pid, signal.SIGSTOP)
    end = until_end(local)
    assert end.kind == "lost" and "longer than search.time_limit_minutes (0.05)" in end.detail["reason"]
    assert frozen.wait() == -signal.SIGKILL


def test_a_job_that_is_cancelled_ends_at_once(local, tmp_path):
    job = prepare_job(tmp_path)
    local.submit(job)
    local.cancel(job)
    assert until_end(local).kind == "lost" and local.free() == 1


def test_gpus_are_dealt_out_in_turn(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [choose_gpus(i)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["2", "5", "2"]


class Scripted(Executor):
    """Ends jobs as a script says, one after another."""

    def __init__(self, *script):
        self.script, self.taken = list(script), []

    def free(self):
        return 1

    def submit(self, job):
        self.taken.append(job)

    def events(self, timeout_seconds):
        kind = self.script.pop(0)
        yield Event(self.taken[-1], kind, {"reason": f"{kind} {len(self.taken)}"})

    def cancel(self, job): ...

    def close(self): ...


class TestJobs:
    def test_what_fails_twice_is_tried_a_third_time(self, tmp_path):
        job, executor = {"trial": str(tmp_path)}, Scripted("failed", "lost", "done")
        (end,) = JobQueue(executor, lambda event: None).run([job])
        assert end.kind == "done" and executor.taken == [job] * 3
        assert [failure["reason"] for failure in read_failures(tmp_path)] == ["failed 1", "lost 2"]

    def test_three_failures_are_the_end_even_across_orchestrators(self, tmp_path):
        job = {"trial": str(tmp_path)}
        note_failure(tmp_path, "before")
        executor = Scripted("failed", "lost")
        (end,) = JobQueue(executor, lambda event: None).run([job])
        assert end.kind == "given up" and end.detail["reason"] == "lost 2"

    def test_what_the_user_must_mend_ends_it_all(self, tmp_path):
        with pytest.raises(MemControlError, match="stop 1"):
            list(JobQueue(Scripted("stop"), lambda event: None).run([{"confirm": str(tmp_path)}]))


def test_a_second_attempt_takes_a_folder_over(tmp_path):
    """As when a worker that was frozen wakes up: it writes nothing more."""
    first = begin_attempt(tmp_path)
    first.progress("train", 1, 10)
    assert read_progress(tmp_path)["done"] == 1
    second = begin_attempt(tmp_path)
    assert second.current() and not first.current() and read_progress(tmp_path) is None
    first.written_at = 0.0
    with pytest.raises(Superseded):
        first.progress("train", 2, 10)
    with open(tmp_path / "attempts.jsonl", "a") as file:
        file.write('{"identity": "cut sh')
    assert second.current() and len(read_attempts(tmp_path)) == 2


def test_out_of_memory_goes_on_with_smaller_forwards(tmp_path, monkeypatch):
    import torch

    from memcontrol.execution.worker import run_job
    from memcontrol.trial import run
    from memcontrol.trial.loaded import LoadedModels

    sizes = []

    def fine_tuned(folder, spec, loaded, progress, rung):
        sizes.append(spec.config.inner.micro_batch_size)
        if len(sizes) < 2 or spec.config.search.accumulate_on_oom is False:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(run, "fine_tuned", fine_tuned)
    for allowed, kind in ((True, "done"), (False, "failed")):
        sizes.clear()
        spec = Spec(
            small(search={"accumulate_on_oom": allowed}),
            load_space("digits"),
            Choice(("mid_attention",), "lora", 1e-3, 2),
            tmp_path,
            "search",
            "holdout",
            32,
        )
        said = []
        run_job(spec.as_job(tmp_path / str(allowed)), LoadedModels(), said.append)
        assert said[-1]["event"] == kind and sizes == ([None, 8] if allowed else [None])
    assert said[-1]["reason"].startswith("out of memory on the GPU: CUDA out of memory")


def test_a_job_of_which_nothing_is_known_yet_is_no_error(tmp_path):
    """A second attempt has not said anything, and what the first one said no longer counts."""
    from memcontrol.core.attempts import begin_attempt
    from memcontrol.execution.ray_cluster import Place, Ray
    from memcontrol.execution.slurm_cluster import Running, Slurm

    begin_attempt(tmp_path).progress("train", 1, 2)
    begin_attempt(tmp_path)
    for executor, one in (
        (object.__new__(Ray), Place(job={"trial": str(tmp_path)}, told={"done": 1}, began=0.0)),
        (object.__new__(Slurm), Running({"trial": str(tmp_path)}, None, 0.0, told={"done": 1})),
    ):
        executor.time_limit_seconds = None
        assert (
            list(
                executor.watched(one, one.job) if isinstance(one, Place) else executor.watched(one, "PENDING")
            )
            == []
        )


def test_preparing_has_no_time_limit():
    assert (
        pick_time_limit({"trial": "x"}, 3.0) == 3.0
        and pick_time_limit({"prepare": "x"}, 3.0) is None
        and pick_time_limit({"trial": "x"}, None) is None
    )


def test_what_sbatch_refuses_is_the_users_to_mend():
    from submitit.core.utils import FailedJobError

    from memcontrol.execution.slurm_cluster import Slurm

    class Refusing:
        def submit(self, *_):
            raise FailedJobError("sbatch: error: Invalid partition name specified")

    slurm = object.__new__(Slurm)
    slurm.running, slurm.submitter = [], Refusing()
    with pytest.raises(
        MemControlError, match="sbatch refuses the job: .*Invalid partition.*; check the slurm keys"
    ):
        slurm.submit({"trial": "x"})
