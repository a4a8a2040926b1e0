"""What ensemble training, skipping, redistribution and augmentation do to copying and quality, at one budget,
on the digits.

`python -m benchmarks.evidence.inner_loop [--seeds 0 1 2] [--workers 2]` fine-tunes every parameter of the
embedded base on 35 digits, as the demo's baseline does, once for each arm and seed; scores 256 samples on
test images; writes inner_loop.json, inner_loop.md and inner_loop.png beside this file. Runs are kept in
runs/evidence, so a second call goes on.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path

from benchmarks._digits_study import DIGITS_STUDY
from memcontrol.config.load import load_config
from memcontrol.config.spec import Spec
from memcontrol.config.study import Config
from memcontrol.core.choice import EVERYTHING, Choice
from memcontrol.core.files import read_json, write_json
from memcontrol.core.jobs import END_EVENTS, Event, GivenUp, TrialJob
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.core.space_yaml import load_space
from memcontrol.execution.job_queue import JobQueue
from memcontrol.execution.local import Local
from memcontrol.search.orchestrator import run_preparation

HERE = Path(__file__).parent
RATE = 4.4e-4  # where the demo's search puts full fine-tuning on every seed
IET = {"ensemble": {"shards": 4, "moments": "reset"}, "rounds": 8}
AGC = {"skip": {"ratio": 1.25, "start": "corrected", "bins": 50}}
MSR, TAA = {"redistribution": {}}, {"augmentation": {}}
# so that each of four shards is trained as long as plain training is
LONG = {"budget_images": 4 * DIGITS_STUDY["inner"]["budget_images"]}
ARMS: dict[str, dict] = {
    "plain training": {},
    "plain, a quarter of the steps": {"budget_images": DIGITS_STUDY["inner"]["budget_images"] // 4},
    "IET, moments reset": IET,
    "IET, moments averaged": {**IET, "ensemble": {"shards": 4, "moments": "averaged"}},
    "IET, moments kept (as published)": {**IET, "ensemble": {"shards": 4, "moments": "kept"}},
    "AGC as published (1000 timesteps, ratio 2)": {"skip": {}},
    "AGC (50 bins, ratio 1.25, corrected)": AGC,
    "IET + AGC": {**IET, **AGC},
    "IET + AGC + redistribution": {**IET, **AGC, **MSR},
    "IET + AGC + augmentation": {**IET, **AGC, **TAA},
    "IET + AGC + redistribution + augmentation": {**IET, **AGC, **MSR, **TAA},
    "four times the budget: plain": LONG,
    "four times the budget: IET": {**IET, **LONG},
    "four times the budget: IET + AGC": {**IET, **AGC, **LONG},
}


def write_config(arm: str, seed: int) -> Config:
    return load_config(
        {
            **DIGITS_STUDY,
            "name": "evidence",
            "inner": {**DIGITS_STUDY["inner"], **ARMS[arm]},
            "search": {"seed": seed},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    args = parser.parse_args()
    executor = Local(args.workers)
    jobs = JobQueue(executor, print_end)
    try:
        for seed in args.seeds:
            run_seed(seed, args.runs.resolve() / str(seed), jobs)
    finally:
        executor.close()
    rows = [row(arm, seed, args.runs.resolve() / str(seed)) for arm in ARMS for seed in args.seeds]
    write_json(HERE / "inner_loop.json", rows)
    (HERE / "inner_loop.md").write_text(table(rows))
    picture(rows, HERE / "inner_loop.png")
    print(table(rows))


def print_end(event: Event) -> None:
    if isinstance(event, END_EVENTS) and isinstance(event.job, TrialJob):
        print(event.job.folder, event.kind)


def run_seed(seed: int, folder: Path, jobs: JobQueue) -> None:
    arms = {RunFolder(folder / str(i)): write_config(arm, seed) for i, arm in enumerate(ARMS)}
    train_arms(folder, write_config("plain training", seed), arms, RATE, jobs)


def train_arms(
    folder: Path, plain: Config, arms: Mapping[RunFolder, Config], rate: float, jobs: JobQueue
) -> None:
    """Fine-tunes every parameter on the images of `plain`, as each config says, in its run folder; what is
    there is not done again."""
    n_train = run_preparation(plain, StudyFolder(folder), jobs).sizes["train"]
    space, choice = load_space(plain.space), Choice((EVERYTHING,), "full", rate)
    specs = {
        run: Spec(config, space, choice, folder, "evidence", "test", n_train) for run, config in arms.items()
    }
    train_specs(specs, jobs)


def train_specs(specs: Mapping[RunFolder, Spec], jobs: JobQueue) -> None:
    """Fine-tunes and scores each in its run folder; what is there is not done again."""
    todo = [run for run in specs if not run.has_result]
    for run in todo:
        specs[run].write(run.path)
    for event in jobs.run([TrialJob(run.path, specs[run].choice) for run in todo]):
        if isinstance(event, GivenUp):
            raise SystemExit(f"{event.job.folder}: {event.reason}")


def row(arm: str, seed: int, folder: Path) -> dict:
    from memcontrol.config.spec import read_spec
    from memcontrol.data.features import pixel_features
    from memcontrol.scoring.published import mq
    from memcontrol.trial.loaded import LoadedModels
    from memcontrol.trial.samples import read_samples

    run = folder / str(list(ARMS).index(arm))
    result, training = read_json(run / "result.json"), read_json(run / "training.json")
    if result["state"] != "COMPLETE":
        raise SystemExit(f"{run}: {result['reason']}")
    train = pixel_features(LoadedModels().train_images(read_spec(run)).pixels())
    seen = sum(shard["seen"] for shard in training["shards"])
    return {
        "arm": arm,
        "seed": seed,
        **{name: result["rewards"][name] for name in ("fid", "memorization", "copy_rate")},
        "mq": mq(pixel_features(read_samples(run)["images"]), train),
        "steps": training["n_steps"],
        "seen": seen,
        "skipped": sum(shard["skipped"] for shard in training["shards"]) / max(seen, 1),
        "seconds": result["seconds"],
    }


def means(rows: list[dict], arm: str) -> dict[str, float]:
    own = [row for row in rows if row["arm"] == arm]
    return {key: statistics.mean(row[key] for row in own) for key in own[0] if key not in ("arm", "seed")}


def table(rows: list[dict]) -> str:
    """Means over the seeds, copy rates also one by one."""
    lines = [
        "| arm | FID | copied | by seed | MQ of 256 | M | skipped | steps | images seen |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        one, each = means(rows, arm), " ".join(f"{row['copy_rate']:.1%}" for row in rows if row["arm"] == arm)
        lines.append(
            f"| {arm} | {one['fid']:.1f} | {one['copy_rate']:.1%} | {each} | {one['mq']:.0f} | "
            f"{one['memorization']:.2f} | {one['skipped']:.1%} | {one['steps']:.0f} | {one['seen']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def picture(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), dpi=130, layout="constrained")
    for i, arm in enumerate(ARMS):
        own, colour = [row for row in rows if row["arm"] == arm], pyplot.get_cmap("tab20")(i)
        axes.scatter(
            [row["fid"] for row in own], [row["copy_rate"] for row in own], color=colour, s=18, alpha=0.6
        )
        one = means(rows, arm)
        axes.scatter(
            one["fid"], one["copy_rate"], color=colour, s=90, marker="D", edgecolors="black", label=arm
        )
    axes.axhline(0.01, color="grey", linestyle=":", linewidth=1)
    axes.set(
        xlabel="FID on test images (lower is better)",
        ylabel="copy rate (dotted: false positives)",
        title="Full fine-tuning on 35 digits, three seeds and their means",
    )
    axes.legend(fontsize=7)
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
