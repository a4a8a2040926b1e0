"""Early stopping: who beats whom, decisions that stay, and what the search makes of them."""

import contextlib
import json

import numpy as np
import pytest
import yaml
from simulated import Simulated, search
from test_orchestrate import STEPS, STORAGE, Dead, dying

from memcontrol.config.inner import InnerConfig
from memcontrol.config.load import load_config
from memcontrol.config.search import EarlyStopping
from memcontrol.core.errors import MemControlError
from memcontrol.core.run_folder import RunFolder, locate_study_folder
from memcontrol.core.space_yaml import load_space
from memcontrol.search.early_stopping import RungResult, judge_trial
from memcontrol.search.encoding import SpaceEncoding
from memcontrol.search.surrogate import extrapolate_losses, gather_training_set, measure_moves
from memcontrol.study.opening import open_study

RULE = EarlyStopping(rungs=(0.5,), beaten_by=0.4, beyond=1.0, min_peers=3)


def test_one_beats_another_only_in_every_objective_and_beyond_error():
    own = RungResult(0, (10.0, 0.5), (0.3, 0.03))
    # by 1 and 0.1, with errors of 0.5 and 0.05
    assert own.beaten_by(RungResult(1, (9.0, 0.4), (0.4, 0.04)), 1.0)
    assert not own.beaten_by(RungResult(1, (9.6, 0.4), (0.4, 0.04)), 1.0)
    assert not own.beaten_by(RungResult(1, (1.0, 0.6), (0.4, 0.04)), 1.0)


def test_in_pairs_what_all_samples_share_cancels():
    """The second model is a little better on every sample, whose values spread widely: told in pairs, hidden
    by each one's own error."""
    rng = np.random.default_rng(0)
    first = rng.normal(10, 5, 64)
    second = first - 0.5 + rng.normal(0, 0.5, 64)
    errors = tuple(values.std(ddof=1) / 8 for values in (first, second))
    alone = [
        RungResult(i, (values.mean(),), (error,))
        for i, (values, error) in enumerate(zip((first, second), errors))
    ]
    paired = [
        RungResult(i, (values.mean(),), (error,), (values,))
        for i, (values, error) in enumerate(zip((first, second), errors))
    ]
    assert not alone[0].beaten_by(alone[1], 1.0) and paired[0].beaten_by(paired[1], 1.0)
    assert paired[0].measure_difference_error(paired[1], 0) == pytest.approx((first - second).std(ddof=1) / 8)


def test_a_maximised_objective_is_a_loss_with_its_sign_turned():
    shown = RungResult.of(
        3,
        {"fid": 9.0, "recall": 0.7, "fid_error": 0.1},
        {"fid": "minimize", "recall": "maximize"},
        {"recall": np.array([0.6, 0.8])},
    )
    assert shown.losses == (9.0, -0.7) and shown.errors == (0.1, 0.0)
    assert shown.contributions[0] is None and shown.contributions[1].tolist() == [-0.6, -0.8]


def test_it_stops_when_enough_peers_beat_it_and_the_decision_stays(tmp_path):
    own, better, worse = (
        RungResult(0, (5.0, 5.0), (0, 0)),
        RungResult(1, (4.0, 4.0), (0, 0)),
        RungResult(2, (4.0, 6.0), (0, 0)),
    )
    assert judge_trial(RunFolder(tmp_path / "few"), 0.5, own, [better, better], RULE)[
        "goes_on"
    ]  # two peers are too few
    assert judge_trial(RunFolder(tmp_path / "a"), 0.5, own, [better, worse, worse], RULE)[
        "goes_on"
    ]  # one of three
    stopped = judge_trial(RunFolder(tmp_path / "b"), 0.5, own, [better, better, worse], RULE)
    assert not stopped["goes_on"] and stopped["n_peers"] == 3
    assert judge_trial(RunFolder(tmp_path / "a"), 0.5, own, [better] * 9, RULE)["goes_on"]  # decided once
    assert judge_trial(RunFolder(tmp_path / "b"), 0.5, own, [worse] * 9, RULE) == stopped


def test_rungs_fall_on_rounds_that_leave_one_model():
    assert [InnerConfig(rounds=8).rounds_to(rung) for rung in (0.25, 0.26, 0.5)] == [2, 3, 4]
    averaged = InnerConfig(rounds=8, ensemble={"shards": 2}, redistribution={"rounds": "alternate"}, skip={})
    # odd rounds exchange images and average nothing
    assert [averaged.rounds_to(rung) for rung in (0.25, 0.3)] == [2, 4]


