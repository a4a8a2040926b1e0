"""Trials an hour, beside what people run today: the same base, images, masks, batches, noise and steps of
fine-tuning, as many samples.

Ours is a trial as a warm worker runs it; a peer's trial is a process that loads its libraries once and then
does all else anew each time. Variants take turns, and medians are compared; VARIANTS, separated by ";",
chooses some. With `--device cuda` the base has Stable Diffusion 1.5's size and random weights.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks._processes import peak_mib

EACH = ", one for each core"  # processes at once, with one thread each
OURS, PEERS = ("ours", "ours" + EACH), ("MemControl's recipe", "diffusers' LoRA recipe")
N_REPEATS, N_TRIALS = int(os.environ.get("REPEATS", "3")), int(os.environ.get("TRIALS", "2"))
SMALL = bool(os.environ.get("SMALL"))  # to see that it runs; on a card, what takes a minute
# of the digits' space
MASKS = (
    ("down_attention", "mid_attention", "up_attention", "down_resnet", "mid_resnet"),
    ("up_attention", "mid_attention"),
)
RANK, BETWEEN = 4, 0.5  # of the ranks; of the learning rates' range, on its logarithmic scale


def run(device: str) -> list[dict]:
    """Rows of each variant: seconds for a trial, trials an hour, and ours over theirs."""
    names = (
        tuple(os.environ["VARIANTS"].split(";"))
        if "VARIANTS" in os.environ
        else (*OURS, *PEERS, PEERS[0] + EACH)
        if device == "cpu"
        else (OURS[0], *PEERS)
    )
    found: dict[str, list[list[dict]]] = {name: [] for name in names}
    for _ in range(N_REPEATS):
        for name in names:
            found[name].append(measured(name, device))
            print(f"{name}: {per_hour(found[name][-1]):.1f} trials an hour", file=sys.stderr, flush=True)
    hourly = {name: statistics.median(per_hour(one) for one in runs) for name, runs in found.items()}
    losses = {name: runs[0][0]["losses"] for name, runs in found.items()}
    ours = losses[next(name for name in names if name in OURS)]
    return [
        {
            "variant": name,
            "trials an hour": hourly[name],
            **{f"{mine} / this": hourly[mine] / hourly[name] for mine in names if mine in OURS},
            "seconds, each": statistics.median(
                seconds for runs in found[name] for one in runs for seconds in one["seconds"]
            ),
            "peak MiB": statistics.median(sum(one["mib"] for one in runs) for runs in found[name]),
            "largest difference of a step's loss": max(
                abs(a - b) for mine, theirs in zip(ours, losses[name]) for a, b in zip(mine, theirs)
            ),
            "fid": found[name][0][0]["fid"][0],
        }
        for name in names
    ]


def per_hour(processes: list[dict]) -> float:
    """Of processes side by side."""
    return sum(3600 * len(one["seconds"]) / sum(one["seconds"]) for one in processes)


def measured(name: str, device: str) -> list[dict]:
    """What the variant's processes print, all at once, each with its share of the cores."""
    n = (os.cpu_count() or 1) if name.endswith(EACH) else 1
    env = {**os.environ, "OMP_NUM_THREADS": str((os.cpu_count() or 1) // n), "OMP_WAIT_POLICY": "passive"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers", name, device],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        for _ in range(n)
    ]
    said = [process.communicate()[0].splitlines() for process in running]
    if codes := [process.returncode for process in running if process.returncode]:
        raise RuntimeError(f"{name}: exit {codes[0]}; see stderr")
    return [json.loads(lines[-1]) for lines in said]


def measure(name: str, device: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        seconds, losses, fids = (ours if name in OURS else theirs)(name, Path(folder), device)
    return {"seconds": seconds, "losses": losses, "fid": fids, "mib": peak_mib(device)}


def specs(folder: Path, device: str):
    """Loaded models, and the trials as a search hands them out."""
    from benchmarks._digits_study import DIGITS_STUDY
    from benchmarks._models import stable_diffusion
    from memcontrol.config.load import load_config
    from memcontrol.config.spec import Spec
    from memcontrol.core.space_yaml import load_space
    from memcontrol.trial.loaded import LoadedModels
    from memcontrol.trial.prepare import prepare_study

    values = {**DIGITS_STUDY, "name": "peers"}
    if SMALL:
        values |= {
            "inner": {**DIGITS_STUDY["inner"], "budget_images": 64, "batch_size": 16},
            "rewards": {**DIGITS_STUDY["rewards"], "n_samples": 16, "force": True, "sampling_steps": 2},
        }
    if device == "cuda":
        held = {"holdout": 64, "test": 64} if SMALL else {}
        values |= {
            "base": stable_diffusion(device),
            "data": {**DIGITS_STUDY["data"], **held, "resolution": 512},
            "inner": {
                **DIGITS_STUDY["inner"],
                "budget_images": 320 if SMALL else 1600,
                "batch_size": 16,
                "precision": "bfloat16",
            },
            "rewards": {**DIGITS_STUDY["rewards"], "n_samples": 16 if SMALL else 64, "force": True},
        }
    config, loaded = load_config(values), LoadedModels()
    prepare_study(config.model_dump(mode="json"), folder, loaded, lambda line: None)
    space = load_space(config.space)
    choices = [space.choice(groups, "lora", BETWEEN, RANK) for groups in MASKS]
    n_train = len(loaded.parts(Spec(config, space, choices[0], folder, "search", "holdout", 1))["train"])
    return loaded, [
        Spec(config, space, choices[i % len(choices)], folder, "search", "holdout", n_train)
        for i in range(N_TRIALS)
    ]


def ours(name: str, folder: Path, device: str) -> tuple[list[float], list[list[float]], list[float]]:
    """The worker has run a trial before."""
    from memcontrol.trial.run import run_trial

    loaded, trials = specs(folder, device)
    seconds, losses, fids = [], [], []
    for i, spec in enumerate([trials[0], *trials]):
        found: dict[int, float] = {}
        run_folder = folder / f"run-{i}"
        spec.write(run_folder)
        started = time.perf_counter()
        result = run_trial(
            run_folder,
            loaded,
            lambda stage, done, total, found=found, **said: (
                found.update({done: said["loss"]}) if stage == "train" else None
            ),
        )
        if i:
            seconds.append(time.perf_counter() - started)
            losses.append(list(found.values()))
            fids.append(result["rewards"]["fid"])
    return seconds, losses, fids


def theirs(name: str, folder: Path, device: str) -> tuple[list[float], list[list[float]], list[float]]:
    from benchmarks._peers import RECIPES, trial

    loaded, trials = specs(folder, device)
    tasks = [make_task(spec, loaded, device) for spec in trials]
    seconds, losses, fids = [], [], []
    for task in tasks:
        started = time.perf_counter()
        found, fid = trial(task, RECIPES[name.removesuffix(EACH)])
        seconds.append(time.perf_counter() - started)
        losses.append(found)
        fids.append(fid)
    return seconds, losses, fids


def make_task(spec, loaded, device: str):
    """The trial as a peer gets it."""
    import torch

    from benchmarks._peers import Task
    from memcontrol.core.seeds import derive_seed
    from memcontrol.model.source import find_base_path
    from memcontrol.training.loop import learning_rate_factor, select_batch_rows
    from memcontrol.trial.tuned import inject_choice

    inner, base, images = spec.config.inner, loaded.base(spec.config), loaded.train_images(spec)
    adapter = inject_choice(base.denoiser, spec)
    first = {
        name.replace(".weight", ".default.weight"): tensor.detach().clone()
        for name, tensor in adapter.named_parameters().items()
    }
    layer = next(iter(adapter.parts[0].layers.values()))
    alpha = layer.scaling["default"] * layer.r["default"]
    modules = list(adapter.parts[0].layers)
    adapter.remove()
    rows = np.random.default_rng(derive_seed(spec.sampling_seed, "captions")).integers(
        len(images), size=spec.config.rewards.n_samples
    )
    extractor = loaded.extractor(spec.config.rewards.extractor)
    return Task(
        find_base_path(spec.config.base.id),
        images.pixels(),
        images.captions,
        loaded.parts(spec)["holdout"].pixels(),
        [images.captions[row] for row in rows],
        modules,
        first,
        RANK,
        alpha,
        lambda step: spec.choice.learning_rate * learning_rate_factor((step + 1) / inner.budget_steps, inner),
        lambda step: (
            select_batch_rows(len(images), inner.batch_size, spec.seed, step),
            torch.Generator().manual_seed(derive_seed(spec.seed, "step", step)),
        ),
        inner.budget_steps,
        spec.config.rewards.guidance,
        extractor.extract,
        extractor.n_features,
        device,
        inner.precision,
    )


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
