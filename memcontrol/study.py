"""Owns the study in Optuna's database: opens it, records trials, reads them."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from memcontrol.artifacts import attach
from memcontrol.config import Config, differing_keys, flat, load_config
from memcontrol.database import Say, StudyLock, cannot_open, checked, engine_arguments, patient, shown
from memcontrol.errors import MemControlError
from memcontrol.figures import MAXIMIZE, MINIMIZE, direction_of
from memcontrol.pareto import Limit, knee
from memcontrol.space import Choice, SearchSpace

T = TypeVar("T")
CONFIRMED, REPLICATES = "confirmed:", "replicates:"  # and the trial's number
OWN = "memcontrol:"  # before the names of our attributes: system attributes, since dashboards print user attributes whole
CONSTRAINT = "constraints:"  # and its name: as optuna's Trial.set_constraint keeps them
optuna.logging.set_verbosity(optuna.logging.ERROR)
logging.getLogger("alembic").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Record:
    """One trial of the study. An anchor tries several choices and stands for the best; `choice` is None until it has one."""

    number: int
    state: str
    candidates: tuple[Choice, ...]
    anchor: str | None = None
    choice: Choice | None = None
    objectives: dict[str, str] = field(default_factory=dict)  # name to direction
    searched: dict[str, float] = field(default_factory=dict)  # rewards as the search measured them
    confirmed: dict[str, float] = field(default_factory=dict)  # and over fresh draws, for trials on the front
    replicates: tuple[dict[str, float], ...] = ()  # rewards of the same choice fine-tuned from other seeds
    rungs: tuple[dict, ...] = ()  # what was measured on the way: rung, rewards
    reason: str = ""
    seconds: float = 0.0
    begun: str = ""  # local time, as ISO 8601
    ended: str = ""
    folder: Path = field(default=Path(), compare=False, repr=False)  # the study's

    @property
    def finished(self) -> bool:
        return self.state == "COMPLETE"

    @property
    def chosen(self) -> Choice:
        """The choice of a trial that has one, as every finished one does."""
        assert self.choice is not None, f"trial {self.number} has no choice yet"
        return self.choice

    @property
    def run(self) -> Path:
        """The folder of the choice's fine-tuning, for `export` and `compare`."""
        return self.folder / self.chosen.key

    @property
    def rewards(self) -> dict[str, float]:
        """The best that is known."""
        return self.confirmed or self.searched

    @property
    def values(self) -> dict[str, float]:
        """The objectives among them."""
        return {name: self.rewards[name] for name in self.objectives} if self.finished else {}

    @property
    def losses(self) -> list[float]:
        """The values, with those that are maximised negated: less is better in each."""
        return [-value if self.objectives[name] == MAXIMIZE else value for name, value in self.values.items()]

    def as_running(self) -> Record:
        """As it was before it ended."""
        choice = self.candidates[0] if len(self.candidates) == 1 else None
        return Record(self.number, "RUNNING", self.candidates, self.anchor, choice, self.objectives, begun=self.begun, folder=self.folder)

    def as_dict(self) -> dict[str, Any]:
        """The form of every --json."""
        return {
            "trial": self.number, "state": self.state, "values": self.values,
            "choice": self.choice.as_dict() if self.choice else None,
            "run": str(self.run) if self.choice else None,
            "anchor": self.anchor, "rewards": self.rewards, "confirmed": bool(self.confirmed), "searched": self.searched, "replicates": list(self.replicates), "reason": self.reason or None, "seconds": self.seconds, "begun": self.begun, "ended": self.ended or None,
        }  # fmt: skip


