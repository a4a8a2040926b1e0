"""Owns what a search tells trackers of experiments (`search.track`): each trial that has ended as a run with
its curves, rewards and pictures, written in threads, so that none of them holds a search up or harms it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import queue
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from memcontrol.core.console import LOG
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import make_private_folder, read_json, write_json
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.core.space import SearchSpace
from memcontrol.search.observer import Observer
from memcontrol.study.database import Tell
from memcontrol.study.record import Record
from memcontrol.study.store import Study
from memcontrol.study.trials import describe_coordinates

_TELL_SECONDS = 5.0  # between two looks at the records
_LAST_SECONDS = 10.0  # for what is still to be written when a search ends; the next one writes the rest


@dataclass(frozen=True)
class TrackedTrial:
    """A trial that has ended, as trackers are told of it. What lies in its folder is read where it is
    written."""

    study: str
    token: str  # tells the study from others of its name
    record: Record
    space: SearchSpace

    @property
    def name(self) -> str:
        return f"{self.record.number:04d}-{self.record.origin}-{self.record.chosen.key}"

    @property
    def identity(self) -> str:
        """The same whenever it is written again."""
        return f"{self.token[:8]}-{self.record.number}"

    @property
    def digest(self) -> str:
        """Of all that is known of it."""
        return hashlib.sha256(json.dumps(self.record.as_dict(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def parameters(self) -> dict[str, Any]:
        told = describe_coordinates(self.record.choice, self.space)
        told |= {"state": self.record.state, "anchor": self.record.origin}
        return told | ({"dropped": self.record.dropped} if self.record.dropped else {})

    @property
    def rewards(self) -> dict[str, float]:
        """Each with its error or its interval beside it."""
        measured = {"searched": self.record.searched, "confirmed": self.record.confirmed}
        return {f"{how}/{name}": value for how, found in measured.items() for name, value in found.items()}

    @cached_property
    def curves(self) -> list[tuple[int, dict[str, float]]]:
        """By round: the mean loss over the shards, and what else the rounds have in numbers. Empty where
        nothing was trained, or the folder is elsewhere."""
        path = RunFolder(self.record.run).training_file
        if not path.is_file():
            return []
        training, losses = read_json(path), defaultdict(list)
        for shard in training.get("shards", ()):
            if shard.get("loss") is not None:
                losses[shard["round"]].append(shard["loss"])
        told = {one["round"]: _select_numbers(one) for one in training.get("rounds", ()) if "round" in one}
        return [(n, {"loss": sum(losses[n]) / len(losses[n])} | told.get(n, {})) for n in sorted(losses)]

    @property
    def pictures(self) -> dict[str, Path]:
        run = RunFolder(self.record.run)
        found = {"samples": run.samples_picture, "pairs": run.pairs_picture}
        return {name: path for name, path in found.items() if path.is_file()}


def _select_numbers(told: dict[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in told.items()
        if key != "round" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


class Tracker(ABC):
    """A library that keeps runs; made and used in one thread. `folder` is for what it keeps here."""

    def __init__(self, folder: Path):
        self.folder = folder

    @abstractmethod
    def write(self, trial: TrackedTrial) -> None:
        """Writes the trial, or over what was written of it before."""

    def close(self) -> None:
        """The search ends."""


class TensorBoard(Tracker):
    """Event files, a folder for each trial, by what PyTorch's own SummaryWriter writes them with: that one
    needs torch, which a search does not load."""

    def write(self, trial: TrackedTrial) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        place = self.folder / trial.name
        shutil.rmtree(place, ignore_errors=True)
        writer, at = EventFileWriter(str(make_private_folder(place))), time.time()
        known = {key: value for key, value in trial.parameters.items() if value is not None}
        writer.add_event(_make_event(hparams_pb(known, trial_id=trial.identity), 0, at))
        for n, values in trial.curves:
            scalars = [Summary.Value(tag=f"train/{key}", simple_value=value) for key, value in values.items()]
            writer.add_event(_make_event(Summary(value=scalars), n, at))
        rewards = [Summary.Value(tag=key, simple_value=value) for key, value in trial.rewards.items()]
        writer.add_event(_make_event(Summary(value=rewards), 0, at))
        for name, path in trial.pictures.items():
            image = Summary.Image(encoded_image_string=path.read_bytes(), colorspace=3)
            writer.add_event(_make_event(Summary(value=[Summary.Value(tag=name, image=image)]), 0, at))
        writer.close()


def _make_event(summary, step: int, at: float):
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=at, step=step, summary=summary)


class MLflow(Tracker):
    """Runs of an experiment of the study's name, in the store that MLFLOW_TRACKING_URI names; without it, a
    SQLite file in the study's folder."""

    @cached_property
    def client(self):
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        own = f"sqlite:///{self.folder / 'mlflow.db'}"
        return MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or own)

    def find_experiment(self, name: str) -> str:
        if known := self.client.get_experiment_by_name(name):
            return known.experiment_id
        own = None if os.environ.get("MLFLOW_TRACKING_URI") else (self.folder / "artifacts").as_uri()
        return self.client.create_experiment(name, artifact_location=own)

    def find_run(self, trial: TrackedTrial) -> Any:
        experiment = self.find_experiment(trial.study)
        known = self.client.search_runs([experiment], f"tags.memcontrol_trial = '{trial.identity}'")
        if known:
            return known[0]
        tags = {"memcontrol_trial": trial.identity}
        return self.client.create_run(experiment, run_name=trial.name, tags=tags)

    def write(self, trial: TrackedTrial) -> None:
        from mlflow.entities import Metric, Param, RunTag

        known, at = self.find_run(trial), int(1000 * time.time())
        run = known.info.run_id
        changing = {"state": trial.record.state, "dropped": trial.record.dropped}
        fixed = {key: value for key, value in trial.parameters.items() if key not in changing}
        curves = [
            Metric(f"train/{key}", value, at, n)
            for n, values in trial.curves
            for key, value in values.items()
            if f"train/{key}" not in known.data.metrics  # where it is written again
        ]
        rewards = [Metric(key, value, at, 0) for key, value in trial.rewards.items()]
        params = [Param(key, str(value)) for key, value in fixed.items() if value is not None]
        tags = [RunTag(key, value) for key, value in changing.items()]
        for some in _cut((*curves, *rewards), 500):  # as many as a call may have
            self.client.log_batch(run, metrics=some)
        for some in _cut(params, 100):
            self.client.log_batch(run, params=some)
        self.client.log_batch(run, tags=tags)
        for path in trial.pictures.values():
            self.client.log_artifact(run, str(path))
        self.client.set_terminated(run, "FAILED" if trial.record.state == "FAIL" else "FINISHED")


