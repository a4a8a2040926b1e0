"""Owns the generated parts of the pages: study keys, rewards, commands and functions as the code has them.

    python docs/generate.py            write the pages
    python docs/generate.py --check    name those that are not current, and exit 1

A page marks each generated part with two comments, `<!-- generated: NAME -->` and `<!-- end of generated
-->`; all else in it is written by hand.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

PAGES = Path(__file__).parent
WIDTH = 110  # columns of a generated line, whatever the terminal has
BEGIN, END = "<!-- generated: {} -->", "<!-- end of generated -->"
KINDS = {"string": "text", "boolean": "true or false", "array": "list", "object": "mapping"}
CHANGING = "Between two runs of one study these may change, with what is below them:"
GLUE = "\0"  # a space that no line is broken at


def generate_keys() -> str:
    """The keys of a study file, a section for each mapping, and those that may change once it was begun."""
    from memcontrol.config.differing import FREE_KEYS
    from memcontrol.config.inner import InnerConfig
    from memcontrol.config.study import Config

    sections = [describe_model(path, model) for path, model in walk_models(Config)]
    keys = (*FREE_KEYS, *(f"inner.{key}" for key in InnerConfig().memory_keys))
    free = ", ".join(f"`{key}`" for key in keys)
    but = "`inner.micro_batch_size` may not with `inner.norm_threshold: decile`, which looks at each forward."
    return join_blocks([*sections, "## What may change", wrap(f"{CHANGING} {free}. {but}")])


def walk_models(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """A config model and those that its fields hold, each with its dotted path."""
    yield path, model
    for name, field in model.model_fields.items():
        if held := find_model(field.annotation):
            yield from walk_models(held, join_keys(path, name))


def find_model(annotation: Any) -> type[BaseModel] | None:
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def join_keys(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def describe_model(path: str, model: type[BaseModel]) -> str:
    schema = model.model_json_schema()["properties"]
    introduction = inspect.cleandoc(model.__doc__ or "").partition("\n\n")[0]
    lines = [
        describe_key(join_keys(path, name), field, schema[name]) for name, field in model.model_fields.items()
    ]
    return join_blocks([f"## {path or 'The study'}", wrap(introduction), "\n".join(lines)])


def describe_key(key: str, field: Any, schema: dict[str, Any]) -> str:
    """A list's item: the key, its type, default and meaning. Ends the script where nothing says that."""
    if not field.description:
        sys.exit(f"{key} has no description; give its field one: Field(description=...)")
    inner = f"[its keys](#{key.replace('.', '')})" if find_model(field.annotation) else ""
    return describe_item(
        f"`{key}` ({inner or describe_type(schema)}; {describe_default(field)})", field.description
    )


