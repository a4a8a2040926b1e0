"""Owns comparisons of runs: two models reward by reward, in pairs over prompts, and a run's images beside
their nearest training images."""

from __future__ import annotations

from pathlib import Path

from memcontrol.config.spec import read_spec
from memcontrol.core.errors import MemControlError
from memcontrol.core.estimate import Estimate, paired_difference
from memcontrol.core.run_folder import RunFolder
from memcontrol.core.seeds import derive_seed
from memcontrol.study.store import refuse_incomparable
from memcontrol.trial.loaded import LoadedModels
from memcontrol.trial.maps import read_maps
from memcontrol.trial.pictures import Strip, make_strip
from memcontrol.trial.samples import gather_evidence, read_estimates, read_samples


def compare(run_a: str | Path, run_b: str | Path) -> dict[str, Estimate]:
    """Run a's rewards less run b's, each with the interval that resampling their common prompts gives. Raises
    MemControlError."""
    return measure_differences(Path(run_a), Path(run_b))


def load_nearest_pairs(run: Path, title: str, loaded: LoadedModels) -> Strip:
    """What a run folder's images come nearest to. Raises MemControlError where they were dropped."""
    RunFolder(run).refuse_dropped(RunFolder(run).samples_file)
    spec, samples = read_spec(run), read_samples(run)
    evidence, maps = gather_evidence(samples, spec, loaded), read_maps(RunFolder(run))
    return make_strip(title, samples, evidence, spec, loaded, maps)


def measure_differences(a: Path, b: Path) -> dict[str, Estimate]:
    """Run a's rewards less run b's, each with the interval that resampling their common prompts gives.

    Raises MemControlError where a run has not finished, or the two were not measured with the same things.
    """
    results = [read_finished_result(run) for run in (a, b)]
    refuse_incomparable(results[0]["measured_with"], results[1]["measured_with"], f"{a} and {b}")
    (first, prompts), (second, _) = (
        read_estimates(run, result["rewards"]) for run, result in zip((a, b), results)
    )
    return {
        name: paired_difference(first[name], second[name], prompts, seed=derive_seed(0, "paired", name))
        for name in first
        if name in second
    }


def read_finished_result(run: Path) -> dict:
    place = RunFolder(run)
    if not place.result_file.is_file() or not place.contributions_file.is_file():
        raise MemControlError(
            f"{run} is no finished run folder: it has no {place.result_file.name} or no "
            f"{place.contributions_file.name}"
        )
    return place.read_result()
