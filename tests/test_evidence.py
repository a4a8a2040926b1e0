"""A user's own rewards, limits, and what a search makes of them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from memcontrol.config import load_config
from memcontrol.errors import MemControlError
from memcontrol.evidence import Evidence, Views, check_rewards, load_function, score

OWN = '''
"""Rewards of a user."""
def brightness(evidence):
    return abs(evidence.generated.pixels.mean() - evidence.holdout.pixels.mean())

def broken(evidence):
    return "very good"
'''


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(OWN)
    return path


def views(n, seed):
    pixels = np.random.default_rng(seed).random((n, 3072)).astype(np.float32)
    return Views(pixels, pixels[:, :32])


EVIDENCE = Evidence(views(40, 0), views(20, 1), views(30, 2))


def test_short_forms_name_the_objectives(own):
    study = own.parent / "s.yaml"
    for written, names in (("my_rewards.py:brightness", ("brightness",)), (["kid", "my_rewards.py:brightness"], ("kid", "brightness"))):
        study.write_text(yaml.safe_dump({"name": "s", "data": "digits", "rewards": written}))
        rewards = load_config(study).rewards
        assert rewards.names == names and rewards.functions == {"brightness": f"{own}:brightness"}
        check_rewards(rewards, 64)
        assert load_config(load_config(study).model_dump(mode="json")).rewards == rewards


def test_a_users_reward_is_a_number_of_the_evidence(own):
    expected = abs(EVIDENCE.generated.pixels.mean() - EVIDENCE.holdout.pixels.mean())
    assert score(EVIDENCE, {"brightness": f"{own}:brightness"})["brightness"] == pytest.approx(float(expected))
    with pytest.raises(MemControlError, match="gave 'very good'; it must give a finite number"):
        score(EVIDENCE, {"broken": f"{own}:broken"})


def test_mistakes_in_a_users_file_are_named(own):
    for place, words in ((f"{own}:beauty", "has no function 'beauty'"), (f"{own}x:brightness", "no such file")):
        with pytest.raises(MemControlError, match=words):
            load_function(place)
    own.write_text("1 / 0")
    with pytest.raises(MemControlError, match="cannot be imported: ZeroDivisionError"):
        load_function(f"{own}:brightness")
    config = load_config({"name": "s", "data": "digits", "rewards": {"limits": {"beauty": 1.0}}})
    with pytest.raises(MemControlError, match="rewards.limits: 'beauty' is unknown"):
        check_rewards(config.rewards, 64)


def test_a_search_with_a_users_reward_and_a_limit(own, study_file):
    """Three objectives, one the user's, and a limit that every trial of so short a training breaks or keeps."""
    import optuna

    rewards = {
        "objectives": ["fid", "memorization", "my_rewards.py:brightness"], "limits": {"fid": 1e-3, "copy_rate": 1.0}, "n_samples": 256, "sampling_steps": 1
    }  # fmt: skip
    study = study_file(rewards=rewards)
    run = lambda *args: subprocess.run([sys.executable, "-m", "memcontrol.cli", *args], capture_output=True, text=True)
    done = run("search", str(study))
    assert done.returncode == 0, done.stderr
    trials = json.loads(run("status", str(study), "--json").stdout)
    assert all(list(trial["values"]) == ["fid", "memorization", "brightness"] and trial["values"]["brightness"] > 0 for trial in trials)
    stored = optuna.load_study(study_name="small", storage=f"sqlite:///{study.parent}/runs/small/study.db").trials
    for trial in stored:
        assert trial.constraints == {"fid": pytest.approx(trial.values[0] - 1e-3), "copy_rate": pytest.approx(trial.user_attrs["rewards"]["copy_rate"] - 1.0)}
    assert json.loads(run("pick", str(study), "--json").stdout)["values"]["brightness"] > 0
