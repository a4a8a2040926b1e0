"""Owns the commands that work: demo, search, retrain, export, audit. What they import, they import when they
run: --help must be instant."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memcontrol.cli.looking import warn_of_full, warn_of_limits
from memcontrol.commands.api import (
    config_of,
    executor_of,
    folder_of,
    full_of,
    opened,
    opened_as,
    overridden,
    picked_record,
    retrain_logged,
    run_folder,
    searched,
    space_of,
)
from memcontrol.core.console import make_console, print_json
from memcontrol.core.errors import MemControlError

if TYPE_CHECKING:
    from memcontrol.core.config import Config
    from memcontrol.execution.executor import Event, Executor
    from memcontrol.study.store import Study


def run_demo(args: argparse.Namespace) -> int:
    from memcontrol.commands.demo import write_demo_study
    from memcontrol.core.config import load_config
    from memcontrol.core.run_folder import locate_study_folder

    study_file = write_demo_study(args.out, args.seed, args.trials, args.workers)
    config = load_config(study_file)
    # the same for both parts: the base stays loaded
    with executor_of(config, locate_study_folder(study_file, config.name)) as executor:
        search_and_show(study_file, config, executor)
        retrain_and_show(study_file, executor)
    return 0


def run_search(args: argparse.Namespace) -> int:
    from memcontrol.core.config import load_config
    from memcontrol.core.run_folder import locate_study_folder

    config = load_config(args.study, overridden(args.overrides, args.trials, args.workers, args.executor))
    if args.dry_run:
        import yaml

        from memcontrol.core.space_yaml import load_space
        from memcontrol.study.database import hide_password, validate_url

        load_space(config.space)
        storage = {"storage": hide_password(validate_url(config.storage))} if config.storage else {}
        yaml.safe_dump(
            {**config.model_dump(mode="json"), **storage}, sys.stdout, sort_keys=False, allow_unicode=True
        )
        sys.stdout.flush()
        print_prediction(config, locate_study_folder(args.study, config.name))
        return 0
    with executor_of(config, locate_study_folder(args.study, config.name)) as executor:
        search_and_show(args.study, config, executor)
    make_console().print(
        f"next: memcontrol retrain {args.study} (the pick, on test images); look: dashboard, report",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def print_prediction(config: Config, folder: Path) -> None:
    """As comments: what is printed stays YAML."""
    from memcontrol.execution.job_queue import JobQueue
    from memcontrol.search.prediction import describe_prediction, predict_search, run_calibrations
    from memcontrol.view.live import Steps

    with executor_of(config, folder) as executor, Steps(make_console()) as steps:

        def show(event: Event) -> None:
            if event.kind == "progress":
                steps.show("calibrating with short trials", event.detail["done"], event.detail["total"])

        found = predict_search(
            config, space_of(config).anchors(), run_calibrations(config, folder, JobQueue(executor, show))
        )
    for line in describe_prediction(found):
        sys.stdout.write(f"# {line}\n")


def search_and_show(study_file: Path, config: Config, executor: Executor) -> None:
    searched(study_file, config, executor)
    show_search(opened_as(config, study_file), make_console())


def show_search(study: Study, screen) -> None:
    from memcontrol.core.space_yaml import load_space
    from memcontrol.study.pick import find_pick, require_finished
    from memcontrol.view.front_data import make_front_data, mark_trials
    from memcontrol.view.front_png import draw_front_png
    from memcontrol.view.live import shorten_path
    from memcontrol.view.tables import describe_rank_agreement, describe_spread, make_study_table

    complete = require_finished(study.records())
    picked = find_pick(complete, study)
    warn_of_full(picked, screen)
    warn_of_limits(study, picked, screen)
    n_groups = len(load_space(study.config.space).groups)
    screen.print(make_study_table(complete, n_groups, "trials", picked))
    if len(study.objectives) > 1:
        front = make_front_data(mark_trials(complete, picked, n_groups), study.objectives)
        draw_front_png(front, study.folder / "front.png", study.config.name)
        screen.print(f"front: {shorten_path(study.folder / 'front.png')}", highlight=False, soft_wrap=True)
    for line in filter(None, (describe_spread(complete), describe_rank_agreement(complete))):
        screen.print(line, highlight=False, soft_wrap=True)


def run_retrain(args: argparse.Namespace) -> int:
    if args.choice and (args.trial is not None or args.rule or args.limit):
        raise MemControlError("--choice names the choice; --trial, --rule and --limit do not go with it")
    with executor_of(config_of(args.study), folder_of(args.study)) as executor:
        retrain_and_show(args.study, executor, args.trial, args.rule, args.limit, args.choice, args.out)
    return 0


def retrain_and_show(
    study_file: Path,
    executor: Executor,
    trial: int | None = None,
    rule: str | None = None,
    limits: Sequence[str] = (),
    choice_file: Path | None = None,
    out: Path | None = None,
) -> None:
    from memcontrol.commands.compare import measure_differences
    from memcontrol.commands.retrain import BASELINE, run_retraining
    from memcontrol.view.live import Display, shorten_path
    from memcontrol.view.tables import RewardsTable, describe_gains
    from memcontrol.view.words import describe_choice

    config, folder, screen = config_of(study_file), folder_of(study_file), make_console()
    choice = read_choice(choice_file) if choice_file else None
    if choice and not was_searched(study_file):
        full = transferred(config, folder, choice, executor, screen)
    else:
        study = opened(study_file)
        config, choice, full = (
            study.config,
            choice or picked_record(study, trial, rule, limits).chosen,
            full_of(study),
        )
    space = space_of(config)
    space.check_choice(choice)
    out, n_groups = out or run_folder(study_file, choice), len(space.groups)
    baseline = out if choice == full else run_folder(study_file, full)  # one for every pick of the study
    note = f"retraining {describe_choice(choice, n_groups)} beside {describe_choice(full, n_groups)}"
    if choice == full:
        note = f"the pick is full fine-tuning itself: retraining {describe_choice(full, n_groups)} alone"
    with Display(screen, 0, n_groups, 2, note) as display, retrain_logged(folder, config) as log:

        def show(event: Event) -> None:
            log(event)
            display.on_event(event)

        results = run_retraining(config, choice, full, folder, out, baseline, executor, show)
    rewards = {name: result["rewards"] for name, result in results.items()}
    rows = [("baseline", describe_choice(full, n_groups), rewards[BASELINE])]
    rows += [("pick", describe_choice(choice, n_groups), rewards["pick"])] if choice != full else []
    screen.print(RewardsTable(rows, "retrained on the full training set, scored on test data"))
    show_pairs({"baseline": baseline, "pick": out}, out / "pairs.png", rows, screen)
    screen.print(
        f"model: {shorten_path(out)} (memcontrol export {shorten_path(out)} OUT)",
        highlight=False,
        soft_wrap=True,
    )
    for line in (
        describe_gains(rewards[BASELINE], rewards["pick"], measure_differences(out, baseline))
        if choice != full
        else ()
    ):
        screen.print(line, highlight=False, soft_wrap=True)


def transferred(config: Config, folder: Path, choice, executor: Executor, screen):
    """Makes a study that was never searched ready for a choice from another one. Returns full fine-tuning to
    compare with."""
    from memcontrol.core.run_folder import refuse_results_among
    from memcontrol.execution.job_queue import JobQueue
    from memcontrol.search.locks import hold_folder_lock
    from memcontrol.search.orchestrator import run_preparation
    from memcontrol.view.live import Display

    space = space_of(config)
    space.check_choice(choice)
    refuse_results_among(config.data.path, folder)
    with (
        hold_folder_lock(folder),
        Display(
            screen, 0, len(space.groups), 2, "reading the images of a study that was not searched"
        ) as display,
    ):
        run_preparation(config, folder, JobQueue(executor, display.on_event))
    screen.print(
        "this study was not searched: full fine-tuning is at the middle of its learning rates",
        highlight=False,
        soft_wrap=True,
    )
    return space.anchors()["full"][1]


def was_searched(study_file: Path) -> bool:
    from memcontrol.study.store import is_searched

    return is_searched(config_of(study_file), folder_of(study_file), study_file)


def show_pairs(folders: dict[str, Path], path: Path, rows, screen) -> None:
    from memcontrol.commands.compare import load_nearest_pairs
    from memcontrol.trial.loaded import LoadedModels
    from memcontrol.trial.pictures import draw_pairs, save_png
    from memcontrol.view.live import shorten_path

    loaded = LoadedModels()
    strips = [
        load_nearest_pairs(
            folders[name],
            f"{name}: {text}: {rewards['copy_rate']:.1%} copied; nearest to a training image first",
            loaded,
        )
        for name, text, rewards in rows
    ]
    save_png(draw_pairs(strips), path)
    screen.print(
        f"images beside their nearest training images: {shorten_path(path)}", highlight=False, soft_wrap=True
    )


def read_choice(path: Path):
    from memcontrol.core.choice import Choice

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MemControlError(
            f"{path} cannot be read as JSON: {error}; give what `memcontrol pick --json` prints"
        ) from None
    values = values.get("choice", values) if isinstance(values, dict) else values
    if not isinstance(values, dict):
        raise MemControlError(f"{path} holds no choice; give what `memcontrol pick --json` prints")
    return Choice.from_dict(values)


def run_export(args: argparse.Namespace) -> int:
    from memcontrol.commands.export import describe_loading, export

    out = export(args.run_dir, args.out, args.format)
    sys.stdout.write(f"{out}\n")
    make_console().print(describe_loading(args.run_dir, out), highlight=False, soft_wrap=True)
    return 0


def run_audit(args: argparse.Namespace) -> int:
    from memcontrol.commands.audit import SAMPLING, Source, audit_source
    from memcontrol.view.audit_page import N_SHOWN, write_audit
    from memcontrol.view.live import Steps, shorten_path

    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    with Steps(make_console()) as steps:
        source = Source(args.images, args.train, args.holdout, args.model, args.skip_unreadable, sampling)
        found, generated, train = audit_source(source, args.extractor, steps.show, steps.warn)
        shown = [one["rows"] for one in found["copies"][:N_SHOWN]]
        write_audit(
            found, zip(generated.read([i for i, _ in shown]), train.read([i for _, i in shown])), args.out
        )
    if args.json:
        print_json(found)
    (sys.stderr if args.json else sys.stdout).write(f"{found['verdict']}\n")
    make_console().print(f"report: {shorten_path(args.out / 'audit.html')}", highlight=False, soft_wrap=True)
    return 0
