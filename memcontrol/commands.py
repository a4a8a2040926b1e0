"""Owns what each command does: call, print. What they import, they import when they run: --help must be instant."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memcontrol.errors import MemControlError

if TYPE_CHECKING:
    from memcontrol.config import Config
    from memcontrol.executors import Executor


SAMPLING = {"samples": 256, "attacked": 0, "steps": 20, "guidance": 1.0, "seed": 0}  # of an audited pipeline
ONCE = (
    "warning: some of these were measured once only, as the search chose them, and may look better than they are; the end of the search "
    "measures them again"
)


def console():
    from rich.console import Console

    width = None if sys.stderr.isatty() or "COLUMNS" in os.environ else 150
    return Console(stderr=True, width=width)


def out_json(value: object) -> None:
    json.dump(value, sys.stdout, indent=1, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


def opened(study_file: Path):
    """The study as it was searched: its stored config counts, not later edits of the file. (study, folder)."""
    from memcontrol.config import load_config, study_folder
    from memcontrol.study import open_study

    config = load_config(study_file)
    folder = study_folder(study_file, config.name)
    return open_study(config, folder, study_file, create=False), folder


def run_demo(args: argparse.Namespace) -> int:
    from memcontrol.config import load_config, study_folder
    from memcontrol.demo import write_study

    study_file = write_study(args.out, args.seed, args.trials, args.workers)
    config = load_config(study_file)
    with workers(config, study_folder(study_file, config.name)) as executor:  # the same for both parts: the base stays loaded
        search_and_show(study_file, config, executor)
        retrain_and_show(study_file, executor)
    return 0


@contextlib.contextmanager
def workers(config: Config, folder: Path):
    """The config's executor, ended at once when the block is left."""
    from memcontrol.executors import make_executor

    executor = make_executor(config, folder)
    try:
        yield executor
    finally:
        executor.close()


def run_search(args: argparse.Namespace) -> int:
    options = {"search.trials": args.trials, "search.workers": args.workers, "search.executor": args.executor}
    overrides = [*args.overrides, *(f"{key}={value}" for key, value in options.items() if value is not None)]
    from memcontrol.config import load_config, study_folder

    config = load_config(args.study, overrides)
    if args.dry_run:
        import yaml

        from memcontrol.database import checked, shown
        from memcontrol.space import load_space

        load_space(config.space)
        storage = {"storage": shown(checked(config.storage))} if config.storage else {}
        yaml.safe_dump({**config.model_dump(mode="json"), **storage}, sys.stdout, sort_keys=False, allow_unicode=True)
        return 0
    with workers(config, study_folder(args.study, config.name)) as executor:
        search_and_show(args.study, config, executor)
    return 0


def search_and_show(study_file: Path, config: Config, executor: Executor) -> None:
    from memcontrol.config import study_folder
    from memcontrol.display import Display
    from memcontrol.orchestrate import search
    from memcontrol.space import load_space

    screen, folder, n_groups = console(), study_folder(study_file, config.name), len(load_space(config.space).groups)
    with Display(screen, config.search.trials, n_groups, config.search.workers) as display:
        search(config, study_file, folder, executor, display.on_event, display.on_study)
    show_search(study_file, screen)


def show_search(study_file: Path, screen) -> None:
    from memcontrol.display import cheap_line, relative, study_table
    from memcontrol.pick import finished, pick
    from memcontrol.pictures import front_picture
    from memcontrol.space import load_space

    study, folder = opened(study_file)
    complete = finished(study.records())
    picked = pick(complete, wanted=study.limits) if any(record.anchor != "none" for record in complete) else None
    warn_of_full(picked, screen)
    warn_of_limits(study, picked, screen)
    screen.print(study_table(complete, len(load_space(study.config.space).groups), "trials", picked))
    if len(study.config.rewards.objectives) > 1:
        front_picture(complete, picked, folder / "front.png", study.config.name)
        screen.print(f"front: {relative(folder / 'front.png')}", highlight=False, soft_wrap=True)
    if line := cheap_line(complete):
        screen.print(line, highlight=False, soft_wrap=True)


