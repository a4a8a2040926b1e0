"""Owns what is known of a study when it is reported: one document, which `report --json` prints and the page
is made from."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from memcontrol.core.choice import EVERYTHING, Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import read_json
from memcontrol.core.published import hide_paths, list_own_places, publish_config, publish_name
from memcontrol.core.reward_table import REWARDS, list_objectives
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.core.space import Coordinate, SearchSpace
from memcontrol.core.version import __version__
from memcontrol.search.importance import measure_importance
from memcontrol.study.hypervolume import estimate_hypervolume, find_reference_point
from memcontrol.study.pick import find_pick, select_front
from memcontrol.study.record import Record
from memcontrol.study.replicates import estimate_spread
from memcontrol.study.store import Study
from memcontrol.view.front_data import TrialData, mark_trials
from memcontrol.view.words import describe_choice, describe_network_doubt

_FATES = ("seen", "trained", "skipped", "dropped", "queued", "surplus")
# of the CSV
_MARK_COLUMNS = ("front", "tie", "pick", "confirmed")
_CHOICE_COLUMNS = ("method", "rank", "learning_rate")


def collect_report_data(study: Study, space: SearchSpace, folder: Path) -> dict[str, Any]:
    """Everything the report says, as JSON can hold it. Raises MemControlError where no trial has ended
    well."""
    records, config = study.records(), study.config
    complete = [record for record in records if record.finished]
    if not complete:
        raise MemControlError(f"study '{config.name}' has no finished trial to report; let the search run on")
    blocks = StudyFolder(folder).read_blocks()
    trials = mark_trials(records, find_pick(records, study), len(space.groups))
    for trial, record in zip(trials, records):
        trial["blocks"] = [_compute_trained_share(record, block) for block in blocks]
    return {
        "study": config.name,
        "written": datetime.now().isoformat(timespec="minutes"),
        "reported_by": __version__,
        "objectives": study.objectives,
        "limits": config.rewards.limits,
        "doubt": describe_network_doubt(config.rewards.extractor, config.data.path),
        "data": StudyFolder(folder).summarize_data(),
        "config": config.model_dump(mode="json"),
        "given": config.model_dump(mode="json", exclude_defaults=True),
        "space": _summarize_space(space, config.space),
        "trials": trials,
        "blocks": [block["name"] for block in blocks],
        "hypervolume": summarize_hypervolume(study),
        "importance": _summarize_importance(records, space),
        "spread": _summarize_spread(complete, study),
        "training": _list_fates(complete),
        "retrained": _list_retrained(folder, len(space.groups)),
        "cost": _sum_costs(records, folder),
        "made_with": study.attributes.get("made_with", {}),
    }


def publish_report_data(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The same where it leaves this machine: run folders as seen from the study's `folder`, and names in
    place of paths."""
    config, images = data["config"], data["data"]
    places = list_own_places(folder, config["data"]["path"])
    return {
        **data,
        "config": publish_config(config),
        "given": publish_config(data["given"]),
        "data": images | ({"source": publish_name(images["source"])} if images else {}),
        "space": {**data["space"], "name": publish_name(data["space"]["name"])},
        "trials": [_publish_run(trial, folder, places) for trial in data["trials"]],
        "retrained": [_publish_run(run, folder, places) for run in data["retrained"]],
    }


def _publish_run(told: Mapping[str, Any], folder: Path, places: Sequence[Path]) -> dict[str, Any]:
    run = told["run"] and Path(told["run"]).relative_to(folder).as_posix()
    words = {key: hide_paths(told[key], *places) for key in ("reason", "dropped") if told.get(key)}
    return {**told, "run": run, **words}


def _summarize_space(space: SearchSpace, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "description": space.description,
        "groups": list(space.groups),
        "methods": list(space.methods),
        "rank": list(space.rank),
        "learning_rate": {method: list(limits) for method, limits in space.learning_rate.items()},
        "settings": {key: _describe_options(one) for key, one in {**space.over, **space.free}.items()},
    }


def _describe_options(coordinate: Coordinate) -> str:
    if coordinate.limits is None:
        return ", ".join("off" if label is None else f"{label}" for label in coordinate.labels)
    low, high = coordinate.limits
    return f"{low:g} to {high:g}{' (log)' if coordinate.log else ''}"


def _compute_trained_share(record: Record, block: dict[str, Any]) -> float:
    """The share of a block's parameters that lie in modules which the trial trains."""
    groups = record.choice.groups if record.choice else ()
    if EVERYTHING in groups:
        return 1.0
    return sum(n for group, n in block["groups"].items() if group in groups) / block["parameters"]


def summarize_hypervolume(study: Study) -> dict[str, Any] | None:
    """Value, error and reference point; None before there is one to measure from."""
    records = study.records()
    reference = study.attributes.get("reference") or find_reference_point(records)
    if reference is None:
        return None
    volume, objectives = estimate_hypervolume(records, reference), list_objectives(study.objectives)
    return {
        "value": float(volume),
        "error": volume.error,
        "reference": {
            objective.name: objective.to_loss(loss) for objective, loss in zip(objectives, reference)
        },
    }


