"""The study: what is recorded, what is suggested, and when a config is refused."""

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from memcontrol.config.load import load_config
from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.space_yaml import load_space, parse_space
from memcontrol.model.adapter import format_header
from memcontrol.search.optuna_samplers import mirror_record
from memcontrol.study.opening import is_searched, open_study
from memcontrol.study.pick import choose_trial, select_front

SPACE = load_space("digits")


def opened(tmp_path, create=True, **keys):
    config = load_config({"name": "s", "data": "digits", "space": "digits", **keys})
    return open_study(config, tmp_path, tmp_path / "s.yaml", create=create)


def result(choice, fid, memorization=0.1, state="COMPLETE"):
    if state != "COMPLETE":
        return {"state": state, "choice": choice.as_dict(), "reason": "why"}
    rewards = {"fid": fid, "memorization": memorization, "copy_rate": 0.0}
    return {
        "state": state,
        "choice": choice.as_dict(),
        "rewards": rewards,
        "seconds": 1.0,
        "measured_with": {"extractor": "tiny", "n_samples": 256},
    }


def test_an_anchor_stands_for_the_best_of_its_candidates(tmp_path):
    study, candidates = opened(tmp_path), SPACE.list_anchors()["full"]
    number = study.begin(candidates, SPACE, "full")
    assert [(r.state, r.anchor, r.choice) for r in study.records()] == [("RUNNING", "full", None)]
    with pytest.raises(MemControlError, match=f"trial {number} has no choice yet"):
        study.records()[0].run  # noqa: B018
    study.finish(
        number,
        [
            result(candidates[0], 9.0),
            result(candidates[1], 7.0, 0.3),
            result(candidates[2], 0, state="PRUNED"),
        ],
    )
    record = opened(tmp_path).records()[0]
    assert (record.choice, record.values) == (candidates[1], {"fid": 7.0, "memorization": 0.3})
    assert record.as_dict()["run"] == str(tmp_path / candidates[1].key)


def test_a_trial_that_failed_keeps_its_reason(tmp_path):
    study, choice = opened(tmp_path), Choice(("up_resnet",), "lora", 2e-3, 2)
    study.finish(study.begin([choice], SPACE), [result(choice, 0, state="PRUNED")])
    record = study.records()[0]
    assert (record.state, record.reason, record.choice, record.values) == ("PRUNED", "why", choice, {})


MIXED = parse_space(
    {
        "groups": {
            "a": "a",
            "b": {"patterns": "b", "methods": ["lora", "svdiff"], "rank": [8, 16]},
            "c": {"patterns": "c", "methods": ["difffit"]},
        },
        "methods": ["lora", "svdiff", "difffit"],
        "mix": True,
        "rank": [2, 4],
        "learning_rate": dict.fromkeys(["lora", "svdiff", "difffit", "full"], [1e-4, 1e-2]),
    },
    "mixed",
)


def test_a_thousand_random_choices_survive_the_database_and_safetensors(tmp_path):
    rng, study = random.Random(0), opened(tmp_path)
    points = [
        {name: rng.choice(options) for name, options in MIXED.list_coordinates().items()}
        | {"rate": rng.random()}
        for _ in range(1000)
    ]
    choices = [MIXED.make_choice_at(point) for point in points]
    study.begin(choices, MIXED, "all")
    assert list(opened(tmp_path).records()[0].candidates) == choices
    for choice in choices:
        save_file(
            {"x": torch.zeros(1)},
            tmp_path / "x.safetensors",
            {"memcontrol": format_header({"choice": choice.as_dict()})},
        )
        with safe_open(tmp_path / "x.safetensors", "pt") as file:
            assert Choice.from_dict(json.loads(file.metadata()["memcontrol"])["choice"]) == choice


def test_a_study_keeps_its_config(tmp_path):
    opened(tmp_path)
    assert opened(tmp_path, search={"trials": 99, "workers": 1}).config.search.trials == 99
    with pytest.raises(
        MemControlError, match="begun with another config: inner.batch_size \\(16 there, 8 here\\)"
    ):
        opened(tmp_path, inner={"batch_size": 8})
    assert opened(tmp_path, create=False, inner={"batch_size": 8}).config.inner.batch_size == 16


