"""Owns the study in Optuna's database: opens it, records trials, reads them."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from memcontrol.core.choice import Choice
from memcontrol.core.config import Config, find_differing_keys, flatten_keys, load_config
from memcontrol.core.errors import MemControlError
from memcontrol.core.reward_table import MAXIMIZE, MINIMIZE, find_direction, list_losses
from memcontrol.core.run_folder import StudyFolder
from memcontrol.core.space import SearchSpace
from memcontrol.study.artifacts import attach_pictures
from memcontrol.study.database import (
    SQLITE,
    StudyLock,
    Tell,
    explain_open_error,
    hide_password,
    make_database_file,
    make_engine_arguments,
    make_engine_url,
    retry_while_away,
    validate_url,
)
from memcontrol.study.optuna_private import (
    add_trial,
    close_storage,
    get_storage,
    get_trial_id,
    name_constraint,
    read_attributes,
    write_attribute,
)
from memcontrol.study.pareto import Limit, find_knee
from memcontrol.study.record import Record, add_result, format_time

Returned = TypeVar("Returned")
_CONFIRMED_KEY, _REPLICATES_KEY = "confirmed:", "replicates:"  # and the trial's number
# before the names of our attributes: system attributes, since dashboards print user attributes whole
_OWN = "memcontrol:"
optuna.logging.set_verbosity(optuna.logging.ERROR)
logging.getLogger("alembic").setLevel(logging.ERROR)


class Study:
    """A study that is open: `records()` reads it, `begin`, `finish` and `confirm` write it. One process
    writes, and so may keep what it read and wrote; a write that the database did not acknowledge is repeated
    until it is, and happens once."""

    def __init__(
        self,
        inner: optuna.Study,
        config: Config,
        folder: Path,
        url: str = "sqlite://",
        say: Tell = lambda line: None,
        lock: StudyLock | None = None,
    ):
        self.inner = inner
        self.config = config
        self.folder = folder
        self.url = url
        self.say = say
        self.lock = lock
        self.directions = [direction.name.lower() for direction in inner.directions]
        self.kept: dict[int, Record] = {}
        self.ids: dict[int, int] = {}  # Optuna's trial ids by number
        self.attributes: dict[str, Any] = {}
        self.patiently(self.read)

    @property
    def storage(self) -> optuna.storages.BaseStorage:
        return get_storage(self.inner)

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
            Limit(name, signs[directions.get(name) or find_direction(name)], bound)
            for name, bound in self.config.rewards.limits.items()
        ]

    def patiently(self, call: Callable[[], Returned]) -> Returned:
        return retry_while_away(call, self.url, self.say, self.lock.take if self.lock else lambda: None)

    def close(self) -> None:
        close_storage(self.storage)

    def read(self) -> None:
        self.attributes = _select_own(read_attributes(self.inner))
        for trial in self.inner.get_trials(deepcopy=False):
            self.keep(trial, get_trial_id(trial))

    def keep(self, trial: optuna.trial.FrozenTrial, trial_id: int) -> None:
        self.ids[trial.number] = trial_id
        confirmed, replicates = (
            self.attributes.get(f"{name}{trial.number}", ()) for name in (_CONFIRMED_KEY, _REPLICATES_KEY)
        )
        self.kept[trial.number] = replace(
            _make_record(trial, self.objectives),
            confirmed=dict(confirmed),
            replicates=tuple(replicates),
            folder=self.folder,
        )

    def records(self) -> list[Record]:
        """All trials, as this process last read or wrote them."""
        return list(self.kept.values())

    def record(self, number: int) -> Record:
        return self.kept[number]

    def confirm(self, number: int, rewards: dict[str, float]) -> None:
        """Records what a trial's fresh draws gave. Beside the trial: Optuna's finished trials are never
        changed."""
        self.write(f"{_CONFIRMED_KEY}{number}", rewards)
        self.kept[number] = replace(self.kept[number], confirmed=rewards)

    def replicate(self, number: int, rewards: Sequence[dict[str, float]]) -> None:
        """Records what further fine-tunings of a trial's choice gave."""
        self.write(f"{_REPLICATES_KEY}{number}", list(rewards))
        self.kept[number] = replace(self.kept[number], replicates=tuple(rewards))

    def note(self, name: str, make: Callable[[], Any]) -> Any:
        """What the study has under a name, made and recorded once; nothing is recorded while it is None."""
        if name not in self.attributes and (value := make()) is not None:
            self.write(name, value)
        return self.attributes.get(name)

    def write(self, name: str, value: Any) -> None:
        self.patiently(lambda: write_attribute(self.inner, f"{_OWN}{name}", value))
        self.attributes[name] = value

    def begin(self, candidates: Sequence[Choice], space: SearchSpace, anchor: str | None = None) -> int:
        """Records a running trial, complete in one transaction: a crash leaves all of it or nothing. Returns
        its number."""
        params = _make_readable_params(candidates[0], space) if anchor is None else {}
        wanted = [choice.as_dict() for choice in candidates]
        frozen = create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions=_make_readable_distributions(params, space),
            user_attrs={"anchor": anchor} if anchor else {},
            system_attrs={f"{_OWN}candidates": wanted},
        )
        tried = False

        def write() -> int:
            nonlocal tried
            if tried and (known := self.running(wanted)):
                return get_trial_id(known)
            tried = True
            if self.lock:
                self.lock.check()
            return add_trial(self.inner, frozen)

        trial_id = self.patiently(write)
        frozen.number = self.patiently(lambda: self.storage.get_trial_number_from_id(trial_id))
        self.keep(frozen, trial_id)
        return frozen.number

    def running(self, candidates: list[dict]) -> optuna.trial.FrozenTrial | None:
        """The running trial of these candidates, which no other ever has."""
        trials = self.inner.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return next(
            (trial for trial in trials if trial.system_attrs.get(f"{_OWN}candidates") == candidates), None
        )

    def finish(self, number: int, results: Sequence[dict]) -> None:
        """Ends a trial with its candidates' results: the knee of the complete ones (the nearest to the ideal
        of them), or a failure.

        Told again, it changes nothing.
        """
        if self.kept[number].state not in ("RUNNING", "WAITING"):
            return
        objectives = self.objectives
        complete = [result for result in results if result["state"] == "COMPLETE"]
        for result in complete:
            self.check_measured(result)
        losses = [list_losses(result["rewards"], objectives) for result in complete]
        best = complete[find_knee(losses)] if complete else results[0]
        told: dict[str, Any] = {
            "result": {
                key: best[key] for key in ("choice", "rewards", "reason", "seconds", "rungs") if key in best
            }
        }
        if len(results) > 1:
            told["tried"] = [{k: r.get(k) for k in ("choice", "state", "rewards", "reason")} for r in results]
        trial_id = self.ids[number]
        state = TrialState.COMPLETE if complete else TrialState[best["state"]]
        tried = False

        def write() -> None:
            nonlocal tried
            if tried and self.storage.get_trial(trial_id).state.is_finished():
                return
            tried = True
            if self.lock:
                self.lock.check()
            for key, value in told.items():
                self.storage.set_trial_system_attr(trial_id, f"{_OWN}{key}", value)
            for name, excess in compute_excesses(best.get("rewards", {}), self.limits).items():
                self.storage.set_trial_system_attr(trial_id, name_constraint(name), excess)
            run = StudyFolder(self.folder).run(Choice.from_dict(best["choice"]))
            attach_pictures(self.storage, trial_id, run, self.folder)
            self.storage.set_trial_state_values(
                trial_id, state, [best["rewards"][name] for name in objectives] if complete else None
            )

        self.patiently(write)
        self.kept[number] = add_result(
            replace(self.kept[number], state=state.name, ended=format_time(datetime.now())), told["result"]
        )

    def check_measured(self, result: dict) -> None:
        """Raises MemControlError for a result that was measured with other things than the study's first
        one."""
        first = self.attributes.get("measured_with")
        if first is None:
            self.write("measured_with", result["measured_with"])
        else:
            refuse_incomparable(first, result["measured_with"], f"results of study '{self.config.name}'")


