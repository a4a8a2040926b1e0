"""Owns what operators ask of a study through its database, whoever searches and wherever: a choice to be
tried, a trial that counts for nothing, an end, another number of workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memcontrol.config.settings import configure_choice
from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.execution.attempts import format_now
from memcontrol.study.database import name_process
from memcontrol.study.foreign import settle_choice
from memcontrol.study.record import Record
from memcontrol.study.store import DROPPED_KEY, ORDER_KEY, Study

_STOP, _WORKERS = f"{ORDER_KEY}stop", f"{ORDER_KEY}workers"


@dataclass(frozen=True)
class Order:
    """What was asked for: `value`, by whom, and when."""

    value: Any
    by: str
    at: str


def enqueue_choice(study: Study, choice: Choice) -> int:
    """Has the choice tried before any other is sampled. Returns its trial's number. Raises MemControlError
    where the space has no such choice, or a trial has it."""
    wanted = settle_choice(choice, study.space)
    configure_choice(study.config, wanted)  # its settings may not go together
    for record in study.records():
        if wanted in record.candidates:
            raise MemControlError(f"choice: trial {record.number} has it already ({_describe_state(record)})")
    return study.enqueue(wanted)


def _describe_state(record: Record) -> str:
    words = {"WAITING": "enqueued", "COMPLETE": "finished", "PRUNED": "stopped early", "FAIL": "failed"}
    if record.dropped:
        return f"dropped: {record.dropped}; memcontrol drop --undo takes that back"
    return words.get(record.state, record.state.lower())


def drop_trial(study: Study, number: int, why: str) -> None:
    """Has a trial count for nothing from now on, and what else was measured on its fine-tuning. Raises
    MemControlError where there is none, or no reason."""
    dropped = _require_trial(study, number)
    if not why.strip():
        raise MemControlError("--why is empty; say why the trial is to count for nothing")
    told = {"why": why.strip(), "by": name_process(), "at": format_now()}
    study.drop(number, told)
    for record in _list_variants(study, dropped):
        if not record.dropped:
            study.drop(record.number, {**told, "with": number})


def restore_trial(study: Study, number: int) -> None:
    """Has a trial that was dropped count again. Raises MemControlError where it was not."""
    if not _require_trial(study, number).dropped:
        raise MemControlError(f"trial {number} was not dropped, so there is nothing to undo")
    study.drop(number, None)
    for record in _list_variants(study, _require_trial(study, number)):
        if (study.attributes.get(f"{DROPPED_KEY}{record.number}") or {}).get("with") == number:
            study.drop(record.number, None)


def _list_variants(study: Study, trained: Record) -> list[Record]:
    """What was measured on a trial's fine-tuning at other settings."""
    if trained.is_variant:
        return []
    return [
        record
        for record in study.records()
        if record.is_variant and record.candidates[0].trained in trained.candidates
    ]


def _require_trial(study: Study, number: int) -> Record:
    known = {record.number: record for record in study.records()}
    if number not in known:
        listed = ", ".join(map(str, known)) or "none yet"
        raise MemControlError(f"study '{study.config.name}' has no trial {number}; it has {listed}")
    return known[number]


def ask_to_stop(study: Study, now: bool) -> None:
    """Has the search that runs end: when its running trials have ended, or `now`, at their checkpoints."""
    _ask(study, _STOP, "now" if now else "gently")


def ask_for_workers(study: Study, n: int) -> None:
    _ask(study, _WORKERS, n)


def _ask(study: Study, key: str, value: Any) -> None:
    study.write(key, {"value": value, "by": name_process(), "at": format_now()})


def find_stop(study: Study) -> Order | None:
    """As the study was last read."""
    return _find(study, _STOP)


def find_workers(study: Study) -> Order | None:
    return _find(study, _WORKERS)


def _find(study: Study, key: str) -> Order | None:
    told = study.attributes.get(key)
    return Order(**told) if told else None


def clear_orders(study: Study) -> None:
    """A search begins: what an earlier one was asked for is past."""
    for key in (_STOP, _WORKERS):
        if study.attributes.get(key):
            study.write(key, None)