def warn_of_limits(study, picked, screen) -> None:
    """A limit that no trial keeps does not bind, and must not seem to."""
    from memcontrol.figures import written
    from memcontrol.pick import kept

    if picked and not kept(picked, study.limits):
        bounds = ", ".join(f"{limit.reward}{limit.sign}{limit.bound:g} (the pick has {written(limit.reward, picked.rewards) or 'none'})" for limit in study.limits)
        screen.print(f"warning: no trial keeps the study's limits, {bounds}; the pick leaves them aside", style="yellow", highlight=False, soft_wrap=True)


def warn_of_full(picked, screen) -> None:
    """A pick that is the baseline itself must not pass for a mask."""
    if picked and picked.anchor == "full":
        screen.print(
            "warning: no mask comes within 5 % of full fine-tuning's first objective, so the pick is full fine-tuning itself; "
            'search on with more trials, or bound its copying: memcontrol pick ... --limit "copy_rate_low<=0.01"',
            style="yellow", highlight=False, soft_wrap=True,
        )  # fmt: skip


def run_status(args: argparse.Namespace) -> int:
    from memcontrol.display import said_of, study_table
    from memcontrol.orchestrate import is_searching
    from memcontrol.space import load_space
    from memcontrol.watch import pace, runs_of, said_of_run

    study, folder = opened(args.study)
    records, n_groups, searching = study.records(), len(load_space(study.config.space).groups), is_searching(folder, study.url, study.config.name)
    runs, speed = {record.number: runs_of(record, folder) for record in records}, pace(records, config_of(args.study))
    if args.json:
        trials = [record.as_dict(folder) | {"runs": runs[record.number]} for record in records]
        out_json({"study": study.config.name, "searching": searching, **speed, "hypervolume": hypervolume_of(study), "trials": trials})
        return 0
    said = {"COMPLETE": "complete", "RUNNING": "running" if searching else "interrupted", "PRUNED": "pruned", "FAIL": "failed"}
    for state, word in said.items():
        sys.stdout.write(f"{word}: {sum(record.state == state for record in records)}\n")
    if grown := hypervolume_of(study):
        point = ", ".join(f"{name} {value:.4g}" for name, value in grown["reference"].items())
        sys.stdout.write(f"hypervolume: {grown['value']:.4g} ± {grown['error']:.2g}, from {point}\n")
    if searching and speed:
        sys.stdout.write(f"about {speed['runs_per_hour']:.0f} runs an hour, about {speed['minutes_left']:.1f} minutes left\n")
    for record in records:
        if record.reason:
            sys.stdout.write(f"trial {record.number} {said[record.state]}: {record.reason}\n")
        if record.state == "RUNNING":
            goes_on = "" if searching else " (the next search goes on with it)"
            sys.stdout.write(f"trial {record.number} {said['RUNNING']} ({record.anchor or 'sampled'}){goes_on}\n")
            for choice, run in zip(record.candidates, runs[record.number]):
                sys.stdout.write(f"  {said_of(choice, n_groups)}: {'' if searching else 'was: '}{said_of_run(run, folder.is_dir())}\n")
    printed(study_table(records, n_groups, f"{study.config.name}: finished trials"))
    return 0


def hypervolume_of(study) -> dict | None:
    """Value, error and reference point; None before the anchors have ended, whose worst values it is measured from."""
    from memcontrol.growth import grown, reference_of

    records = study.records()
    reference = study.attributes.get("reference") or reference_of(records)
    if reference is None:
        return None
    found, signs = grown(records, reference), {name: -1 if direction == "maximize" else 1 for name, direction in study.objectives.items()}
    return {"value": float(found), "error": found.error, "reference": {name: sign * value for (name, sign), value in zip(signs.items(), reference)}}


