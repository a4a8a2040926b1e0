"""Searches replayed on the table of every mask of seven sites (`digits_masks`), without any training: how
many trials each sampler needs for a share of the true front's hypervolume, and what early stopping saves."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks._problems import hypervolume
from benchmarks.digits_masks import IMAGES, RUNGS, SITES, SPACE, TABLE
from memcontrol.study.pareto import find_front

N_SEEDS, N_WORKERS, N_LONGEST, N_FULL, GOALS = 20, 4, 100, 40, (0.95, 0.97, 0.99)
KINDS = ("auto", "tpe", "nsga2", "random")
REFERENCES = {
    "worst": "from the worst of each objective (median of 20 seeds)",
    "front": "from just beyond the front",
}
OBJECTIVES = {"fid": "minimize", "memorization": "minimize"}
HERE = Path(__file__).parent


class Table:
    """Every mask's figures, and hypervolumes as shares of the true front's. They are measured from the worst
    of each objective, or from just beyond the front: its own worst values and a tenth of its range (Ishibuchi
    et al. 2018), where only what is near the front counts."""

    def __init__(self):
        stored = json.loads(TABLE.read_text())
        self.rows = {row["mask"]: row for row in stored["rows"]}
        with np.load(IMAGES, allow_pickle=False) as images:
            self.images = dict(images)
        self.points = {mask: (row["fid"], row["memorization"]) for mask, row in self.rows.items()}
        values = list(self.points.values())
        best = np.array([values[i] for i in find_front(values)])
        self.references = {"worst": np.max(values, 0), "front": best.max(0) + 0.1 * np.ptp(best, 0)}
        self.wholes = {name: hypervolume(values, reference) for name, reference in self.references.items()}

    def share(self, masks: Iterable[str], reference: str = "worst") -> float:
        return (
            hypervolume([self.points[mask] for mask in masks], self.references[reference])
            / self.wholes[reference]
        )

    def images_at(self, mask: str, rung: float) -> dict[str, np.ndarray]:
        return {
            name: self.images[key] for name in OBJECTIVES if (key := f"{mask} {rung} {name}") in self.images
        }


def run(device: str) -> list[dict]:
    table, rows, curves = Table(), [], {}
    for kind in KINDS:
        searches = [replayed(table, kind, seed) for seed in range(N_SEEDS)]
        for reference in REFERENCES:
            curves[reference, kind] = [
                [table.share(masks[: i + 1], reference) for i in range(len(masks))] for masks, _ in searches
            ]
    for reference, goal, kind in itertools.product(REFERENCES, GOALS, KINDS):
        needed = [
            next((i for i, ratio in enumerate(curve, 1) if ratio >= goal), N_LONGEST)
            for curve in curves[reference, kind]
        ]
        rows.append(
            {
                "what": f"{kind}: trials to {goal:.0%} of the true hypervolume from the {reference}",
                "median": float(statistics.median(needed)),
                "mean": statistics.mean(needed),
                "worst": max(needed),
            }
        )
    for kind in ("auto", "random"):
        shares, steps = [], []
        for seed in range(N_SEEDS):
            whole, spent_whole = replayed(table, kind, seed, N_FULL)
            early, spent_early = replayed(table, kind, seed, N_FULL, early=True)
            shares.append(table.share(early) / table.share(whole))
            steps.append(spent_early / spent_whole)
        rows += [
            {
                "what": f"early stopping, {kind}, {N_FULL} trials: hypervolume / without",
                "median": statistics.median(shares),
                "mean": statistics.mean(shares),
                "worst": min(shares),
            },
            {
                "what": f"early stopping, {kind}, {N_FULL} trials: training steps / without",
                "median": statistics.median(steps),
                "mean": statistics.mean(steps),
                "worst": max(steps),
            },
        ]
    drawn(curves)
    return rows


def replayed(
    table: Table, kind: str, seed: int, n_trials: int = N_LONGEST, early: bool = False
) -> tuple[list[str], int]:
    """The masks in the order in which their trials ended well, and the training steps of all: four workers,
    ends in random order."""
    from memcontrol.config.search import EarlyStopping
    from memcontrol.core.space_yaml import parse_space
    from memcontrol.search.early_stopping import RungResult, weigh_peers
    from memcontrol.search.sampler import Sampler
    from memcontrol.study.record import Record

    space, rule, rng = parse_space(SPACE, "sites"), EarlyStopping(rungs=RUNGS), random.Random(seed)
    sampler, records, running, ended, n_steps = Sampler(space, seed, 2, (), kind), [], [], [], 0
    there: dict[float, list[RungResult]] = {rung: [] for rung in RUNGS}

    def draw_mask(record: Record) -> str:
        return "".join(str(int(site in record.choice.groups)) for site in SITES)

    def stops(record: Record) -> dict | None:
        """The rung at which it stops."""
        row, measured = table.rows[draw_mask(record)], []
        for one in row["rungs"]:
            measured.append(
                {
                    "rung": one["rung"],
                    "rewards": {name: one[name] for name in one if name.startswith(tuple(OBJECTIVES))},
                }
            )
            own, peers = (
                RungResult.of(
                    record.number,
                    measured[-1]["rewards"],
                    OBJECTIVES,
                    table.images_at(row["mask"], one["rung"]),
                ),
                there[one["rung"]],
            )
            stopped = weigh_peers(own, peers, rule)[1]
            peers.append(own)
            if stopped:
                return {"rungs": tuple(measured), "n_steps": one["n_steps"]}
        return None

    while len(ended) + sum(record.state == "PRUNED" for record in records) < n_trials:
        while len(running) < N_WORKERS and len(records) < n_trials:
            records.append(
                Record(len(records), "RUNNING", (sampler.draw(records),), objectives=OBJECTIVES).as_running()
            )
            running.append(records[-1].number)
        number = running.pop(rng.randrange(len(running)))
        row, stopped = table.rows[draw_mask(records[number])], stops(records[number]) if early else None
        n_steps += stopped["n_steps"] if stopped else row["n_steps"]
        if stopped:
            records[number] = replace(records[number], state="PRUNED", rungs=stopped["rungs"])
            continue
        ended.append(row["mask"])
        searched = {name: row[name] for name in row if name.startswith(tuple(OBJECTIVES))}
        rungs = (
            tuple(
                {"rung": one["rung"], "rewards": {name: one[name] for name in searched}}
                for one in row["rungs"]
            )
            if early
            else ()
        )
        records[number] = replace(records[number], state="COMPLETE", searched=searched, rungs=rungs)
    return ended, n_steps


def drawn(curves: dict[tuple[str, str], list[list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(REFERENCES), figsize=(10, 3.6), layout="constrained")
    for panel, (reference, title) in zip(panels, REFERENCES.items()):
        for kind in KINDS:
            columns = np.array([curve[:80] for curve in curves[reference, kind]])
            panel.plot(
                range(1, columns.shape[1] + 1),
                np.median(columns, axis=0),
                label=kind,
                linewidth=2.5 if kind == "auto" else 1.2,
            )
        panel.axhline(GOALS[0], color="grey", linewidth=0.8)
        panel.set(xlabel="trials ended", ylim=(0, 1.01), title=title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of the true front's hypervolume")
    panels[-1].legend()
    figure.savefig(HERE / "evidence" / "replay.png", dpi=110)
