"""The audit of 500 images against 5,000 and against 50,000 training images: time and peak memory, ten planted
copies found or not."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks._processes import measured, peak_mib

SIZES = ("5000", "50000")
N_HOLDOUT, N_GENERATED, N_COPIES = 2000, 500, 10


def run(device: str) -> list[dict]:
    found = [{"training images": size, **measured("benchmarks.audit", size, device)} for size in SIZES]
    return [
        row | {"time / first": row["s"] / found[0]["s"], "memory / first": row["MiB"] / found[0]["MiB"]}
        for row in found
    ]


def picture(seed: int) -> Image.Image:
    """A smooth picture of 64 x 64, no two alike."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((64, 64), Image.Resampling.BICUBIC)


def write(folder: Path, seeds: range) -> Path:
    folder.mkdir()
    for seed in seeds:
        picture(seed).save(folder / f"{seed}.png", compress_level=1)
    return folder


def noisy(seed: int) -> Image.Image:
    pixels = np.asarray(picture(seed), np.float64) + np.random.default_rng(seed).normal(0, 4, (64, 64, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def one(n_train: int, root: Path) -> dict[str, float]:
    from memcontrol.auditing.judge import judge_images
    from memcontrol.data.pictures import read_folder_pictures

    write(root / "train", range(n_train))
    write(root / "holdout", range(10**6, 10**6 + N_HOLDOUT))
    write(root / "generated", range(2 * 10**6, 2 * 10**6 + N_GENERATED - N_COPIES))
    for i in range(N_COPIES):
        noisy(i * n_train // N_COPIES).save(root / "generated" / f"copy{i}.png")
    started = time.perf_counter()
    parts = [read_folder_pictures(part, root / part, print) for part in ("generated", "train", "holdout")]
    found = judge_images(*parts, "tiny", lambda *_: None)
    first = [copy["generated"] for copy in found["copies"][:N_COPIES]]
    return {
        "s": time.perf_counter() - started,
        "copies ranked first": sum(name.startswith("copy") for name in first),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        row = one(int(sys.argv[1]), Path(folder))
    print(json.dumps(row | {"MiB": peak_mib(sys.argv[2])}))
