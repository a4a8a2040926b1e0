"""What it is worth to search more than masks: the demo's masks alone, against masks with the budget, skipping
and the adapter's strength as coordinates, at the same total of training steps, on the digits.

`python -m benchmarks.evidence.settings [--seeds 0 1 2]` searches both for each seed and writes settings.json,
settings.md and settings.png beside this file. Studies are kept in runs/settings, so a second call goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import yaml

from memcontrol.commands.demo import DEMO_STUDY
from memcontrol.commands.fork import fork
from memcontrol.commands.search import search
from memcontrol.core.files import read_json, write_json
from memcontrol.core.reward_table import MINIMIZE, list_errors
from memcontrol.study.hypervolume import hypervolume
from memcontrol.study.pareto import find_front
from memcontrol.study.place import StudyPlace
from memcontrol.study.record import Record

HERE = Path(__file__).parent
N_MASKS, N_MORE, N_REDRAWS = 8, 4, 400
SKIP = {"ratio": 1.25, "start": "corrected", "bins": 50}  # which acts on so few images (inner_loop.md)
ARMS = {"masks": "masks alone", "settings": "masks, budget, skipping, strength"}
PAIRS = (("fid", "memorization"), ("fid", "membership_auc"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/settings"))
    parser.add_argument("--search-only", action="store_true")
    args = parser.parse_args()
    for seed in args.seeds:
        search_arms(args.runs.resolve() / str(seed), make_study(seed))
    if args.search_only:
        return
    found = [
        row
        for seed in args.seeds
        for row in compare_arms(
            {arm: read_records(args.runs / str(seed) / f"{arm}.yaml") for arm in ARMS}, seed
        )
    ]
    write_json(HERE / "settings.json", found)
    (HERE / "settings.md").write_text(format_table(found))
    draw(found, HERE / "settings.png")
    print(format_table(found))


def make_study(seed: int) -> dict:
    rewards = {**DEMO_STUDY["rewards"], "confirm": 4}
    return {**DEMO_STUDY, "rewards": rewards, "search": {"workers": 1, "seed": seed}}


def make_coordinates(budget: int) -> dict:
    """What the second arm searches beside masks, as keys of `search`."""
    over = {
        "inner.budget_images": {"low": budget // 8, "high": budget, "log": True, "steps": 6},
        "inner.skip": [None, SKIP],
    }
    return {"over": over, "strengths": [0.75, 0.5]}


def search_arms(folder: Path, study: dict, n_masks: int = N_MASKS) -> None:
    """Both arms have the same anchors, which are trained once; then the first has masks, and the second more
    trials until it has taken as many steps."""
    folder.mkdir(parents=True, exist_ok=True)
    masks, other = folder / "masks.yaml", folder / "settings.yaml"
    write_study(masks, study)
    search(masks, trials=0)
    if not other.exists():
        write_study(masks, study, make_coordinates(study["inner"]["budget_images"]))
        fork(masks, "settings")
        write_study(masks, study)
    search(masks, trials=n_masks)
    most, n = count_steps(read_records(masks)), 0
    while count_steps(read_records(other)) < most:
        n += N_MORE
        search(other, trials=n)


def write_study(path: Path, study: dict, search_keys: Mapping = MappingProxyType({})) -> None:
    """Under the name of its file, with further keys of `search`."""
    named = {**study, "name": path.stem, "search": {**study["search"], **search_keys}}
    path.write_text(yaml.safe_dump(named, sort_keys=False))


def read_records(path: Path) -> list[Record]:
    with contextlib.closing(StudyPlace.load(path).open()) as study:
        return sorted((one for one in study.records() if one.finished), key=lambda one: one.number)


def find_steps(record: Record) -> int:
    """Steps that were taken for a trial: none for a variant."""
    if record.is_variant:
        return 0
    runs = (record.run.parent / choice.key for choice in record.candidates)
    return sum(read_json(run / "result.json")["n_steps"] for run in runs)


def count_steps(records: Sequence[Record]) -> int:
    return sum(find_steps(record) for record in records)


def compare_arms(arms: dict[str, list[Record]], seed: int) -> list[dict]:
    """A row for each arm and pair of rewards: hypervolume of what was measured again (a search picks lucky
    trials), with the error of measuring; and by steps, of what the search measured."""
    rows = []
    for pair in PAIRS:
        anchors = [record for record in arms["masks"] if record.anchor]
        losses = collect_losses(anchors, pair, searched=True)[0]
        reference = losses.max(0) + 0.1 * np.ptp(losses, 0)
        for arm, records in arms.items():
            again = [record for record in records if record.confirmed]
            values, errors = collect_losses(again, pair)
            rng = np.random.default_rng(0)
            draws = [hypervolume(rng.normal(values, errors), reference) for _ in range(N_REDRAWS)]
            rows.append(
                {
                    "seed": seed,
                    "arm": arm,
                    "pair": list(pair),
                    "hypervolume": hypervolume(values, reference),
                    "error": float(np.std(draws)),
                    "steps": count_steps(records),
                    "trials": len(records),
                    "fine-tunings": sum(len(one.candidates) for one in records if not one.is_variant),
                    "trace": trace(records, pair, reference),
                    "front": [values[i].tolist() for i in find_front(values)],
                }
            )
    return rows


def collect_losses(
    records: Sequence[Record], pair: Sequence[str], searched: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    found = [record.searched if searched else record.rewards for record in records]
    values = [[rewards[name] for name in pair] for rewards in found]
    errors = [list_errors(rewards, dict.fromkeys(pair, MINIMIZE)) for rewards in found]
    return np.array(values), np.array(errors)


def trace(records: Sequence[Record], pair: Sequence[str], reference: np.ndarray) -> list[list[float]]:
    """Steps so far, and the hypervolume of what the search had measured by then."""
    found, steps = [], 0
    for n, record in enumerate(records, 1):
        steps += find_steps(record)
        values = collect_losses(records[:n], pair, searched=True)[0]
        found.append([steps, hypervolume(values, reference)])
    return found


def find_steps_to(rows: Sequence[dict], share: float = 1.0) -> float:
    """After what share of the first arm's steps the second has its hypervolume, both as searched."""
    first, second = rows
    goal = share * first["trace"][-1][1]
    steps = next((steps for steps, volume in second["trace"] if volume >= goal), float("nan"))
    return steps / first["trace"][-1][0]


