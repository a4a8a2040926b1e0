"""Owns `memcontrol.report`: one page about a study, or its data."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from memcontrol.study.place import StudyPlace
from memcontrol.view.report import write_report
from memcontrol.view.report_data import collect_report_data, publish_report_data


def report(
    study: str | Path,
    out: str | Path | None = None,
    *,
    images: bool = True,
    paths: bool = False,
    name: str | None = None,
) -> dict[str, Any]:
    """Writes one page about the study, where `out` names it; `name` is another than its file's. Returns what
    it says as data; `paths`: with where things lie on this machine. Raises MemControlError."""
    place = StudyPlace.load(study, name=name)
    with contextlib.closing(place.open()) as found:
        data = collect_report_data(found, found.space, place.folder.path)
    if out is not None:
        write_report(data, Path(out), images)
    return data if paths else publish_report_data(data, place.folder.path)
