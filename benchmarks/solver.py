"""Whether few steps of DPM-Solver++(2M), which a search samples with, rank fine-tunings as 50 steps of DDIM
do: the runs of a demo's search (or of FOLDER, a study's), each sampled with both from the same captions and
noise."""

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
        subprocess.run(
            [sys.executable, "-m", "memcontrol.cli", "demo", "--out", f"{folder}/demo"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return ranked(Path(folder) / "demo")


def ranked(folder: Path) -> list[dict]:
    """Rows with the rank correlation over the runs, and by how much a figure differs in the median."""
    import numpy as np

    from memcontrol.core.estimate import spearman
    from memcontrol.core.files import read_json
    from memcontrol.trial.loaded import LoadedModels

    loaded = LoadedModels()
    runs = [
        path.parent for path in sorted(folder.glob("*/result.json")) if read_json(path)["state"] == "COMPLETE"
    ]
    found = {
        steps: [figures(run, loaded, steps, ddim=steps == REFERENCE) for run in runs]
        for steps in (*STEPS, REFERENCE)
    }
    rows = []
    for steps in STEPS:
        for name in FIGURES:
            few, many = ([one[name] for one in found[key]] for key in (steps, REFERENCE))
            ranks = spearman(few, many)
            rows.append(
                {
                    "figure": name,
                    "steps": steps,
                    "runs": len(runs),
                    "rank correlation": float(ranks),
                    "low": ranks.low,
                    "high": ranks.high,
                    f"median difference from {REFERENCE} steps": float(np.median(np.subtract(few, many))),
                    "median error of measuring": float(
                        np.median([one[f"{name}_error"] for one in found[REFERENCE]])
                    ),
                }
            )
    return rows


def figures(run: Path, loaded, steps: int, ddim: bool) -> dict[str, float]:
    from diffusers import DDIMScheduler

    from memcontrol.config.spec import read_spec
    from memcontrol.core.estimate import Rewards
    from memcontrol.trial.samples import gather_evidence, sample_images, score_samples
    from memcontrol.trial.tuned import inject_choice

    spec = read_spec(run)
    spec = replace(spec, config=spec.config.replaced({"rewards.sampling_steps": steps}))
    base, material = loaded.base(spec.config), loaded.make_material(spec)
    adapter, solver = inject_choice(base.denoiser, spec), base.pipeline.scheduler
    try:
        adapter.load(run)
        if ddim:
            base.pipeline.scheduler = DDIMScheduler.from_config(solver.config)
        with adapter.fold():
            samples = sample_images(base, material, spec, lambda done, total: None)
    finally:
        base.pipeline.scheduler = solver
        adapter.remove()
    measured = score_samples(samples, gather_evidence(samples, spec, loaded), spec, loaded)
    rewards = Rewards.from_estimates(measured)
    return rewards.to_plain() | {f"{name}_error": rewards.error(name) for name in FIGURES}
