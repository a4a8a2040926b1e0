"""Retraining: which runs it takes, in which folders, at which budget; trials are only simulated."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from simulated import Simulated, search

import memcontrol.commands.retrain as retraining
from memcontrol.commands.retrain import Retraining, has_result, log_retraining, run_retraining
from memcontrol.config.differing import find_differing_keys
from memcontrol.config.load import load_config
from memcontrol.config.spec import read_spec
from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import write_json
from memcontrol.core.jobs import Done, Failed, TrialJob
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.core.space_yaml import load_space

CHOICE = Choice(("mid_attention",), "lora", 1e-3, 2)
FULL = load_space("digits").list_anchors()["full"][1]
N_TRAIN = 40  # images, of which a search saw a quarter


@pytest.fixture
def plan(tmp_path):
    folder = StudyFolder(tmp_path / "s")
    rows = [{"name": str(i), "caption": "a digit", "digest": str(i)} for i in range(N_TRAIN)]
    write_json(folder.split_file, {"source": "digits", "resolution": 32, "parts": {"train": rows}})
    config = load_config(
        {
            "name": "s",
            "data": "digits",
            "space": "digits",
            "inner": {"budget_images": 100, "batch_size": 4},
            "search": {"train_fraction": 0.25},
        }
    )
    return Retraining(folder, config, load_space(config.space), CHOICE, FULL)


class Ending(Simulated):
    """Every trial ends as it is told."""

    def __init__(self, state="COMPLETE"):
        super().__init__()
        self.state = state

    def ended(self, begun, end, job):
        if self.state == "COMPLETE" or not isinstance(job, TrialJob):
            return super().ended(begun, end, job)
        if self.state == "FAIL":
            return Failed(job, "made up")
        told = {"state": self.state, "choice": job.choice.as_dict(), "reason": "the loss is not finite"}
        write_json(RunFolder(job.folder).result_file, told)
        return Done(job)


def retrain(plan, state="COMPLETE"):
    """The results, and the events of trials that were shown."""
    shown = []
    results = run_retraining(plan, Ending(state), shown.append)
    return results, [event for event in shown if isinstance(event.job, TrialJob)]


def test_runs_lie_in_the_studys_folder_and_full_fine_tuning_has_one_for_every_pick(plan, tmp_path):
    own, full = (plan.folder.path / "retrain" / choice.key for choice in (CHOICE, FULL))
    assert not plan.is_full and plan.choices == {"pick": CHOICE, "baseline": FULL}
    assert plan.runs == {"pick": own, "baseline": full}
    elsewhere = replace(plan, out=tmp_path / "out")
    assert elsewhere.runs == {"pick": tmp_path / "out", "baseline": full}


def test_full_fine_tuning_itself_is_one_run(plan, tmp_path):
    for out in (None, tmp_path / "out"):
        picked = replace(plan, choice=FULL, out=out)
        run = out or plan.folder.path / "retrain" / FULL.key
        assert picked.is_full and set(picked.runs.values()) == {run} == set(picked.make_specs())


def test_specs_take_as_many_passes_over_all_training_images(plan):
    specs = plan.make_specs()
    assert {run: spec.choice for run, spec in specs.items()} == {
        plan.runs["pick"]: CHOICE,
        plan.runs["baseline"]: FULL,
    }
    for spec in specs.values():
        assert spec.n_train == N_TRAIN
        assert spec.config.inner.budget_images / N_TRAIN == 100 / (0.25 * N_TRAIN) == 10
        assert find_differing_keys(plan.config, spec.config) == ["inner.budget_images (100 there, 400 here)"]
        assert (spec.purpose, spec.reference, spec.study_folder) == ("retrain", "test", plan.folder.path)
    assert len({spec.sampling_seed for spec in specs.values()}) == 1  # the same prompts and noise for both


@pytest.mark.parametrize("fraction, budget", [(1.0, 100), (0.3, 333), (0.6, 167)])
def test_budget_is_a_whole_number_of_images(plan, fraction, budget):
    one = replace(plan, config=plan.config.replaced({"search.train_fraction": fraction}))
    assert {spec.config.inner.budget_images for spec in one.make_specs().values()} == {budget}


def test_what_is_there_is_not_trained_again(plan):
    results, shown = retrain(plan)
    assert {event.job.folder for event in shown} == set(plan.runs.values()) and len(shown) == 2
    assert [Choice.from_dict(results[name]["choice"]) for name in ("pick", "baseline")] == [CHOICE, FULL]
    assert [event.job.number for event in shown] == [None, None]  # no trial of the study
    assert retrain(plan) == (results, [])
    RunFolder(plan.runs["pick"]).result_file.unlink()
    again, shown = retrain(plan)
    assert again == results and [event.job for event in shown] == [TrialJob(plan.runs["pick"], CHOICE)]


def test_full_fine_tuning_itself_is_trained_once(plan):
    results, shown = retrain(replace(plan, choice=FULL))
    assert len(shown) == 1 and results["pick"] == results["baseline"]
    assert retrain(plan)[1][0].job.choice == CHOICE  # another pick takes the baseline as it is


def test_what_fails_three_times_is_named_with_its_reason(plan):
    with pytest.raises(MemControlError, match=rf"{plan.runs['pick']} failed 3 times: made up"):
        retrain(replace(plan, full=CHOICE), "FAIL")


def test_what_ends_without_a_model_is_named_and_trained_again(plan):
    with pytest.raises(MemControlError, match="ended as PRUNED: the loss is not finite"):
        retrain(plan, "PRUNED")
    spec = plan.make_specs()[plan.runs["pick"]]
    assert not has_result(plan.runs["pick"], spec)
    assert retrain(plan)[0]["pick"]["state"] == "COMPLETE"


def test_folder_with_the_result_of_another_choice_is_refused(plan, tmp_path):
    out = tmp_path / "out"
    retrain(replace(plan, out=out))
    before = RunFolder(out).result_file.read_text()
    other = replace(plan, out=out, choice=Choice(("up_attention",), "lora", 1e-3, 2))
    with pytest.raises(MemControlError, match="holds the result of another choice; give another folder"):
        retrain(other)
    assert RunFolder(out).result_file.read_text() == before and read_spec(out).choice == CHOICE


def test_folder_of_another_config_is_refused(plan):
    retrain(plan)
    longer = replace(plan, config=plan.config.replaced({"inner.budget_images": 200}))
    with pytest.raises(MemControlError, match=r"inner.budget_images \(400 there, 800 here\)"):
        retrain(longer)


def test_log_of_the_study_tells_of_it(plan):
    with log_retraining(plan) as show:
        show(Done(TrialJob(plan.runs["pick"], CHOICE)))
    begins, line, ends = plan.folder.log_file.read_text().splitlines()
    assert " begins: retrain: " in begins and ends.endswith("INFO ended")
    assert line.endswith(f"INFO {CHOICE.key}: lora r2, lr 0.001, 1/6 groups: done")


def test_function_gives_each_result_with_its_run(tmp_path, monkeypatch):
    """Of a study over simulated trials: the pick by its number, beside full fine-tuning as the anchor found
    it."""

    @contextlib.contextmanager
    def open_simulated(config, folder, command):
        yield Simulated()

    monkeypatch.setattr(retraining, "open_executor", open_simulated)
    path = tmp_path / "s.yaml"
    values = {"trials": 1, "workers": 1, "sampler": "random"}
    path.write_text(
        yaml.safe_dump(
            {"name": "s", "data": "digits", "space": "digits", "rewards": {"confirm": 0}, "search": values}
        )
    )
    study = search(path, Simulated())
    full, last = (next(r for r in study.records() if r.anchor == anchor) for anchor in ("full", None))
    folder = StudyFolder(study.folder)
    study.close()
    row = {"name": "0", "caption": "", "digest": "0"}
    split = {"source": "digits", "resolution": 32, "parts": {"train": [row] * N_TRAIN}}
    write_json(folder.split_file, split)
    results = retraining.retrain(path, trial=last.number, out=tmp_path / "out")
    assert {name: result["run"] for name, result in results.items()} == {
        "pick": str(tmp_path / "out"),
        "baseline": str(folder.retrained(full.chosen).path),
    }
    for result in results.values():
        assert result == RunFolder(Path(result.pop("run"))).read_result()