def run_importance(args: argparse.Namespace) -> int:
    from memcontrol.display import importance_table
    from memcontrol.importance import importance
    from memcontrol.space import load_space

    study, _ = opened(args.study)
    effects = importance(study.records(), load_space(study.config.space))
    if args.json:
        out_json([effect.as_dict() for effect in effects])
    else:
        printed(importance_table(effects, study.config.name))
    return 0


def printed(table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 150).print(table)


def run_front(args: argparse.Namespace) -> int:
    from memcontrol.display import study_table
    from memcontrol.pick import finished, front_of, ties_of, to_confirm
    from memcontrol.space import load_space

    study, folder = opened(args.study)
    complete = finished(study.records())
    records = front_of(complete)
    if args.json:
        out_json([record.as_dict(folder) for record in records])
        return 0
    shown = records + [record for record in ties_of(complete) if record not in records]
    printed(study_table(shown, len(load_space(study.config.space).groups), f"{study.config.name}: front", None, complete))
    if study.config.rewards.confirm and to_confirm(complete):
        console().print(ONCE, style="yellow", highlight=False, soft_wrap=True)
    return 0


def picked_record(study, trial: int | None, rule: str | None, limits: Sequence[str]):
    from memcontrol.pick import by_number, finished, pick

    if trial is not None:
        if rule or limits:
            raise MemControlError("--trial names one trial; --rule and --limit do not go with it")
        return by_number(finished(study.records()), trial)
    return pick(study.records(), rule or "knee", limits, study.limits)


def run_pick(args: argparse.Namespace) -> int:
    from memcontrol.display import study_table
    from memcontrol.space import load_space

    study, folder = opened(args.study)
    record = picked_record(study, args.trial, args.rule, args.limit)
    if args.json:
        out_json(record.as_dict(folder))
    else:
        printed(study_table([record], len(load_space(study.config.space).groups), f"{study.config.name}: pick", record, study.records()))
        if args.trial is None:
            warn_of_full(record, console())
            warn_of_limits(study, record, console())
        sys.stdout.write(f"groups: {', '.join(record.choice.groups) or '-'}\nrun: {folder / record.choice.key}\n")
    return 0


def run_retrain(args: argparse.Namespace) -> int:
    if args.choice and (args.trial is not None or args.rule or args.limit):
        raise MemControlError("--choice names the choice; --trial, --rule and --limit do not go with it")
    with workers(config_of(args.study), folder_of(args.study)) as executor:
        retrain_and_show(args.study, executor, args.trial, args.rule, args.limit, args.choice, args.out)
    return 0


def retrain_and_show(
    study_file: Path, executor: Executor, trial: int | None = None, rule: str | None = None, limits: Sequence[str] = (),
    choice_file: Path | None = None, out: Path | None = None,
) -> None:  # fmt: skip
    from memcontrol.compare import differences
    from memcontrol.display import Display, gain_lines, relative, rewards_table, said_of
    from memcontrol.retrain import BASELINE, retrain

    config, folder, screen = config_of(study_file), folder_of(study_file), console()
    choice = read_choice(choice_file) if choice_file else None
    if choice and not searched(study_file):
        full = transferred(config, folder, choice, executor, screen)
    else:
        study, _ = opened(study_file)
        config, choice = study.config, choice or picked_record(study, trial, rule, limits).choice
        full = next((record.choice for record in study.records() if record.anchor == "full" and record.finished), None)
    if full is None:
        raise MemControlError("the anchor 'full' has not finished, so there is no baseline to compare with; let the search run on")
    space = space_of(config)
    space.check_choice(choice)
    out, n_groups = out or folder / "retrain" / choice.key, len(space.groups)
    baseline = out if choice == full else folder / "retrain" / full.key  # one for every pick of the study
    note = f"retraining {said_of(choice, n_groups)} beside {said_of(full, n_groups)}"
    if choice == full:
        note = f"the pick is full fine-tuning itself: retraining {said_of(full, n_groups)} alone"
    with Display(screen, 0, n_groups, 2, note) as display:
        results = retrain(config, choice, full, folder, out, baseline, executor, display.on_event)
    rewards = {name: result["rewards"] for name, result in results.items()}
    rows = [("baseline", said_of(full, n_groups), rewards[BASELINE]), ("pick", said_of(choice, n_groups), rewards["pick"])]
    screen.print(rewards_table(rows, "retrained on the full training set, scored on test data"))
    show_pairs({"baseline": baseline, "pick": out}, out / "pairs.png", rows, screen)
    screen.print(f"model: {relative(out)} (memcontrol export {relative(out)} OUT)", highlight=False, soft_wrap=True)
    apart = differences(out, baseline) if choice != full else {}
    for line in gain_lines(rewards[BASELINE], rewards["pick"], apart):
        screen.print(line, highlight=False, soft_wrap=True)


