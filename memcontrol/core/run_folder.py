"""Owns the files of a study's folder and of a run's: their names, and what is read from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import read_json, write_json
from memcontrol.core.image_parts import CALIBRATION, DIGITS, PARTS

PAIRS_LAYOUT = "memcontrol pairs"  # under which a picture of pairs says where each lies, as JSON
_MOST_ROWS = 10_000  # of split.json, beyond which it is a table by columns
_SPLIT_COLUMNS = {"name": "", "caption": "", "digest": "", "group": "", "further": []}  # and what is none
_MAY_LACK = ("group", "further")


@dataclass(frozen=True)
class RunFolder:
    """The folder of one fine-tuning: of a trial, of a replicate, or of `retrain`."""

    path: Path

    @property
    def spec_file(self) -> Path:
        """All that the run depends on, written before it begins."""
        return self.path / "spec.json"

    @property
    def result_file(self) -> Path:
        """Written last: the run is over once it is there."""
        return self.path / "result.json"

    @property
    def adapter_file(self) -> Path:
        return self.path / "adapter.safetensors"

    def checkpoint_file(self, share: float) -> Path:
        """What it had learned after a share of its budget."""
        return self.path / f"checkpoint-{share:g}.safetensors"

    def list_checkpoints(self) -> list[Path]:
        return sorted(self.path.glob("checkpoint-*.safetensors"))

    @property
    def samples_file(self) -> Path:
        """Uncompressed, so that it is mapped and not read."""
        return self.path / "samples.safetensors"

    @property
    def old_samples_file(self) -> Path:
        """Of studies of before."""
        return self.path / "samples.npz"

    @property
    def contributions_file(self) -> Path:
        """What each sample adds to each reward."""
        return self.path / "contributions.npz"

    @property
    def training_file(self) -> Path:
        """What the fine-tuning did: rounds, skips, memory."""
        return self.path / "training.json"

    @property
    def confirmed_file(self) -> Path:
        """The rewards over fresh draws."""
        return self.path / "confirmed.json"

    @property
    def judged_file(self) -> Path:
        """Whether it goes on beyond each rung."""
        return self.path / "judged.json"

    @property
    def samples_picture(self) -> Path:
        return self.path / "samples.png"

    @property
    def pairs_picture(self) -> Path:
        return self.path / "pairs.png"

    @property
    def maps_file(self) -> Path:
        """Where the model differs from its base on the training images of the pairs picture."""
        return self.path / "maps.npz"

    @property
    def dropped_file(self) -> Path:
        """Which files were dropped since other trials beat this one, written before they were."""
        return self.path / "dropped.json"

    @property
    def rounds(self) -> Path:
        """The folder of its checkpoints, until its result is there."""
        return self.path / "rounds"

    def copy_of_rounds(self, rank: int) -> Path:
        """Where a rank above 0 of several that hold one base keeps the same rounds."""
        return self.path / f"rounds-{rank}"

    def list_copies_of_rounds(self) -> list[Path]:
        return sorted(self.path.glob("rounds-*"))

    @property
    def attempts_file(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def progress_file(self) -> Path:
        return self.path / "progress.json"

    @property
    def failures_file(self) -> Path:
        return self.path / "failures.json"

    def rung_file(self, rung: float) -> Path:
        """What it was measured at, at a share of its budget."""
        return self.path / f"rung-{rung:g}.json"

    def rung_contributions_file(self, rung: float) -> Path:
        return self.rung_file(rung).with_suffix(".npz")

    def replicate(self, i: int) -> RunFolder:
        """The run of the same choice from another seed."""
        return RunFolder(self.path / f"replicate-{i}")

    @property
    def has_result(self) -> bool:
        return self.result_file.is_file()

    @property
    def is_complete(self) -> bool:
        """Whether it ended well."""
        return self.has_result and self.read_result()["state"] == "COMPLETE"

    def has_come_to(self, rung: float | None) -> bool:
        """Whether there is nothing left to do on the way to a rung, or to the end: a failure is no end, and a
        model that was dropped is asked for anew."""
        if self.has_result and self.read_result()["state"] != "FAIL":
            return not self.is_dropped(self.adapter_file)
        return rung is not None and self.rung_file(rung).is_file()

    def is_dropped(self, path: Path) -> bool:
        """Whether a file of the run is gone since other trials beat it."""
        return self.dropped_file.is_file() and not path.exists()

    def refuse_dropped(self, path: Path) -> None:
        """Raises MemControlError where `is_dropped`."""
        if self.is_dropped(path):
            number = read_json(self.dropped_file)["trial"]
            raise MemControlError(
                f"{path} was dropped, since other trials beat trial {number} (search.keep: front); to have "
                f"its model, train the choice anew: memcontrol retrain STUDY.yaml --trial {number}"
            )

    def read_result(self) -> dict[str, Any]:
        return read_json(self.result_file)

    def read_judgements(self) -> list[dict]:
        """What was decided at the trial's rungs: rung, goes_on, beaten_by, n_peers."""
        return read_json(self.judged_file) if self.judged_file.is_file() else []

    def read_rungs(self, rungs: Sequence[float], names: tuple[str, ...]) -> list[dict]:
        """What the trial was measured at, of these rungs: its share of the budget, and the rewards of these
        names there with what is told of their errors."""
        paths = [self.rung_file(rung) for rung in rungs]
        measured = [read_json(path) for path in paths if path.is_file()]
        return [{**one, "rewards": _select_rewards(one["rewards"], names)} for one in measured]

    def read_contributions(self) -> Mapping[str, np.ndarray]:
        """What each sample added to each reward, where that was kept: name to [N]."""
        return _read_arrays(self.contributions_file)

    def read_rung_contributions(self, rung: float) -> Mapping[str, np.ndarray]:
        """The same at the rung."""
        return _read_arrays(self.rung_contributions_file(rung))

    def forget_failure(self) -> None:
        """Makes room for further attempts after the run was given up; the old ones' reasons stay beside."""
        if self.has_result and self.read_result()["state"] == "FAIL":
            self.result_file.unlink()
        if self.failures_file.is_file():
            n = len(list(self.path.glob("failures-*.json")))
            self.failures_file.replace(self.path / f"failures-{n}.json")

    def count_rungs(self) -> int:
        return len(list(self.path.glob("rung-*.json")))