def study_in(folder, **rule):
    path = folder / "study.yaml"
    early = {"rungs": [0.25, 0.5], "beaten_by": 0.1, "beyond": 1.0, "min_peers": 4, **rule}
    path.write_text(
        yaml.safe_dump(
            {
                "name": "s",
                "data": "digits",
                "space": "digits",
                "inner": {"rounds": 8},
                "rewards": {"confirm": 0},
                "search": {"trials": 14, "workers": 1, "sampler": "tpe", "early_stopping": early},
            }
        )
    )
    return path


def read_state(study_file):
    config = load_config(study_file)
    folder = locate_study_folder(study_file, config.name)
    study = open_study(config, folder, study_file, create=False)
    records = study.records()
    study.close()
    return records, {record.number: folder / record.choice.key for record in records if record.choice}


def test_stopped_trials_are_kept_with_their_values_and_anchors_never_stop(tmp_path):
    study = study_in(tmp_path)
    search(study, Simulated(2)).close()
    records, runs = read_state(study)
    stopped = [record for record in records if record.state == "PRUNED"]
    assert stopped and {record.state for record in records} == {"COMPLETE", "PRUNED"} and len(records) == 17
    assert all(record.anchor is None for record in stopped) and not any(
        RunFolder(runs[record.number]).read_judgements() for record in records if record.anchor
    )
    for record in stopped:
        last = RunFolder(runs[record.number]).read_judgements()[-1]
        assert record.rungs[-1]["rung"] == last["rung"] and set(record.rungs[-1]["rewards"]) == {
            "fid",
            "memorization",
        }
        assert record.reason.startswith(
            f"stopped at {last['rung']:.0%} of its budget: beaten in every objective by "
            f"{len(last['beaten_by'])} of "
        )
        assert json.loads(RunFolder(runs[record.number]).result_file.read_text())["rungs"] == list(
            record.rungs
        )
    evidence = gather_training_set(records, SpaceEncoding(load_space("digits")), ())
    # stopped ones teach the sampler too
    assert len(evidence.values) == sum(record.anchor not in ("none", "full") for record in records)
    ended = [record for record in records if record.finished and record.anchor is None]
    if stopped[0].rungs[-1]["rung"] == 0.25:
        promised, _ = extrapolate_losses(stopped[0], measure_moves(ended))
        # as much as it fell for the others
        assert promised[0] == pytest.approx(stopped[0].rungs[-1]["rewards"]["fid"] - 7.5)


@pytest.mark.parametrize("step", [*STEPS, *STORAGE])
def test_a_restart_changes_no_decision(step, tmp_path, monkeypatch):
    """Searches over one study die one after the other; what each had decided is what the last one holds."""
    study, decided = study_in(tmp_path), {}
    for at in (12, 17, 23):
        with monkeypatch.context() as patch, contextlib.suppress(Dead):
            if step in STEPS:
                patch.setattr(*STEPS[step], dying(getattr(*STEPS[step]), at, "after"))
            else:
                from optuna.storages._cached_storage import _CachedStorage

                patch.setattr(_CachedStorage, step, dying(getattr(_CachedStorage, step), at, "after"))
            search(study, Simulated()).close()
        for path in locate_study_folder(study, "s").glob("*/judged.json"):
            known = json.loads(path.read_text())
            assert known[: len(decided.get(path, []))] == decided.get(path, [])
            decided[path] = known
    search(study, Simulated()).close()
    (records, runs), config = read_state(study), load_config(study)
    assert decided and all(
        json.loads(path.read_text())[: len(known)] == known for path, known in decided.items()
    )
    assert len(records) == 17 and {record.state for record in records} <= {"COMPLETE", "PRUNED"}
    for number, run in runs.items():
        goes_on = all(judgement["goes_on"] for judgement in RunFolder(run).read_judgements())
        assert records[number].finished == goes_on and len(
            RunFolder(run).read_rungs(config.search.rungs, config.rewards.names)
        ) == len(RunFolder(run).read_judgements())


def test_rungs_that_no_study_can_have_are_refused(tmp_path):
    with pytest.raises(MemControlError, match="rising shares"):
        load_config({"name": "s", "data": "digits", "search": {"early_stopping": {"rungs": [0.5, 0.25]}}})
    with pytest.raises(MemControlError, match="each rung needs a round of its own"):
        load_config(
            {
                "name": "s",
                "data": "digits",
                "search": {"early_stopping": {"rungs": [0.5]}},
                "inner": {"rounds": 1},
            }
        )
