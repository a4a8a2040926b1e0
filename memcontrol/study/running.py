"""Owns what is known of a search from outside, in its run folders: which process is at which trial since
when, attempts, pace, time left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.execution.attempts import read_attempts, read_failures, read_progress
from memcontrol.study.record import Record

_QUIET_SECONDS = 120  # without a word for so long, a run is said to be silent


def list_runs(record: Record, folder: Path) -> list[dict[str, Any]]:
    """For each choice that the trial tries: whether it is finished, its attempts, and the present one's place
    and progress."""
    return [
        {"choice": choice.as_dict(), **inspect_run(StudyFolder(folder).run(choice))}
        for choice in record.candidates
    ]


def inspect_run(run: RunFolder) -> dict[str, Any]:
    attempts, failures = read_attempts(run.path), read_failures(run.path)
    found = {
        "run": str(run.path),
        "finished": run.has_result,
        "attempts": max(len(attempts) - run.count_rungs(), 0),  # the way to each rung was a job of its own
        "failures": [failure["reason"] for failure in failures],
    }
    if not found["attempts"] or found["finished"]:
        return found
    last, progress = attempts[-1], read_progress(run.path)
    place = {key: last[key] for key in ("host", "pid", "gpu", "started")}
    return (
        found
        | place
        | {"progress": {key: progress[key] for key in ("stage", "done", "total", "at")} if progress else None}
    )


def describe_run(run: dict[str, Any], is_here: bool = True) -> str:
    """Such as "attempt 2 on node7, process 4711, GPU 0, since 12:31 UTC, train 120/230, silent for 5
    minutes"."""
    if run["finished"]:
        return "finished"
    if not run["attempts"]:
        return "waits for a place" if is_here else "its run folder is on another machine"
    gpu, progress = f", GPU {run['gpu']}" if run["gpu"] else "", run["progress"]
    text = (
        f"attempt {run['attempts']} on {run['host']}, process {run['pid']}{gpu}, since "
        f"{run['started'][11:16]} UTC"
    )
    if progress:
        text += f", {progress['stage']} {progress['done']}/{progress['total']}"
    silent = (
        datetime.now(UTC) - datetime.fromisoformat((progress or {}).get("at") or run["started"])
    ).total_seconds()
    return text + (f", silent for {silent / 60:.0f} minutes" if silent > _QUIET_SECONDS else "")


def estimate_pace(records: Sequence[Record], n_trials: int, n_workers: int) -> dict[str, float]:
    """`runs_per_hour` with all workers busy, each with what its fine-tuning is measured at beside, and
    `minutes_left`; empty before the first run is finished."""
    timed = [record for record in records if record.seconds and record.anchor != "none"]
    trained = [record.seconds for record in timed if not record.is_variant]
    if not trained:
        return {}
    of_variant = _mean([record.seconds for record in timed if record.is_variant])
    n_variants = sum(record.is_variant for record in records)
    of_run = _mean(trained) + of_variant * n_variants / len(trained)
    begun = [record for record in records if record.state in ("RUNNING", "WAITING")]
    n_left = max(0, n_trials - sum(record.fills_place for record in records)) + sum(
        len(record.candidates) for record in begun if not record.is_variant
    )
    n_variants_left = sum(record.is_variant for record in begun)
    seconds = math.ceil(n_left / n_workers) * of_run + math.ceil(n_variants_left / n_workers) * of_variant
    return {"runs_per_hour": 3600 * n_workers / of_run, "minutes_left": seconds / 60}


def _mean(lengths: Sequence[float]) -> float:
    return sum(lengths) / len(lengths) if lengths else 0.0
