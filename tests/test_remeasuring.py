"""What is done again once all trials have ended, over simulated trials: until the front stands, and each
once."""

import re
from dataclasses import replace

import pytest
import yaml
from simulated import Simulated, search
from test_orchestrate import Dead, dying

from memcontrol.core.files import write_json
from memcontrol.core.jobs import ConfirmJob, Done, Failed, TrialJob
from memcontrol.core.run_folder import RunFolder
from memcontrol.study.pick import select_front, select_to_confirm
from memcontrol.study.replicates import select_to_replicate
from memcontrol.study.store import Study


class Remeasuring(Simulated):
    """The best trials were lucky: measured again, FID is higher by `luck`. Notes what it did."""

    def __init__(self, luck=0.0, broken=None):
        super().__init__()
        self.luck, self.broken = luck, broken
        self.confirmed, self.replicated = [], []

    def ended(self, begun, end, job):
        if isinstance(job, self.broken or ()) and getattr(job, "replicate", 0) is not None:
            return Failed(job, "made up")
        if isinstance(job, ConfirmJob):
            self.confirmed.append(job.number)
            rewards = self.rewards(job.choice.as_dict())
            again = {**rewards, "fid": rewards["fid"] + self.luck}
            write_json(RunFolder(job.folder).confirmed_file, {"rewards": again})
            return Done(job)
        if isinstance(job, TrialJob) and job.replicate is not None:
            self.replicated.append((job.number, job.replicate))
        return super().ended(begun, end, job)


def study_in(folder, confirm=0, replicates=0):
    path = folder / "s.yaml"
    values = {"trials": 9, "workers": 1, "sampler": "random", "replicates": replicates}
    rewards = {"confirm": confirm}
    path.write_text(
        yaml.safe_dump(
            {"name": "s", "data": "digits", "space": "digits", "rewards": rewards, "search": values}
        )
    )
    return path


def test_front_is_confirmed_until_it_stands(tmp_path):
    """Each trial once; those that move up as the lucky ones fall back are measured in their turn."""
    executor = Remeasuring(luck=3.0)
    study = search(study_in(tmp_path, confirm=2), executor)
    records = study.records()
    assert select_to_confirm(records) == [] and all(record.confirmed for record in select_front(records))
    assert len(set(executor.confirmed)) == len(executor.confirmed)
    confirmed = [record for record in records if record.confirmed]
    assert {record.number for record in confirmed} == {*executor.confirmed}
    for record in confirmed:
        assert record.confirmed["fid"] == pytest.approx(record.searched["fid"] + 3)
    at_first = select_front([replace(record, confirmed={}) for record in records])
    assert {record.number for record in at_first} < {*executor.confirmed}
    study.close()


def test_confirmations_that_are_there_are_taken_as_they_are(tmp_path, monkeypatch):
    """As after a crash between the measuring and its record."""
    path, executor = study_in(tmp_path, confirm=2), Remeasuring()
    with monkeypatch.context() as patch, pytest.raises(Dead):
        patch.setattr(Study, "confirm", dying(Study.confirm, 1, "before"))
        search(path, executor)
    assert executor.confirmed
    again = Remeasuring()
    study = search(path, again)
    assert again.confirmed == [] and select_to_confirm(study.records()) == []
    assert {record.number for record in study.records() if record.confirmed} == {*executor.confirmed}
    study.close()


def test_front_is_fine_tuned_again_as_often_as_the_config_says(tmp_path):
    path, executor = study_in(tmp_path, replicates=2), Remeasuring()
    study = search(path, executor)
    records = study.records()
    assert select_to_replicate(records, 2) == []
    again = [record.number for record in records if record.replicates]
    assert executor.replicated == [(number, i) for number in again for i in (0, 1)]
    assert any(record.anchor == "full" and record.replicates for record in records)
    for record in records:
        stored = [RunFolder(record.run).replicate(i) for i in range(len(record.replicates))]
        assert list(record.replicates) == [run.read_result()["rewards"] for run in stored]
    study.close()
    executor = Remeasuring()
    search(path, executor).close()
    assert executor.replicated == []  # nothing is done twice


@pytest.mark.parametrize(
    "kind, keys, words",
    [
        (ConfirmJob, {"confirm": 2}, "cannot be measured again, and counts as it was searched: "),
        (TrialJob, {"replicates": 1}, "could not be fine-tuned again from another seed: "),
    ],
    ids=["confirmation", "replicate"],
)
def test_trial_that_cannot_be_done_again_is_named_and_left_out(kind, keys, words, tmp_path):
    """By the search that meets it; the next one tries again."""
    file, said = study_in(tmp_path, **keys), []
    executor = Remeasuring(broken=kind)
    study = search(file, executor, lambda event: said.append(getattr(event, "text", "")))
    assert any(re.fullmatch(rf"trial \d+ {words}made up", line) for line in said)
    assert not any(record.confirmed or record.replicates for record in study.records())
    study.close()
    study = search(file, Remeasuring())
    assert any(record.confirmed or record.replicates for record in study.records())
    study.close()
