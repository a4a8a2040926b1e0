"""Owns the parser of all commands, in the order in which people meet them; and the completion that shells
make of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from memcontrol.cli.arguments import OneLineParser, add_command, add_levels
from memcontrol.cli.audit import add_audit
from memcontrol.cli.choices import add_rewards, add_spaces
from memcontrol.cli.compare import add_compare
from memcontrol.cli.dashboard import add_dashboard
from memcontrol.cli.demo import add_demo
from memcontrol.cli.export import add_export, add_recipe
from memcontrol.cli.front import add_front
from memcontrol.cli.importance import add_importance
from memcontrol.cli.init import add_doctor, add_init
from memcontrol.cli.operate import add_clean, add_drop, add_enqueue, add_stop
from memcontrol.cli.pick import add_pick
from memcontrol.cli.report import add_report
from memcontrol.cli.retrain import add_retrain
from memcontrol.cli.search import add_fork, add_search
from memcontrol.cli.status import add_status, add_trials
from memcontrol.core.version import __version__


def _add_completion(subparsers) -> None:
    text = "print a script that lets a shell complete commands, options, spaces, rules and trials"
    completion = add_command(subparsers, "completion", _run_completion, text)
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="which shell")


_COMMANDS = (
    add_demo,
    add_init,
    add_doctor,
    add_search,
    add_fork,
    add_enqueue,
    add_drop,
    add_stop,
    add_status,
    add_trials,
    add_front,
    add_importance,
    add_pick,
    add_retrain,
    add_export,
    add_recipe,
    add_audit,
    add_dashboard,
    add_report,
    add_compare,
    add_clean,
    add_rewards,
    add_spaces,
    _add_completion,
)


def make_parser() -> argparse.ArgumentParser:
    top = OneLineParser(
        prog="memcontrol",
        description="Search which parameters of a diffusion model to fine-tune, so that quality stays and "
        "memorization goes.",
    )
    top.add_argument("--version", action="version", version=f"memcontrol {__version__}")
    add_levels(top)
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in _COMMANDS:
        add(subparsers)
    return top


def parse_arguments(top: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; overrides of a search may also stand after its options."""
    args, rest = top.parse_known_args()
    if rest and args.command == "search" and all("=" in text and not text.startswith("-") for text in rest):
        args.overrides += rest
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


# Numbers of the trials of the study that stands earlier on the line; a study that is not there has none.
_TRIAL_COMPLETERS = {
    "bash": """
_memcontrol_trials() {
  local word
  for word in "${COMP_WORDS[@]}"; do
    case "$word" in *.yaml|*.yml)
      compgen -W "$(memcontrol trials "$word" 2>/dev/null | sed -e 1d -e 's/,.*//')" -- "$1"
      return;;
    esac
  done
}
""",
    "zsh": """
_memcontrol_trials() {
  local study=${words[(r)*.(yaml|yml)]}
  [[ -n $study ]] && compadd -- $(memcontrol trials "$study" 2>/dev/null | sed -e 1d -e 's/,.*//')
}
""",
}


def _run_completion(args: argparse.Namespace) -> int:
    import shtab

    from memcontrol.core.space_yaml import list_shipped_spaces
    from memcontrol.study.pareto import RULES

    top, spaces = make_parser(), list(list_shipped_spaces())
    completers = {  # by what help calls an argument, of an option by its name
        "trial": {**dict.fromkeys(_TRIAL_COMPLETERS, "_memcontrol_trials"), "preamble": _TRIAL_COMPLETERS},
        "study": shtab.glob("*.yaml", "*.yml"),
        "rule": _complete_words("rules", RULES),
        "NAME": _complete_words("spaces", ["auto", *spaces]),
        "NAME_OR_FILE": _complete_words("spaces_or_files", spaces, files=True),
    }
    for action in _list_actions(top):
        called = action.dest if action.option_strings or action.dest == "study" else str(action.metavar)
        found = completers.get(called)
        if found or action.type is Path:
            action.complete = found or shtab.FILE  # type: ignore[attr-defined]  # where shtab looks for it
    sys.stdout.write(shtab.complete(top, args.shell))
    return 0


def _complete_words(name: str, words: Sequence[str], files: bool = False) -> dict[str, object]:
    """What shtab takes for an argument that is one of these words, or perhaps a file."""
    function, listed = f"_memcontrol_{name}", " ".join(words)
    lines = {
        "bash": [f'compgen -W "{listed}" -- "$1"', *(['compgen -f -- "$1"'] if files else [])],
        "zsh": [f"compadd -- {listed}", *(["_files"] if files else [])],
    }
    preamble = {shell: f"{function}() {{\n  {'; '.join(body)}\n}}\n" for shell, body in lines.items()}
    return {"bash": function, "zsh": function, "tcsh": f"({listed})", "preamble": preamble}


def _list_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _list_actions(inner)
