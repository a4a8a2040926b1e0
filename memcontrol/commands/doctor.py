"""Owns `memcontrol.doctor`: everything that is looked at before a search, in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memcontrol.checks.finding import OK, Finding, list_faults, run_check

if TYPE_CHECKING:
    from memcontrol.study.place import StudyPlace

_CHECK_SECONDS = 10.0  # of most checks: each thing that is asked gives up before
_IMPORT_SECONDS = 60.0  # of those that import torch or diffusers, which a slow disk makes long


def doctor(study: str | Path | None = None) -> list[Finding]:
    """Looks whether a search of the study, or any search where none is named, can work on this machine:
    Python and packages, device, memory, folder, data, base and how it fits, feature network, Hub, database,
    Ray, Slurm. Each finding has a `name`, a `state` (`ok`, `warn`, or `fail`: a search would fail), a `text`,
    and a `cure`. It raises nothing, and takes some seconds at most for whatever does not answer."""
    return list(examine(Path(study) if study is not None else None))


def examine(file: Path | None, name: str | None = None) -> Iterator[Finding]:
    """The same, as they are found; `name`: another name of the study than the file's."""
    yield from map(_run_step, _OF_THE_MACHINE)
    if file is None:
        yield from map(_run_step, _list_usual_steps())
        return
    place: list[StudyPlace] = []
    study = run_check("study", lambda: _read_study(file, name, place), _IMPORT_SECONDS)
    yield from list_faults(study)
    if place:
        yield from map(_run_step, _list_study_steps(place[0]))


@dataclass(frozen=True)
class _Step:
    """A check by its module and name, imported when it is its turn, since what it imports may be what is
    broken; and how long it may take."""

    name: str
    check: str
    given: tuple[Any, ...] = ()
    seconds: float = _CHECK_SECONDS


_OF_THE_MACHINE = (
    _Step("python", "packages.check_python"),
    _Step("packages", "packages.check_packages"),
    _Step("torch", "packages.check_torch", seconds=_IMPORT_SECONDS),
    _Step("device", "machine.check_device", seconds=_IMPORT_SECONDS),
)


def _run_step(step: _Step) -> Finding:
    module, _, function = step.check.partition(".")

    def check() -> Finding:
        return getattr(import_module(f"memcontrol.checks.{module}"), function)(*step.given)

    return run_check(step.name, check, step.seconds)


def _read_study(file: Path, name: str | None, place: list[StudyPlace]) -> Finding:
    """Raises MemControlError for what is wrong in it, or in its space."""
    from memcontrol.study.place import StudyPlace

    found = StudyPlace.load(file, name=name)
    n, executor = len(found.space.groups), found.config.search.executor
    place.append(found)
    return Finding("study", OK, f"{found.config.name}: {n} groups of layers, executor {executor}")


def _list_usual_steps() -> list[_Step]:
    """With the defaults, and results below this folder."""
    return [
        _Step("memory", "machine.check_memory", (None, None), _IMPORT_SECONDS),
        _Step("folder", "machine.check_folder", (Path.cwd(), None)),
        _Step("fit", "fit.check_usual_fit", seconds=_IMPORT_SECONDS),
        _Step("extractor", "downloads.check_usual_extractor"),
        _Step("hub", "downloads.check_hub", seconds=_IMPORT_SECONDS),
        _Step("ray", "services.check_ray", (None,), _IMPORT_SECONDS),
        _Step("slurm", "services.check_slurm", (None,)),
    ]


def _list_study_steps(place: StudyPlace) -> list[_Step]:
    config, file = place.config, place.file
    clip = [_Step("clip", "downloads.check_clip", (config.rewards.clip,))] if config.rewards.clip else []
    return [
        _Step("memory", "machine.check_memory", (config, file), _IMPORT_SECONDS),
        _Step("folder", "machine.check_folder", (place.folder.path, config.search.disk_gb)),
        _Step("data", "downloads.check_data", (config,)),
        _Step("base", "downloads.check_base", (config,), _IMPORT_SECONDS),
        _Step("fit", "fit.check_fit", (config, file), _IMPORT_SECONDS),
        _Step("extractor", "downloads.check_extractor", (config,)),
        *clip,
        _Step("hub", "downloads.check_hub", seconds=_IMPORT_SECONDS),
        _Step("database", "services.check_database", (place,), 2 * _CHECK_SECONDS),
        _Step("ray", "services.check_ray", (config,)),
        _Step("slurm", "services.check_slurm", (config,)),
    ]
