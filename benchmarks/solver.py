"""Whether few steps of DPM-Solver++(2M), which a search samples with, rank fine-tunings as 50 steps of DDIM do: the runs of a demo's search (or of
FOLDER, a study's), each sampled with both from the same captions and noise."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

STEPS, REFERENCE = (8, 20), 50
FIGURES = ("fid", "memorization", "copy_rate")


def run(device: str) -> list[dict]:
    if given := os.environ.get("FOLDER"):
        return ranked(Path(given))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "memcontrol.cli", "demo", "--out", f"{folder}/demo"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return ranked(Path(folder) / "demo")


def ranked(folder: Path) -> list[dict]:
    """Rows with the rank correlation over the runs, and by how much a figure differs in the median."""
    import numpy as np

    from memcontrol.bench import Bench
    from memcontrol.estimate import spearman
    from memcontrol.files import read_json
    from memcontrol.spec import RESULT

    bench = Bench()
    runs = [path.parent for path in sorted(folder.glob(f"*/{RESULT}")) if read_json(path)["state"] == "COMPLETE"]
    found = {steps: [figures(run, bench, steps, ddim=steps == REFERENCE) for run in runs] for steps in (*STEPS, REFERENCE)}
    rows = []
    for steps in STEPS:
        for name in FIGURES:
            few, many = ([one[name] for one in found[key]] for key in (steps, REFERENCE))
            ranks = spearman(few, many)
            rows.append({
                "figure": name, "steps": steps, "runs": len(runs), "rank correlation": float(ranks), "low": ranks.low, "high": ranks.high,
                f"median difference from {REFERENCE} steps": float(np.median(np.subtract(few, many))), "median error of measuring": float(np.median([one[f"{name}_error"] for one in found[REFERENCE]])),
            })  # fmt: skip
    return rows


def figures(run: Path, bench, steps: int, ddim: bool) -> dict[str, float]:
    from diffusers import DDIMScheduler

    from memcontrol.evidence import flat
    from memcontrol.figures import error_of
    from memcontrol.run import chosen_adapter
    from memcontrol.scoring import evidence, figures_of, sample
    from memcontrol.spec import read_spec

    spec = read_spec(run)
    spec = replace(spec, config=spec.config.model_copy(update={"rewards": spec.config.rewards.model_copy(update={"sampling_steps": steps})}))
    base, material = bench.base(spec.config), bench.material(spec)
    adapter, solver = chosen_adapter(base.denoiser, spec), base.pipeline.scheduler
    try:
        adapter.load(run)
        if ddim:
            base.pipeline.scheduler = DDIMScheduler.from_config(solver.config)
        with adapter.folded():
            samples = sample(base, material, spec, lambda done, total: None)
    finally:
        base.pipeline.scheduler = solver
        adapter.remove()
    found = flat(figures_of(samples, evidence(samples, spec, bench), spec, bench))
    return found | {f"{name}_error": error_of(name, found) for name in FIGURES}
