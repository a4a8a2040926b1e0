"""A search with strengths and checkpoints, killed at ten moments: no training is paid twice, no record is
lost or doubled.

`python -m pytest tests/nightly/variant_kills.py`
"""

import contextlib
import json
import random
import signal
import time
from collections import Counter

import pytest
import yaml
from commands import run, started
from conftest import SMALL

from memcontrol.core.run_folder import RunFolder
from memcontrol.study.place import StudyPlace

N_KILLS = 10
STUDY = {
    **SMALL,
    "inner": {"budget_images": 640, "batch_size": 16, "rounds": 4},
    "rewards": {**SMALL["rewards"], "confirm": 1},
    "search": {
        "trials": 3,
        "workers": 2,
        "anchors": ["full"],
        "strengths": [0.5],
        "checkpoints": [0.25, 0.5],
        "over": {"inner.budget_images": [320, 640]},
        "replicates": 1,
    },
}


def read_study(path):
    with contextlib.closing(StudyPlace.load(path).open()) as study:
        return study.records(), study.inner.get_trials(deepcopy=False)


@pytest.mark.parametrize("storage", ("sqlite", "postgresql"))
def test_no_training_is_paid_twice_and_no_record_is_lost(storage, tmp_path, request):
    path = tmp_path / "killed.yaml"
    url = {} if storage == "sqlite" else {"storage": request.getfixturevalue("postgres").url}
    path.write_text(yaml.safe_dump({"name": "killed", **STUDY, **url}))
    folder, rng, ended = tmp_path / "runs" / "killed", random.Random(0), {}
    for _ in range(N_KILLS):
        n_before = len(list(folder.glob("**/result.json")))
        with started("search", path) as (process, said):
            until = time.monotonic() + 120
            while process.is_alive() and time.monotonic() < until:
                if len(list(folder.glob("**/result.json"))) >= n_before + 1:
                    break
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 1.5))
            process.kill()
            process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), [one.read_text() for one in said]
        for result, at in ended.items():
            assert result.stat().st_mtime_ns == at, f"{result} was written again"
        ended |= {one: one.stat().st_mtime_ns for one in folder.glob("**/result.json")}
    run("search", path, check=True)
    for result, at in ended.items():
        assert result.stat().st_mtime_ns == at, f"{result} was written again"

    records, trials = read_study(path)
    assert len(trials) == len(records) == 4 * 6  # of each fine-tuning all strengths and checkpoints
    assert all(record.state == "COMPLETE" for record in records)
    assert len({record.chosen for record in records}) == len(records)
    for record in records:
        training = json.loads(RunFolder(record.run).training_file.read_text())
        rounds = Counter(row["round"] for row in training.get("shards", []))
        assert rounds == ({} if record.is_variant else dict.fromkeys(range(1, 5), 1))
    for place in folder.glob("*/replicate-0"):
        training = json.loads(RunFolder(place).training_file.read_text())
        spec = json.loads(RunFolder(place).spec_file.read_text())
        is_variant = {"strength", "checkpoint"} & spec["choice"].get("settings", {}).keys()
        assert bool(training.get("shards")) == (not is_variant)