class Study:
    """A study that is open: `records()` reads it, `begin`, `finish` and `confirm` write it. One process writes, and so may keep
    what it read and wrote; a write that the database did not acknowledge is repeated until it is, and happens once."""

    def __init__(self, inner: optuna.Study, config: Config, folder: Path, url: str = "sqlite://", say: Say = lambda line: None, lock: StudyLock | None = None):
        self.inner, self.config, self.folder, self.url, self.say, self.lock = inner, config, folder, url, say, lock
        self.directions = [direction.name.lower() for direction in inner.directions]
        self.kept: dict[int, Record] = {}
        self.ids: dict[int, int] = {}  # Optuna's trial ids by number
        self.attributes: dict[str, Any] = {}
        self.patiently(self.read)

    @property
    def storage(self) -> optuna.storages.BaseStorage:
        return self.inner._storage

    @property
    def objectives(self) -> dict[str, str]:
        """Name to direction."""
        return dict(zip(self.config.rewards.names, self.directions))

    @property
    def limits(self) -> list[Limit]:
        """The config's own: upper bounds where less is better, lower ones where more is."""
        directions = self.objectives
        signs = {MINIMIZE: "<=", MAXIMIZE: ">="}
        return [
            Limit(name, signs[directions.get(name) or direction_of(name)], bound) for name, bound in self.config.rewards.limits.items()
        ]

    def patiently(self, call: Callable[[], T]) -> T:
        return patient(call, self.url, self.say, self.lock.take if self.lock else lambda: None)

    def close(self) -> None:
        close_storage(self.storage)

    def read(self) -> None:
        self.attributes = own(self.storage.get_study_system_attrs(self.inner._study_id))
        for trial in self.inner.get_trials(deepcopy=False):
            self.keep(trial)

    def keep(self, trial: optuna.trial.FrozenTrial) -> None:
        self.ids[trial.number] = trial._trial_id
        confirmed, replicates = (self.attributes.get(f"{name}{trial.number}", ()) for name in (CONFIRMED, REPLICATES))
        self.kept[trial.number] = replace(record_of(trial, self.objectives), confirmed=dict(confirmed), replicates=tuple(replicates), folder=self.folder)

    def records(self) -> list[Record]:
        """All trials, as this process last read or wrote them."""
        return list(self.kept.values())

    def confirm(self, number: int, rewards: dict[str, float]) -> None:
        """Records what a trial's fresh draws gave. Beside the trial: Optuna's finished trials are never changed."""
        self.write(f"{CONFIRMED}{number}", rewards)
        self.kept[number] = replace(self.kept[number], confirmed=rewards)

    def replicate(self, number: int, rewards: Sequence[dict[str, float]]) -> None:
        """Records what further fine-tunings of a trial's choice gave."""
        self.write(f"{REPLICATES}{number}", list(rewards))
        self.kept[number] = replace(self.kept[number], replicates=tuple(rewards))

    def note(self, name: str, make: Callable[[], Any]) -> Any:
        """What the study has under a name, made and recorded once; nothing is recorded while it is None."""
        if name not in self.attributes and (value := make()) is not None:
            self.write(name, value)
        return self.attributes.get(name)

    def write(self, name: str, value: Any) -> None:
        self.patiently(lambda: self.storage.set_study_system_attr(self.inner._study_id, f"{OWN}{name}", value))
        self.attributes[name] = value

    def begin(self, candidates: Sequence[Choice], space: SearchSpace, anchor: str | None = None) -> int:
        """Records a running trial, complete in one transaction: a crash leaves all of it or nothing. Returns its number."""
        params = readable_params(candidates[0], space) if anchor is None else {}
        wanted = [choice.as_dict() for choice in candidates]
        frozen = create_trial(
            state=TrialState.RUNNING, params=params, distributions=readable_distributions(params, space),
            user_attrs={"anchor": anchor} if anchor else {}, system_attrs={f"{OWN}candidates": wanted},
        )  # fmt: skip
        tried = False

        def write() -> int:
            nonlocal tried
            if tried and (known := self.running(wanted)):
                return known._trial_id
            tried = True
            if self.lock:
                self.lock.check()
            return self.storage.create_new_trial(self.inner._study_id, template_trial=frozen)

        frozen._trial_id = self.patiently(write)
        frozen.number = self.patiently(lambda: self.storage.get_trial_number_from_id(frozen._trial_id))
        self.keep(frozen)
        return frozen.number

    def running(self, candidates: list[dict]) -> optuna.trial.FrozenTrial | None:
        """The running trial of these candidates, which no other ever has."""
        trials = self.inner.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return next((trial for trial in trials if trial.system_attrs.get(f"{OWN}candidates") == candidates), None)

    def finish(self, number: int, results: Sequence[dict]) -> None:
        """Ends a trial with its candidates' results: the knee of the complete ones (the nearest to the ideal of them), or a failure.

        Told again, it changes nothing.
        """
        if self.kept[number].state not in ("RUNNING", "WAITING"):
            return
        objectives = self.config.rewards.names
        complete = [result for result in results if result["state"] == "COMPLETE"]
        for result in complete:
            self.check_measured(result)
        values = [[result["rewards"][name] for name in objectives] for result in complete]
        best = complete[knee([oriented(point, self.directions) for point in values])] if complete else results[0]
        told: dict[str, Any] = {"result": {key: best[key] for key in ("choice", "rewards", "reason", "seconds", "rungs") if key in best}}
        if len(results) > 1:
            told["tried"] = [{k: r.get(k) for k in ("choice", "state", "rewards", "reason")} for r in results]
        trial_id, state, tried = self.ids[number], TrialState.COMPLETE if complete else TrialState[best["state"]], False

        def write() -> None:
            nonlocal tried
            if tried and self.storage.get_trial(trial_id).state.is_finished():
                return
            tried = True
            if self.lock:
                self.lock.check()
            for key, value in told.items():
                self.storage.set_trial_system_attr(trial_id, f"{OWN}{key}", value)
            for name, excess in excesses(best.get("rewards", {}), self.limits).items():
                self.storage.set_trial_system_attr(trial_id, f"{CONSTRAINT}{name}", excess)
            attach(self.storage, trial_id, self.folder / Choice.from_dict(best["choice"]).key, self.folder)
            self.storage.set_trial_state_values(trial_id, state, [best["rewards"][name] for name in objectives] if complete else None)

        self.patiently(write)
        self.kept[number] = with_result(replace(self.kept[number], state=state.name, ended=iso(datetime.now())), told["result"])

    def check_measured(self, result: dict) -> None:
        """Raises MemControlError for a result that was measured with other things than the study's first one."""
        first = self.attributes.get("measured_with")
        if first is None:
            self.write("measured_with", result["measured_with"])
        else:
            refuse_incomparable(first, result["measured_with"], f"results of study '{self.config.name}'")


