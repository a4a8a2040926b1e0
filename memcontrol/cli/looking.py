"""Owns the commands that only look: status, front, pick, importance, compare, rewards, spaces. What they
import, they import when they run: --help must be instant."""

from __future__ import annotations

import argparse
import sys

from memcontrol.commands.api import config_of, dashboard_of, folder_of, opened, picked_record, report
from memcontrol.core.console import make_console, print_json
from memcontrol.core.errors import MemControlError

N_WARNINGS = 12
ONCE = (
    "warning: some of these were measured once only, as the search chose them, and may look better "
    "than they are; the end of the search "
    "measures them again"
)


def printed(table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(table)


def run_status(args: argparse.Namespace) -> int:
    from memcontrol.core.space_yaml import load_space
    from memcontrol.search.locks import is_searching
    from memcontrol.study.running import describe_run, estimate_pace, list_runs
    from memcontrol.view.report_data import summarize_hypervolume
    from memcontrol.view.tables import make_study_table
    from memcontrol.view.words import describe_choice

    study, folder = opened(args.study), folder_of(args.study)
    records, n_groups, searching = (
        study.records(),
        len(load_space(study.config.space).groups),
        is_searching(folder, study.url, study.config.name),
    )
    runs, speed = (
        {record.number: list_runs(record, folder) for record in records},
        estimate_pace(records, config_of(args.study)),
    )
    flat = is_over(study, config_of(args.study).search.stop_when_flat)
    if flat:
        speed |= {"minutes_left": 0.0}
    if args.json:
        trials = [record.as_dict() | {"runs": runs[record.number]} for record in records]
        print_json(
            {
                "study": study.config.name,
                "searching": searching,
                "flat": flat,
                **speed,
                "hypervolume": summarize_hypervolume(study),
                "trials": trials,
            }
        )
        return 0
    said = {
        "COMPLETE": "complete",
        "RUNNING": "running" if searching else "interrupted",
        "PRUNED": "pruned",
        "FAIL": "failed",
    }
    for state, word in said.items():
        sys.stdout.write(f"{word}: {sum(record.state == state for record in records)}\n")
    if grown := summarize_hypervolume(study):
        point = ", ".join(f"{name} {value:.4g}" for name, value in grown["reference"].items())
        sys.stdout.write(f"hypervolume: {grown['value']:.4g} ± {grown['error']:.2g}, from {point}\n")
    if flat:
        sys.stdout.write(
            "the hypervolume has not grown beyond its noise, which ends the search (search.stop_when_flat)\n"
        )
    elif searching and speed:
        sys.stdout.write(
            f"about {speed['runs_per_hour']:.0f} runs an hour, about {speed['minutes_left']:.1f} "
            "minutes left\n"
        )
    for record in records:
        if record.reason:
            sys.stdout.write(f"trial {record.number} {said[record.state]}: {record.reason}\n")
        if record.state == "RUNNING":
            goes_on = "" if searching else " (the next search goes on with it)"
            sys.stdout.write(
                f"trial {record.number} {said['RUNNING']} ({record.anchor or 'sampled'}){goes_on}\n"
            )
            for choice, run in zip(record.candidates, runs[record.number]):
                sys.stdout.write(
                    f"  {describe_choice(choice, n_groups)}: "
                    f"{'' if searching else 'was: '}{describe_run(run, folder.is_dir())}\n"
                )
    printed(make_study_table(records, n_groups, f"{study.config.name}: finished trials"))
    return 0


def is_over(study, n: int | None) -> bool:
    """Whether search.stop_when_flat ends it."""
    from memcontrol.study.hypervolume import is_flat

    reference = study.attributes.get("reference")
    return bool(n and reference and is_flat(study.records(), reference, n))


def run_importance(args: argparse.Namespace) -> int:
    from memcontrol.core.space_yaml import load_space
    from memcontrol.search.importance import measure_importance
    from memcontrol.view.tables import make_importance_table

    study = opened(args.study)
    effects = measure_importance(study.records(), load_space(study.config.space))
    if args.json:
        print_json([effect.as_dict() for effect in effects])
    else:
        printed(make_importance_table(effects, study.config.name))
    return 0


def run_front(args: argparse.Namespace) -> int:
    from memcontrol.core.space_yaml import load_space
    from memcontrol.study.pick import require_finished, select_front, select_ties, select_to_confirm
    from memcontrol.view.tables import describe_spread, make_study_table

    study = opened(args.study)
    complete = require_finished(study.records())
    records = select_front(complete)
    if args.json:
        print_json([record.as_dict() for record in records])
        return 0
    shown = records + [record for record in select_ties(complete) if record not in records]
    printed(
        make_study_table(
            shown, len(load_space(study.config.space).groups), f"{study.config.name}: front", None, complete
        )
    )
    if said := describe_spread(complete):
        make_console().print(said, highlight=False, soft_wrap=True)
    if study.config.rewards.confirm and select_to_confirm(complete):
        make_console().print(ONCE, style="yellow", highlight=False, soft_wrap=True)
    return 0


def run_pick(args: argparse.Namespace) -> int:
    from memcontrol.core.space_yaml import load_space
    from memcontrol.view.tables import make_study_table

    study = opened(args.study)
    record = picked_record(study, args.trial, args.rule, args.limit)
    if args.json:
        print_json(record.as_dict())
    else:
        printed(
            make_study_table(
                [record],
                len(load_space(study.config.space).groups),
                f"{study.config.name}: pick",
                record,
                study.records(),
            )
        )
        if args.trial is None:
            warn_of_full(record, make_console())
            warn_of_limits(study, record, make_console())
        sys.stdout.write(f"groups: {', '.join(record.chosen.groups) or '-'}\nrun: {record.run}\n")
    return 0


def warn_of_limits(study, picked, screen) -> None:
    """A limit that no trial keeps does not bind, and must not seem to."""
    from memcontrol.core.reward_table import format_reward
    from memcontrol.study.pick import keeps_limits

    if picked and not keeps_limits(picked, study.limits):
        bounds = ", ".join(
            f"{limit.reward}{limit.sign}{limit.bound:g} (the pick has "
            f"{format_reward(limit.reward, picked.rewards) or 'none'})"
            for limit in study.limits
        )
        screen.print(
            f"warning: no trial keeps the study's limits, {bounds}; the pick leaves them aside",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )


def warn_of_full(picked, screen) -> None:
    """A pick that is the baseline itself must not pass for a mask."""
    if picked and picked.anchor == "full":
        screen.print(
            "warning: no mask on the front comes within 5 % of full fine-tuning's first objective, "
            "so the pick is full fine-tuning itself; search on "
            "with more trials, or pick one that `memcontrol front` lists: memcontrol pick ... "
            "--trial N",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )


def run_compare(args: argparse.Namespace) -> int:
    from memcontrol.commands.compare import measure_differences, read_finished_result
    from memcontrol.view.tables import make_differences_table

    apart = measure_differences(args.run_a, args.run_b)
    first, second = (read_finished_result(run)["rewards"] for run in (args.run_a, args.run_b))
    if args.json:
        print_json(
            {
                name: {
                    "first": first[name],
                    "second": second[name],
                    "difference": float(value),
                    "error": value.error,
                    "low": value.low,
                    "high": value.high,
                }
                for name, value in apart.items()
            }
        )
    else:
        printed(
            make_differences_table(apart, first, second, f"{args.run_a} (first) and {args.run_b} (second)")
        )
    return 0


def run_rewards(args: argparse.Namespace) -> int:
    from memcontrol.core.reward_table import REWARDS
    from memcontrol.view.tables import make_rewards_table

    if args.json:
        from dataclasses import asdict

        print_json({name: asdict(figure) for name, figure in REWARDS.items()})
    else:
        printed(make_rewards_table())
    return 0


def run_init(args: argparse.Namespace) -> int:
    from memcontrol.commands.init import list_warnings, propose_study
    from memcontrol.view.live import Steps, shorten_path

    screen = make_console()
    with Steps(screen) as steps:
        proposal = propose_study(args.images, args.out, args.name, args.base, steps.show)
    screen.print(proposal.text, highlight=False, soft_wrap=True, markup=False)
    said = list_warnings(proposal.seen)
    for warning in said[:N_WARNINGS]:
        screen.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    if len(said) > N_WARNINGS:
        screen.print(f"warning: and {len(said) - N_WARNINGS} more of the kind", style="yellow")
    screen.print(f"next: memcontrol search {shorten_path(proposal.path)}", highlight=False, soft_wrap=True)
    sys.stdout.write(f"{proposal.path}\n")
    return 0


def run_report(args: argparse.Namespace) -> int:
    from memcontrol.view.report_data import format_csv

    if not (args.out or args.csv or args.json):
        raise MemControlError("report writes a page or prints data; give OUT.html, --csv or --json")
    facts = report(args.study, args.out, images=not args.without_images)
    if args.out:
        make_console().print(f"report: {args.out}", highlight=False, soft_wrap=True)
    if args.csv:
        sys.stdout.write(format_csv(facts))
    if args.json:
        print_json(facts)
    return 0


def run_dashboard(args: argparse.Namespace) -> int:
    server, address = dashboard_of(args.study, args.storage, args.host, args.port, args.token, args.writable)
    said = "anyone who has the address may change and delete studies" if args.writable else "read-only"
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()
    make_console().print(f"{said}; Ctrl-C ends it", highlight=False, soft_wrap=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0
    finally:
        server.server_close()
    return 0


def run_spaces(args: argparse.Namespace) -> int:
    from memcontrol.core.space_yaml import list_shipped_spaces, load_space

    if args.action == "list":
        for name in list_shipped_spaces():
            space = load_space(name)
            sys.stdout.write(f"{name:26} {len(space.groups):3} groups  {space.description}\n")
        return 0
    if args.action == "show":
        sys.stdout.write(shown_space(args.name, args.base))
        return 0
    from memcontrol.model.base import make_empty_denoiser
    from memcontrol.model.cost import survey_space

    found = survey_space(make_empty_denoiser(args.base), load_space(args.name))
    if args.json:
        print_json(found)
    else:
        print_survey(found)
    return 0


def shown_space(name: str, base: str) -> str:
    from memcontrol.core.space_yaml import list_shipped_spaces

    if name == "auto":
        from memcontrol.model.base import make_empty_denoiser
        from memcontrol.model.derive_space import derive_space

        return derive_space(make_empty_denoiser(base), base)
    if name not in list_shipped_spaces():
        raise MemControlError(
            f"space '{name}' is not shipped; shipped are {', '.join(list_shipped_spaces())}; 'auto' "
            "derives one from --base"
        )
    return list_shipped_spaces()[name].read_text(encoding="utf-8")


def print_survey(found: dict) -> None:
    write, total = sys.stdout.write, found["total"]
    for group in found["groups"]:
        parts = ", ".join(f"{method} {n:,} ({n / total:.4%})" for method, n in group["parameters"].items())
        write(f"{group['name']:24} {len(group['modules']):4} modules  {parts}\n")
        write("".join(f"    {name}\n" for name in group["modules"]))
    write(f"{total:,} parameters in all\n")
    for method, counts in found["methods"].items():
        cost = counts["cost"]
        write(
            f"{method:12} all groups on {counts['all_on']:13,} ({counts['all_on'] / total:8.4%})   "
            f"off {counts['all_off']:13,}"
        )
        write(
            f"   {figure(cost['step_gflops'])} GFLOP and {figure(cost['memory_mib'])} MiB for a "
            "step of one image\n"
            if cost
            else "\n"
        )


def figure(value: float) -> str:
    """Three digits of what is small, no decimals of what is large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
