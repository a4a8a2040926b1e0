"""Fixtures that several tests share: the embedded base, opened once, and small studies."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

torch.set_num_threads(1)

SMALL = {
    "data": {"path": "digits", "train": 32, "holdout": 64, "test": 64},
    "space": "digits",
    "inner": {"budget_images": 32, "batch_size": 16},
    "rewards": {"n_samples": 256, "sampling_steps": 1},
    "search": {"trials": 1, "workers": 1, "executor": "inline"},
}


@pytest.fixture(scope="session")
def base():
    from memcontrol.models import load_base

    return load_base("tiny")


@pytest.fixture
def study_file(tmp_path):
    """Writes a study file; keyword arguments replace whole keys of SMALL."""

    def write(name="small", **keys):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, **SMALL, **keys}))
        return path

    return write


@pytest.fixture
def photographs(tmp_path):
    """A folder of n smooth colour images, no two alike."""

    def make(n, folder="photos", size=(40, 30), mode="RGB"):
        root = tmp_path / folder
        root.mkdir(parents=True, exist_ok=True)
        for i in range(n):
            cells = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).convert(mode).save(root / f"{i:03}.png")
        return root

    return make
