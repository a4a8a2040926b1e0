"""Searches that leave anchors out: every command goes without those that are not there."""

import json
from functools import partial
from pathlib import Path

import pytest
from commands import run
from conftest import SMALL
from simulated import Simulated, search
from test_orchestrate import study_in

from memcontrol.config.load import load_config
from memcontrol.core.choice import ANCHORS
from memcontrol.core.errors import MemControlError
from memcontrol.core.jobs import Failed, TrialJob
from memcontrol.core.run_folder import locate_study_folder
from memcontrol.study.hypervolume import find_reference_point

memcontrol = partial(run, check=True)
BY_LACK = [("all",), (), ("full", "none"), ("none", "all"), ("all", "full")]
KEPT = {"name": "s", "data": "digits"}


def test_anchors_are_all_three_unless_the_study_names_others():
    assert load_config(KEPT).search.anchors == ANCHORS
    for anchors in BY_LACK:
        assert load_config({**KEPT, "search": {"anchors": list(anchors)}}).search.anchors == anchors
    for wrong, words in (
        (["all", "all"], "search.anchors is [all, all]; give each of none, all, full once"),
        (["some"], "'search.anchors' is 'some'; it should be 'none', 'all' or 'full'"),
    ):
        with pytest.raises(MemControlError) as caught:
            load_config({**KEPT, "search": {"anchors": wrong}})
        assert words in str(caught.value)


@pytest.mark.parametrize("anchors", BY_LACK)
def test_a_search_runs_the_anchors_it_names_and_later_ones_too(tmp_path, anchors):
    file = study_in(tmp_path, anchors=list(anchors))
    study = search(file, Simulated())
    records = study.records()
    assert {record.anchor for record in records} == {*anchors, None}
    assert [record.state for record in records] == ["COMPLETE"] * (len(anchors) + 9)
    # the worst of two anchors, or of one and of the first six trials, and a tenth of their range
    known = [record for record in records if record.anchor]
    known += [] if len(anchors) > 1 else [record for record in records if not record.anchor][:6]
    point = []
    for column in zip(*(record.losses for record in known)):
        point.append(max(column) + 0.1 * (max(column) - min(column)))
    assert find_reference_point(records) == pytest.approx(point)
    study.close()
    again = search(study_in(tmp_path, anchors=list(ANCHORS)), Simulated())
    assert sorted(record.anchor for record in again.records() if record.anchor) == sorted(ANCHORS)
    assert len(again.records()) == 12
    again.close()


class Failing(Simulated):
    """Full fine-tuning, which the GPU's memory does not suffice for."""

    def ended(self, begun, end, job):
        if isinstance(job, TrialJob) and job.choice.method == "full":
            return Failed(job, "out of memory")
        return super().ended(begun, end, job)


@pytest.mark.parametrize("anchors", [("full",), ANCHORS])
def test_a_failed_anchor_is_as_good_as_none(tmp_path, anchors):
    file = study_in(tmp_path, anchors=list(anchors))
    study = search(file, Failing())
    assert find_reference_point(study.records()) is not None
    study.close()
    picked = json.loads(memcontrol("pick", file, "--json").stdout)
    assert picked["anchor"] in (None, "all")
    for command in ("front", "status", "importance"):
        assert memcontrol(command, file).stdout
    memcontrol("report", file, tmp_path / "report.html")
    assert "full fine-tuning" not in legend(tmp_path / "report.html")


def legend(page):
    return page.read_text().partition('<p class="legend">')[2].partition("</p>")[0]


@pytest.mark.parametrize("anchors", [["all"], []])
def test_a_real_study_goes_all_the_way_without_its_anchors(study_file, tmp_path, anchors):
    keys = {**SMALL["search"], "trials": 2, "anchors": anchors, "early_stopping": {"rungs": [0.5]}}
    inner = {**SMALL["inner"], "rounds": 3, "batch_size": 8}
    rewards = {**SMALL["rewards"], "confirm": 1}
    study = study_file(search={**keys, "replicates": 1}, rewards=rewards, inner=inner)
    dry = memcontrol("search", study, "--dry-run")
    said = next(line for line in dry.stdout.splitlines() if "predicted time of a run" in line)
    assert "none" not in said and "full" not in said and ("all" in said) == bool(anchors)
    memcontrol("search", study)
    trials = json.loads(memcontrol("status", study, "--json").stdout)["trials"]
    assert [trial["anchor"] for trial in trials] == [*anchors, None, None]
    front = json.loads(memcontrol("front", study, "--json").stdout)
    assert all(trial["confirmed"] and len(trial["replicates"]) == 1 for trial in front)

    picked = json.loads(memcontrol("pick", study, "--json").stdout)
    alone = memcontrol("retrain", study)
    assert "full fine-tuning is no anchor of this study (search.anchors)" in alone.stderr
    run_folder = locate_study_folder(study, "small") / "retrain" / Path(picked["run"]).name
    assert [path.parent for path in run_folder.parent.glob("*/result.json")] == [run_folder]

    memcontrol("report", study, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert ("Front and anchors" in page) == bool(anchors)
    assert ("plain PEFT" in legend(tmp_path / "report.html")) == bool(anchors)
    memcontrol("export", run_folder, tmp_path / "exported")
    assert "full fine-tuning" not in (tmp_path / "exported" / "README.md").read_text()
