"""Owns the look at one finished run's images: each generated one, its nearest training image, and how near that is."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from memcontrol.run import Bench, evidence, read_samples
from memcontrol.spec import read_spec

Strip = tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def nearest_pairs(run: Path, title: str, bench: Bench) -> Strip:
    """A row of `pictures.pairs_picture` for a run folder."""
    spec = read_spec(run)
    images = read_samples(run)["images"]
    space = evidence(images, spec, bench, 0.0).space("pixels")
    distances, indices = space.to_train
    matches = bench.train_images(spec).take(indices.tolist()).pixels()
    return title, images, matches, distances, distances / np.maximum(space.to_holdout, 1e-12)