def _cut(items: Sequence, n: int) -> list[Sequence]:
    return [items[i : i + n] for i in range(0, len(items), n)]


class WandB(Tracker):
    """Runs of a project of the study's name: online where WANDB_MODE or WANDB_API_KEY says so, otherwise in
    the study's folder, for `wandb sync`."""

    def write(self, trial: TrackedTrial) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or (
            "online" if os.environ.get("WANDB_API_KEY") else "offline"
        )
        run = wandb.init(
            project=trial.study,
            id=trial.identity,
            name=trial.name,
            config=trial.parameters,
            dir=str(self.folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True),
        )
        for n, values in trial.curves:
            run.log({f"train/{key}": value for key, value in values.items()}, step=n)
        run.log({name: wandb.Image(str(path)) for name, path in trial.pictures.items()})
        run.summary.update(trial.rewards)
        run.finish(exit_code=int(trial.record.state == "FAIL"))


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


def require_trackers(names: Sequence[str]) -> None:
    """Raises MemControlError where the library of one is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MemControlError(
                f"search.track names {name}, which is not installed; install memcontrol[{name}], or take it "
                "out"
            )


class Tracking(Observer):
    """Tells every tracker of each trial that ends, and again where more is known of it. What was written is
    noted in the study's folder: the next search writes what is missing."""

    def __init__(self, names: Sequence[str], space: SearchSpace, folder: StudyFolder, say: Tell):
        self.space, self.say = space, say
        self.feeds = [_Feed(TRACKERS[name], name, folder) for name in dict.fromkeys(names)]
        self.study: Study | None = None
        self.seen: dict[int, Record] = {}
        self.due = 0.0

    def opened(self, study: Study) -> None:
        self.study = study
        for feed in self.feeds:
            feed.thread.start()

    def tick(self) -> None:
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + _TELL_SECONDS
            self.tell()

    def tell(self) -> None:
        assert self.study is not None, "nothing is told before it is open"
        for record in self.study.records():
            is_over = record.ended and record.choice is not None
            if is_over and self.seen.get(record.number) != record:
                self.seen[record.number] = record
                trial = TrackedTrial(self.study.config.name, self.study.token or "", record, self.space)
                for feed in self.feeds:
                    feed.add(trial)
        for feed in self.feeds:
            if line := feed.take_warning():
                self.say(line)

    def over(self) -> None:
        if self.study is None:
            return
        self.tell()
        deadline = time.monotonic() + _LAST_SECONDS
        for feed in self.feeds:
            feed.waiting.put(None)
        for feed in self.feeds:
            feed.thread.join(max(deadline - time.monotonic(), 0.0))
            if line := feed.take_warning():
                self.say(line)
            if feed.thread.is_alive():
                self.say(f"{feed.name} is not done; the next search writes to it what is missing")


class _Feed:
    """One tracker, and the thread that writes to it."""

    def __init__(self, kind: type[Tracker], name: str, folder: StudyFolder):
        self.kind, self.name, self.folder = kind, name, folder.track / name
        self.noted = self.folder / "written.json"
        self.written: dict[str, str] = {}  # what is known of each trial there, by its number
        self.waiting: queue.Queue[TrackedTrial | None] = queue.Queue()
        self.warnings: queue.Queue[str] = queue.Queue()
        self.has_failed = False
        self.thread = threading.Thread(target=self.work, name=f"track {name}", daemon=True)

    def add(self, trial: TrackedTrial) -> None:
        self.waiting.put(trial)

    def take_warning(self) -> str:
        """Once in a search, however often it fails."""
        try:
            return self.warnings.get_nowait()
        except queue.Empty:
            return ""

    def work(self) -> None:
        """Whatever its library raises is no concern of the search."""
        tracker = None
        try:
            make_private_folder(self.folder)
            self.written = read_json(self.noted) if self.noted.is_file() else {}
            tracker = self.kind(self.folder)
        except Exception as error:
            self.warn(error)
        while (trial := self.waiting.get()) is not None:
            if tracker is not None and self.written.get(str(trial.record.number)) != trial.digest:
                self.write(tracker, trial)
        if tracker is not None:
            try:
                tracker.close()
            except Exception as error:
                self.warn(error)

    def write(self, tracker: Tracker, trial: TrackedTrial) -> None:
        try:
            tracker.write(trial)
            self.written[str(trial.record.number)] = trial.digest
            write_json(self.noted, self.written)
        except Exception as error:
            self.warn(error)

    def warn(self, error: Exception) -> None:
        LOG.debug("%s failed", self.name, exc_info=error)
        if not self.has_failed:
            self.has_failed = True
            words = " ".join(str(error).split())[:200] or type(error).__name__
            self.warnings.put(f"{self.name} could not be written (search.track); the search goes on: {words}")
