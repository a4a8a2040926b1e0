"""Owns `memcontrol.enqueue`, `drop` and `stop`: an operator's hand on a study, whether a search of it runs or
not, and what a running one is told."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from memcontrol.commands.clean import is_being_searched
from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.reward_table import find_direction
from memcontrol.core.space import SearchSpace
from memcontrol.search.locks import read_holder, refuse_second_search
from memcontrol.study.foreign import check_rate
from memcontrol.study.opening import open_study
from memcontrol.study.orders import (
    ask_for_workers,
    ask_to_stop,
    drop_trial,
    enqueue_choice,
    find_workers,
    restore_trial,
)
from memcontrol.study.place import StudyPlace
from memcontrol.study.record import Record
from memcontrol.study.store import Study


def enqueue(
    study: str | Path,
    choice: Mapping[str, Any] | Choice | None = None,
    *,
    groups: Sequence[str] = (),
    method: str | None = None,
    rank: int | None = None,
    learning_rate: float | None = None,
) -> int:
    """Has a choice of one's own tried, before any other is sampled, as one of `search.trials` (where all of
    these have been, in addition): by a search that runs, or by the next. `choice` is what a record or
    `front --json` holds; or its `groups`, a method (none: the space's first), a rank and a learning rate
    (none: the middle ones). Returns its trial's number. Raises MemControlError where the space has no such
    choice, or a trial has it."""
    return enqueue_at(StudyPlace.load(study), choice, groups, method, rank, learning_rate).number


def enqueue_at(
    place: StudyPlace,
    choice: Mapping[str, Any] | Choice | None,
    groups: Sequence[str],
    method: str | None,
    rank: int | None,
    learning_rate: float | None,
) -> Record:
    """The same, of a study's place. Returns the trial, which has the whole choice."""
    if (choice is None) == (not groups):
        raise MemControlError("give a choice, or groups and a method; one of the two")
    with _open_to_enqueue(place) as study:
        if choice is None:
            wanted = make_choice(study.space, groups, method, rank, learning_rate)
        else:
            wanted = choice if isinstance(choice, Choice) else Choice.from_dict(dict(choice))
        return study.record(enqueue_choice(study, wanted))


@contextlib.contextmanager
def _open_to_enqueue(place: StudyPlace) -> Iterator[Study]:
    """The study; a new one where it was not searched yet. Raises MemControlError."""
    if place.is_searched():
        with contextlib.closing(place.open()) as study:
            yield study
        return
    rewards = place.config.rewards
    if rewards.functions:
        raise MemControlError(
            f"study '{place.config.name}' has rewards of your own, of which only a search knows which way is "
            "better; begin the search first"
        )
    directions = [find_direction(name) for name in rewards.names]
    made = open_study(place.config, place.folder.path, place.file, create=True, directions=directions)
    with contextlib.closing(made) as study:
        yield study


def make_choice(
    space: SearchSpace,
    groups: Sequence[str],
    method: str | None,
    rank: int | None,
    learning_rate: float | None,
) -> Choice:
    """Of some groups, all trained alike. Raises MemControlError."""
    method = method or space.methods[0]
    if method not in space.learning_rate or method not in (*space.methods, *_list_methods(space)):
        raise MemControlError(
            f"method '{method}' is none of space '{space.name}'; it has {', '.join(space.methods)}"
        )
    unknown = [name for name in groups if name not in space.groups]
    if unknown:
        raise MemControlError(
            f"unknown group '{unknown[0]}'; space '{space.name}' has {', '.join(space.groups)}"
        )
    choice = space.choice(groups, method, 0.5, rank)
    if rank is not None and choice.rank is None:
        raise MemControlError(f"method {method} has no rank; leave --rank out")
    if learning_rate is None:
        return choice
    check_rate(method, learning_rate, space)
    differing = ((name, replace(own, learning_rate=learning_rate)) for name, own in choice.per_group)
    return replace(choice, learning_rate=learning_rate, per_group=tuple(differing))


def _list_methods(space: SearchSpace) -> list[str]:
    return [method for group in space.groups.values() for method in group.methods]


def read_choice_file(path: Path) -> dict[str, Any]:
    """The choice that a JSON file holds: bare, or as a trial has it that `front --json` or `pick --json`
    prints. Raises MemControlError."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise MemControlError(f"{path} is no JSON: {error}") from None
    held = held[0] if isinstance(held, list) and len(held) == 1 else held
    if isinstance(held, list):
        raise MemControlError(f"{path} holds {len(held)} entries; give a file with one trial, or its choice")
    held = held.get("choice", held) if isinstance(held, dict) else held
    if not isinstance(held, dict):
        raise MemControlError(f"{path} holds no choice; it needs groups, method, learning_rate and rank")
    return held


def drop(study: str | Path, trial: int, why: str = "", *, undo: bool = False) -> None:
    """Has a trial count for nothing from now on: it is not on the front, not picked, not learnt from, and
    another is sampled in its place; it stays in the study, with the reason. `undo` takes that back. A search
    that runs heeds it. Raises MemControlError."""
    drop_at(StudyPlace.load(study), trial, why, undo)


def drop_at(place: StudyPlace, trial: int, why: str, undo: bool) -> list[int]:
    """The same, of a study's place. Returns the other trials that go with it, which were measured on its
    fine-tuning."""
    with contextlib.closing(place.open()) as study:
        before = _list_dropped(study)
        if undo:
            restore_trial(study, trial)
        else:
            drop_trial(study, trial, why)
        return sorted((before ^ _list_dropped(study)) - {trial})


def _list_dropped(study: Study) -> set[int]:
    return {record.number for record in study.records() if record.dropped}


def stop(study: str | Path, *, now: bool = False) -> None:
    """Has the search that runs end, on whatever machine: once its running trials have ended, or `now`, at
    their checkpoints. The next `search` goes on. Raises MemControlError where none runs."""
    stop_at(StudyPlace.load(study), now)


def stop_at(place: StudyPlace, now: bool) -> None:
    """The same, of a study's place."""
    with contextlib.closing(place.open()) as study:
        if not is_being_searched(place):
            raise MemControlError(
                f"no search of study '{place.config.name}' is running, so there is nothing to stop"
            )
        ask_to_stop(study, now)


def hand_over_workers(place: StudyPlace) -> int | None:
    """Where a search of the study runs in this folder, and with another number of workers than the config
    names, tells it that number, and returns it; None where none runs. Raises MemControlError where nothing is
    to be handed over, and where the config is another one's: its name is used."""
    wanted, held = place.config.search.workers, read_holder(place.folder).get("workers")
    if wanted is None or held is None or not is_being_searched(place) or not place.is_searched():
        refuse_second_search(place.folder)
        return None
    with contextlib.closing(open_study(place.config, place.folder.path, place.file, create=True)) as study:
        order = find_workers(study)
        if wanted == (order.value if order else held):
            refuse_second_search(place.folder)
            return None
        ask_for_workers(study, wanted)
    return wanted
