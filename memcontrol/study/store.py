"""Owns the study in Optuna's database: records trials, reads them, and keeps to its own among others'."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.trial import TrialState, create_trial

from memcontrol.config.differing import flatten_keys
from memcontrol.config.study import Config
from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.reward_table import MAXIMIZE, MINIMIZE, find_direction, list_losses
from memcontrol.core.run_folder import StudyFolder
from memcontrol.core.space import SearchSpace
from memcontrol.study.artifacts import attach_pictures
from memcontrol.study.database import StudyLock, Tell, is_away, retry_while_away
from memcontrol.study.foreign import ForeignTrial
from memcontrol.study.identity import read_space
from memcontrol.study.optuna_private import (
    ENQUEUED,
    add_trial,
    close_storage,
    get_storage,
    get_trial_id,
    name_constraint,
    read_attributes,
    read_attributes_below,
    renumber_trial,
    revise_trial,
    write_attribute,
)
from memcontrol.study.pareto import Limit, find_knee
from memcontrol.study.record import Record, add_result, format_time
from memcontrol.study.trials import (
    OWN,
    compute_excesses,
    drop_params,
    make_attributes,
    make_foreign,
    make_readable_distributions,
    make_readable_params,
    make_record,
    select_own,
)

Returned = TypeVar("Returned")
_CONFIRMED_KEY, _REPLICATES_KEY = "confirmed:", "replicates:"  # and the trial's number
DROPPED_KEY, ORDER_KEY = "dropped:", "order:"  # what operators write while another process searches
_OF_RESULT = ("choice", "rewards", "reason", "seconds", "rungs")  # what the database keeps of result.json
optuna.logging.set_verbosity(optuna.logging.ERROR)
logging.getLogger("alembic").setLevel(logging.ERROR)


class Study:
    """A study that is open: `records()` reads it, `begin`, `finish` and `confirm` write it. One process
    writes, and so may keep what it read and wrote, less what operators ask for, which `heed` reads; a write
    that the database did not acknowledge is repeated until it is, and happens once."""

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
        self.foreign: dict[int, ForeignTrial] = {}
        self.first: dict[tuple[Choice, ...], int] = {}  # by choices, the trial that ended well with them
        self.attributes: dict[str, Any] = {}
        self.turn = threading.RLock()  # whose it is to use the database, of this process's threads
        self.dropped: dict[int, str] = {}  # why trials count for nothing, by their numbers
        self.patiently(self.read)

    @property
    def storage(self) -> optuna.storages.BaseStorage:
        return get_storage(self.inner)

    @property
    def objectives(self) -> dict[str, str]:
        """Name to direction."""
        return dict(zip(self.config.rewards.names, self.directions))

    @property
    def about(self) -> Mapping[str, Any]:
        """The content of what it was begun with, as `memcontrol.study.identity` has it."""
        return self.attributes.get("about", {})

    @property
    def space(self) -> SearchSpace:
        """As it was searched in. Raises MemControlError."""
        return read_space(self.about, self.config)

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
        again = self.lock.take if self.lock else lambda: None
        try:
            with self.turn:
                return retry_while_away(call, self.url, self.say, again)
        except KeyError:  # Optuna's word for what is not there
            if self.is_there():
                raise
            raise MemControlError(
                f"study '{self.config.name}' was deleted from its database meanwhile; what has finished is "
                f"kept in {self.folder}, and the same command enters it again"
            ) from None

    def is_there(self) -> bool:
        return self.config.name in optuna.get_all_study_names(self.storage)

    def close(self) -> None:
        close_storage(self.storage)

    def read(self) -> None:
        self.attributes = select_own(read_attributes(self.inner))
        self.gather_dropped()
        for trial in self.inner.get_trials(deepcopy=False):
            self.take_in(trial)

    def heed(self) -> bool:
        """Reads what operators have asked for meanwhile. Whether it could: a database that is away is not
        waited for."""
        try:
            found = read_attributes_below(self.inner, [f"{OWN}{DROPPED_KEY}", f"{OWN}{ORDER_KEY}"])
        except Exception as error:
            if not is_away(error, self.url):
                raise
            return False
        self.attributes |= select_own(found)
        self.gather_dropped()
        return True

    def gather_dropped(self) -> None:
        told = {name: value for name, value in self.attributes.items() if name.startswith(DROPPED_KEY)}
        self.dropped = {
            int(name.removeprefix(DROPPED_KEY)): value["why"] for name, value in told.items() if value
        }

    def take_in(self, trial: optuna.trial.FrozenTrial) -> None:
        """One that was made by others is kept apart, and the copy of a finished one; one whose number another
        has gets a free one."""
        trial_id = get_trial_id(trial)
        if trial.number in self.kept:
            trial = copy.copy(trial)
            trial.number = self.find_free_number()
        record = self.make_record(trial) if self.is_own(trial) else None
        if record and record.finished and self.first.setdefault(record.candidates, trial_id) != trial_id:
            record = None
        if record is None:
            self.foreign[trial.number] = make_foreign(trial)
        else:
            self.keep(record, trial_id)

    def is_own(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether this study made it, and not another of memcontrol's."""
        attributes = select_own(trial.system_attrs)
        return "candidates" in attributes and attributes.get("token", self.token) == self.token

    @property
    def token(self) -> str | None:
        """What tells the study from others, of any database; none of those from before there was one."""
        return self.about.get("token")

    def list_taken_numbers(self) -> set[int]:
        """Those of trials that are gone included, of which something is still known."""
        keys = (key.partition(":") for key in self.attributes)
        known = {int(number) for _, colon, number in keys if colon and number.isdecimal()}
        return {*self.kept, *self.foreign} | known

    def find_free_number(self) -> int:
        return 1 + max(self.list_taken_numbers())

    def make_record(self, trial: optuna.trial.FrozenTrial) -> Record:
        """With what the study knows of it beside the trial."""
        confirmed, replicates = (
            self.attributes.get(f"{name}{trial.number}", ()) for name in (_CONFIRMED_KEY, _REPLICATES_KEY)
        )
        return replace(
            make_record(trial, self.objectives),
            confirmed=dict(confirmed),
            replicates=tuple(replicates),
            folder=self.folder,
        )

    def keep(self, record: Record, trial_id: int) -> None:
        self.ids[record.number], self.kept[record.number] = trial_id, record

    def records(self) -> list[Record]:
        """All trials, as this process last read or wrote them."""
        return [self.record(number) for number in self.kept] if self.dropped else list(self.kept.values())

    def record(self, number: int) -> Record:
        record, why = self.kept[number], self.dropped.get(number)
        return record.as_dropped(why) if why else record

    def confirm(self, number: int, rewards: dict[str, float]) -> None:
        """Records what a trial's fresh draws gave, and shows it in the trial."""
        self.write(f"{_CONFIRMED_KEY}{number}", rewards)
        self.kept[number] = replace(self.kept[number], confirmed=rewards)
        self.publish(self.kept[number])

    def publish(self, record: Record) -> None:
        """Has the trial show, to whoever reads it with plain Optuna, the values that count, all rewards as
        user attributes, and how far it is beyond each limit."""
        values = list(record.values.values())
        told, own = make_attributes(record), self.make_constraints(record.rewards)
        self.patiently(lambda: revise_trial(self.storage, self.ids[record.number], values, told, own))

    def publish_missing(self) -> None:
        """What a process that died, or an earlier version, has not published; what others wrote over."""
        trials = {get_trial_id(trial): trial for trial in self.inner.get_trials(deepcopy=False)}
        for record in self.records():
            trial_id = self.ids[record.number]
            shown = trials[trial_id]
            if shown.number != record.number:
                self.patiently(partial(renumber_trial, self.storage, trial_id, record.number))
            if record.finished and (
                shown.values != list(record.values.values())
                or not make_attributes(record).items() <= shown.user_attrs.items()
            ):
                self.publish(record)

    def make_constraints(self, rewards: dict[str, float]) -> dict[str, float]:
        """Where Optuna looks for them."""
        excesses = compute_excesses(rewards, self.limits)
        return {name_constraint(name): excess for name, excess in excesses.items()}

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
        self.patiently(lambda: write_attribute(self.inner, f"{OWN}{name}", value))
        self.attributes[name] = value

    def write_aside(self, inner: optuna.Study, key: str, value: Any) -> None:
        """An attribute under its whole name, from a thread that lets the search write before it writes again:
        where one waits for a file to be free, SQLite knows no order. Waits for no database that is away."""
        with self.turn:
            started = time.monotonic()
            write_attribute(inner, key, value)
        time.sleep(time.monotonic() - started)

    def drop(self, number: int, told: dict[str, Any] | None) -> None:
        """Has a trial count for nothing from now on, or for what it is again. Plain Optuna shows why, and
        that it is not feasible, so that it does not count it among the best either."""
        self.write(f"{DROPPED_KEY}{number}", told)
        self.gather_dropped()
        shown = {"dropped": told["why"] if told else ""}
        own = {name_constraint("dropped"): float(bool(told))}
        self.patiently(lambda: revise_trial(self.storage, self.ids[number], (), shown, own))

    def begin(self, candidates: Sequence[Choice], space: SearchSpace, anchor: str | None = None) -> int:
        """Records a running trial, complete in one transaction: a crash leaves all of it or nothing. Returns
        its number."""
        params = make_readable_params(candidates[0], space) if anchor is None else {}
        wanted = [choice.as_dict() for choice in candidates]
        frozen = create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions=make_readable_distributions(params, space),
            user_attrs={"anchor": anchor} if anchor else {},
            system_attrs={f"{OWN}candidates": wanted, f"{OWN}token": self.token},
        )
        tried = False

        def write() -> int:
            nonlocal tried
            if tried and (known := self.find_asked(wanted, TrialState.RUNNING)):
                return get_trial_id(known)
            tried = True
            if self.lock:
                self.lock.check()
            try:
                return add_trial(self.inner, frozen)
            except ValueError:  # other programs' trials have parameters of these names, and other values
                return add_trial(self.inner, drop_params(frozen))

        trial_id = self.patiently(write)
        frozen.number = self.patiently(lambda: self.storage.get_trial_number_from_id(trial_id))
        frozen.number = self.settle_number(frozen.number, trial_id)
        self.keep(self.make_record(frozen), trial_id)
        return frozen.number

    def settle_number(self, number: int, trial_id: int) -> int:
        """The number of a new trial, which gets a free one where another has, or had, its own."""
        if number not in self.list_taken_numbers():
            return number
        free = self.find_free_number()
        self.patiently(lambda: renumber_trial(self.storage, trial_id, free))
        return free

    def enqueue(self, choice: Choice) -> int:
        """Asks for a trial of the choice, which the next place that is free in a search begins. It may be
        asked for by any process, whoever searches. Returns its number."""
        wanted = [choice.as_dict()]
        asked = create_trial(
            state=TrialState.WAITING,
            system_attrs={
                ENQUEUED: make_readable_params(choice, self.space),
                f"{OWN}candidates": wanted,
                f"{OWN}token": self.token,
            },
        )

        def write() -> int:
            known = self.find_asked(wanted, TrialState.WAITING)
            return get_trial_id(known) if known else add_trial(self.inner, asked)

        trial_id = self.patiently(write)
        asked.number = self.patiently(lambda: self.storage.get_trial_number_from_id(trial_id))
        asked.number = self.settle_number(asked.number, trial_id)
        self.keep(self.make_record(asked), trial_id)
        return asked.number

    def find_asked(self, candidates: list[dict], state: TrialState) -> optuna.trial.FrozenTrial | None:
        """The trial of these candidates in that state, which no other ever has."""
        trials = self.inner.get_trials(deepcopy=False, states=(state,))
        return next(
            (trial for trial in trials if trial.system_attrs.get(f"{OWN}candidates") == candidates), None
        )

    def claim(self, trial: ForeignTrial, choice: Choice) -> int:
        """Makes a trial ours that another program has enqueued, and begins it. Returns its number."""
        trial_id, params = trial.trial_id, make_readable_params(choice, self.space)
        is_new = trial_id not in self.ids.values()

        def write() -> None:
            # ours from the first write on, so that a search that goes on begins it whatever follows
            self.storage.set_trial_system_attr(trial_id, f"{OWN}candidates", [choice.as_dict()])
            for name, distribution in make_readable_distributions(params, self.space).items():
                inside = distribution.to_internal_repr(params[name])
                with contextlib.suppress(ValueError):  # as in `begin`
                    self.storage.set_trial_param(trial_id, name, inside, distribution)
            self.storage.set_trial_state_values(trial_id, TrialState.RUNNING)

        self.patiently(write)
        self.foreign.pop(trial.number, None)
        begun = copy.copy(self.patiently(lambda: self.storage.get_trial(trial_id)))
        begun.number = self.settle_number(begun.number, trial_id) if is_new else trial.number
        self.keep(self.make_record(begun), trial_id)
        return begun.number

    def find_enqueued(self) -> list[ForeignTrial]:
        """Trials that operators and other programs wait for, as the database has them now."""
        waiting = self.patiently(lambda: self.inner.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
        found = map(self.make_enqueued, waiting)
        return [trial for trial in found if trial.enqueued is not None and trial.number not in self.dropped]

    def make_enqueued(self, trial: optuna.trial.FrozenTrial) -> ForeignTrial:
        """With the whole choice, where memcontrol itself was asked; one that is known by its number here."""
        found, candidates = make_foreign(trial), select_own(trial.system_attrs).get("candidates")
        if not candidates or not self.is_own(trial):
            return found
        numbers = {trial_id: number for number, trial_id in self.ids.items()}
        number = numbers.get(found.trial_id, found.number)
        return replace(found, number=number, choice=Choice.from_dict(candidates[0]))

    def finish(self, number: int, results: Sequence[dict]) -> int:
        """Ends a trial with its candidates' results: the knee of the complete ones (the nearest to the ideal
        of them), or a failure. Returns its number, which is another one where somebody else has ended or
        deleted the trial meanwhile.

        Told again, it changes nothing.
        """
        if self.kept[number].state not in ("RUNNING", "WAITING"):
            return number
        complete = [result for result in results if result["state"] == "COMPLETE"]
        for result in complete:
            self.check_measured(result)
        losses = [list_losses(result["rewards"], self.objectives) for result in complete]
        best = complete[find_knee(losses)] if complete else results[0]
        told: dict[str, Any] = {"result": {key: best[key] for key in _OF_RESULT if key in best}}
        if len(results) > 1:
            told["tried"] = [{k: r.get(k) for k in ("choice", "state", "rewards", "reason")} for r in results]
        state = TrialState.COMPLETE if complete else TrialState[best["state"]]
        while not self.end(number, state, told):
            number = self.begin_anew(number)
        return number

    def end(self, number: int, state: TrialState, told: dict[str, Any]) -> bool:
        """Writes the end of a trial. Whether it was there to be ended."""
        trial_id, result = self.ids[number], told["result"]
        run = StudyFolder(self.folder).run(Choice.from_dict(result["choice"]))
        own = {f"{OWN}{key}": value for key, value in told.items()}
        own |= self.make_constraints(result.get("rewards", {}))
        ended = add_result(replace(self.kept[number], state=state.name), result)
        tried = False

        def write() -> bool:
            nonlocal tried
            there = self.find_state(trial_id)
            if there is None or (there.is_finished() and not tried):
                return False
            if not there.is_finished():
                tried = True
                if self.lock:
                    self.lock.check()
                for key, value in own.items():
                    self.storage.set_trial_system_attr(trial_id, key, value)
                attach_pictures(self.storage, trial_id, run, self.folder)
                self.storage.set_trial_state_values(trial_id, state, list(ended.values.values()) or None)
            return True

        try:
            is_ended = self.patiently(write)
        except optuna.exceptions.UpdateFinishedTrialError:  # by another program, between two of the writes
            is_ended = False
        if is_ended:
            at = self.patiently(lambda: self.storage.get_trial(trial_id)).datetime_complete
            self.kept[number] = replace(ended, ended=format_time(at))  # as everyone reads it
            if ended.finished:
                self.publish(ended)
        return is_ended

    def find_state(self, trial_id: int) -> TrialState | None:
        """As the database has it now; None where the trial is gone."""
        try:
            return self.storage.get_trial(trial_id).state
        except KeyError:
            if not self.is_there():
                raise
            return None

    def begin_anew(self, number: int) -> int:
        """A further trial of the same choices, in place of one that another program has ended or deleted."""
        old = self.kept.pop(number)
        with contextlib.suppress(KeyError):
            self.take_in(self.patiently(lambda: self.storage.get_trial(self.ids[number])))
        self.say(f"trial {number} was ended or deleted by another program; its choice is entered anew")
        return self.begin(old.candidates, self.space, old.anchor)

    def check_measured(self, result: dict) -> None:
        """Raises MemControlError for a result that was measured with other things than the study's first
        one."""
        first, choice = self.attributes.get("measured_with"), Choice.from_dict(result["choice"])
        own = {f"sampling.{key.rpartition('.')[2]}" for key in choice.overrides}  # which it decides itself
        if first is not None:
            refuse_incomparable(first, result["measured_with"], f"results of study '{self.config.name}'", own)
        elif not choice.is_variant:
            self.write("measured_with", result["measured_with"])


def refuse_incomparable(a: Mapping, b: Mapping, what: str, apart: Collection[str] = ()) -> None:
    """Raises MemControlError where two rewards were measured with different things, those `apart` left
    out."""
    a, b = flatten_keys(dict(a)), flatten_keys(dict(b))
    differing = [
        f"{key} ({a.get(key)} and {b.get(key)})"
        for key in sorted({*a, *b} - {*apart})
        if a.get(key) != b.get(key)
    ]
    if differing:
        raise MemControlError(f"{what} cannot be compared; measured with different {'; '.join(differing)}")
