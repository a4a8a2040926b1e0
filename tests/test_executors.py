"""One contract for every executor: a job ends exactly once, progress on the way; and what local adds: workers may die."""

import os
import signal

import pytest

from memcontrol.config import load_config
from memcontrol.errors import MemControlError
from memcontrol.executors import ENDS, Local, make_executor, visible_gpus
from memcontrol.space import Choice, load_space
from memcontrol.spec import RESULT, Spec


@pytest.fixture(params=["inline", "local"])
def executor(request):
    made = make_executor(request.param, 1)
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
        ends = [event for event in events if event.kind in ENDS]
        if ends:
            assert len(ends) == 1
            return ends[0]


class TestContract:
    def test_jobs_end_once_and_free_their_place(self, executor, tmp_path):
        assert executor.free() == 1
        executor.submit(prepare_job(tmp_path))
        assert executor.free() == 0
        end = until_end(executor)
        assert end.kind == "prepared" and end.detail["sizes"] == {"train": 32, "holdout": 64, "test": 64} and executor.free() == 1
        choice, kinds = Choice(("mid_attention",), "lora", 1e-3, 2), []
        spec = Spec(small(), load_space("digits"), choice, tmp_path, "search", "holdout", 32)
        job = spec.as_job(tmp_path / choice.key) | {"number": 7}
        executor.submit(job)
        end = until_end(executor, lambda event: kinds.append(event.kind))
        assert end.kind == "done" and end.job == job and "progress" in kinds
        assert (tmp_path / choice.key / RESULT).is_file()

    def test_a_users_error_ends_the_job_with_its_line(self, executor, tmp_path):
        executor.submit(prepare_job(tmp_path, base="./none-such"))
        end = until_end(executor)
        assert end.kind == "stop" and "no such folder" in end.detail["reason"] and executor.free() == 1


def test_a_worker_that_is_killed_is_started_again_with_its_job(tmp_path):
    executor, killed = Local(1), []
    try:
        executor.submit(prepare_job(tmp_path))
        os.kill(executor.workers[0].process.pid, signal.SIGKILL)
        killed.append(1)
        assert until_end(executor).kind == "prepared"
        executor.submit(prepare_job(tmp_path))
        worker = executor.workers[0]
        while worker.n_tries < 3:
            os.kill(worker.process.pid, signal.SIGKILL)
            worker.process.wait()
            list(executor.events(0.5))
        os.kill(worker.process.pid, signal.SIGKILL)
        end = until_end(executor)
        assert end.kind == "lost" and "died 3 times" in end.detail["reason"]
    finally:
        executor.close()


def test_gpus_are_dealt_out_in_turn(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [visible_gpus(i)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["2", "5", "2"]


def test_an_unknown_executor_is_refused():
    with pytest.raises(MemControlError, match="allowed: inline, local"):
        make_executor("ray", 1)
