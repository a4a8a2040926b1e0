"""Owns comparisons of runs: two models figure by figure, in pairs over prompts, and a run's images beside their nearest training
images."""

from __future__ import annotations

from pathlib import Path

from memcontrol.bench import Bench
from memcontrol.errors import MemControlError
from memcontrol.estimate import Estimate, paired_difference
from memcontrol.files import read_json
from memcontrol.gallery import Strip, strip_of
from memcontrol.scoring import evidence, read_contributions, read_samples
from memcontrol.seeds import seed_of
from memcontrol.spec import CONTRIBUTIONS, RESULT, read_spec
from memcontrol.study import refuse_incomparable


def nearest_pairs(run: Path, title: str, bench: Bench) -> Strip:
    """What a run folder's images come nearest to."""
    spec, samples = read_spec(run), read_samples(run)
    return strip_of(title, samples, evidence(samples, spec, bench), spec, bench)


def differences(a: Path, b: Path) -> dict[str, Estimate]:
    """Run a's figures less run b's, each with the interval that resampling their common prompts gives.

    Raises MemControlError where a run has not finished, or the two were not measured with the same things.
    """
    results = [finished_result(run) for run in (a, b)]
    refuse_incomparable(results[0]["measured_with"], results[1]["measured_with"], f"{a} and {b}")
    first, second = read_contributions(a), read_contributions(b)
    prompts, found = first["prompts"], {}
    for name in first:
        if name != "prompts" and name in second:
            one, other = (Estimate(result["rewards"][name], contributions=rows[name]) for result, rows in zip(results, (first, second)))
            found[name] = paired_difference(one, other, prompts, seed=seed_of(0, "paired", name))
    return found


def finished_result(run: Path) -> dict:
    if not (run / RESULT).is_file() or not (run / CONTRIBUTIONS).is_file():
        raise MemControlError(f"{run} is no finished run folder: it has no {RESULT} or no {CONTRIBUTIONS}")
    return read_json(run / RESULT)
