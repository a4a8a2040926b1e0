"""Owns the commands that work: demo, search, retrain, export, audit. What they import, they import when they run: --help must be instant."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memcontrol.api import (
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
from memcontrol.errors import MemControlError
from memcontrol.looking import warn_of_full, warn_of_limits
from memcontrol.saying import console, out_json

if TYPE_CHECKING:
    from memcontrol.config import Config
    from memcontrol.executors import Event, Executor
    from memcontrol.study import Study


def run_demo(args: argparse.Namespace) -> int:
    from memcontrol.config import load_config, study_folder
    from memcontrol.demo import write_study

    study_file = write_study(args.out, args.seed, args.trials, args.workers)
    config = load_config(study_file)
    with executor_of(config, study_folder(study_file, config.name)) as executor:  # the same for both parts: the base stays loaded
        search_and_show(study_file, config, executor)
        retrain_and_show(study_file, executor)
    return 0


def run_search(args: argparse.Namespace) -> int:
    from memcontrol.config import load_config, study_folder

    config = load_config(args.study, overridden(args.overrides, args.trials, args.workers, args.executor))
    if args.dry_run:
        import yaml

        from memcontrol.database import checked, shown
        from memcontrol.space import load_space

        load_space(config.space)
        storage = {"storage": shown(checked(config.storage))} if config.storage else {}
        yaml.safe_dump({**config.model_dump(mode="json"), **storage}, sys.stdout, sort_keys=False, allow_unicode=True)
        sys.stdout.flush()
        print_prediction(config, study_folder(args.study, config.name))
        return 0
    with executor_of(config, study_folder(args.study, config.name)) as executor:
        search_and_show(args.study, config, executor)
    console().print(f"next: memcontrol retrain {args.study} (the pick, on test images); look: dashboard, report", highlight=False, soft_wrap=True)
    return 0


def print_prediction(config: Config, folder: Path) -> None:
    """As comments: what is printed stays YAML."""
    from memcontrol.display import Steps
    from memcontrol.jobs import Jobs
    from memcontrol.predict import calibrations_of, lines_of, predicted

    with executor_of(config, folder) as executor, Steps(console()) as steps:

        def show(event: Event) -> None:
            if event.kind == "progress":
                steps.show("calibrating with short trials", event.detail["done"], event.detail["total"])

        found = predicted(config, space_of(config).anchors(), calibrations_of(config, folder, Jobs(executor, show)))
    for line in lines_of(found):
        sys.stdout.write(f"# {line}\n")


def search_and_show(study_file: Path, config: Config, executor: Executor) -> None:
    searched(study_file, config, executor)
    show_search(opened_as(config, study_file), console())


def show_search(study: Study, screen) -> None:
    from memcontrol.display import relative
    from memcontrol.picking import finished
    from memcontrol.pictures import front_picture
    from memcontrol.publish import picked_of
    from memcontrol.space import load_space
    from memcontrol.tables import cheap_line, spread_line, study_table

    complete = finished(study.records())
    picked = picked_of(complete, study)
    warn_of_full(picked, screen)
    warn_of_limits(study, picked, screen)
    screen.print(study_table(complete, len(load_space(study.config.space).groups), "trials", picked))
    if len(study.config.rewards.objectives) > 1:
        front_picture(complete, picked, study.folder / "front.png", study.config.name)
        screen.print(f"front: {relative(study.folder / 'front.png')}", highlight=False, soft_wrap=True)
    for line in filter(None, (spread_line(complete), cheap_line(complete))):
        screen.print(line, highlight=False, soft_wrap=True)


def run_retrain(args: argparse.Namespace) -> int:
    if args.choice and (args.trial is not None or args.rule or args.limit):
        raise MemControlError("--choice names the choice; --trial, --rule and --limit do not go with it")
    with executor_of(config_of(args.study), folder_of(args.study)) as executor:
        retrain_and_show(args.study, executor, args.trial, args.rule, args.limit, args.choice, args.out)
    return 0


def retrain_and_show(
    study_file: Path, executor: Executor, trial: int | None = None, rule: str | None = None, limits: Sequence[str] = (),
    choice_file: Path | None = None, out: Path | None = None,
) -> None:  # fmt: skip
    from memcontrol.comparing import differences
    from memcontrol.display import Display, relative
    from memcontrol.notes import said_of
    from memcontrol.retraining import BASELINE, retrain
    from memcontrol.tables import RewardsTable, gain_lines

    config, folder, screen = config_of(study_file), folder_of(study_file), console()
    choice = read_choice(choice_file) if choice_file else None
    if choice and not was_searched(study_file):
        full = transferred(config, folder, choice, executor, screen)
    else:
        study = opened(study_file)
        config, choice, full = study.config, choice or picked_record(study, trial, rule, limits).chosen, full_of(study)
    space = space_of(config)
    space.check_choice(choice)
    out, n_groups = out or run_folder(study_file, choice), len(space.groups)
    baseline = out if choice == full else run_folder(study_file, full)  # one for every pick of the study
    note = f"retraining {said_of(choice, n_groups)} beside {said_of(full, n_groups)}"
    if choice == full:
        note = f"the pick is full fine-tuning itself: retraining {said_of(full, n_groups)} alone"
    with Display(screen, 0, n_groups, 2, note) as display, retrain_logged(folder, config) as log:

        def show(event: Event) -> None:
            log(event)
            display.on_event(event)

        results = retrain(config, choice, full, folder, out, baseline, executor, show)
    rewards = {name: result["rewards"] for name, result in results.items()}
    rows = [("baseline", said_of(full, n_groups), rewards[BASELINE])]
    rows += [("pick", said_of(choice, n_groups), rewards["pick"])] if choice != full else []
    screen.print(RewardsTable(rows, "retrained on the full training set, scored on test data"))
    show_pairs({"baseline": baseline, "pick": out}, out / "pairs.png", rows, screen)
    screen.print(f"model: {relative(out)} (memcontrol export {relative(out)} OUT)", highlight=False, soft_wrap=True)
    for line in gain_lines(rewards[BASELINE], rewards["pick"], differences(out, baseline)) if choice != full else ():
        screen.print(line, highlight=False, soft_wrap=True)


def transferred(config: Config, folder: Path, choice, executor: Executor, screen):
    """Makes a study that was never searched ready for a choice from another one. Returns full fine-tuning to compare with."""
    from memcontrol.data import refuse_results_among
    from memcontrol.display import Display
    from memcontrol.jobs import Jobs
    from memcontrol.orchestrate import only_one, prepared

    space = space_of(config)
    space.check_choice(choice)
    refuse_results_among(config.data.path, folder)
    with only_one(folder), Display(screen, 0, len(space.groups), 2, "reading the images of a study that was not searched") as display:
        prepared(config, folder, Jobs(executor, display.on_event))
    screen.print("this study was not searched: full fine-tuning is at the middle of its learning rates", highlight=False, soft_wrap=True)
    return space.anchors()["full"][1]


def was_searched(study_file: Path) -> bool:
    from memcontrol.study import is_searched

    return is_searched(config_of(study_file), folder_of(study_file), study_file)


def show_pairs(folders: dict[str, Path], path: Path, rows, screen) -> None:
    from memcontrol.bench import Bench
    from memcontrol.comparing import nearest_pairs
    from memcontrol.display import relative
    from memcontrol.gallery import pairs_picture, save

    bench = Bench()
    strips = [
        nearest_pairs(folders[name], f"{name}: {text}: {rewards['copy_rate']:.1%} copied; nearest to a training image first", bench)
        for name, text, rewards in rows
    ]
    save(pairs_picture(strips), path)
    screen.print(f"images beside their nearest training images: {relative(path)}", highlight=False, soft_wrap=True)


def read_choice(path: Path):
    from memcontrol.space import Choice

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MemControlError(f"{path} cannot be read as JSON: {error}; give what `memcontrol pick --json` prints") from None
    values = values.get("choice", values) if isinstance(values, dict) else values
    if not isinstance(values, dict):
        raise MemControlError(f"{path} holds no choice; give what `memcontrol pick --json` prints")
    return Choice.from_dict(values)


def run_export(args: argparse.Namespace) -> int:
    from memcontrol.exporting import export, how_to_load

    out = export(args.run_dir, args.out, args.format)
    sys.stdout.write(f"{out}\n")
    console().print(how_to_load(args.run_dir, out), highlight=False, soft_wrap=True)
    return 0


def run_audit(args: argparse.Namespace) -> int:
    from memcontrol.auditing import SAMPLING, Source, audit_of, write_audit
    from memcontrol.display import Steps, relative

    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    with Steps(console()) as steps:
        source = Source(args.images, args.train, args.holdout, args.model, args.skip_unreadable, sampling)
        found, generated, train = audit_of(source, args.extractor, steps.show, steps.warn)
        write_audit(found, generated, train, args.out)
    if args.json:
        out_json(found)
    (sys.stderr if args.json else sys.stdout).write(f"{found['verdict']}\n")
    console().print(f"report: {relative(args.out / 'audit.html')}", highlight=False, soft_wrap=True)
    return 0