def transferred(config: Config, folder: Path, choice, executor: Executor, screen):
    """Makes a study that was never searched ready for a choice from another one. Returns full fine-tuning to compare with."""
    from memcontrol.display import Display
    from memcontrol.jobs import Jobs
    from memcontrol.orchestrate import only_one, prepared

    space = space_of(config)
    space.check_choice(choice)
    with only_one(folder), Display(screen, 0, len(space.groups), 2, "reading the images of a study that was not searched") as display:
        prepared(config, folder, Jobs(executor, display.on_event))
    screen.print("this study was not searched: full fine-tuning is at the middle of its learning rates", highlight=False, soft_wrap=True)
    return space.anchors()["full"][1]


def config_of(study_file: Path) -> Config:
    from memcontrol.config import load_config

    return load_config(study_file)


def folder_of(study_file: Path) -> Path:
    from memcontrol.config import study_folder

    return study_folder(study_file, config_of(study_file).name)


def space_of(config: Config):
    from memcontrol.space import load_space

    return load_space(config.space)


def searched(study_file: Path) -> bool:
    from memcontrol.study import is_searched

    return is_searched(config_of(study_file), folder_of(study_file), study_file)


def show_pairs(folders: dict[str, Path], path: Path, rows, screen) -> None:
    from memcontrol.bench import Bench
    from memcontrol.compare import nearest_pairs
    from memcontrol.display import relative
    from memcontrol.pictures import pairs_picture

    bench = Bench()
    strips = [
        nearest_pairs(folders[name], f"{name}: {text}: {rewards['copy_rate']:.1%} copied; nearest to a training image first", bench)
        for name, text, rewards in rows
    ]
    pairs_picture(strips, path)
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
    from memcontrol.export import export, how_to_load

    out = export(args.run_dir, args.out, args.format)
    sys.stdout.write(f"{out}\n")
    console().print(how_to_load(args.run_dir, out), highlight=False, soft_wrap=True)
    return 0


def run_audit(args: argparse.Namespace) -> int:
    from memcontrol.audit import audit, folder_pictures, pictures_of, sampled_pictures, samples_of, write_report
    from memcontrol.display import Steps, relative
    from memcontrol.spec import SPEC

    run = Path(args.model) if args.model and (Path(args.model) / SPEC).is_file() else None
    if not run and not (args.train and args.holdout):
        raise MemControlError("audit compares with training and held-out images; give --train DIR and --holdout DIR")
    sampling = {name: getattr(args, name) for name in ("samples", "attacked", "steps", "guidance", "seed") if getattr(args, name) is not None}
    if sampling and (run or args.images):
        given = ", ".join(f"--{name}" for name in sampling)
        raise MemControlError(f"{given} say how a pipeline is sampled, and these images are there already; leave them out, or give --model a pipeline")
    with Steps(console()) as steps:
        parts = {name: folder_pictures(name, folder, steps.warn, args.skip_unreadable) for name, folder in (("train", args.train), ("holdout", args.holdout)) if folder}
        if run:
            from memcontrol.bench import Bench
            from memcontrol.scoring import read_samples
            from memcontrol.spec import read_spec

            spec, bench = read_spec(run), Bench()
            own = {"train": bench.train_images(spec), "holdout": bench.parts(spec)[spec.reference]}
            parts = {name: parts.get(name) or pictures_of(name, images) for name, images in own.items()}
            samples = read_samples(run)
            generated, attack = sampled_pictures(samples["images"]), samples.get("extraction")
        elif args.images:
            generated, attack = folder_pictures("generated", args.images, steps.warn, args.skip_unreadable), None
        else:
            from memcontrol.data import read_captions

            captions = sorted(read_captions(args.train).values())
            generated, attack = samples_of(args.model, captions, **{**SAMPLING, **sampling}, progress=steps.show)
        found = audit(generated, parts["train"], parts["holdout"], args.extractor, steps.show, attack)
        write_report(found, generated, parts["train"], args.out)
    if args.json:
        out_json(found)
    (sys.stderr if args.json else sys.stdout).write(f"{found['verdict']}\n")
    screen = console()
    screen.print(f"report: {relative(args.out / 'audit.html')}", highlight=False, soft_wrap=True)
    return 0


