"""What differential privacy costs and gives: membership and quality by epsilon, on 881 digits.

`python -m benchmarks.evidence.privacy [--seeds 0 1 2] [--workers 2]` fine-tunes every parameter of the
embedded base, without a bound and under each epsilon, once for each arm and seed; scores 256 samples on test
images, and tells training images from test images; writes privacy.json, privacy.md and privacy.png beside
this file. Runs are kept in runs/privacy, so a second call goes on.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.inner_loop import print_end, train_arms
from memcontrol.commands.demo import DEMO_STUDY
from memcontrol.config.load import load_config
from memcontrol.config.study import Config
from memcontrol.core.files import read_json, write_json
from memcontrol.core.run_folder import RunFolder
from memcontrol.execution.job_queue import JobQueue
from memcontrol.execution.local import Local

HERE = Path(__file__).parent
RATE = 1e-3
INNER = {"budget_images": 29_440, "batch_size": 128, "micro_batch_size": 32, "caption_dropout": 0.0}
# by epsilon and multiplicity; none: without a bound
ARMS: dict[str, dict | None] = {
    "no bound": None,
    **{f"epsilon {epsilon}": {"epsilon": epsilon, "multiplicity": 1} for epsilon in (512, 128, 32, 8, 2)},
    "epsilon 8, four draws": {"epsilon": 8, "multiplicity": 4},
}
REWARDS = ("fid", "membership_auc", "membership_tpr", "epsilon_low", "epsilon_most", "copy_rate")


def write_config(arm: str, seed: int) -> Config:
    study = {
        **DEMO_STUDY,
        "name": "privacy",
        "data": {"path": "digits", "train": 881, "holdout": 35, "test": 881},
        "inner": {**INNER, "privacy": ARMS[arm]},
        # as an objective membership is measured on as many images as there may be
        "rewards": {**DEMO_STUDY["rewards"], "objectives": ["fid", "membership_auc"]},
        "search": {"seed": seed},
    }
    return load_config(study)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--runs", type=Path, default=Path("runs/privacy"))
    args = parser.parse_args()
    executor = Local(args.workers)
    jobs = JobQueue(executor, print_end)
    try:
        for seed in args.seeds:
            run_seed(seed, args.runs.resolve() / str(seed), jobs, args.arms)
    finally:
        executor.close()
    rows = [read_row(arm, seed, args.runs.resolve() / str(seed)) for arm in args.arms for seed in args.seeds]
    if args.arms == list(ARMS):
        write_json(HERE / "privacy.json", rows)
        (HERE / "privacy.md").write_text(format_table(rows))
        draw(rows, HERE / "privacy.png")
    print(format_table(rows))


def run_seed(seed: int, folder: Path, jobs: JobQueue, arms: Sequence[str]) -> None:
    runs = {locate_run(arm, folder): write_config(arm, seed) for arm in arms}
    train_arms(folder, write_config("no bound", seed), runs, RATE, jobs)


def locate_run(arm: str, folder: Path) -> RunFolder:
    return RunFolder(folder / arm.replace(",", "").replace(" ", "-"))


def read_row(arm: str, seed: int, folder: Path) -> dict:
    result = read_json(locate_run(arm, folder).result_file)
    if result["state"] != "COMPLETE":
        raise SystemExit(f"{folder}, {arm}: {result['reason']}")
    rewards, account = result["rewards"], result.get("privacy", {})
    return {
        "arm": arm,
        "seed": seed,
        **{name: rewards[name] for name in REWARDS},
        **{f"{name}_error": rewards[f"{name}_error"] for name in ("fid", "membership_auc")},
        **{key: account.get(key) for key in ("epsilon", "delta", "noise", "rate", "steps")},
        "seconds": result["seconds"],
    }


def average(rows: Sequence[dict], arm: str) -> dict[str, float]:
    """Means over the seeds, and for FID and AUC what the seeds differ by."""
    own = [row for row in rows if row["arm"] == arm]
    found = {name: statistics.mean(row[name] for row in own) for name in (*REWARDS, "seconds")}
    spread = {name: [row[name] for row in own] for name in ("fid", "membership_auc")}
    return found | {
        f"{name}_spread": statistics.stdev(values) if len(values) > 1 else 0.0
        for name, values in spread.items()
    }


def format_table(rows: Sequence[dict]) -> str:
    """Means over the seeds with their standard deviations, AUCs also one by one."""
    lines = [
        "| arm | epsilon | noise | FID | membership AUC | by seed | epsilon, at least | copied | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        one, own = average(rows, arm), [row for row in rows if row["arm"] == arm]
        each = " ".join(f"{row['membership_auc']:.3f}" for row in own)
        bound = [f"{own[0][key]:.3g}" if own[0][key] is not None else "" for key in ("epsilon", "noise")]
        cells = [
            arm,
            *bound,
            f"{one['fid']:.1f} ± {one['fid_spread']:.1f}",
            f"{one['membership_auc']:.3f} ± {one['membership_auc_spread']:.3f}",
            each,
            f"{max(row['epsilon_low'] for row in own):.2f} of {own[0]['epsilon_most']:.1f}",
            f"{one['copy_rate']:.1%}",
            f"{one['seconds'] / 60:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict], path: Path) -> None:
    """AUC and FID by epsilon, a point for each seed with its 95 % interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = [arm for arm in ARMS if "draws" not in arm]
    more = next(arm for arm in ARMS if "draws" in arm)
    places = {arm: i for i, arm in enumerate(reversed(arms))}
    places[more] = places["epsilon 8"] + 0.3
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for panel, name, title in zip(panels, ("membership_auc", "fid"), ("membership AUC", "FID")):
        for row in rows:
            x, marker = places[row["arm"]] + 0.06 * row["seed"], "D" if row["arm"] == more else "o"
            panel.errorbar(x, row[name], 1.96 * row[f"{name}_error"], marker=marker, color=f"C{row['seed']}")
        panel.plot(range(len(arms)), [average(rows, arm)[name] for arm in reversed(arms)], color="grey")
        panel.set_xticks(range(len(arms)), [arm.removeprefix("epsilon ") for arm in reversed(arms)])
        panel.set(xlabel="epsilon (diamonds: four draws of noise)", ylabel=title)
    panels[0].axhline(0.5, color="grey", linestyle=":", linewidth=1)
    figure.suptitle("Full fine-tuning on 881 digits, colours are seeds")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