def refuse_incomparable(a: Mapping, b: Mapping, what: str) -> None:
    """Raises MemControlError where two rewards were measured with different things."""
    a, b = flatten_keys(dict(a)), flatten_keys(dict(b))
    differing = [
        f"{key} ({a.get(key)} and {b.get(key)})" for key in sorted({*a, *b}) if a.get(key) != b.get(key)
    ]
    if differing:
        raise MemControlError(f"{what} cannot be compared; measured with different {'; '.join(differing)}")


def compute_excesses(rewards: dict[str, float], limits: Sequence[Limit]) -> dict[str, float]:
    """How far each limited reward lies beyond its limit; at most 0 where it keeps it."""
    return {limit.reward: limit.excess(rewards[limit.reward]) for limit in limits if limit.reward in rewards}


def resolve_storage_url(config: Config, folder: Path, study_file: Path) -> str:
    """The database: SQLite in the study's folder unless the config names another; relative SQLite paths start
    at the study file. Raises MemControlError where it is no URL."""
    if config.storage is None:
        return f"{SQLITE}{StudyFolder(folder).database}"
    if config.storage.startswith(SQLITE):
        return SQLITE + os.path.join(study_file.resolve().parent, config.storage.removeprefix(SQLITE))
    return validate_url(config.storage)