def run_compare(args: argparse.Namespace) -> int:
    from memcontrol.compare import differences, finished_result
    from memcontrol.display import differences_table

    apart = differences(args.run_a, args.run_b)
    first, second = (finished_result(run)["rewards"] for run in (args.run_a, args.run_b))
    if args.json:
        out_json({
            name: {"first": first[name], "second": second[name], "difference": float(value), "error": value.error, "low": value.low, "high": value.high}
            for name, value in apart.items()
        })  # fmt: skip
    else:
        printed(differences_table(apart, first, second, f"{args.run_a} (first) and {args.run_b} (second)"))
    return 0


def run_rewards(args: argparse.Namespace) -> int:
    from memcontrol.display import figures_table
    from memcontrol.figures import FIGURES

    if args.json:
        from dataclasses import asdict

        out_json({name: asdict(figure) for name, figure in FIGURES.items()})
    else:
        printed(figures_table())
    return 0


def run_spaces(args: argparse.Namespace) -> int:
    from memcontrol.space import load_space, shipped_spaces

    if args.action == "list":
        for name in shipped_spaces():
            space = load_space(name)
            sys.stdout.write(f"{name:26} {len(space.groups):3} groups  {space.description}\n")
        return 0
    if args.action == "show":
        sys.stdout.write(shown_space(args.name, args.base))
        return 0
    from memcontrol.cost import survey
    from memcontrol.models import empty_denoiser

    found = survey(empty_denoiser(args.base), load_space(args.name))
    if args.json:
        out_json(found)
    else:
        print_survey(found)
    return 0


def shown_space(name: str, base: str) -> str:
    from memcontrol.space import shipped_spaces

    if name == "auto":
        from memcontrol.derive import derived_space
        from memcontrol.models import empty_denoiser

        return derived_space(empty_denoiser(base), base)
    if name not in shipped_spaces():
        raise MemControlError(f"space '{name}' is not shipped; shipped are {', '.join(shipped_spaces())}; 'auto' derives one from --base")
    return shipped_spaces()[name].read_text(encoding="utf-8")


def print_survey(found: dict) -> None:
    write, total = sys.stdout.write, found["total"]
    for group in found["groups"]:
        parts = ", ".join(f"{method} {n:,} ({n / total:.4%})" for method, n in group["parameters"].items())
        write(f"{group['name']:24} {len(group['modules']):4} modules  {parts}\n")
        write("".join(f"    {name}\n" for name in group["modules"]))
    write(f"{total:,} parameters in all\n")
    for method, counts in found["methods"].items():
        cost = counts["cost"]
        write(f"{method:12} all groups on {counts['all_on']:13,} ({counts['all_on'] / total:8.4%})   off {counts['all_off']:13,}")
        write(f"   {figure(cost['step_gflops'])} GFLOP and {figure(cost['memory_mib'])} MiB for a step of one image\n" if cost else "\n")


def figure(value: float) -> str:
    """Three digits of what is small, no decimals of what is large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
