"""Owns the calibration behind `search --dry-run`: a few short trials, as a worker runs them beside its
neighbours, and what each part took."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memcontrol.core.choice import Choice
from memcontrol.core.config import Config, load_config
from memcontrol.core.run_folder import PAIRS_PICTURE, ROUNDS, SAMPLES, SAMPLES_PICTURE
from memcontrol.core.seeds import derive_seed
from memcontrol.core.space import SearchSpace
from memcontrol.core.space_yaml import load_space
from memcontrol.core.spec import Spec
from memcontrol.model.base import ENCODE_BATCH
from memcontrol.trial.loaded import LoadedModels
from memcontrol.trial.prepare import prepare_study
from memcontrol.trial.run import measure_peak_mib, run_trial

N_STEPS, N_SAMPLED = 10, 3  # the fewest steps of each short trial; choices beside the anchors


def calibrate(
    values: dict,
    folder: Path,
    loaded: LoadedModels,
    warn: Callable[[str], None],
    progress: Callable[..., None],
) -> dict[str, Any]:
    """Runs short trials of the config in an empty folder. Returns what `predict` needs: seconds before the
    first trial (`start`), for each kind of choice the parts of its trials in seconds and bytes, those of one
    that samples twice as much and trains nothing (`twice`), samples in a batch, bytes that all trials share,
    and the peak of memory. Raises MemControlError."""
    started, config, space = time.monotonic(), load_config(values), load_space(load_config(values).space)
    prepared = prepare_study(values, folder, loaded, warn)
    n_train = config.search.count_train(prepared["sizes"]["train"])

    def run(name: str, choice: Choice, batches: int) -> dict[str, float]:
        spec = Spec(shorten_config(config, batches), space, choice, folder, "calibrate", "holdout", n_train)
        run_folder = folder / name
        spec.as_job(run_folder)
        return measure_parts(run_folder, spec, loaded)

    kinds = pick_calibration_choices(space, config.search.seed)
    run("cold", kinds["all"][0], 1)  # reads, encodes and caches
    found: dict[str, Any] = {"start": time.monotonic() - started}
    jobs = [
        *((name, choice, 1) for name, choices in kinds.items() for choice in choices),
        ("twice", kinds["none"][0], 2),
    ]
    for i, (name, choice, batches) in enumerate(jobs):
        found.setdefault(name, []).append(run(f"{name}-{i}", choice, batches))
        progress("calibrate", i + 1, len(jobs))
    shared = sum(list_file_sizes(folder).values()) - sum(
        sum(list_file_sizes(path).values()) for path in folder.iterdir() if (path / SAMPLES).exists()
    )
    return found | {"batch": ENCODE_BATCH, "shared_bytes": shared, "peak_mib": measure_peak_mib()}


def shorten_config(config: Config, batches: int) -> Config:
    """The same trial, of a few steps and samples."""
    inner = config.inner
    n_steps = max(N_STEPS, 3 * inner.ensemble.shards * inner.rounds)  # most steps must end no round
    return config.replaced(
        {
            "inner.budget_images": n_steps * inner.batch_size,
            "rewards.n_samples": batches * ENCODE_BATCH,
            "rewards.extraction": None,
            "rewards.force": True,
            "search.early_stopping": None,
        }
    )


def pick_calibration_choices(space: SearchSpace, seed: int) -> dict[str, list[Choice]]:
    """The anchors at their middle rates, and a few random choices."""
    anchors, rng = space.anchors(), random.Random(derive_seed(seed, "calibrate"))
    found = {name: [choices[len(choices) // 2]] for name, choices in anchors.items()}
    options = space.coordinates()
    points = (
        {name: rng.choice(list(values)) for name, values in options.items()} | {"rate": 0.5}
        for _ in range(N_SAMPLED)
    )
    return {**found, "sampled": [space.choice_at(point) for point in points]}


def measure_parts(folder: Path, spec: Spec, loaded: LoadedModels) -> dict[str, float]:
    """Of one short trial: seconds of a step; before the first, the ends of its rounds with them, which do not
    grow with the budget; after the last; bytes of its samples, of the rest that is kept, pictures twice since
    a dashboard's copy is, and of its checkpoints while it trains."""
    steps: list[float] = []

    def progress(stage: str, done: int, total: int, **said: object) -> None:
        if stage == "train":
            steps.append(time.monotonic())

    started = time.monotonic()
    run_trial(folder, loaded, progress)
    ended = time.monotonic()
    step = statistics.median(later - before for before, later in itertools.pairwise(steps)) if steps else 0.0
    size, rounds = list_file_sizes(folder), sum(list_file_sizes(folder / ROUNDS).values())
    samples, pictures = (
        size[folder / SAMPLES],
        sum(size[folder / name] for name in (SAMPLES_PICTURE, PAIRS_PICTURE)),
    )
    return {
        "setup": steps[-1] - len(steps) * step - started if steps else 0.0,
        "step": step,
        "after": ended - (steps[-1] if steps else started),
        "samples_bytes": samples,
        "rest_bytes": sum(size.values()) - samples - rounds + pictures,
        "rounds_bytes": rounds,
    }


def list_file_sizes(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
