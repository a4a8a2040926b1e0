"""Owns the commands as Python functions, for notebooks and scripts: `import memcontrol;
memcontrol.front("xrays.yaml")`. What they import, they import when they are called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memcontrol.core.console import log_to_file, make_console
from memcontrol.core.errors import MemControlError

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    from memcontrol.core.choice import Choice
    from memcontrol.core.config import Config
    from memcontrol.core.estimate import Estimate
    from memcontrol.core.space import SearchSpace
    from memcontrol.execution.executor import Event, Executor
    from memcontrol.search.importance import Effect
    from memcontrol.study.record import Record
    from memcontrol.study.store import Study


StudyFile = str | Path
LOG_FILE = "search.log"


def search(
    study: StudyFile,
    *overrides: str,
    trials: int | None = None,
    workers: int | None = None,
    executor: str | None = None,
    quiet: bool = False,
) -> list[Record]:
    """Runs or continues a study; `overrides` are values such as "inner.batch_size=8". Returns its finished
    trials.

    Interrupted, it is continued by the same call. Raises MemControlError.
    """
    from memcontrol.core.config import load_config
    from memcontrol.core.run_folder import locate_study_folder

    config = load_config(Path(study), overridden(overrides, trials, workers, executor))
    with executor_of(config, locate_study_folder(Path(study), config.name)) as places:
        searched(Path(study), config, places, quiet)
    with contextlib.closing(opened_as(config, study)) as found:
        return [record for record in found.records() if record.finished]


def status(study: StudyFile) -> list[Record]:
    """All trials of a study, as they are now. Raises MemControlError where it was not searched."""
    with contextlib.closing(opened(study)) as found:
        return found.records()


def front(study: StudyFile) -> list[Record]:
    """The trials that no other beats in every objective, best in the first one first. Raises
    MemControlError."""
    from memcontrol.study.pick import require_finished, select_front

    return select_front(require_finished(status(study)))


def pick(
    study: StudyFile, rule: str | None = None, *, trial: int | None = None, limits: Sequence[str] = ()
) -> Record:
    """One trial: by rule (knee, quality or memorization) under limits such as "copy_rate<=0.02", or by its
    number. Raises MemControlError."""
    with contextlib.closing(opened(study)) as found:
        return picked_record(found, trial, rule, limits)


def importance(study: StudyFile) -> list[Effect]:
    """Which groups, methods, ranks and learning rates drive which objective, with error. Raises
    MemControlError where too few trials ended."""
    from memcontrol.search.importance import measure_importance as measured

    with contextlib.closing(opened(study)) as found:
        return measured(found.records(), space_of(found.config))


def retrain(
    study: StudyFile,
    rule: str | None = None,
    *,
    trial: int | None = None,
    limits: Sequence[str] = (),
    out: StudyFile | None = None,
) -> dict[str, dict[str, Any]]:
    """Trains the pick and full fine-tuning on the whole training set, scored on test data. Returns the
    results of `pick` and `baseline`, each with its rewards and its folder, `run`. Raises MemControlError."""
    from memcontrol.commands.retrain import run_retraining as trained

    with contextlib.closing(opened(study)) as found:
        config, choice, full = found.config, picked_record(found, trial, rule, limits).chosen, full_of(found)
    folder = folder_of(study)
    run = Path(out or run_folder(study, choice))
    runs = {"pick": run, "baseline": run if choice == full else run_folder(study, full)}
    with executor_of(config_of(study), folder) as places, retrain_logged(folder, config) as log:
        results = trained(config, choice, full, folder, runs["pick"], runs["baseline"], places, log)
    return {name: {**results[name], "run": str(runs[name])} for name in runs}


def compare(run_a: str | Path, run_b: str | Path) -> dict[str, Estimate]:
    """Run a's rewards less run b's, each with the interval that resampling their common prompts gives. Raises
    MemControlError."""
    from memcontrol.commands.compare import measure_differences

    return measure_differences(Path(run_a), Path(run_b))


def export(run: str | Path, out: str | Path, format: str | None = None) -> Path:
    """Writes a run's model for plain diffusers: as an adapter, a pipeline or a denoiser. Returns the folder.
    Raises MemControlError."""
    from memcontrol.commands.export import export as exported

    return exported(Path(run), Path(out), format)


def audit(
    images: str | Path | None = None,
    train: str | Path | None = None,
    holdout: str | Path | None = None,
    *,
    model: str | Path | None = None,
    extractor: str = "tiny",
    skip_unreadable: bool = False,
    **sampling: Any,
) -> dict[str, Any]:
    """How much a model (a run folder, or a pipeline to sample from) or a folder of images copies a training
    set, judged against held-out images: what audit.json holds. A run knows its own images. `sampling` of a
    pipeline: samples, attacked, steps, guidance, seed. Raises MemControlError."""
    from memcontrol.commands.audit import Source, audit_source

    generated, known, held = (Path(path) if path else None for path in (images, train, holdout))
    source = Source(generated, known, held, str(model) if model else None, skip_unreadable, sampling)
    return audit_source(source, extractor, lambda title, done, total: None, lambda line: None)[0]


def report(study: StudyFile, out: str | Path | None = None, *, images: bool = True) -> dict[str, Any]:
    """Writes one page about the study, where `out` names it. Returns what it says as data. Raises
    MemControlError."""
    from memcontrol.view.report import write_report
    from memcontrol.view.report_data import collect_report_data

    with contextlib.closing(opened(study)) as found:
        facts = collect_report_data(found, space_of(found.config), folder_of(study))
    if out is not None:
        write_report(facts, Path(out), images)
    return facts


def init(
    images: str | Path, out: str | Path | None = None, *, name: str | None = None, base: str | None = None
) -> Path:
    """Looks at a folder of images and writes a study for it, with the reason beside each value. Returns the
    file. Raises MemControlError."""
    from memcontrol.commands.init import propose_study

    return propose_study(
        Path(images), Path(out) if out else None, name, base, lambda title, done, total: None
    ).path


def dashboard(
    study: StudyFile,
    *,
    storage: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    writable: bool = False,
) -> str:
    """Serves the study in optuna-dashboard from a thread, until the process ends. Returns the address. Raises
    MemControlError."""
    import threading

    server, address = dashboard_of(study, storage, host, port, token, writable)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return address


def load_adapter(pipeline: Any, path: str | Path) -> Any:
    """Puts an exported adapter into a diffusers pipeline; see memcontrol.exporting.load_adapter."""
    from memcontrol.commands.export import load_adapter as load

    return load(pipeline, path)


def overridden(
    overrides: Sequence[str], trials: int | None, workers: int | None, executor: str | None
) -> list[str]:
    options = {"search.trials": trials, "search.workers": workers, "search.executor": executor}
    return [*overrides, *(f"{key}={value}" for key, value in options.items() if value is not None)]


def searched(study_file: Path, config: Config, executor: Executor, quiet: bool = False) -> None:
    """Searches, shown on stderr (or below a notebook's cell) unless quiet."""
    from memcontrol.core.run_folder import locate_study_folder
    from memcontrol.search.orchestrator import search_study as run
    from memcontrol.view.live import Display, log_event

    folder, n_groups = locate_study_folder(study_file, config.name), len(space_of(config).groups)

    def show(event: Event) -> None:
        log_event(event, n_groups)
        if not quiet:
            display.on_event(event)

    with (
        log_to_file(folder / LOG_FILE, f"search of {study_file}: {given(config)}"),
        contextlib.ExitStack() as shown,
    ):
        display = Display(make_console(), config.search.trials, n_groups, config.search.workers)
        if not quiet:
            shown.enter_context(display)
        run(
            config,
            study_file,
            folder,
            executor,
            show,
            lambda study: None if quiet else display.on_study(study),
        ).close()


@contextlib.contextmanager
def retrain_logged(folder: Path, config: Config) -> Iterator[Callable[[Event], None]]:
    """Gives what writes a retraining's events to the study's log."""
    from memcontrol.view.live import log_event

    n_groups = len(space_of(config).groups)
    with log_to_file(folder / LOG_FILE, f"retrain: {given(config)}"):
        yield lambda event: log_event(event, n_groups)


def given(config: Config) -> str:
    """The config in a line, less what is at its default and less the storage's URL."""
    import json

    return json.dumps(config.model_dump(mode="json", exclude_defaults=True), ensure_ascii=False)


def dashboard_of(
    study: StudyFile, storage: str | None, host: str, port: int, token: str | None, writable: bool
) -> tuple[WSGIServer, str]:
    from memcontrol.view.dashboard import start_server

    with contextlib.closing(opened(study, [f"storage={storage}"] if storage else [])) as found:
        url, folder, name = found.url, found.folder, found.config.name
    return start_server(url, folder, name, host, port, token, writable)


@contextlib.contextmanager
def executor_of(config: Config, folder: Path) -> Iterator[Executor]:
    """The config's executor, ended at once when the block is left."""
    from memcontrol.execution.make import make_executor

    executor = make_executor(config, folder)
    try:
        yield executor
    finally:
        executor.close()


def opened(study_file: StudyFile, overrides: Sequence[str] = ()) -> Study:
    """The study as it was searched: its stored config counts, not later edits of the file."""
    from memcontrol.core.config import load_config

    return opened_as(load_config(Path(study_file), overrides), study_file)


def opened_as(config: Config, study_file: StudyFile) -> Study:
    """The study that has the config's name and storage."""
    from memcontrol.core.run_folder import locate_study_folder
    from memcontrol.study.store import open_study

    return open_study(
        config, locate_study_folder(Path(study_file), config.name), Path(study_file), create=False
    )


def config_of(study_file: StudyFile) -> Config:
    from memcontrol.core.config import load_config

    return load_config(Path(study_file))


def folder_of(study_file: StudyFile) -> Path:
    from memcontrol.core.run_folder import locate_study_folder

    return locate_study_folder(Path(study_file), config_of(study_file).name)


def space_of(config: Config) -> SearchSpace:
    from memcontrol.core.space_yaml import load_space

    return load_space(config.space)


def run_folder(study_file: StudyFile, choice: Choice) -> Path:
    """Where a choice is retrained."""
    return folder_of(study_file) / "retrain" / choice.key


def full_of(study: Study) -> Choice:
    """Full fine-tuning as the study's anchor found it. Raises MemControlError."""
    for record in study.records():
        if record.anchor == "full" and record.finished:
            return record.chosen
    raise MemControlError(
        "the anchor 'full' has not finished, so there is no baseline to compare with; let the search run on"
    )


def picked_record(study: Study, trial: int | None, rule: str | None, limits: Sequence[str]) -> Record:
    from memcontrol.study.pick import choose_trial as chosen
    from memcontrol.study.pick import find_trial, require_finished

    if trial is not None:
        if rule or limits:
            raise MemControlError("--trial names one trial; --rule and --limit do not go with it")
        return find_trial(require_finished(study.records()), trial)
    return chosen(study.records(), rule or "knee", limits, study.limits)
