"""What the machine did to a trial, or code of the user's, is no property of its choice: later searches try it
again, with a bound."""

import json
import shutil

import pytest
import yaml
from simulated import Simulated, search
from test_orchestrate import study_in

from memcontrol.commands.front import front
from memcontrol.commands.status import status
from memcontrol.core.errors import MemControlError, TrialsKeepFailing
from memcontrol.core.jobs import ConfirmJob, Lost, TrialJob
from memcontrol.study.retries import N_TRIALS


class Broken(Simulated):
    """A machine on which the trials that `is_lost` says are lost, every time."""

    def __init__(self, is_lost):
        super().__init__()
        self.is_lost = is_lost

    def ended(self, begun, end, job):
        if isinstance(job, TrialJob) and self.is_lost(job):
            return Lost(job, "it ran longer than search.time_limit_minutes (0.02)")
        return super().ended(begun, end, job)


def is_anchor(job):
    return job.number < 3


def test_anchors_that_a_machine_lost_are_tried_again_by_the_next_search(tmp_path):
    file = study_in(tmp_path)
    with pytest.raises(TrialsKeepFailing, match="the same command tries them again"):
        search(file, Broken(is_anchor))
    assert [record.state for record in status(file)] == ["FAIL"] * 3
    study = search(file, Simulated())
    records = study.records()
    assert study.attributes["reference"], "the hypervolume has its anchors"
    study.close()
    anchors = [record for record in records if record.anchor]
    assert [record.anchor for record in anchors] == ["none", "all", "full"] * 2
    assert [record.state for record in anchors] == ["FAIL"] * 3 + ["COMPLETE"] * 3
    assert [record.anchor for record in records[:6]] == ["none", "all", "full"] * 2, "before what is sampled"
    assert sum(record.anchor is None and record.finished for record in records) == 9


def test_a_sampled_choice_that_a_machine_lost_is_tried_again_before_new_ones(tmp_path):
    file = study_in(tmp_path)

    def is_lost(job):
        return job.number in (4, 6)

    search(file, Broken(is_lost)).close()
    first = status(file)  # failed ones are made up for by further choices
    assert sum(record.finished for record in first) == 12 and len(first) == 14
    search(file, Simulated()).close()
    assert status(file) == first, "there is nothing left to make up for"
    lost = [record.candidates for record in first if record.state == "FAIL"]
    study_in(tmp_path, trials=10)
    search(file, Simulated()).close()
    assert [record.candidates for record in status(file)[14:]] == lost[:1] or len(status(file)) == 15
    again = status(file)[14]
    assert again.candidates == lost[0] and again.finished


def test_what_fails_in_search_after_search_is_left_alone(tmp_path):
    file = study_in(tmp_path)
    for _ in range(N_TRIALS):
        search(file, Broken(lambda job: job.choice.method == "full")).close()
    before, said = status(file), []
    full = [record for record in before if record.anchor == "full"]
    assert len(full) == N_TRIALS and all(record.state == "FAIL" for record in full)
    search(file, Simulated(), lambda event: said.append(getattr(event, "text", ""))).close()
    assert status(file) == before
    assert any("the anchor 'full' has failed in 3 trials and is left alone" in line for line in said)


def test_nothing_is_given_up_while_all_fails(tmp_path):
    """A dead card, under a service manager that begins the search again and again."""
    file = study_in(tmp_path)
    for _ in range(N_TRIALS + 2):
        with pytest.raises(TrialsKeepFailing):
            search(file, Broken(lambda job: True))
    search(file, Simulated()).close()
    finished = [record for record in status(file) if record.finished]
    assert {record.anchor for record in finished} == {"none", "all", "full", None} and len(finished) == 12


def test_the_reasons_of_earlier_attempts_are_kept(tmp_path):
    file = study_in(tmp_path)
    with pytest.raises(TrialsKeepFailing):
        search(file, Broken(is_anchor))
    search(file, Simulated()).close()
    kept = sorted((tmp_path / "runs" / "s").glob("*/failures-0.json"))
    assert len(kept) == 7 and all("time_limit" in json.loads(path.read_text())[0]["reason"] for path in kept)


OWN = """
from pathlib import Path
def mine(evidence):
    flag = Path(__file__).with_name("flag")
    if not flag.exists():
        return float(evidence.images.mean())
    if flag.read_text() == "raise":
        raise ValueError("no luck")
    return float("nan")
"""


@pytest.mark.parametrize("how, words", [("raise", "failed: ValueError: no luck"), ("nan", "gave nan")])
def test_an_own_reward_that_fails_fails_its_trial_and_the_search_goes_on(how, words, tmp_path, study_file):
    """Prepared well, broken when the trials are scored, mended again."""
    from memcontrol.commands.search import search as search_really
    from memcontrol.execution import worker

    (tmp_path / "own.py").write_text(OWN)
    rewards = {"objectives": ["kid", "own.py:mine"], "n_samples": 8, "sampling_steps": 1, "confirm": 0}
    file = study_file(rewards=rewards)
    began = worker.attempt_trial
    with pytest.MonkeyPatch.context() as patch:

        def attempt(job, loaded, say):
            (file.parent / "flag").write_text(how)
            return began(job, loaded, say)

        (file.parent / "own.py").write_text(OWN)
        patch.setitem(worker._RUN, TrialJob, attempt)
        with pytest.raises(MemControlError, match=f"3 trials in a row failed for good.*{words}"):
            search_really(file, quiet=True)
    records = status(file)
    assert [record.state for record in records] == ["FAIL"] * 3 and all(words in r.reason for r in records)
    runs = [path for path in (file.parent / "runs").glob("*/*/attempts.jsonl")]
    assert all(len(path.read_text().splitlines()) == 1 for path in runs), "trying again would give the same"
    (file.parent / "flag").unlink()
    assert len(search_really(file, quiet=True)) == 4


class StopsBeforeConfirming(Simulated):
    def submit(self, job):
        if isinstance(job, ConfirmJob):
            raise KeyboardInterrupt
        super().submit(job)


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_front_whose_folders_are_lost_counts_as_it_was_searched(tmp_path, is_lost):
    file = study_in(tmp_path)
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**values, "storage": "sqlite:///kept.db", "rewards": {"confirm": 1}}))
    with pytest.raises(KeyboardInterrupt):
        search(file, StopsBeforeConfirming())
    if is_lost:
        shutil.rmtree(tmp_path / "runs")
    said = []
    search(file, Simulated(), lambda event: said.append(getattr(event, "text", ""))).close()
    lines = [line for line in said if "cannot be measured again" in line]
    on_front = front(file)
    assert bool(lines) == is_lost and all(bool(record.confirmed) != is_lost for record in on_front)
