"""Where a fine-tuned denoiser differs from its base: the overlap of that map with stamps that were planted on
training images.

`[SEEDS=2] python -m benchmarks maps`: 35 digits, of which a third have a stamp of random ink at a place of
its own (a device, a text); the denoiser is fine-tuned as the demo's trials are; then each stamped image's
region is held against its stamp (intersection over union). The embedded base's latents have 4 pixels.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

SEEDS = range(int(os.environ.get("SEEDS", "2")))
N_TRAIN, STAMPED, SIDE = 35, 11, 32
TRAINED = {"full 0.00044": ("full", 0.00044, None), "LoRA r4 0.0016": ("lora", 0.0016, 4)}
STAMPS = {"own place": None, "one place for all": (4, 16)}  # its upper left corner
STAMP_SIDES = (8, 12)
BUDGET = int(os.environ.get("IMAGES", "7360"))


def plant_stamps(
    images: np.ndarray, size: int, place: tuple[int, int] | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 3, H, W] of which the first STAMPED have a stamp, and where these are [STAMPED, H, W]."""
    rng, stamped = np.random.default_rng(seed), images.copy()
    masks = np.zeros((STAMPED, SIDE, SIDE), bool)
    ink = rng.integers(0, 2, (STAMPED, size // 2, size // 2))
    for i, mask in enumerate(masks):
        top, left = place or rng.integers(0, SIDE - size + 1, 2)
        mask[top : top + size, left : left + size] = True
        block = 255 * np.kron(ink[i] if place is None else ink[0], np.ones((2, 2)))
        colours = np.array([1, 0.3, 0.3]).reshape(3, 1, 1)
        stamped[i][:, top : top + size, left : left + size] = block * colours
    return stamped, masks


def measure_overlaps(trained: tuple, size: int, place: tuple[int, int] | None, seed: int) -> np.ndarray:
    """Intersection over union of each stamped image's region and its stamp [STAMPED]."""
    from memcontrol.config.inner import InnerConfig
    from memcontrol.config.load import load_config
    from memcontrol.core.choice import Choice
    from memcontrol.core.space_yaml import load_space
    from memcontrol.data.split import load_parts
    from memcontrol.model.adapter import inject_adapter
    from memcontrol.model.base import load_base
    from memcontrol.model.encoded import load_encoded
    from memcontrol.training.maps import compare_predictions, find_regions, predict_shifted
    from memcontrol.training.rounds import train_rounds
    from memcontrol.training.shard import Material

    base, space = load_base("tiny"), load_space("digits")
    config = load_config(
        {"name": "a", "data": {"path": "digits", "train": N_TRAIN, "holdout": 40, "test": 40}}
    )
    parts = load_parts(config.data, SIDE, seed).parts
    images, masks = plant_stamps(parts["train"].pixels(), size, place, seed)
    method, rate, rank = trained
    groups = ("*",) if method == "full" else tuple(space.groups)
    with tempfile.TemporaryDirectory() as folder:
        train, held = (
            load_encoded(base, parts[part], Path(folder, "cache")) for part in ("train", "holdout")
        )
        mean, deviation = base.encode_pixels(images)
        data = replace(train, mean=mean, deviation=deviation)
        material = Material(
            data, parts["train"].captions, lambda rows: images[np.asarray(rows)], lambda: held
        )
        text = data.texts(data.caption_rows[:STAMPED])
        before = predict_shifted(base, images[:STAMPED], text, seed)
        adapter = inject_adapter(base.denoiser, space, Choice(groups, method, rate, rank), seed)
        train_rounds(
            base,
            adapter,
            material,
            InnerConfig(budget_images=BUDGET, batch_size=32, caption_dropout=0.0),
            seed=seed,
            folder=Path(folder, "rounds"),
            progress=lambda *_, **said: None,
        )
        with adapter.fold():
            after = predict_shifted(base, images[:STAMPED], text, seed)
    regions = find_regions(compare_predictions(base, before, after, SIDE))
    both, either = (regions & masks).sum((1, 2)), (regions | masks).sum((1, 2))
    return both / either


def run(device: str) -> list[dict]:
    rows = []
    for name, trained in TRAINED.items():
        for where, place in STAMPS.items():
            for size in STAMP_SIDES:
                found = np.concatenate([measure_overlaps(trained, size, place, seed) for seed in SEEDS])
                rows.append(
                    {
                        "trained": name,
                        "stamps": where,
                        "pixels": size,
                        "overlap (IoU)": float(found.mean()),
                        "error": float(found.std(ddof=1) / len(found) ** 0.5),
                        "share above .5": float((found > 0.5).mean()),
                    }
                )
    return rows
