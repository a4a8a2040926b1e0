"""Owns how a wrong key of a study is said: which key, what was given, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

NAME_RULE = "use letters, digits, '.', '_' and '-', a letter or digit first, 100 at most"  # of study.NAME
_EXAMPLES = {
    "base": "{id: owner/name, revision: main}",
    "data": "{path: images}",
    "inner": "{budget_images: 20000}",
    "ensemble": "{shards: 4}",
    "skip": "{ratio: 2}",
    "redistribution": "{share: 0.25}",
    "augmentation": "{rule: zone}",
    "captions": "{replace: 0.1}",
    "privacy": "{epsilon: 8}",
    "rewards": "{objectives: [fid, memorization]}",
    "extraction": "{prompts: 16}",
    "search": "{trials: 20}",
    "early_stopping": "{rungs: [0.25, 0.5]}, or {} for all defaults",
    "ray": "{address: auto}",
    "slurm": "{gres: gpu:1}",
}


# by pydantic's type of a problem, what the value should be; in braces what its `ctx` tells
_SHOULD = {
    "bool_type": "be a valid boolean",
    "dict_type": "be a valid dictionary",
    "float_type": "be a valid number",
    "int_type": "be a valid integer",
    "string_type": "be a valid string",
    "literal_error": "be {expected}",
    "greater_than": "be greater than {gt:g}",
    "greater_than_equal": "be greater than or equal to {ge:g}",
    "less_than": "be less than {lt:g}",
    "less_than_equal": "be less than or equal to {le:g}",
}
# the same, where the sentence is not about the value
_WORDS = {
    "invalid_key": "keys should be strings",
    "string_pattern_mismatch": NAME_RULE,
    "string_too_short": "string should have at least {min_length} character",
    "too_short": "{owner} should have at least {min_length} item after validation, not {actual_length}",
    "tuple_type": "give a list, such as [a, b]",
}


@dataclass(frozen=True)
class Advice:
    """What to write instead. Where a key may be one of two types, each gives its own: the second follows an
    "or" and goes without the subject."""

    words: str
    subject: str = ""


def explain_problems(problems: Sequence[Mapping[str, Any]], model: type[BaseModel]) -> str:
    """What pydantic found wrong with a model's values: one sentence for each key; what a key of two types
    could be is joined by "or"."""
    sentences: dict[str, list[Advice]] = {}
    for problem in problems:
        found, advice = explain_problem(problem, model)
        sentences.setdefault(found, []).extend(advice)
    return "; ".join(_join_advice(found, advice) for found, advice in sentences.items())


def _join_advice(found: str, advice: Sequence[Advice]) -> str:
    if not advice:
        return found
    alternatives = ", or ".join(each.words for each in advice)
    return f"{found}; {advice[0].subject}{alternatives}"


def explain_problem(problem: Mapping[str, Any], model: type[BaseModel]) -> tuple[str, list[Advice]]:
    """The beginning of its sentence, which other problems of the same value share, and what it advises."""
    kind = problem["type"]
    if kind == "value_error":  # of a validator of ours, which says it all
        return str(problem["ctx"]["error"]), []
    if kind == "extra_forbidden":
        return _explain_unknown_key(problem["loc"], model)
    path = _find_known_path(problem["loc"], model)
    key = ".".join(path)
    if kind == "missing":
        return f"key '{key}' is missing", []
    return f"key '{key}' is {problem['input']!r}", [_advise(problem, path[-1])]


def _advise(problem: Mapping[str, Any], key: str) -> Advice:
    """What to write instead of a value; what the tables lack is said in pydantic's own words."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "model_type":
        return Advice(f"should be keys and values, such as {_EXAMPLES.get(key, '{}')}", "it ")
    if kind in _SHOULD:
        return Advice(f"should {_SHOULD[kind].format(**context)}", "it ")
    if kind in _WORDS:
        owner = context.get("field_type", "").lower()
        return Advice(_WORDS[kind].format(**context, owner=owner))
    return Advice(problem["msg"])


def _explain_unknown_key(place: Sequence[str | int], model: type[BaseModel]) -> tuple[str, list[Advice]]:
    """With the key that was probably meant: of the same name elsewhere, or nearly so among its neighbours."""
    key, last = ".".join(str(part) for part in place), str(place[-1])
    valid = list(_find_model(place[:-1], model).model_fields)
    before = key[: -len(last)]
    meant = [
        *(known for known in _list_places(model) if known.rpartition(".")[2] == last),
        *(before + name for name in difflib.get_close_matches(last, valid, 1)),
    ]
    hint = f"did you mean {meant[0]}? " if meant else ""
    return f"unknown key '{key}'", [Advice(f"{hint}allowed: {', '.join(valid)}")]


def _find_known_path(place: Sequence[str | int], model: type[BaseModel]) -> list[str]:
    """The keys of a place, without what pydantic adds: members of a union, items of a tuple, keys of a
    mapping."""
    known = {path.rpartition(".")[2] for path in _list_places(model)}
    return [str(part) for part in place if str(part) in known] or [str(place[0])]


def _list_places(model: type[BaseModel], before: str = "") -> Iterator[str]:
    """The dotted keys of a model and of all models inside it."""
    for name in model.model_fields:
        yield f"{before}{name}"
        if (inside := _find_model([name], model)) is not model:
            yield from _list_places(inside, f"{before}{name}.")


def _find_model(place: Sequence, model: type[BaseModel]) -> type[BaseModel]:
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
