"""Owns `memcontrol status`, what it prints of each trial, and `memcontrol trials`, which gives them as a
table."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memcontrol.cli.arguments import add_command, add_json, add_study
from memcontrol.cli.printing import make_json, print_table
from memcontrol.core.console import print_json
from memcontrol.core.errors import MemControlError

if TYPE_CHECKING:
    from memcontrol.study.place import StudyPlace
    from memcontrol.study.record import Record
    from memcontrol.study.store import Study


def add_status(subparsers) -> None:
    status = add_command(subparsers, "status", _run_status, "list all trials with their state")
    add_study(status)
    add_json(status)


def add_trials(subparsers) -> None:
    text = "all trials as a table: choice, rewards with their errors, times, a row each"
    trials = add_command(subparsers, "trials", _run_trials, text)
    add_study(trials)
    form = trials.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="comma-separated (default)")
    form.add_argument("--parquet", action="store_true", help="Apache Parquet, by pyarrow; needs --out")
    form.add_argument("--json", action="store_true", help="a list of objects")
    trials.add_argument("--out", type=Path, metavar="FILE", help="a file in place of stdout")


def _run_trials(args: argparse.Namespace) -> int:
    import json

    from memcontrol.commands.trials import format_rows, list_rows, pack_rows
    from memcontrol.core.files import replace_file, write_text
    from memcontrol.study.place import StudyPlace

    if args.parquet and not args.out:
        raise MemControlError("--parquet is no text; name its file with --out")
    with contextlib.closing(StudyPlace.load(args.study, name=args.name).open()) as study:
        rows = list_rows(study)
    if args.parquet:
        with replace_file(args.out, published=True) as part:
            part.write_bytes(pack_rows(rows))
        return 0
    text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n" if args.json else format_rows(rows)
    if args.out:
        write_text(args.out, text, published=True)
    else:
        sys.stdout.write(text)
    return 0


def _run_status(args: argparse.Namespace) -> int:
    from memcontrol.study.place import StudyPlace

    place = StudyPlace.load(args.study, name=args.name)
    with contextlib.closing(place.open()) as study:
        found = _read_status(place, study)
        if args.json:
            print_json(found)
        else:
            _print_status(found, study, place)
    return 0


def _read_status(place: StudyPlace, study: Study) -> dict[str, Any]:
    """What `--json` prints: of each trial also its runs, with the place and progress of those at work."""
    from memcontrol.execution.make import count_workers
    from memcontrol.search.locks import is_searching, read_holder
    from memcontrol.study.orders import find_stop
    from memcontrol.study.running import estimate_pace, list_runs
    from memcontrol.view.report_data import summarize_hypervolume

    records, folder = study.records(), place.folder.path
    search, searching = place.config.search, is_searching(folder, study.url, study.config.name)
    plan = read_holder(place.folder) if searching else {}  # it may have been given other numbers
    n_trials, n_workers = plan.get("trials", search.trials), plan.get("workers") or count_workers(search)
    stop = find_stop(study)  # which the next search takes back
    flat, pace = _is_over(study, search.stop_when_flat), estimate_pace(records, n_trials, n_workers)
    return {
        "study": study.config.name,
        "searching": searching,
        "stop": asdict(stop) if stop else None,
        "flat": flat,
        **pace,
        **({"minutes_left": 0.0} if flat else {}),
        "hypervolume": summarize_hypervolume(study),
        "trials": [make_json(record, study) | {"runs": list_runs(record, folder)} for record in records],
    }


def _is_over(study: Study, n: int | None) -> bool:
    """Whether search.stop_when_flat ends it."""
    from memcontrol.study.hypervolume import is_flat

    reference = study.attributes.get("reference")
    return bool(n and reference and is_flat(study.records(), reference, n))


def _print_status(found: dict[str, Any], study: Study, place: StudyPlace) -> None:
    from memcontrol.study.pick import find_pick
    from memcontrol.study.record import DROPPED
    from memcontrol.view.tables import make_study_table

    records, n_groups = study.records(), len(study.space.groups)
    words = {
        "COMPLETE": "complete",
        "RUNNING": "running" if found["searching"] else "interrupted",
        "PRUNED": "pruned",
        "FAIL": "failed",
        "WAITING": "enqueued",
        DROPPED: "dropped",
    }
    for state, word in words.items():
        n = sum(record.state == state for record in records)
        if n or state not in ("WAITING", DROPPED):  # which few studies have
            sys.stdout.write(f"{word}: {n}\n")
    _print_progress(found)
    for record, trial in zip(records, found["trials"]):
        _print_trial(record, trial["runs"], words[record.state], n_groups, found["searching"], place)
    title, picked = f"{study.config.name}: finished trials", find_pick(records, study)
    print_table(make_study_table(records, n_groups, title, picked, None, study.limits))


def _print_progress(found: dict[str, Any]) -> None:
    if volume := found["hypervolume"]:
        point = ", ".join(f"{name} {value:.4g}" for name, value in volume["reference"].items())
        sys.stdout.write(f"hypervolume: {volume['value']:.4g} ± {volume['error']:.2g}, from {point}\n")
    if found["stop"]:
        sys.stdout.write(f"{_describe_stop(found['stop'], found['searching'])}\n")
    elif found["flat"]:
        sys.stdout.write(
            "the hypervolume has not grown beyond its noise, which ends the search (search.stop_when_flat)\n"
        )
    elif found["searching"] and "runs_per_hour" in found:
        pace, left = found["runs_per_hour"], found["minutes_left"]
        sys.stdout.write(f"about {pace:.0f} runs an hour, about {left:.1f} minutes left\n")


def _describe_stop(stop: dict[str, Any], searching: bool) -> str:
    asked = f"memcontrol stop asked for it ({stop['by']}, {stop['at']})"
    if not searching:
        return f"the last search was stopped: {asked}; the next one goes on"
    when = "at its trials' checkpoints" if stop["value"] == "now" else "when its running trials have ended"
    return f"the search ends {when}: {asked}"


def _print_trial(
    record: Record, runs: list[dict], word: str, n_groups: int, searching: bool, place: StudyPlace
) -> None:
    """Why it ended as it did, or where it runs."""
    from memcontrol.study.running import describe_run
    from memcontrol.view.words import describe_choice

    if said := record.dropped or record.reason:
        sys.stdout.write(f"trial {record.number} {word}: {said}\n")
    if record.state == "WAITING":
        said = describe_choice(record.chosen, n_groups)
        sys.stdout.write(f"trial {record.number} {word}: {said}, begun before any other is sampled\n")
    if record.state != "RUNNING":
        return
    goes_on = "" if searching else " (the next search goes on with it)"
    sys.stdout.write(f"trial {record.number} {word} ({record.origin}){goes_on}\n")
    for choice, run in zip(record.candidates, runs):
        what = describe_run(run, place.folder.path.is_dir())
        sys.stdout.write(f"  {describe_choice(choice, n_groups)}: {'' if searching else 'was: '}{what}\n")
