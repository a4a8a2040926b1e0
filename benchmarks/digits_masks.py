"""Every mask of a small space, fine-tuned once: seven sites of the embedded base under LoRA on the digits,
128 masks, each measured at a quarter and at half of its budget and at its end. What searches are replayed on
afterwards, without any training."""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np

RUNGS, N_FEW, RATE, RANK = (0.25, 0.5), 64, 3e-3, 8
HERE = Path(__file__).parent / "evidence"
TABLE, IMAGES = HERE / "digits-masks.json", HERE / "digits-masks.npz"
ATTENTION, RESNET = (
    r"attentions\.\d+\.transformer_blocks\.0\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    r"resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)",
)
SITES = {
    "down_attention": rf"down_blocks\.\d+\.{ATTENTION}",
    "mid_attention": rf"mid_block\.{ATTENTION}",
    "up_attention": rf"up_blocks\.\d+\.{ATTENTION}",
    "down_resnet": rf"down_blocks\.\d+\.{RESNET}",
    "mid_resnet": rf"mid_block\.{RESNET}",
    "up_resnet": rf"up_blocks\.\d+\.{RESNET}",
    "ends": r"(conv_in|conv_out|time_embedding\.linear_[12])",
}
SPACE = {
    "groups": SITES,
    "methods": ["lora"],
    "rank": [RANK],
    "learning_rate": {"lora": [RATE, 1.09 * RATE], "full": [3e-4, 3e-3]},
}
STUDY = {
    "name": "masks",
    "data": {"path": "digits", "train": 35, "holdout": 881, "test": 881},
    "inner": {"budget_images": 7360, "batch_size": 32, "caption_dropout": 0.0, "rounds": 8},
    "rewards": {
        "objectives": ["fid", "memorization"],
        "n_samples": 256,
        "confirm": 0,
        "sampling_steps": 8,
        "guidance": 2.0,
    },
    "search": {"workers": os.cpu_count(), "early_stopping": {"rungs": list(RUNGS), "n_samples": N_FEW}},
}


def run(device: str) -> list[dict]:
    """The rows of the extremes; the table itself goes to benchmarks/evidence. FOLDER in the environment keeps
    the runs, to go on with."""
    folder = Path(os.environ.get("FOLDER") or tempfile.mkdtemp())
    masks = ["".join(bits) for bits in itertools.product("01", repeat=len(SITES))]
    fine_tune(folder, masks)
    rows = [read_row(folder / mask, mask) for mask in masks]
    TABLE.write_text(json.dumps({"sites": list(SITES), "study": STUDY, "rows": rows}, indent=1) + "\n")
    np.savez_compressed(
        IMAGES,
        **{name: values for mask in masks for name, values in read_images(folder / mask, mask).items()},
    )
    lowest = min(row["fid"] for row in rows)
    extremes = {
        "no site": rows[0],
        "every site": rows[-1],
        "lowest FID": min(rows, key=lambda row: row["fid"]),
        "lowest M within 10 % of it": min(
            (row for row in rows if row["fid"] <= 1.1 * lowest), key=lambda row: row["memorization"]
        ),
    }
    return [
        {"what": name, **{key: row[key] for key in ("mask", "fid", "memorization")}}
        for name, row in extremes.items()
    ]


def fine_tune(folder: Path, masks: list[str]) -> None:
    """Each mask in a folder of its name, from rung to rung to its end; what is finished stays as it is."""
    from memcontrol.config.load import load_config
    from memcontrol.config.spec import Spec
    from memcontrol.core.choice import Choice
    from memcontrol.core.jobs import GivenUp, TrialJob
    from memcontrol.core.run_folder import RunFolder, StudyFolder
    from memcontrol.core.space_yaml import parse_space
    from memcontrol.execution.job_queue import JobQueue
    from memcontrol.execution.local import Local
    from memcontrol.search.orchestrator import run_preparation

    config, space, steps = load_config(STUDY), parse_space(SPACE, "sites"), [*RUNGS, None]
    jobs = JobQueue(Local(os.cpu_count()), lambda event: None)
    n_train, todo = run_preparation(config, StudyFolder(folder), jobs).sizes["train"], deque()
    for mask in masks:
        groups = tuple(name for name, bit in zip(SITES, mask) if bit == "1")
        choice = Choice(groups, "lora", RATE, RANK) if groups else Choice((), "none", 0.0)
        run = RunFolder(folder / mask)
        Spec(config, space, choice, folder, "search", "holdout", n_train).write(run.path)
        if not run.has_result:
            open_rungs = (rung for rung in steps if not (rung and run.rung_file(rung).exists()))
            todo.append(TrialJob(run.path, choice, rung=next(open_rungs) if groups else None))
    n_left = len(todo)
    while n_left:
        while todo and jobs.count_room() > 0:
            jobs.add(todo.popleft())
        for event in jobs.collect_ends():
            if isinstance(event, GivenUp):
                raise RuntimeError(event.reason)
            if event.job.rung is None:
                n_left -= 1
                print(f"\r{n_left} masks left ", end="", file=sys.stderr)
            else:
                todo.appendleft(replace(event.job, rung=steps[steps.index(event.job.rung) + 1]))
    jobs.executor.close()


def read_row(run: Path, mask: str) -> dict:
    result = json.loads((run / "result.json").read_text())

    def kept(rewards: dict) -> dict:
        return {name: rewards[name] for name in ("fid", "fid_error", "memorization", "memorization_error")}

    rungs = [
        {"rung": one["rung"], "n_steps": one["n_steps"], **kept(one["rewards"])} for one in result["rungs"]
    ]
    return {
        "mask": mask,
        **kept(result["rewards"]),
        "n_steps": result["n_steps"],
        "seconds": result["seconds"],
        "rungs": rungs,
    }


def read_images(run: Path, mask: str) -> dict[str, np.ndarray]:
    """What each sample adds to the figures at the rungs, for comparisons in pairs."""

    from memcontrol.core.run_folder import RunFolder

    found = {}
    for rung in RUNGS:
        added = RunFolder(run).read_rung_contributions(rung)
        found |= {
            f"{mask} {rung} {name}": added[name].astype(np.float32)
            for name in ("fid", "memorization")
            if name in added
        }
    return found
