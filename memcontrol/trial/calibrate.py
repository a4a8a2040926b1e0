"""Owns the calibration behind `search --dry-run`: a few short trials, as a worker runs them beside its
neighbours, and what each part took."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from memcontrol.config.load import load_config
from memcontrol.config.settings import load_study_space
from memcontrol.config.spec import Spec
from memcontrol.config.study import Config
from memcontrol.core.choice import EVERYTHING, Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import make_private_folder
from memcontrol.core.image_parts import DIGITS
from memcontrol.core.jobs import Calibration, TrialCost
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.core.seeds import derive_seed
from memcontrol.core.space import SearchSpace
from memcontrol.model.batches import MOST_AT_A_TIME, is_out_of_memory
from memcontrol.trial.loaded import LoadedModels
from memcontrol.trial.memory import measure_peak_mib
from memcontrol.trial.prepare import prepare_study
from memcontrol.trial.run import run_trial

_N_STEPS, _N_SAMPLED = 10, 3  # the fewest steps of each short trial; choices beside the anchors
_TWICE = "twice"  # the kind of the one that samples two batches


def calibrate(
    values: dict,
    folder: Path,
    loaded: LoadedModels,
    warn: Callable[[str], None],
    progress: Callable[..., None],
) -> Calibration:
    """Runs short trials of the config in an empty folder. Raises MemControlError."""
    started, config = time.monotonic(), load_config(values)
    space = load_study_space(config)
    kept = StudyFolder(folder.parent)
    if config.data.path != DIGITS and not StudyFolder(folder).cache.exists():
        # what is read and encoded is the study's: the search finds it
        for place in (folder, kept.cache):
            make_private_folder(place)
        StudyFolder(folder).cache.symlink_to(kept.cache, target_is_directory=True)
    prepared = prepare_study(values, folder, loaded, warn, kept.image_index, progress)
    n_train = config.search.count_train(prepared["sizes"]["train"])

    def run(name: str, choice: Choice, n_batches: int) -> TrialCost:
        choice = replace(choice, settings=())  # of which the budget would be one
        spec = Spec(shorten_config(config, n_batches), space, choice, folder, "calibrate", "holdout", n_train)
        run_folder = folder / name
        spec.write(run_folder)
        try:
            return measure_parts(run_folder, spec, loaded)
        except RuntimeError as error:
            if not is_out_of_memory(error) or EVERYTHING not in choice.groups:
                raise
        raise MemControlError(
            "full fine-tuning, an anchor, does not fit into this machine's memory; set "
            "inner.low_memory_full=true, or leave it out with search.anchors=[none, all]"
        )

    # Once for all that is read, encoded and cached.
    kinds = pick_calibration_choices(space, config.search.anchors, config.search.seed)
    run("cold", kinds.get("all", kinds["sampled"])[0], 1)
    start_seconds = time.monotonic() - started

    # A short trial of each kind of choice, and one that samples twice as much.
    jobs = [
        *((kind, choice, 1) for kind, choices in kinds.items() for choice in choices),
        (_TWICE, kinds["none"][0], 2),
    ]
    costs: dict[str, list[TrialCost]] = {}
    for i, (kind, choice, n_batches) in enumerate(jobs):
        costs.setdefault(kind, []).append(run(f"{kind}-{i}", choice, n_batches))
        progress("calibrate", i + 1, len(jobs))
    (two_batches,) = costs.pop(_TWICE)
    return Calibration(
        start_seconds=start_seconds,
        batch_size=MOST_AT_A_TIME,
        shared_bytes=measure_shared_bytes(folder),
        peak_mib=measure_peak_mib(),
        by_kind={kind: tuple(found) for kind, found in costs.items()},
        two_batches=two_batches,
    )


def measure_shared_bytes(folder: Path) -> int:
    """What lies in a study's folder beside its runs."""
    runs = [path for path in folder.iterdir() if RunFolder(path).samples_file.exists()]
    cache = StudyFolder(folder).cache
    places = [folder, *([cache] if cache.is_symlink() else [])]
    whole = sum(sum(_list_file_sizes(place).values()) for place in places)
    return whole - sum(sum(_list_file_sizes(run).values()) for run in runs)


def shorten_config(config: Config, n_batches: int) -> Config:
    """The same trial, of a few steps and samples."""
    inner = config.inner
    n_steps = max(_N_STEPS, 3 * inner.ensemble.shards * inner.rounds)  # most steps must end no round
    return config.replaced(
        {
            "inner.budget_images": n_steps * inner.batch_size,
            "rewards.n_samples": n_batches * MOST_AT_A_TIME,
            "rewards.extraction": None,
            "rewards.force": True,
            "search.early_stopping": None,
        }
    )


def pick_calibration_choices(space: SearchSpace, wanted: Sequence[str], seed: int) -> dict[str, list[Choice]]:
    """The search's anchors at their middle rates, and a few random choices. No training is always among
    them: what a batch of samples takes is known from it."""
    anchors, rng = space.list_anchors({"none", *wanted}), random.Random(derive_seed(seed, "calibrate"))
    found = {name: [choices[len(choices) // 2]] for name, choices in anchors.items()}
    options = space.list_coordinates()
    points = (
        {name: rng.choice(list(values)) for name, values in options.items()} | {"rate": 0.5}
        for _ in range(_N_SAMPLED)
    )
    return {**found, "sampled": [space.make_choice_at(point) for point in points]}


def measure_parts(folder: Path, spec: Spec, loaded: LoadedModels) -> TrialCost:
    """Runs one short trial, whose spec lies in the folder. Of what it keeps, pictures count twice, since a
    dashboard's copy does too."""
    ends: list[float] = []  # of its steps

    def progress(stage: str, done: int, total: int, **said: object) -> None:
        if stage == "train":
            ends.append(time.monotonic())

    started = time.monotonic()
    run_trial(folder, loaded, progress)
    ended = time.monotonic()
    step = statistics.median(later - before for before, later in itertools.pairwise(ends)) if ends else 0.0
    run, sizes = RunFolder(folder), _list_file_sizes(folder)
    rounds, samples = sum(_list_file_sizes(run.rounds).values()), sizes[run.samples_file]
    pictures = sizes[run.samples_picture] + sizes[run.pairs_picture]
    return TrialCost(
        setup_seconds=ends[-1] - len(ends) * step - started if ends else 0.0,
        step_seconds=step,
        after_seconds=ended - (ends[-1] if ends else started),
        samples_bytes=samples,
        rest_bytes=sum(sizes.values()) - samples - rounds + pictures,
        weights_bytes=sizes.get(run.adapter_file, 0),
        rounds_bytes=rounds,
    )


def _list_file_sizes(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
