"""A whole search through the command line, then pick, retrain, export, and the export in plain diffusers."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from benchmarks._gpu_size import Size, shorten_error, tell

PLAIN = """
import sys
import numpy, torch
from diffusers import DiffusionPipeline

base, out, kind, device, side = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(out if kind == "pipeline" else base, torch_dtype=torch.float32)
pipe = pipe.to(device)
if kind == "adapter":
    pipe.load_lora_weights(out)
image = pipe(
    "a red picture", num_inference_steps=4, height=int(side), width=int(side), output_type="np"
).images[0]
assert image.shape == (int(side), int(side), 3) and numpy.isfinite(image).all(), image
"""
SPACE = r"""
groups:
  down: 'down_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.0\.attn[12]\.(to_[qkv]|to_out\.0)'
  mid: 'mid_block\.attentions\.\d+\.transformer_blocks\.0\.attn[12]\.(to_[qkv]|to_out\.0)'
  up: 'up_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.0\.attn[12]\.(to_[qkv]|to_out\.0)'
methods: [lora]
learning_rate:
  lora: [1.0e-5, 1.0e-3]
  full: [1.0e-6, 1.0e-4]
rank: [4, 8]
"""


def run(size: Size) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.perf_counter()
        base = size.find_base()
        tell("libraries, base of random weights", time.perf_counter() - started, "s", Path(base).name)
        write_pictures(folder / "pictures", size.images, size.side)
        study = write_study(folder, base, size)
        seconds = call("search", study)
        trials = read_trials(folder)
        what = f"{len(trials)} trials, {size.budget // size.batch} steps of {size.batch}, {size.side} px"
        tell("search", seconds, "s", f"{what}, {size.samples} samples by {size.solver_steps} steps")
        tell("seconds a trial", statistics.median(each["seconds"] for each in trials), "s", "median")
        tell_memory(folder)
        tell("pick", call("pick", study), "s")
        tell("retrain", call("retrain", study, "--out", folder / "retrained"), "s", "the pick alone")
        tell("export", call("export", folder / "retrained", folder / "exported"), "s")
        kind = "pipeline" if (folder / "exported" / "model_index.json").is_file() else "adapter"
        words = [base, folder / "exported", kind, size.device, size.side]
        tell("export in plain diffusers", execute("-c", PLAIN, *words), "s", f"{kind}, one image in 4 steps")


def write_pictures(folder: Path, n: int, side: int) -> None:
    """Smooth colour images, no two alike."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(n):
        cells = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:03}.png")
        lines.append(json.dumps({"file_name": f"{i:03}.png", "text": ("a red picture", "a blue one")[i % 2]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_study(folder: Path, base: str, size: Size) -> Path:
    """Three trials of LoRA."""
    values = {
        "name": "study",
        "base": base,
        "data": {"path": str(folder / "pictures"), "resolution": size.side},
        "space": str(folder / "lora.yaml"),
        "inner": {"budget_images": size.budget, "batch_size": size.batch, "rounds": 2},
        "rewards": {
            "n_samples": size.samples,
            "sampling_steps": size.solver_steps,
            "confirm": 1,
            "force": True,
        },
        "search": {"trials": 3, "anchors": [], "workers": 1, "executor": choose_executor(size)},
    }
    (folder / "lora.yaml").write_text(SPACE)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def choose_executor(size: Size) -> str:
    return "local" if size.on_card else "inline"


def call(command: str, *words: object) -> float:
    """Seconds of a command of memcontrol."""
    return execute("-m", "memcontrol.cli", command, *words)


def execute(*words: object) -> float:
    """Seconds of a Python process. Raises RuntimeError with its last words."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {shorten_error(done.stderr)}")
    return time.perf_counter() - started


def read_trials(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in folder.rglob("result.json")]


def tell_memory(folder: Path) -> None:
    """Of the trial that held most while it trained, what was predicted beside it."""
    records = [json.loads(path.read_text())["memory"] for path in folder.rglob("training.json")]
    most = max(records, key=lambda each: each["peak_mib"]["train"])
    predicted = sum(most["predicted_mib"].values())
    for stage, mib in most["peak_mib"].items():
        tell(f"a trial's peak, {stage}", mib, "MiB", f"predicted {predicted:.0f}" if stage == "train" else "")