def oriented(values: Sequence[float], directions: Iterable[str]) -> list[float]:
    return [-value if direction == MAXIMIZE else value for value, direction in zip(values, directions)]


def refuse_incomparable(a: Mapping, b: Mapping, what: str) -> None:
    """Raises MemControlError where two figures were measured with different things."""
    a, b = flat(dict(a)), flat(dict(b))
    differing = [f"{key} ({a.get(key)} and {b.get(key)})" for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    if differing:
        raise MemControlError(f"{what} cannot be compared; measured with different {'; '.join(differing)}")


def excesses(rewards: dict[str, float], limits: Sequence[Limit]) -> dict[str, float]:
    """How far each limited reward lies beyond its limit; at most 0 where it keeps it."""
    return {limit.reward: limit.excess(rewards[limit.reward]) for limit in limits if limit.reward in rewards}


def storage_url(config: Config, folder: Path, study_file: Path) -> str:
    """The database: SQLite in the study's folder unless the config names another; relative SQLite paths start at the study file.
    Raises MemControlError where it is no URL."""
    if config.storage is None:
        return f"sqlite:///{folder / 'study.db'}"
    prefix = "sqlite:///"
    if config.storage.startswith(prefix):
        return prefix + os.path.join(study_file.resolve().parent, config.storage.removeprefix(prefix))
    return checked(config.storage)


def open_study(
    config: Config, folder: Path, study_file: Path, *, create: bool, directions: Sequence[str] = (), say: Say = lambda line: None,
    lock: StudyLock | None = None,
) -> Study:  # fmt: skip
    """The config's study. Its stored config must agree with a given one in all that numbers depend on. A new one is given
    its objectives' directions; without them each is minimised. `say` is told when the database is away. Raises MemControlError."""
    known, url = is_searched(config, folder, study_file), storage_url(config, folder, study_file)
    if not known and not create:
        raise no_study(config, study_file, folder)
    storage = open_storage(url)
    if known:
        inner = optuna.load_study(study_name=config.name, storage=storage)
        try:
            return Study(inner, agreeing_config(inner, config) if create else stored_config(inner), folder, url, say, lock)
        except MemControlError:
            close_storage(storage)
            raise
    objectives = list(config.rewards.names)
    inner = optuna.create_study(study_name=config.name, storage=storage, directions=[StudyDirection[name.upper()] for name in directions or [MINIMIZE] * len(objectives)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        inner.set_metric_names(objectives)
    storage.set_study_system_attr(inner._study_id, f"{OWN}config", config.model_dump_json())
    return Study(inner, config, folder, url, say, lock)


def is_searched(config: Config, folder: Path, study_file: Path) -> bool:
    """Whether the storage holds the study."""
    url = storage_url(config, folder, study_file)
    absent = url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).is_file()
    if absent:
        return False
    storage = open_storage(url)
    try:
        return config.name in optuna.get_all_study_names(storage)
    finally:
        close_storage(storage)


def close_storage(storage: Any) -> None:
    """Ends its connections, which would otherwise stay open until the process ends."""
    storage.remove_session()
    storage._backend.engine.dispose()


def open_storage(url: str) -> optuna.storages.BaseStorage:
    import sqlalchemy.exc

    try:
        if url.startswith("sqlite:///"):
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.get_storage(optuna.storages.RDBStorage(url, engine_kwargs=engine_arguments(url)))
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError, OSError, ValueError, RuntimeError) as error:
        raise cannot_open(url, error) from None


def no_study(config: Config, study_file: Path, folder: Path) -> MemControlError:
    if config.storage:
        return MemControlError(f"storage {shown(config.storage)} holds no study '{config.name}'; name the database that was searched, or run: memcontrol search {study_file}")
    return MemControlError(f"study '{config.name}' has not been searched yet; run: memcontrol search {study_file} (there is no study.db in {folder})")


def stored_config(inner: optuna.Study) -> Config:
    stored = inner._storage.get_study_system_attrs(inner._study_id).get(f"{OWN}config")
    if stored is None:
        raise MemControlError(f"study '{inner.study_name}' in this storage was not made by memcontrol; choose another name")
    return load_config(json.loads(stored))


def agreeing_config(inner: optuna.Study, config: Config) -> Config:
    differing = differing_keys(stored_config(inner), config)
    if differing:
        raise MemControlError(
            f"study '{config.name}' was begun with another config: {'; '.join(differing)}; restore these keys or choose another name"
        )
    return config


def own(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Ours among Optuna's system attributes."""
    return {name.removeprefix(OWN): value for name, value in attributes.items() if name.startswith(OWN)}


def record_of(trial: optuna.trial.FrozenTrial, objectives: dict[str, str]) -> Record:
    attributes = own(trial.system_attrs)
    candidates = tuple(Choice.from_dict(values) for values in attributes.get("candidates", ()))
    result = attributes.get("result", {})
    if not result and trial.state == TrialState.COMPLETE:
        raise MemControlError(f"trial {trial.number} has no result that this version of memcontrol knows; read the study with the version that searched it")
    begun = Record(trial.number, "RUNNING", candidates, trial.user_attrs.get("anchor"), objectives=objectives, begun=iso(trial.datetime_start)).as_running()
    return with_result(replace(begun, state=trial.state.name, ended=iso(trial.datetime_complete)), result)


def with_result(record: Record, result: dict) -> Record:
    choice = Choice.from_dict(result["choice"]) if "choice" in result else record.choice
    return replace(
        record, choice=choice, searched=result.get("rewards", {}), rungs=tuple(result.get("rungs", ())), reason=result.get("reason", ""),
        seconds=result.get("seconds", 0.0),
    )  # fmt: skip


def iso(when) -> str:
    return when.isoformat(timespec="seconds") if when else ""


def readable_params(choice: Choice, space: SearchSpace) -> dict[str, Any]:
    """The choice as the dashboard shows it: which groups are on, how they are trained, and the learning rate."""
    point = space.point_of(choice)
    del point["rate"]
    if choice.rank is None:
        del point["rank"]
    return point | {"learning_rate": choice.learning_rate}


def readable_distributions(params: dict[str, Any], space: SearchSpace) -> dict[str, BaseDistribution]:
    lows, highs = zip(*space.learning_rate.values())
    found = distributions(space) | {"learning_rate": FloatDistribution(min(lows), max(highs), log=True)}
    return {name: found[name] for name in params}


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    found: dict[str, BaseDistribution] = {name: CategoricalDistribution(options) for name, options in space.coordinates().items()}
    return found | {"rate": FloatDistribution(0, 1)}
