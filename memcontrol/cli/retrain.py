"""Owns `memcontrol retrain`: what it asks and prints."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memcontrol.cli.arguments import add_command, add_pick_arguments, add_study
from memcontrol.core.console import make_console, say
from memcontrol.core.errors import MemControlError

if TYPE_CHECKING:
    from memcontrol.commands.retrain import Retraining
    from memcontrol.core.choice import Choice
    from memcontrol.core.jobs import Event
    from memcontrol.execution.executor import Executor
    from memcontrol.study.place import StudyPlace

_Rows = list[tuple[str, str, dict[str, float]]]


def add_retrain(subparsers) -> None:
    text = "retrain a choice on the full training set, scored on test data beside full fine-tuning"
    retrain = add_command(subparsers, "retrain", _run_retrain, text)
    add_study(retrain)
    add_pick_arguments(retrain)
    retrain.add_argument(
        "--choice", type=Path, metavar="CHOICE.json", help="a choice from a file, as `pick --json` prints it"
    )
    retrain.add_argument(
        "--out", type=Path, help="run folder to write (default: retrain/KEY in the study's folder)"
    )


def _run_retrain(args: argparse.Namespace) -> int:
    from memcontrol.execution.make import open_executor
    from memcontrol.study.place import StudyPlace

    if args.choice and (args.trial is not None or args.rule or args.limit):
        raise MemControlError("--choice names the choice; --trial, --rule and --limit do not go with it")
    place = StudyPlace.load(args.study, name=args.name)
    with open_executor(place.config, place.folder.path, "retrain") as executor:
        if args.choice:
            plan = _plan_choice(place, _read_choice(args.choice), args.out, executor)
        else:
            plan = plan_pick(place, args.trial, args.rule, args.limit, args.out)
        show_retraining(plan, executor)
    return 0


def plan_pick(
    place: StudyPlace,
    trial: int | None = None,
    rule: str | None = None,
    limits: Sequence[str] = (),
    out: Path | None = None,
) -> Retraining:
    from memcontrol.commands.retrain import plan_retraining
    from memcontrol.study.pick import choose_record

    with contextlib.closing(place.open()) as study:
        choice = choose_record(study, trial, rule, limits).chosen
        return plan_retraining(place.folder, study, choice, out)


def _plan_choice(place: StudyPlace, choice: Choice, out: Path | None, executor: Executor) -> Retraining:
    """Of a choice from a file, which may be another study's; this one need not have been searched."""
    from memcontrol.commands.retrain import plan_retraining, plan_unsearched
    from memcontrol.view.live import Display

    if place.is_searched():
        with contextlib.closing(place.open()) as study:
            return plan_retraining(place.folder, study, choice, out)
    screen, n_groups = make_console(), len(place.space.groups)
    note = "reading the images of a study that was not searched"
    with Display(screen, 0, n_groups, 2, note) as display:
        plan = plan_unsearched(place, choice, out, executor, display.heard)
    if plan.full:
        say(screen, "this study was not searched: full fine-tuning is at the middle of its learning rates")
    return plan


def _read_choice(path: Path) -> Choice:
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


def show_retraining(plan: Retraining, executor: Executor) -> None:
    """Retrains, and shows what came of it: rewards, images, and the differences from full fine-tuning, where
    the study has it."""
    from memcontrol.view.tables import RewardsTable
    from memcontrol.view.words import describe_choice, describe_network_doubt

    space, screen = plan.space, make_console()
    space.check_choice(plan.choice)
    names = {name: describe_choice(choice, len(space.groups)) for name, choice in plan.choices.items()}
    if plan.alone:
        say(screen, plan.alone)
    rewards = _retrain_shown(plan, executor, names, len(space.groups), screen)
    wanted = ["baseline"] if plan.is_full else ["baseline", "pick"]
    rows: _Rows = [(name, names[name], rewards[name]) for name in wanted if name in names]
    screen.print(RewardsTable(rows, "retrained on the full training set, scored on test data"))
    if doubt := describe_network_doubt(plan.config.rewards.extractor, plan.config.data.path):
        say(screen, doubt)
    _show_pairs(plan, rows, screen)
    _show_gains(plan, rewards, screen)


def _retrain_shown(
    plan: Retraining, executor: Executor, names: dict[str, str], n_groups: int, screen
) -> dict[str, dict[str, float]]:
    """The rewards of the pick and of the baseline, if there is one, with a live display while they are
    trained."""
    from memcontrol.commands.retrain import log_retraining, run_retraining
    from memcontrol.view.live import Display

    note = f"retraining {' beside '.join(names.values())}"
    if plan.is_full:
        note = f"the pick is full fine-tuning itself: retraining {names['baseline']} alone"
    with Display(screen, 0, n_groups, 2, note) as display, log_retraining(plan) as log:

        def show(event: Event) -> None:
            log(event)
            display.heard(event)

        results = run_retraining(plan, executor, show)
    return {name: result["rewards"] for name, result in results.items()}


def _show_pairs(plan: Retraining, rows: _Rows, screen) -> None:
    from memcontrol.commands.compare import load_nearest_pairs
    from memcontrol.core.run_folder import RunFolder
    from memcontrol.trial.loaded import LoadedModels
    from memcontrol.trial.pictures import draw_pairs, save_png
    from memcontrol.view.live import shorten_path

    loaded, strips = LoadedModels(), []
    for name, text, rewards in rows:
        title = f"{name}: {text}: {rewards['copy_rate']:.1%} copied; nearest to a training image first"
        strips.append(load_nearest_pairs(plan.runs[name], title, loaded))
    path = RunFolder(plan.runs["pick"]).pairs_picture
    save_png(draw_pairs(strips), path)
    say(screen, f"images beside their nearest training images: {shorten_path(path)}")


def _show_gains(plan: Retraining, rewards: dict[str, dict[str, float]], screen) -> None:
    from memcontrol.commands.compare import measure_differences
    from memcontrol.view.live import shorten_path
    from memcontrol.view.tables import describe_gains

    own = plan.runs["pick"]
    say(screen, f"model: {shorten_path(own)} (memcontrol export {shorten_path(own)} OUT)")
    if plan.full and not plan.is_full:
        apart = measure_differences(own, plan.runs["baseline"])
        for line in describe_gains(rewards["baseline"], rewards["pick"], apart):
            say(screen, line)
