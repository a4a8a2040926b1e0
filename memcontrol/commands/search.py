"""Owns `memcontrol.search`: a study is run or continued, shown and logged."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from memcontrol.commands.operate import hand_over_workers
from memcontrol.config.study import describe_config
from memcontrol.core.console import log_to_file, make_console, warn
from memcontrol.core.errors import SearchEnded
from memcontrol.core.jobs import Warned
from memcontrol.dashboard.notes import Publisher
from memcontrol.execution.executor import Executor
from memcontrol.execution.make import count_workers, open_executor
from memcontrol.search.observer import Observer, Observers
from memcontrol.search.orchestrator import search_study
from memcontrol.search.track import Tracking, require_trackers
from memcontrol.study.contents import make_study_folder
from memcontrol.study.place import StudyPlace
from memcontrol.study.record import Record
from memcontrol.view.live import Display, EventLog
from memcontrol.view.words import describe_network_doubt


def search(
    study: str | Path,
    *overrides: str,
    trials: int | None = None,
    workers: int | None = None,
    executor: str | None = None,
    quiet: bool = False,
    hours: float | None = None,
) -> list[Record]:
    """Runs or continues a study; `overrides` are values such as "inner.batch_size=8". Returns its finished
    trials: after so many `hours`, or where `stop` asks for it, those that have finished by then.

    Interrupted, it is continued by the same call; while it runs elsewhere, that changes its number of
    workers. Raises MemControlError.
    """
    place = StudyPlace.load(study, list_overrides(overrides, trials, workers, executor))
    if hand_over_workers(place) is None:
        with (
            contextlib.suppress(SearchEnded),
            open_executor(place.config, place.folder.path) as places,
        ):
            run_search(place, places, quiet, hours)
    with contextlib.closing(place.open()) as found:
        return [record for record in found.records() if record.finished]


def list_overrides(
    overrides: Sequence[str], trials: int | None, workers: int | None, executor: str | None
) -> list[str]:
    options = {"search.trials": trials, "search.workers": workers, "search.executor": executor}
    return [*overrides, *(f"{key}={value}" for key, value in options.items() if value is not None)]


def run_search(
    place: StudyPlace, executor: Executor, quiet: bool = False, hours: float | None = None
) -> None:
    """Searches, shown on stderr (or below a notebook's cell) unless quiet. Raises SearchEnded and
    MemControlError."""
    _ = place.url  # what is wrong with it is said before anything is shown
    search, n_groups = place.config.search, len(place.space.groups)
    watchers: list[Observer] = [EventLog(n_groups), Publisher(place.space, place.folder)]
    about = f"search of {place.file}: {describe_config(place.config)}"
    doubt = describe_network_doubt(place.config.rewards.extractor, place.config.data.path)
    require_trackers(search.track)
    make_study_folder(place)
    with log_to_file(place.folder.log_file, about), contextlib.ExitStack() as shown:
        if doubt and not quiet:
            warn(make_console(), doubt)
        if not quiet:
            watchers.append(
                shown.enter_context(Display(make_console(), search.trials, n_groups, count_workers(search)))
            )
        if search.track:
            shown_to = Observers(*watchers)
            watchers.append(
                Tracking(
                    search.track,
                    place.space,
                    place.folder,
                    lambda line: shown_to.heard(Warned(None, line)),
                )
            )
        search_study(place, executor, Observers(*watchers), hours).close()