def _read_arrays(path: Path) -> Mapping[str, np.ndarray]:
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def _select_rewards(rewards: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    return {key: value for key, value in rewards.items() if key.startswith(names)}


@dataclass(frozen=True)
class StudyFolder:
    """Where a study's results lie: a folder for each choice, and what they share."""

    path: Path

    @property
    def database(self) -> Path:
        """The study's own, where its config names no other."""
        return self.path / "study.db"

    @property
    def split_file(self) -> Path:
        """Which image is in which part."""
        return self.path / "split.json"

    @property
    def network_file(self) -> Path:
        """The denoiser's blocks."""
        return self.path / "network.json"

    @property
    def extractor_file(self) -> Path:
        """The feature network that the study began with."""
        return self.path / "extractor.json"

    @property
    def base_file(self) -> Path:
        """What the study's base is pinned to: a Hub id's commit, the content of files."""
        return self.path / "base.json"

    def read_pins(self) -> dict[str, str]:
        """Empty where nothing was recorded: of a folder, and by older versions."""
        return read_json(self.base_file) if self.base_file.is_file() else {}

    @property
    def log_file(self) -> Path:
        return self.path / "search.log"

    @property
    def lock_file(self) -> Path:
        return self.path / "search.lock"

    @property
    def holder_file(self) -> Path:
        """Who searches, and since when."""
        return self.path / "search.holder.json"

    @property
    def front_picture(self) -> Path:
        return self.path / "front.png"

    @property
    def artifacts(self) -> Path:
        """Pictures that a dashboard shows beside trials; `optuna-dashboard --artifact-dir` takes it too."""
        return self.path / "artifacts"

    @property
    def cache(self) -> Path:
        """Latents, encodings and features, by their content."""
        return self.path / "cache"

    @property
    def image_index(self) -> Path:
        """What was read of each image file."""
        return self.cache / "images.db"

    @property
    def secret_file(self) -> Path:
        """What names of artifacts are drawn from, so that none can be guessed."""
        return self.path / "secret"

    @property
    def readme_file(self) -> Path:
        """What lies in the folder, for whoever finds it."""
        return self.path / "README.txt"

    @property
    def others_file(self) -> Path:
        """Names that the folder held before the study."""
        return self.path / "others.json"

    @property
    def track(self) -> Path:
        """What experiment trackers keep here, by their names."""
        return self.path / "track"

    @property
    def slurm(self) -> Path:
        """What is known of Slurm jobs, by the command that submits them."""
        return self.path / "slurm"

    def worker_log(self, index: int) -> Path:
        """What a worker of this machine prints before its first job; none where it prints nothing."""
        return self.path / f"worker-{index}.txt"

    def list_worker_logs(self) -> list[Path]:
        return sorted(self.path.glob("worker-*.txt"))

    def calibration(self, i: int) -> Path:
        return self.path / f"calibration-{i}"

    def run(self, choice: Choice) -> RunFolder:
        return RunFolder(self.path / choice.key)

    def retrained(self, choice: Choice) -> RunFolder:
        """Where a choice is retrained, unless another place is given."""
        return RunFolder(self.path / "retrain" / choice.key)

    def list_runs(self) -> Iterator[RunFolder]:
        """Those that the search has begun."""
        return (RunFolder(path.parent) for path in self.path.glob("*/spec.json"))

    def list_retrained(self) -> list[RunFolder]:
        """Those that `retrain` has ended."""
        return [RunFolder(path.parent) for path in sorted(self.path.glob("retrain/*/result.json"))]

    def read_split(self) -> dict[str, Any]:
        """Source, resolution and parts: name, caption and hash of each image."""
        stored = read_json(self.split_file)
        return stored | {"parts": {part: _list_rows(table) for part, table in stored["parts"].items()}}

    def write_split(self, split: Mapping[str, Any]) -> None:
        """What `read_split` gives; many images as a table by columns. Raises DiskFull."""
        n = sum(len(rows) for rows in split["parts"].values())
        parts = {
            part: _list_columns(rows) if n > _MOST_ROWS else rows for part, rows in split["parts"].items()
        }
        write_json(self.split_file, {**split, "parts": parts})

    def list_twins(self, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """Pairs of images that are nearly the same, both of `names`."""
        known, pairs = set(names), self.read_split().get("twins", {}).get("pairs", [])
        return tuple((a, b) for a, b in pairs if a in known and b in known)

    def read_blocks(self) -> list[dict]:
        """The denoiser's blocks; empty where they are not on this machine."""
        return read_json(self.network_file) if self.network_file.is_file() else []

    def summarize_data(self) -> dict[str, Any]:
        """The images as split.json knows them: source, resolution, and for each part its numbers of `images`
        and of `groups` (people), and the `digest` of its contents, and of twins, where they were sought, how
        many `pairs` there are and images were `dropped`; empty where it is not on this machine."""
        if not self.split_file.is_file():
            return {}
        stored = self.read_split()
        parts = {name: _summarize_part(rows) for name, rows in stored["parts"].items()}
        twins = stored.get("twins", {})
        return {
            "source": stored["source"],
            "resolution": stored["resolution"],
            "parts": parts,
            "twins": {key: len(twins.get(key, ())) for key in ("pairs", "dropped") if twins},
        }


def _list_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {column: [row.get(column, none) for row in rows] for column, none in _SPLIT_COLUMNS.items()}


def _list_rows(table: Mapping[str, list[Any]] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(table, list):
        return table
    return [
        {column: value for column, value in zip(table, row) if value or column not in _MAY_LACK}
        for row in zip(*table.values())
    ]


def _summarize_part(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    lines = "\n".join(f"{row['digest']} {row['caption']}" for row in rows)
    groups = {row.get("group") or row["name"] for row in rows}
    digest = hashlib.sha256(lines.encode()).hexdigest()[:16]
    return {"images": len(rows), "groups": len(groups), "digest": digest}


def locate_study_folder(study_file: Path, name: str) -> Path:
    """Where results go: runs/NAME beside the study file, or the file's own folder if that already is called
    NAME."""
    parent = study_file.resolve().parent
    return parent if parent.name == name else parent / "runs" / name


def refuse_results_among(source: str, folder: Path) -> None:
    """Raises MemControlError where a study's folder lies among its images: its pictures would count as images
    the next time."""
    images = Path(source)
    parts = (images / part for part in (*PARTS, CALIBRATION))
    places = [part for part in parts if part.is_dir()] or [images]
    if source != DIGITS and any(folder.resolve().is_relative_to(place.resolve()) for place in places):
        raise MemControlError(
            f"results would go to {folder}, among the images of data.path, '{source}', and count as images "
            f"themselves; move the study file out of there, for example to {images.resolve().parent}"
        )