def describe_type(schema: dict[str, Any]) -> str:
    """A JSON schema in words: "integer ≥ 1"."""
    if "anyOf" in schema:
        return " or ".join(describe_type(kind) for kind in schema["anyOf"] if kind.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = KINDS.get(schema["type"], schema["type"])
    return f"{kind} {describe_bounds(schema)}".rstrip()


def describe_bounds(schema: dict[str, Any]) -> str:
    """One bound as "> 0" or "≥ 1", both as an interval such as "in [0, 1)"; empty without any."""
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    start = f"[{low:g}" if low is not None else f"({above:g}" if above is not None else ""
    end = f"{high:g}]" if high is not None else f"{below:g})" if below is not None else ""
    if start and end:
        return f"in {start}, {end}"
    if start:
        return f"{'≥' if start[0] == '[' else '>'} {start[1:]}"
    return f"{'≤' if end[-1] == ']' else '<'} {end[:-1]}" if end else ""


def describe_default(field: Any) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "default none"
    if isinstance(default, BaseModel):
        return "each has a default"
    return f"default `{default if isinstance(default, str) else json.dumps(default)}`"


def generate_rewards() -> str:
    """What each reward says, then a table of direction, interval and cost."""
    from memcontrol.core.reward_table import REWARDS

    names = {name: f"`{name}`" + (" \\*" if info.objective else "") for name, info in REWARDS.items()}
    items = [describe_item(names[name], info.meaning) for name, info in REWARDS.items()]
    rows = [
        (names[name], info.title, info.direction, info.interval, info.cost) for name, info in REWARDS.items()
    ]
    table = write_table([("name", "in tables", "better", "interval", "cost"), *rows])
    return join_blocks(["\n".join(items), table])


def generate_extractors() -> str:
    """The feature networks that have a name."""
    from memcontrol.scoring.extractor_table import EXTRACTORS

    rows = [
        (
            f"`{name}{info.given}`",
            info.use,
            f"{info.n_features:,}",
            info.size,
            info.license,
            info.source,
            f"`{info.form}`" if info.form else "",
        )
        for name, info in EXTRACTORS.items()
    ]
    heads = ("name", "for", "features", "weights", "licence", "from", "stands for")
    return write_table([heads, *rows])


def write_table(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table, its headings being the first row."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def generate_commands() -> str:
    """Each command: what it does, how it is called, and its arguments."""
    from memcontrol.cli.parser import make_parser

    top = make_parser()
    common = [action for action in top._actions if action.option_strings]
    known = {action.dest for action in common}
    commands = walk_commands(top.prog, "", top)
    sections = [describe_command(name, text, parser, known) for name, text, parser in commands]
    return join_blocks([describe_arguments(top, common), *sections])


def walk_commands(
    name: str, text: str, parser: argparse.ArgumentParser
) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """The commands that do something, with what each does; one that only has others below it gives those."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield name, text, parser
    for action in nested:
        texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for word, inner in action.choices.items():
            yield from walk_commands(f"{name} {word}", texts[word], inner)


def describe_command(name: str, text: str, parser: argparse.ArgumentParser, known: set[str]) -> str:
    actions = [action for action in parser._actions if action.dest not in known]
    usage = wrap(" ".join([name, *write_usage(parser, actions)]), indent="    ")
    sentence = wrap(f"{text[:1].upper()}{text[1:]}.")
    return join_blocks(
        [f"## {name}", sentence, f"```text\n{usage}\n```", describe_arguments(parser, actions)]
    )


def write_usage(parser: argparse.ArgumentParser, actions: list[argparse.Action]) -> Iterator[str]:
    """What follows a command's name. Of those that exclude each other (a | b) one is needed, [a | b] none."""
    groups = parser._mutually_exclusive_groups
    group_by_dest = {action.dest: group for group in groups for action in group._group_actions}
    written: list[Any] = []
    for action in sorted(actions, key=lambda action: bool(action.option_strings)):
        group = group_by_dest.get(action.dest)
        if group is None:
            text = write_argument(action)
            yield glue(f"[{text}]" if action.option_strings else text)
        elif group not in written:
            written.append(group)
            text = " | ".join(write_argument(member) for member in group._group_actions)
            yield glue(f"({text})" if group.required else f"[{text}]")


def write_argument(action: argparse.Action) -> str:
    """An argument as it is typed: `--trials N`, `OUT`, `[key=value ...]`."""
    choices = "|".join(map(str, action.choices or ()))
    if action.option_strings:
        option, value = action.option_strings[-1], action.metavar or choices or action.dest.upper()
        return option if action.nargs == 0 else f"{option} {value}"
    value = str(action.metavar or choices or action.dest)
    return {"*": f"[{value} ...]", "?": f"[{value}]"}.get(str(action.nargs), value)


def describe_arguments(parser: argparse.ArgumentParser, actions: list[argparse.Action]) -> str:
    texts = {id(action): str(action.help) % {**vars(action), "prog": parser.prog} for action in actions}
    return "\n".join(describe_item(f"`{write_argument(action)}`", texts[id(action)]) for action in actions)


def generate_functions() -> str:
    """Each public function: its signature and docstring."""
    import memcontrol

    names = sorted(name for name in memcontrol.__all__ if inspect.isfunction(getattr(memcontrol, name)))
    return join_blocks(describe_function(name, getattr(memcontrol, name)) for name in names)


def describe_function(name: str, function: Callable) -> str:
    paragraphs = [wrap(paragraph) for paragraph in (inspect.getdoc(function) or "").split("\n\n")]
    return join_blocks([f"## {name}", f"```python\n{write_signature(name, function)}\n```", *paragraphs])


def write_signature(name: str, function: Callable) -> str:
    """As a `def`, on one line or with a line for each parameter."""
    signature = inspect.signature(function)
    parameters = write_parameters(signature.parameters.values())
    is_typed = signature.return_annotation is not inspect.Signature.empty
    returns = f" -> {write_annotation(signature.return_annotation)}" if is_typed else ""
    line = f"def {name}({', '.join(parameters)}){returns}: ..."
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"def {name}(", *(f"    {parameter}," for parameter in parameters), f"){returns}: ..."])


