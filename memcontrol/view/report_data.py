"""Owns what is known of a study when it is reported: one document, which `report --json` prints and the page
is made from."""

from __future__ import annotations

import csv
import io
import statistics
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from memcontrol.core.choice import EVERYTHING, Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import read_json
from memcontrol.core.reward_table import REWARDS, list_objectives
from memcontrol.core.run_folder import NETWORK, RESULT, TRAINING, summarize_data
from memcontrol.core.space import SearchSpace
from memcontrol.core.version import __version__
from memcontrol.search.importance import measure_importance
from memcontrol.study.hypervolume import estimate_hypervolume, find_reference_point
from memcontrol.study.pick import find_pick, select_front, select_ties
from memcontrol.study.record import Record
from memcontrol.study.replicates import estimate_spread
from memcontrol.study.store import Study
from memcontrol.view.words import describe_choice

FATES = ("seen", "trained", "skipped", "dropped", "queued", "surplus")


def collect_report_data(study: Study, space: SearchSpace, folder: Path) -> dict[str, Any]:
    """Everything the report says, as JSON can hold it. Raises MemControlError where no trial has ended
    well."""
    records, config = study.records(), study.config
    complete = [record for record in records if record.finished]
    if not complete:
        raise MemControlError(f"study '{config.name}' has no finished trial to report; let the search run on")
    picked = find_pick(records, study)
    front, ties = select_front(complete), select_ties(complete)
    blocks = read_json(folder / NETWORK) if (folder / NETWORK).is_file() else []
    trials = [
        record.as_dict()
        | {
            "said": describe_choice(record.choice, len(space.groups)) if record.choice else "",
            "front": record in front,
            "tie": record in ties,
            "pick": record is picked,
            "blocks": [compute_trained_share(record, block) for block in blocks],
        }
        for record in records
    ]
    told = [record for record in complete if record in front or record.anchor == "full"]
    return {
        "study": config.name,
        "written": datetime.now().isoformat(timespec="minutes"),
        "reported_by": __version__,
        "objectives": study.objectives,
        "limits": config.rewards.limits,
        "data": summarize_data(folder),
        "config": config.model_dump(mode="json"),
        "given": config.model_dump(mode="json", exclude_defaults=True),
        "space": {
            "name": config.space,
            "description": space.description,
            "groups": list(space.groups),
            "methods": list(space.methods),
            "rank": list(space.rank),
            "learning_rate": {method: list(limits) for method, limits in space.learning_rate.items()},
        },
        "trials": trials,
        "blocks": [block["name"] for block in blocks],
        "hypervolume": summarize_hypervolume(study),
        "importance": summarize_importance(records, space),
        "spread": None
        if (spread := estimate_spread(complete)) is None
        else dict(zip(study.objectives, spread.tolist())),
        "training": [
            {"trial": record.number} | fates
            for record in told
            if (fates := count_fates(folder / record.chosen.key))
        ],
        "retrained": list_retrained(folder, len(space.groups)),
        "cost": sum_costs(records, folder),
        "made_with": study.attributes.get("made_with", {}),
    }


def compute_trained_share(record: Record, block: dict[str, Any]) -> float:
    """The share of a block's parameters that lie in modules which the trial trains."""
    groups = record.choice.groups if record.choice else ()
    return (
        1.0
        if EVERYTHING in groups
        else sum(n for group, n in block["groups"].items() if group in groups) / block["parameters"]
    )


def summarize_hypervolume(study: Study) -> dict[str, Any] | None:
    """Value, error and reference point; None before the anchors have ended, whose worst values it is measured
    from."""
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


def summarize_importance(records: Sequence[Record], space: SearchSpace) -> list[dict[str, Any]]:
    """Empty where too few trials have ended."""
    try:
        return [effect.as_dict() for effect in measure_importance(records, space)]
    except MemControlError:
        return []


def count_fates(run: Path) -> dict[str, int]:
    """What became of the images that a fine-tuning drew; empty where the run folder is elsewhere."""
    if not (run / TRAINING).is_file():
        return {}
    total: Counter[str] = Counter()
    for shard in read_json(run / TRAINING).get("shards", ()):  # none, where nothing was trained
        total.update({name: shard.get(name, 0) for name in FATES})
    return dict(total)


def list_retrained(folder: Path, n_groups: int) -> list[dict[str, Any]]:
    """The runs of `memcontrol retrain` that ended well, full fine-tuning first: choice, rewards on test
    images, folder."""
    found = [(path.parent, read_json(path)) for path in sorted((folder / "retrain").glob(f"*/{RESULT}"))]
    runs = [
        {
            "said": describe_choice(Choice.from_dict(result["choice"]), n_groups),
            "choice": result["choice"],
            "rewards": result["rewards"],
            "n_samples": result["n_samples"],
            "run": str(run),
        }
        for run, result in found
        if result["state"] == "COMPLETE"
    ]
    return sorted(runs, key=lambda run: run["choice"]["method"] != "full")


def sum_costs(records: Sequence[Record], folder: Path) -> dict[str, float]:
    """The fine-tunings that ended, each with its scoring: how many, their hours, the seconds of the median
    one."""
    paths = (folder / choice.key / RESULT for record in records for choice in record.candidates)
    results = (read_json(path) for path in paths if path.is_file())
    lengths = [result["seconds"] for result in results if "seconds" in result]
    return {
        "runs": len(lengths),
        "hours": sum(lengths) / 3600,
        "median_seconds": statistics.median(lengths) if lengths else 0.0,
    }


def format_csv(facts: dict[str, Any]) -> str:
    """A row for each trial: what it is, its groups, and every figure."""
    names = list(dict.fromkeys(name for trial in facts["trials"] for name in trial["rewards"]))
    ordered = [name for name in REWARDS if name in names] + sorted(set(names) - set(REWARDS))
    groups, out = facts["space"]["groups"], io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "trial",
            "anchor",
            "state",
            "front",
            "tie",
            "pick",
            "confirmed",
            "method",
            "rank",
            "learning_rate",
            *groups,
            *ordered,
            "seconds",
        ]
    )
    for trial in facts["trials"]:
        choice = trial["choice"] or {}
        on = [
            int(name in choice.get("groups", ()) or EVERYTHING in choice.get("groups", ())) for name in groups
        ]
        figures = [trial["rewards"].get(name, "") for name in ordered]
        writer.writerow(
            [
                trial["trial"],
                trial["anchor"] or "sampled",
                trial["state"],
                int(trial["front"]),
                int(trial["tie"]),
                int(trial["pick"]),
                int(trial["confirmed"]),
                choice.get("method"),
                choice.get("rank"),
                choice.get("learning_rate"),
                *on,
                *figures,
                trial["seconds"],
            ]
        )
    return out.getvalue()