def format_table(found: Sequence[dict]) -> str:
    heads = ("seed", "FID and", "arm", "fine-tunings", "trials", "steps", "hypervolume, measured again")
    lines = [f"| {' | '.join(heads)} | to masks alone | the same after |", "|---" * (len(heads) + 2) + "|"]
    by_key = {(row["seed"], row["pair"][1], row["arm"]): row for row in found}
    for row in found:
        first = by_key[row["seed"], row["pair"][1], "masks"]
        ratio = row["hypervolume"] / first["hypervolume"]
        reached = find_steps_to([first, row])
        cells = [
            row["seed"],
            row["pair"][1],
            ARMS[row["arm"]],
            row["fine-tunings"],
            row["trials"],
            row["steps"],
        ]
        cells += [f"{row['hypervolume']:.3f} ± {row['error']:.3f}", f"{ratio:.2f}"]
        said = f"{reached:.0%} of its steps" if math.isfinite(reached) else "not reached"
        cells.append("" if row is first else said)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for pair in PAIRS:
        own = [row for row in found if row["pair"] == list(pair)]
        ratios = [
            row["hypervolume"] / by_key[row["seed"], pair[1], "masks"]["hypervolume"]
            for row in own
            if row["arm"] == "settings"
        ]
        spread = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
        lines.append(f"| all | {pair[1]} | | | | | | {statistics.mean(ratios):.2f} ± {spread:.2f} | |")
    return "\n".join(lines) + "\n"


def draw(found: Sequence[dict], path: Path) -> None:
    """Hypervolume by steps, a panel for each pair of rewards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(PAIRS), figsize=(11, 4), layout="constrained")
    for panel, pair in zip(panels, PAIRS):
        for arm, style in zip(ARMS, ("--", "-")):
            for row in (one for one in found if one["arm"] == arm and one["pair"] == list(pair)):
                label = f"seed {row['seed']}, {ARMS[arm]}"
                panel.step(*zip(*row["trace"]), style, where="post", color=f"C{row['seed']}", label=label)
        panel.set(xlabel="training steps", ylabel=f"hypervolume of FID and {pair[1]}")
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