def write_parameters(parameters: Iterable[inspect.Parameter]) -> list[str]:
    written: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not any(text.startswith("*") for text in written):
            written.append("*")
        written.append(write_parameter(parameter))
    return written


def write_parameter(parameter: inspect.Parameter) -> str:
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
    text = f"{stars}{parameter.name}"
    if parameter.annotation is not parameter.empty:
        text += f": {write_annotation(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        is_text = isinstance(parameter.default, str)
        text += f" = {json.dumps(parameter.default) if is_text else repr(parameter.default)}"
    return text


def write_annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def describe_item(head: str, text: str) -> str:
    return wrap(f"- {head}: {text}", indent="  ")


def join_blocks(blocks: Iterable[str]) -> str:
    """Blocks of Markdown with an empty line between them, empty ones left out."""
    return "\n\n".join(block for block in blocks if block)


def wrap(text: str, indent: str = "") -> str:
    """Lines of WIDTH columns, `indent` before all but the first; none begins like an item of a list."""
    kept = re.sub(r" (?=([-+*>#=]|\d+\.) )", GLUE, text.replace("\n", " "))
    lines = textwrap.wrap(
        kept, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace(GLUE, " ")


def glue(text: str) -> str:
    """Words that `wrap` leaves on one line."""
    return text.replace(" ", GLUE)


PARTS: dict[str, dict[str, Callable[[], str]]] = {  # of each page: its parts' names, and what writes each
    "study-file.md": {"keys": generate_keys},
    "rewards.md": {"extractors": generate_extractors, "rewards": generate_rewards},
    "cli.md": {"commands": generate_commands},
    "python-api.md": {"functions": generate_functions},
}


def fill_page(page: Path) -> str:
    """The page's text, its parts written anew. Ends the script where the page does not mark one."""
    text = page.read_text(encoding="utf-8")
    for name, generate in PARTS[page.name].items():
        begin = BEGIN.format(name)
        before, begun, rest = text.partition(begin)
        _, ended, after = rest.partition(END)
        if not (begun and ended):
            sys.exit(f"docs/{page.name} lacks the lines '{begin}' and '{END}'")
        text = f"{before}{begin}\n\n{generate()}\n\n{END}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the generated parts of the pages.")
    parser.add_argument("--check", action="store_true", help="write nothing, name the pages that are stale")
    check = parser.parse_args().check
    texts = {page: fill_page(page) for page in (PAGES / name for name in PARTS)}
    stale = [page for page, text in texts.items() if text != page.read_text(encoding="utf-8")]
    for page in stale:
        if check:
            print(f"docs/{page.name} is not current; run python docs/generate.py")
        else:
            page.write_text(texts[page], encoding="utf-8")
            print(f"docs/{page.name} written")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
