"""Owns `memcontrol.fork`: a study of another name that takes over those trials of a searched one that stay
valid under what its file says now."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from memcontrol.config.differing import find_differing_keys
from memcontrol.config.settings import configure_choice
from memcontrol.config.spec import OF_STUDY, read_spec
from memcontrol.core.choice import EVERYTHING, Choice, thaw
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import write_json, write_text
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.core.space import SearchSpace
from memcontrol.scoring.own_rewards import find_directions
from memcontrol.search.locks import hold_folder_lock
from memcontrol.study.database import hold_study_lock
from memcontrol.study.identity import describe_study, find_differences
from memcontrol.study.opening import open_study
from memcontrol.study.place import StudyPlace
from memcontrol.study.record import Record
from memcontrol.study.store import Study

_NAME_LINE = re.compile(r"^name:.*$", re.MULTILINE)
_SHARED = ("split_file", "network_file", "extractor_file", "base_file")  # of a study's folder
_BEGUN = "fork.json"  # there until the fork is whole; one that was killed is taken up again
_GROWS = (".jsonl", ".txt")  # files that are added to, of which each study has its own


@dataclass(frozen=True)
class Fork:
    """What became of each finished trial: the new study's file, and the old trials' new numbers, or why they
    do not count there."""

    file: Path
    taken: dict[int, int]
    left: dict[int, str]


def fork(study: str | Path, name: str) -> Fork:
    """Writes NAME.yaml beside the study file, with its keys as they are now, and begins that study with the
    finished trials that these keys would give again. The old study stays as it is. Raises MemControlError."""
    old = StudyPlace.load(study)
    named = StudyPlace.load(study, name=name)
    file = old.file.with_name(f"{name}.yaml")
    if file.exists():
        raise MemControlError(f"{file} exists; give another name with --as")
    new = replace(named, file=file)
    begun = new.folder.path / _BEGUN
    if not begun.is_file() and (new.is_searched() or any(new.folder.list_runs())):
        raise MemControlError(f"a study '{name}' exists already; give another name with --as")
    with contextlib.closing(old.open()) as source:
        records = [record for record in source.records() if record.finished]
        reasons = dict(_explain_invalid(source, old, new, records))
        valid = [record for record in records if record.number not in reasons]
        text = _rename_study(old.file, name)
        with hold_folder_lock(new.folder.path), hold_study_lock(new.url, name):
            write_json(begun, {"fork of": old.config.name})
            taken = _take_over(source, new, valid) if valid else {}
            write_text(file, text, published=True)
            begun.unlink()
    return Fork(file, taken, reasons)


def _rename_study(old: Path, name: str) -> str:
    """The file's text with another name: comments stay."""
    text = old.read_text(encoding="utf-8")
    named, n = _NAME_LINE.subn(f"name: {name}", text, count=1)
    if not n:
        raise MemControlError(
            f"{old} has no line that begins with 'name:'; write it so, or copy the file and name it by hand"
        )
    return named


def _explain_invalid(
    source: Study, old: StudyPlace, new: StudyPlace, records: Sequence[Record]
) -> Iterator[tuple[int, str]]:
    """The number of each trial that would not come out the same, and why."""
    differing = find_differing_keys(source.config, new.config, OF_STUDY)
    now = describe_study(new.config, old.folder)
    differing += find_differences(
        {key: value for key, value in source.about.items() if key not in ("space", "own_rewards")}, now
    )
    mended = find_differences(source.about.get("own_rewards", {}), now.get("own_rewards", {}))
    for record in records:
        missing = [name for name in new.config.rewards.names if name not in record.rewards]
        reason = (
            "; ".join(differing)
            or "; ".join(mended)
            or (f"{', '.join(missing)} was not measured" if missing else "")
            or _explain_outside(record, source.space, new.space)
            or ("" if old.folder.run(record.chosen).has_result else f"{record.run} is not here")
        )
        if reason:
            yield record.number, reason


def _explain_outside(record: Record, old: SearchSpace, new: SearchSpace) -> str:
    """Why a trial's choices are none of the new space; empty where they are."""
    if record.anchor and tuple(new.list_anchors().get(record.anchor, ())) != record.candidates:
        return f"the anchor '{record.anchor}' has other learning rates"
    for choice in record.candidates:
        if reason := _explain_changed(choice, old, new):
            return reason
    return ""


def _explain_changed(choice: Choice, old: SearchSpace, new: SearchSpace) -> str:
    if choice.method not in ("none", "full") and old.always != new.always:
        return "what the space always trains has changed"
    for key, value in choice.trained.settings:
        if key not in new.over or value not in new.over[key].options:
            return f"{key} is not searched over, or not at {thaw(value)}, any more"
    for name in choice.groups:
        if name == EVERYTHING:
            continue
        setting, group = choice.setting(name), new.groups.get(name)
        if group is None:
            return f"the space has no group '{name}' any more"
        was = old.groups[name]
        if (group.patterns, group.alpha) != (was.patterns, was.alpha):
            return f"group '{name}' holds other modules, or has another alpha"
        low, high = new.learning_rate.get(setting.method, (1.0, 0.0))
        is_ranked = setting.rank is not None
        if setting.method not in group.methods or (is_ranked and setting.rank not in group.rank):
            return f"group '{name}' may not be trained by {setting.method}, rank {setting.rank}, any more"
        if not low <= setting.learning_rate <= high:
            return f"{setting.learning_rate:g} lies outside the learning rates of {setting.method}"
    return ""


def _take_over(source: Study, new: StudyPlace, records: Sequence[Record]) -> dict[int, int]:
    """Begins the new study with these trials. Their numbers there, by the old ones."""
    old = StudyFolder(source.folder)
    for name in _SHARED:
        if (path := getattr(old, name)).is_file():
            shutil.copy2(path, getattr(new.folder, name))
    for record in records:
        for choice in record.candidates:
            _copy_run(old.run(choice), new, choice)
    goals = find_directions(new.config.rewards)
    study = open_study(new.config, new.folder.path, new.file, create=True, directions=goals)
    taken = {}
    with contextlib.closing(study):
        known = {record.candidates: record.number for record in study.records() if record.finished}
        for record in records:
            if record.candidates in known:  # of a fork that was killed
                taken[record.number] = known[record.candidates]
                continue
            results = [new.folder.run(choice).read_result() for choice in record.candidates]
            number = study.finish(study.begin(record.candidates, new.space, record.anchor), results)
            if record.confirmed:
                study.confirm(number, record.confirmed)
            if record.replicates:
                study.replicate(number, record.replicates)
            taken[record.number] = number
    return taken


def _copy_run(old: RunFolder, new: StudyPlace, choice: Choice) -> None:
    """Files are shared where the disk allows, since none that is whole is ever changed."""
    place = new.folder.run(choice)
    shutil.rmtree(place.path, ignore_errors=True)  # half of it, of a fork that was killed
    shutil.copytree(old.path, place.path, copy_function=_link_file)
    for folder in (place.path, *place.path.glob("replicate-*")):
        source = old.path / folder.relative_to(place.path)
        config, there = configure_choice(new.config, choice), read_spec(source)
        spec = replace(there, config=config, space=new.space, study_folder=new.folder.path)
        RunFolder(folder).spec_file.unlink()
        spec.write(folder)


def _link_file(source: str, target: str) -> None:
    if not source.endswith(_GROWS):
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)
