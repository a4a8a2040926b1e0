"""How good a front is after n trials: this project's sampler and Optuna's on problems of 13 bits whose true
front is known, and on some of 9 bits with a budget and a ratio beside, four workers that end in random order,
ten seeds; the share of choices that were asked for twice."""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from benchmarks._problems import (
    FAMILIES,
    N_BITS,
    N_BUDGETS,
    N_FEWER,
    N_RATIOS,
    Problem,
    ProblemWithSettings,
)
from memcontrol.reading.threads import count_cores

N_SEEDS, N_WORKERS, CHECKS = int(os.environ.get("SEEDS", "10")), 4, (20, 50, 100)
OURS = ("auto", "tpe", "nsga2", "random")
OPTUNAS = ("Optuna's TPE", "Optuna's multivariate TPE", "Optuna's NSGA-II")
SETTINGS = " with settings"
ONLY = os.environ.get("ONLY", "")
PLAIN = () if ONLY else FAMILIES
KINDS = (*PLAIN, *(f"{family}{SETTINGS}" for family in FAMILIES))
HERE = Path(__file__).parent


def run(device: str) -> list[dict]:
    tasks = [
        (family, system, seed) for family in KINDS for system in (*OURS, *OPTUNAS) for seed in range(N_SEEDS)
    ]
    with get_context("spawn").Pool(count_cores()) as pool:
        found = []
        for i, one in enumerate(pool.imap_unordered(measured, tasks)):
            found.append(one)
            print(f"\r{i + 1} of {len(tasks)}", end="", file=sys.stderr)
    rows = []
    for family in KINDS:
        for system in (*OURS, *OPTUNAS):
            own = [one for one in found if (one["family"], one["system"]) == (family, system)]
            ratios = {f"at {n}": statistics.mean(one["ratios"][n - 1] for one in own) for n in CHECKS}
            rows.append(
                {
                    "family": family,
                    "system": system,
                    **ratios,
                    "error at 50": statistics.stdev(one["ratios"][49] for one in own) / len(own) ** 0.5,
                    "twice": statistics.mean(one["twice"] for one in own),
                    "ms a draw": 1000 * statistics.median(one["seconds"] for one in own),
                }
            )
    drawn(found)
    return rows


def measured(task: tuple[str, str, int]) -> dict:
    family, system, seed = task
    make = ProblemWithSettings if family.endswith(SETTINGS) else Problem
    problem = make(family.removesuffix(SETTINGS), seed)
    search = ours if system in OURS else optunas
    started = time.perf_counter()
    seen = search(problem, system, seed)
    ratios, n = [problem.ratio(seen[: n + 1]) for n in range(len(seen))], len(seen)
    return {
        "family": family,
        "system": system,
        "seed": seed,
        "ratios": ratios,
        "twice": 1 - len(set(seen)) / n,
        "seconds": (time.perf_counter() - started) / n,
    }


def in_flight(
    ask: Callable[[int], tuple[int, ...]], tell: Callable[[int], None], rng: random.Random
) -> list[tuple[int, ...]]:
    """Trials in the order of their ends: four run at a time, and any of them ends next."""
    running: dict[int, tuple[int, ...]] = {}
    ended: list[tuple[int, ...]] = []
    for number in range(max(CHECKS) + N_WORKERS - 1):
        running[number] = ask(number)
        if len(running) == N_WORKERS:
            done = rng.choice(list(running))
            tell(done)
            ended.append(running.pop(done))
    return ended


