"""The runs of one search: the folder, the spec and the job of each choice and of its replicates."""

import pytest

from memcontrol.config.load import load_config
from memcontrol.config.spec import read_spec
from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import write_json
from memcontrol.core.jobs import TrialJob
from memcontrol.core.run_folder import StudyFolder
from memcontrol.core.space_yaml import load_space
from memcontrol.search.runs import TrialRuns

CHOICE, OTHER = (Choice(("mid_attention",), "lora", rate, 2) for rate in (1e-3, 2e-3))


def open_runs(folder, **inner):
    config = load_config({"name": "s", "data": "digits", "space": "digits", "inner": inner})
    return TrialRuns(config, load_space("digits"), StudyFolder(folder), 30)


def test_run_lies_in_a_folder_of_its_choice(tmp_path):
    runs = open_runs(tmp_path)
    assert runs.locate(CHOICE).path == tmp_path / CHOICE.key != runs.locate(OTHER).path


def test_job_finds_its_spec_written(tmp_path):
    runs = open_runs(tmp_path)
    job = runs.make_job(CHOICE, 7, 0.25)
    assert job == TrialJob(tmp_path / CHOICE.key, CHOICE, 7, 0.25)
    spec = read_spec(job.folder)
    assert spec == runs.make_spec(CHOICE)
    assert (spec.purpose, spec.reference, spec.n_train) == ("search", "holdout", 30)


def test_replicate_has_a_folder_and_a_seed_of_its_own(tmp_path):
    runs = open_runs(tmp_path)
    jobs = [runs.make_job(CHOICE, 7, None), *(runs.make_replicate_job(CHOICE, 7, i) for i in (0, 1))]
    assert [job.replicate for job in jobs] == [None, 0, 1]
    assert jobs[1].folder == tmp_path / CHOICE.key / "replicate-0"
    specs = [read_spec(job.folder) for job in jobs]
    assert len({spec.seed for spec in specs}) == 3 and {spec.choice for spec in specs} == {CHOICE}


def test_replicate_is_there_once_it_has_a_result(tmp_path):
    runs = open_runs(tmp_path)
    assert not runs.has_replicate(CHOICE, 0)
    job = runs.make_replicate_job(CHOICE, 7, 0)
    assert not runs.has_replicate(CHOICE, 0)
    write_json(job.folder / "result.json", {"state": "COMPLETE"})
    assert runs.has_replicate(CHOICE, 0) and not runs.has_replicate(CHOICE, 1)


def test_run_of_another_config_is_refused(tmp_path):
    job = open_runs(tmp_path).make_job(CHOICE, 7, None)
    replicate = open_runs(tmp_path).make_replicate_job(CHOICE, 7, 0)
    before = [(one.folder / "spec.json").read_text() for one in (job, replicate)]
    other = open_runs(tmp_path, batch_size=8)
    other.check(OTHER)  # nothing is there
    for refused in (
        lambda: other.check(CHOICE),
        lambda: other.make_job(CHOICE, 7, None),
        lambda: other.has_replicate(CHOICE, 0),
        lambda: other.make_replicate_job(CHOICE, 7, 0),
    ):
        with pytest.raises(MemControlError, match="inner.batch_size"):
            refused()
    assert [(one.folder / "spec.json").read_text() for one in (job, replicate)] == before
