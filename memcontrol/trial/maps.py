"""Owns the maps of a run: where its model differs from its base on the training images that its samples come
nearest to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from memcontrol.config.spec import Spec
from memcontrol.core.files import replace_file
from memcontrol.core.run_folder import RunFolder
from memcontrol.data.images import Images
from memcontrol.model.families import Text
from memcontrol.scoring.evidence import Evidence
from memcontrol.training.maps import compare_predictions, may_map, predict_shifted
from memcontrol.trial.loaded import LoadedModels
from memcontrol.trial.pictures import N_COLUMNS
from memcontrol.trial.tuned import hold_run

Maps = Mapping[int, np.ndarray]  # [H, W] of some training images, by row

_MOST_SIDE = 128  # pixels of a map: pictures show no more


def map_pairs(run: RunFolder, spec: Spec, loaded: LoadedModels, evidence: Evidence) -> Maps:
    """Of the images of the pairs picture, kept in the run's folder; empty where it would be a large part of
    the trial, or several processes hold the base."""
    found = evidence.suspects
    rows = np.unique(found.training[found.order[:N_COLUMNS]]).tolist()
    base, config = loaded.base(spec.config), spec.config
    if base.ranks.size > 1 or not may_map(base, config.inner, config.rewards, N_COLUMNS):
        return {}
    images, data = loaded.train_images(spec).take(rows), loaded.make_material(spec).data
    maps = map_images(run.path, spec, loaded, images, data.texts(data.caption_rows[rows]))
    with replace_file(run.maps_file) as part, open(part, "wb") as file:
        np.savez_compressed(file, rows=rows, maps=maps.astype(np.float16))
    return dict(zip(rows, maps))


def read_maps(run: RunFolder) -> Maps:
    """What `map_pairs` kept; empty where it kept none."""
    if not run.maps_file.is_file():
        return {}
    with np.load(run.maps_file, allow_pickle=False) as stored:
        return dict(zip(stored["rows"].tolist(), stored["maps"].astype(np.float32)))


def map_images(run: Path, spec: Spec, loaded: LoadedModels, images: Images, text: Text) -> np.ndarray:
    """Of some images under their captions' encodings, [N, H, W]."""
    base, pixels = loaded.base(spec.config), images.pixels()
    before = predict_shifted(base, pixels, text, spec.sampling_seed)
    with hold_run(run, spec, loaded):
        after = predict_shifted(base, pixels, text, spec.sampling_seed)
    return shrink_maps(compare_predictions(base, before, after, images.resolution))


def shrink_maps(maps: np.ndarray) -> np.ndarray:
    """[N, H, W], to no more than MOST_SIDE pixels."""
    side = min(maps.shape[-1], _MOST_SIDE)
    return torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(maps), side).numpy()