def ours(problem: Problem, kind: str, seed: int) -> list[tuple[int, ...]]:
    """Our sampler as a search calls it, over a space of 13 groups under one method."""
    from memcontrol.core.space_yaml import parse_space
    from memcontrol.search.sampler import Sampler
    from memcontrol.study.record import Record

    has_settings = isinstance(problem, ProblemWithSettings)
    groups = [f"g{i:02}" for i in range(N_FEWER if has_settings else N_BITS)]
    budgets = {"low": 1000, "high": 1000 * 2 ** (N_BUDGETS - 1), "log": True, "steps": N_BUDGETS - 1}
    space = parse_space(
        {
            "groups": {g: f"{g}.*" for g in groups},
            "over": {"inner.budget_images": budgets, "inner.skip.ratio": [1.0 + i for i in range(N_RATIOS)]}
            if has_settings
            else {},
            "learning_rate": {"lora": [1e-3, 1.09e-3], "full": [1e-4, 1e-3]},
            "rank": [4],
            "always": [{"method": "bias", "patterns": ["x.*"]}],
        },
        "bits",
    )
    # by trials, not by cost, as Optuna's are
    sampler, records = Sampler(space, seed, 2, (), kind, weigh_cost=False), []

    def mask(choice) -> tuple[int, ...]:
        own = dict(choice.settings)
        places = (space.over[key].options.index(own[key]) for key in space.over)
        return (*(int(group in choice.groups) for group in groups), *places)

    def ask(number: int) -> tuple[int, ...]:
        records.append(Record(number, "RUNNING", (sampler.draw(records),)).as_running())
        return mask(records[-1].choice)

    def tell(number: int) -> None:
        values = dict(zip(("a", "b"), problem.value(mask(records[number].choice))))
        records[number] = replace(
            records[number], state="COMPLETE", objectives=dict.fromkeys(values, "minimize"), searched=values
        )

    return in_flight(ask, tell, random.Random(seed))


def optunas(problem: Problem, system: str, seed: int) -> list[tuple[int, ...]]:
    """Plain Optuna on 13 booleans, its samplers as their defaults are."""
    import warnings

    import optuna

    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    samplers = optuna.samplers
    sampler = {
        "Optuna's TPE": lambda: samplers.TPESampler(seed=seed),
        "Optuna's NSGA-II": lambda: samplers.NSGAIISampler(seed=seed),
        "Optuna's multivariate TPE": lambda: samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=True
        ),
    }[system]()
    study, trials = optuna.create_study(directions=["minimize"] * 2, sampler=sampler), {}

    has_settings = isinstance(problem, ProblemWithSettings)
    asked: dict[int, tuple[int, ...]] = {}

    def ask(number: int) -> tuple[int, ...]:
        trial = trials[number] = study.ask()
        n_bits = N_FEWER if has_settings else N_BITS
        bits = [int(trial.suggest_categorical(f"g{i:02}", [False, True])) for i in range(n_bits)]
        if has_settings:
            bits += [
                trial.suggest_int("budget", 0, N_BUDGETS - 1),
                trial.suggest_int("ratio", 0, N_RATIOS - 1),
            ]
        asked[number] = tuple(bits)
        return asked[number]

    def tell(number: int) -> None:
        study.tell(trials[number], problem.value(asked[number]))

    return in_flight(ask, tell, random.Random(seed))


def drawn(found: list[dict]) -> None:
    """The plot: mean hypervolume against trials, a panel for each family."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = len(KINDS) // len(FAMILIES), len(FAMILIES)
    figure, panels = plt.subplots(
        rows, columns, figsize=(14, 3.5 * rows), sharey=True, layout="constrained", squeeze=False
    )
    for panel, family in zip(panels.flat, KINDS):
        for system in (*OURS, *OPTUNAS):
            own = [one["ratios"] for one in found if (one["family"], one["system"]) == (family, system)]
            means = [statistics.mean(column) for column in zip(*own)]
            panel.plot(
                range(1, len(means) + 1),
                means,
                "-" if system in OURS else "--",
                label=system,
                linewidth=2.5 if system == "auto" else 1.2,
            )
        panel.set(title=family, xlabel="trials ended", xlim=(5, max(CHECKS)), ylim=(0.4, 1.01))
        panel.grid(alpha=0.3)
    for row in panels:
        row[0].set_ylabel("hypervolume / the true front's")
    panels[0, -1].legend(fontsize=8, loc="lower right")
    figure.savefig(HERE / "evidence" / f"sampling{f'-{ONLY}' if ONLY else ''}.png", dpi=110)