def _summarize_spread(complete: Sequence[Record], study: Study) -> dict[str, float] | None:
    """By objective, between fine-tunings of the same choice; None where none was repeated."""
    spread = estimate_spread(complete)
    return None if spread is None else dict(zip(study.objectives, spread.tolist()))


def _summarize_importance(records: Sequence[Record], space: SearchSpace) -> list[dict[str, Any]]:
    """Empty where too few trials have ended."""
    try:
        return [effect.as_dict() for effect in measure_importance(records, space)]
    except MemControlError:
        return []


def _list_fates(complete: Sequence[Record]) -> list[dict[str, int]]:
    """What became of the images in each trial on the front, and in full fine-tuning, where that is known."""
    front = select_front(complete)
    told = [record for record in complete if record in front or record.anchor == "full"]
    fates = {record.number: _count_fates(record.run) for record in told}
    return [{"trial": number} | counts for number, counts in fates.items() if counts]


def _count_fates(run: Path) -> dict[str, int]:
    """What became of the images that a fine-tuning drew; empty where the run folder is elsewhere."""
    path = RunFolder(run).training_file
    if not path.is_file():
        return {}
    total: Counter[str] = Counter()
    for shard in read_json(path).get("shards", ()):  # none, where nothing was trained
        total.update({name: shard.get(name, 0) for name in _FATES})
    return dict(total)


def _list_retrained(folder: Path, n_groups: int) -> list[dict[str, Any]]:
    """The runs of `memcontrol retrain` that ended well, full fine-tuning first: choice, rewards on test
    images, folder."""
    results = [(run.path, run.read_result()) for run in StudyFolder(folder).list_retrained()]
    runs = [
        {
            "said": describe_choice(Choice.from_dict(result["choice"]), n_groups),
            "choice": result["choice"],
            "rewards": result["rewards"],
            "n_samples": result["n_samples"],
            "run": str(run),
        }
        for run, result in results
        if result["state"] == "COMPLETE"
    ]
    return sorted(runs, key=lambda run: run["choice"]["method"] != "full")


def _sum_costs(records: Sequence[Record], folder: Path) -> dict[str, float]:
    """The fine-tunings that ended, each with its scoring: how many, their hours, the seconds of the median
    one."""
    runs = (StudyFolder(folder).run(choice) for record in records for choice in record.candidates)
    results = (run.read_result() for run in runs if run.has_result)
    lengths = [result["seconds"] for result in results if "seconds" in result]
    return {
        "runs": len(lengths),
        "hours": sum(lengths) / 3600,
        "median_seconds": statistics.median(lengths) if lengths else 0.0,
    }


def format_csv(facts: dict[str, Any]) -> str:
    """A row for each trial: what it is, its groups, and every figure."""
    measured = dict.fromkeys(name for trial in facts["trials"] for name in trial["rewards"])
    names = [name for name in REWARDS if name in measured] + sorted(set(measured) - set(REWARDS))
    groups, out = facts["space"]["groups"], io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    settings = list(facts["space"]["settings"])
    head = [
        "trial",
        "anchor",
        "state",
        *_MARK_COLUMNS,
        *_CHOICE_COLUMNS,
        *groups,
        *settings,
        *names,
        "seconds",
    ]
    for row in (head, *(_list_cells(trial, groups, settings, names) for trial in facts["trials"])):
        writer.writerow([guard_cell(cell) for cell in row])
    return out.getvalue()


def guard_cell(cell: Any) -> Any:
    """A name that a spreadsheet would take for a formula is made a text; numbers stay numbers."""
    is_formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    held = cell.replace("\r", " ") if isinstance(cell, str) else cell  # which csv leaves unquoted
    return f"'{held}" if is_formula else held


def _write_setting(settings: dict[str, Any], key: str) -> Any:
    """Its value; "off" for one that is, and nothing where the config's own counts."""
    value = settings.get(key, "")
    return "off" if value is None else json.dumps(value) if isinstance(value, dict) else value


def _list_cells(
    trial: TrialData, groups: Sequence[str], settings: Sequence[str], names: Sequence[str]
) -> list[Any]:
    """Of one row."""
    choice = trial["choice"] or {}
    on = choice.get("groups", ())
    return [
        trial["trial"],
        trial["origin"],
        trial["state"],
        *(int(trial[name]) for name in _MARK_COLUMNS),
        *(choice.get(name) for name in _CHOICE_COLUMNS),
        *(int(name in on or EVERYTHING in on) for name in groups),
        *(_write_setting(choice.get("settings", {}), key) for key in settings),
        *(trial["rewards"].get(name, "") for name in names),
        trial["seconds"],
    ]