def test_studies_and_storages_that_are_not_there(tmp_path):
    with pytest.raises(MemControlError, match="has not been searched yet; run: memcontrol search"):
        opened(tmp_path, create=False)
    for storage in ("nonsense", "sqlite:////proc/none/x.db", "mysql+nothing://x"):
        with pytest.raises(MemControlError, match="storage .* (cannot be opened|is no database URL)"):
            opened(tmp_path, storage=storage)
    (tmp_path / "text.db").write_text("this is no database, but it is long enough to be read as one" * 100)
    with pytest.raises(MemControlError, match="storage .* (cannot be opened|is no database URL)"):
        opened(tmp_path, storage="sqlite:///text.db")


def test_results_measured_with_other_things_are_refused(tmp_path):
    study, told = opened(tmp_path), result(Choice(("up_resnet",), "lora", 2e-3, 2), 9.0)
    other = {
        **result(Choice(("up_resnet",), "lora", 1e-3, 2), 8.0),
        "measured_with": {"extractor": "pixels", "n_samples": 256},
    }
    study.finish(study.begin([Choice.from_dict(told["choice"])], SPACE), [told])
    number = study.begin([Choice.from_dict(other["choice"])], SPACE)
    with pytest.raises(
        MemControlError, match=r"cannot be compared; measured with different extractor \(tiny and pixels\)"
    ):
        study.finish(number, [other])
    assert [record.state for record in study.records()] == ["COMPLETE", "RUNNING"]


def test_an_objective_may_be_maximised(tmp_path):
    """Its values stay as they are in the database; the sampler and fronts see them negated; its limit is a
    lower bound."""
    config = load_config(
        {
            "name": "s",
            "data": "digits",
            "space": "digits",
            "rewards": {"objectives": ["fid", "recall"], "limits": {"recall": 0.5}},
        }
    )
    study = open_study(
        config, tmp_path, tmp_path / "s.yaml", create=True, directions=["minimize", "maximize"]
    )
    for i, (fid, recall) in enumerate(((9.0, 0.4), (8.0, 0.6), (7.0, 0.1))):
        told = result(SPACE.choice(SPACE.select_groups("lora")[: 1 + i], "lora", 0.5), fid)
        told["rewards"]["recall"] = recall
        study.finish(study.begin([Choice.from_dict(told["choice"])], SPACE), [told])
    records = open_study(config, tmp_path, tmp_path / "s.yaml", create=False).records()
    assert [record.values["recall"] for record in records] == [0.4, 0.6, 0.1]
    assert [record.losses for record in records] == [[9.0, -0.4], [8.0, -0.6], [7.0, -0.1]]
    assert [record.number for record in select_front(records)] == [2, 1]
    assert study.inner.trials[2].constraints == {"recall": pytest.approx(0.4)}
    assert mirror_record(records[1], SPACE, study.limits).values == [8.0, -0.6]
    assert choose_trial(records, "memorization").number == 1


def test_what_was_confirmed_is_what_is_reported(tmp_path):
    study, choice = opened(tmp_path), Choice(("up_resnet",), "lora", 2e-3, 2)
    number = study.begin([choice], SPACE)
    study.finish(number, [result(choice, 9.0)])
    study.confirm(number, {"fid": 11.0, "memorization": 0.2})
    record = opened(tmp_path).records()[0]
    assert record.values == {"fid": 11.0, "memorization": 0.2} and record.searched["fid"] == 9.0
    shown = opened(tmp_path).inner.trials[0]  # as plain Optuna shows it
    assert shown.values == [11.0, 0.2]
    assert shown.user_attrs["fid"] == 11.0 and shown.user_attrs["fid (searched)"] == 9.0


@pytest.mark.parametrize("name", ["what now?", "my%20scans", "a#b & 100% c's"])
def test_a_study_lies_below_folders_of_any_name(tmp_path, name):
    folder = tmp_path / name / "runs" / "a"
    config = load_config({"name": "a", "data": "digits"})
    open_study(config, folder, tmp_path / name / "a.yaml", create=True).close()
    assert (folder / "study.db").is_file() and is_searched(config, folder, tmp_path / name / "a.yaml")
    assert [path.name for path in tmp_path.iterdir()] == [name]
