"""All paths of a study file are seen from it, by every command and from any working directory, and a folder
that is moved as a whole goes on."""

import contextlib
import json
import shutil

import pytest
import torch
import yaml
from commands import run

from memcontrol.config.spec import read_spec
from memcontrol.core.files import PACKAGE
from memcontrol.study.optuna_private import read_attributes
from memcontrol.study.place import StudyPlace

OWN = "def grey(evidence):\n    return float(evidence.images.mean())\n"
SPACE = {
    "groups": {"up": r"up_blocks\..*attentions.*to_q", "down": r"down_blocks\..*attentions.*to_q"},
    "learning_rate": {"lora": [1e-4, 1e-2], "full": [1e-5, 1e-3]},
}


class Texture(torch.nn.Module):
    """A feature network of few numbers."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


@pytest.fixture
def home(tmp_path, photographs):
    """A study whose every path is relative, in a folder of its own, and a working directory with a decoy of
    each."""
    home = tmp_path / "home" / "study"
    home.mkdir(parents=True)
    photographs(24, folder="home/images")
    shutil.copytree(PACKAGE / "assets" / "tiny", home / "mybase")
    (home / "mine.yaml").write_text(yaml.safe_dump(SPACE))
    (home / "own.py").write_text(OWN)
    torch.jit.script(Texture()).save(home / "net.pt")
    study = {
        "name": "s",
        "base": "./mybase",
        "data": {"path": "../images", "train": 8, "holdout": 8, "test": 8},
        "space": "mine.yaml",
        "storage": "sqlite:///kept/study.db?timeout=60",
        "inner": {"budget_images": 16, "batch_size": 8, "rounds": 2},
        "rewards": {
            "objectives": ["kid", "own.py:grey"],
            "extractor": "torchscript:net.pt,side=32",
            "n_samples": 8,
            "sampling_steps": 1,
            "confirm": 1,
        },
        "search": {"trials": 1, "workers": 1, "executor": "inline"},
    }
    (home / "s.yaml").write_text(yaml.safe_dump(study))
    away = tmp_path / "away"
    (away / "mybase").mkdir(parents=True)
    for name in ("mine.yaml", "own.py", "net.pt"):
        (away / name).write_text("none")
    return home, away


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_paths_are_seen_from_the_study_file_and_a_moved_folder_goes_on(home):
    home, away = home
    run("search", home / "s.yaml", cwd=away, check=True)
    assert (home / "kept" / "study.db").is_file()
    moved = home.parent.with_name("elsewhere") / "study"
    home.parent.rename(moved.parent)
    file = moved / "s.yaml"

    # what is stored holds no place of this machine
    with contextlib.closing(StudyPlace.load(file).open()) as study:
        stored = json.loads(read_attributes(study.inner)["memcontrol:config"])
    assert stored["base"] == "./mybase" and stored["data"]["path"] == "../images"
    assert stored["space"] == "mine.yaml" and stored["rewards"]["objectives"][1] == "own.py:grey"
    for path in (moved / "runs" / "s").glob("*/spec.json"):
        assert str(home) not in path.read_text() and str(moved) not in path.read_text()
        config = read_spec(path.parent).config
        assert config.base.id == str(moved / "mybase") and config.data.path == str(moved / "../images")

    for command in ("status", "front", "pick"):
        run(command, file, cwd=away, check=True)
    run("search", file, "--trials", "2", cwd=away, check=True)
    run("retrain", file, cwd=away, check=True)
    picked = json.loads(run("pick", file, "--json", cwd=away, check=True).stdout)
    run("export", picked["run"], "--format", "pipeline", away / "pipeline", cwd=away, check=True)
    run("report", file, away / "page.html", cwd=away, check=True)
    runs = [record["run"] for record in json.loads(run("front", file, "--json", cwd=away, check=True).stdout)]
    run("compare", *[*runs, picked["run"]][:2], cwd=away, check=True)
    states = json.loads(run("status", file, "--json", cwd=away, check=True).stdout)["trials"]
    assert [trial["state"] for trial in states] == ["COMPLETE"] * 5


@pytest.mark.parametrize(
    "storage, words",
    [("sqlite://", "in memory"), ("sqlite:///:memory:", "in memory"), ("sqlite:///", "in memory")],
)
def test_a_database_in_memory_is_refused(storage, words, study_file):
    file = study_file(storage=storage)
    done = run("search", file)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1
