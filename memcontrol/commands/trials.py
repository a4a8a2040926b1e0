"""Owns `memcontrol.trials`: a study's trials as a table, a row each with all that is known of it."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memcontrol.core.errors import MemControlError
from memcontrol.study.pick import find_pick, select_front
from memcontrol.study.place import StudyPlace
from memcontrol.study.record import Record
from memcontrol.study.store import Study
from memcontrol.study.trials import describe_coordinates
from memcontrol.view.report_data import guard_cell

if TYPE_CHECKING:
    import pandas

Row = dict[str, Any]


def trials(study: str | Path) -> pandas.DataFrame | list[dict[str, Any]]:
    """All trials of a study, a row each: number, state, anchor, why it was dropped; its choice (a column for
    each group and setting), every reward as `searched.NAME` and `confirmed.NAME`, their errors among them;
    times and the run folder. A pandas frame where pandas is installed, otherwise a list of dicts, all with
    the same keys. Raises MemControlError where it was not searched."""
    with contextlib.closing(StudyPlace.load(study).open()) as found:
        rows = list_rows(found)
    try:
        import pandas
    except ImportError:
        return rows
    return pandas.DataFrame(rows)


def list_rows(study: Study) -> list[Row]:
    """The same keys in each; None where a trial has no such value."""
    records, space = study.records(), study.space
    complete = [record for record in records if record.finished]
    front, picked = select_front(complete), find_pick(records, study)
    places = {"front": {record.number for record in front}, "pick": {picked.number} if picked else set()}
    rows = [
        {**_describe_trial(record), **{name: record.number in numbers for name, numbers in places.items()}}
        | describe_coordinates(record.choice, space)
        | {f"searched.{name}": value for name, value in record.searched.items()}
        | {f"confirmed.{name}": value for name, value in record.confirmed.items()}
        for record in records
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _describe_trial(record: Record) -> Row:
    return {
        "trial": record.number,
        "state": record.state,
        "anchor": record.anchor,
        "origin": record.origin,
        "dropped": record.dropped or None,
        "reason": record.reason or None,
        "seconds": record.seconds or None,
        "begun": record.begun or None,
        "ended": record.ended or None,
        "run": str(record.run) if record.choice else None,
        "n_replicates": len(record.replicates),
    }


def format_rows(rows: Sequence[Row]) -> str:
    """As CSV; what is not known is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = list(rows[0]) if rows else ["trial"]
    writer.writerow([guard_cell(name) for name in names])
    writer.writerows([[guard_cell(row[name]) for name in names] for row in rows])
    return out.getvalue()


def pack_rows(rows: Sequence[Row]) -> bytes:
    """As Parquet. Raises MemControlError where pyarrow is missing."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MemControlError(
            "--parquet needs pyarrow, which is not installed; install memcontrol[datasets], or take --csv"
        ) from None
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([*rows]), out)
    return out.getvalue()