def open_study(
    config: Config,
    folder: Path,
    study_file: Path,
    *,
    create: bool,
    directions: Sequence[str] = (),
    say: Tell = lambda line: None,
    lock: StudyLock | None = None,
) -> Study:
    """The config's study. Its stored config must agree with a given one in all that numbers depend on. A new
    one is given its objectives' directions; without them each is minimised. `say` is told when the database
    is away. Raises MemControlError."""
    known, url = is_searched(config, folder, study_file), resolve_storage_url(config, folder, study_file)
    if not known and not create:
        raise _explain_no_study(config, study_file, folder)
    storage = _open_storage(url)
    if known:
        inner = optuna.load_study(study_name=config.name, storage=storage)
        try:
            return Study(
                inner,
                _check_config_agrees(inner, config) if create else _read_stored_config(inner),
                folder,
                url,
                say,
                lock,
            )
        except MemControlError:
            close_storage(storage)
            raise
    objectives = list(config.rewards.names)
    inner = optuna.create_study(
        study_name=config.name,
        storage=storage,
        directions=[StudyDirection[name.upper()] for name in directions or [MINIMIZE] * len(objectives)],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        inner.set_metric_names(objectives)
    write_attribute(inner, f"{_OWN}config", json.dumps(config.model_dump(mode="json")))
    return Study(inner, config, folder, url, say, lock)


def is_searched(config: Config, folder: Path, study_file: Path) -> bool:
    """Whether the storage holds the study."""
    url = resolve_storage_url(config, folder, study_file)
    absent = url.startswith(SQLITE) and not Path(url.removeprefix(SQLITE)).is_file()
    if absent:
        return False
    storage = _open_storage(url)
    try:
        return config.name in optuna.get_all_study_names(storage)
    finally:
        close_storage(storage)


def _open_storage(url: str) -> optuna.storages.RDBStorage:
    import sqlalchemy.exc

    try:
        if url.startswith(SQLITE):
            make_database_file(url)
        return optuna.storages.RDBStorage(make_engine_url(url), engine_kwargs=make_engine_arguments(url))
    except (
        sqlalchemy.exc.SQLAlchemyError,
        optuna.exceptions.StorageInternalError,
        ImportError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:
        raise explain_open_error(url, error) from None


def _explain_no_study(config: Config, study_file: Path, folder: Path) -> MemControlError:
    if config.storage:
        return MemControlError(
            f"storage {hide_password(config.storage)} holds no study '{config.name}'; name the "
            f"database that was searched, or run: memcontrol search {study_file}"
        )
    return MemControlError(
        f"study '{config.name}' has not been searched yet; run: memcontrol search {study_file} "
        f"(there is no study.db in {folder})"
    )


def _read_stored_config(inner: optuna.Study) -> Config:
    stored = read_attributes(inner).get(f"{_OWN}config")
    if stored is None:
        raise MemControlError(
            f"study '{inner.study_name}' in this storage was not made by memcontrol; choose another name"
        )
    return load_config(json.loads(stored))


def _check_config_agrees(inner: optuna.Study, config: Config) -> Config:
    differing = find_differing_keys(_read_stored_config(inner), config)
    if differing:
        raise MemControlError(
            f"study '{config.name}' was begun with another config: {'; '.join(differing)}; restore "
            "these keys or choose another name"
        )
    return config


def _select_own(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Ours among Optuna's system attributes."""
    return {name.removeprefix(_OWN): value for name, value in attributes.items() if name.startswith(_OWN)}


def _make_record(trial: optuna.trial.FrozenTrial, objectives: dict[str, str]) -> Record:
    attributes = _select_own(trial.system_attrs)
    candidates = tuple(Choice.from_dict(values) for values in attributes.get("candidates", ()))
    result = attributes.get("result", {})
    if not result and trial.state == TrialState.COMPLETE:
        raise MemControlError(
            f"trial {trial.number} has no result that this version of memcontrol knows; read the "
            "study with the version that searched it"
        )
    begun = Record(
        trial.number,
        "RUNNING",
        candidates,
        trial.user_attrs.get("anchor"),
        objectives=objectives,
        begun=format_time(trial.datetime_start),
    ).as_running()
    return add_result(
        replace(begun, state=trial.state.name, ended=format_time(trial.datetime_complete)), result
    )


def _make_readable_params(choice: Choice, space: SearchSpace) -> dict[str, Any]:
    """The choice as the dashboard shows it: which groups are on, how they are trained, and the learning
    rate."""
    point = space.find_point(choice)
    del point["rate"]
    if choice.rank is None:
        del point["rank"]
    return point | {"learning_rate": choice.learning_rate}


def _make_readable_distributions(params: dict[str, Any], space: SearchSpace) -> dict[str, BaseDistribution]:
    lows, highs = zip(*space.learning_rate.values())
    found = make_distributions(space) | {"learning_rate": FloatDistribution(min(lows), max(highs), log=True)}
    return {name: found[name] for name in params}


def make_distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    found: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(options) for name, options in space.list_coordinates().items()
    }
    return found | {"rate": FloatDistribution(0, 1)}
