"""Owns how a wrong key of a study is said: which key, what was given, what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

NAME_RULE = "use letters, digits, '.', '_' and '-', a letter or digit first"  # of config.NAME
EXAMPLES = {
    "data": "{path: images}",
    "inner": "{budget_images: 20000}",
    "ensemble": "{shards: 4}",
    "skip": "{ratio: 2}",
    "redistribution": "{share: 0.25}",
    "augmentation": "{rule: zone}",
    "captions": "{replace: 0.1}",
    "rewards": "{objectives: [fid, memorization]}",
    "extraction": "{prompts: 16}",
    "search": "{trials: 20}",
    "early_stopping": "{rungs: [0.25, 0.5]}, or {} for all defaults",
    "ray": "{address: auto}",
    "slurm": "{gres: gpu:1}",
}


def explain_problems(problems: Sequence[Mapping[str, Any]], model: type[BaseModel]) -> str:
    """What pydantic found wrong with a model's values: one sentence for each key; what a key of two types
    could be is joined by "or"."""
    found: dict[str, str] = {}
    for said in (explain_problem(problem, model) for problem in problems):
        key = said.partition(";")[0]
        found[key] = (
            f"{found[key]}, or{said.partition(';')[2].removeprefix(' it')}"
            if key in found and key != said
            else said
        )
    return "; ".join(found.values())


def explain_problem(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    if problem["type"] == "value_error":  # of a validator of ours, which says it all
        return problem["msg"].removeprefix("Value error, ")
    known = {place.rpartition(".")[2] for place in list_places(model)}
    path = [str(part) for part in problem["loc"] if str(part) in known] or [str(problem["loc"][0])]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        key = ".".join(str(part) for part in problem["loc"])
        valid = list(find_model(problem["loc"][:-1], model).model_fields)
        last, before = str(problem["loc"][-1]), key[: -len(str(problem["loc"][-1]))]
        meant = [
            *(place for place in list_places(model) if place.rpartition(".")[2] == last),
            *(before + name for name in difflib.get_close_matches(last, valid, 1)),
        ]
        return (
            f"unknown key '{key}'; {f'did you mean {meant[0]}? ' if meant else ''}allowed: {', '.join(valid)}"
        )
    if problem["type"] == "missing":
        return f"key '{key}' is missing"
    if problem["type"] == "string_pattern_mismatch":
        return f"key '{key}' is {problem['input']!r}; {NAME_RULE}"
    wanted = (
        problem["msg"]
        .replace("Input should be a valid tuple", "give a list, such as [fid, memorization]")
        .replace("Input should", "it should")
    )
    wanted = re.sub(
        r"a valid dictionary or instance of \w+",
        "keys and values, such as " + EXAMPLES.get(path[-1], "{}"),
        wanted,
    )
    return f"key '{key}' is {problem['input']!r}; {wanted[0].lower()}{wanted[1:]}"


def list_places(model: type[BaseModel], before: str = "") -> Iterator[str]:
    """The dotted keys of a model and of all models inside it."""
    for name in model.model_fields:
        yield f"{before}{name}"
        if (inside := find_model([name], model)) is not model:
            yield from list_places(inside, f"{before}{name}.")


def find_model(place: Sequence, model: type[BaseModel]) -> type[BaseModel]:
    """The model of the keys at a place, such as ("inner", "skip"); a key that has none leaves it as it is."""
    for part in place:
        inner = model.model_fields[part].annotation
        model = next(
            (
                kind
                for kind in (inner, *get_args(inner))
                if isinstance(kind, type) and issubclass(kind, BaseModel)
            ),
            model,
        )
    return model
