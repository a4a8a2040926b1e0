"""One worker of plain Optuna, as its tutorials write it: `study.optimize` on PostgreSQL, with heartbeats and
retries of failed trials.

`python -m benchmarks._heartbeat_worker URL STUDY LOG N_TRIALS SECONDS`. Every evaluation is noted in LOG,
which is no part of the recipe.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings

import optuna
from optuna.storages import RDBStorage, RetryFailedTrialCallback
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

N_GROUPS = 7
HEARTBEAT_SECONDS, GRACE_SECONDS = 5, 15


def main(url: str, name: str, log: str, n_trials: int, seconds: float) -> None:
    def note(kind: str, params: dict) -> None:
        with open(log, "a") as file:
            file.write(json.dumps({"kind": kind, "pid": os.getpid(), "params": params}) + "\n")

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        mask = [trial.suggest_categorical(f"group_{i}", [False, True]) for i in range(N_GROUPS)]
        rate = trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
        note("begun", trial.params)
        for _ in range(int(seconds / 0.05)):  # short naps: time spent stopped does not count as work
            time.sleep(0.05)
        note("finished", trial.params)
        return sum(mask) + rate, N_GROUPS - sum(mask) + rate

    warnings.simplefilter("ignore")
    storage = RDBStorage(
        url,
        engine_kwargs={"pool_pre_ping": True},
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=GRACE_SECONDS,
        failed_trial_callback=RetryFailedTrialCallback(max_retry=3),
    )
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        directions=["minimize"] * 2,
        load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(),
    )
    stop = MaxTrialsCallback(n_trials, states=(TrialState.COMPLETE,))
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < n_trials:
        study.optimize(objective, callbacks=[stop])


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), float(sys.argv[5]))
