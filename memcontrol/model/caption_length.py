"""Owns how many tokens of a caption a base reads, and which captions are cut."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_WORDS_ANYWAY = 16  # captions of fewer words are cut by no text encoder


def is_long(caption: str) -> bool:
    """Whether a text encoder might cut it."""
    return len(caption.split()) >= _WORDS_ANYWAY


def describe_cut(tokenizer: Any, limit: int, captions: Sequence[str]) -> str:
    """What is lost of captions beyond `limit` tokens, in a sentence; empty where nothing is."""
    different = [one for one in dict.fromkeys(captions) if is_long(one)]
    if not different:
        return ""
    tokens = [tuple(ids) for ids in tokenizer(different, truncation=False, verbose=False).input_ids]
    cut = {one for one, ids in zip(different, tokens) if len(ids) > limit}
    if not cut:
        return ""
    n_cut, longest = sum(one in cut for one in captions), max(map(len, tokens))
    # the last token is the end's, which is put in again
    n_equal = len(different) - len({ids[: limit - 1] for ids in tokens})
    equal = f"; {n_equal} that differ become equal to another" if n_equal else ""
    return (
        f"{n_cut} of {len(captions)} captions are cut at {limit} tokens, all that the base reads; the "
        f"longest has {longest}{equal}"
    )


def find_limit(pipeline: Any, length: int | None) -> tuple[Any, int] | None:
    """The tokenizer that reads most of a caption, and how many tokens that are: `length` of them, where the
    pipeline lets that be chosen. None where there are no captions."""
    found = [one for name, one in sorted(pipeline.components.items()) if name.startswith("tokenizer") and one]
    if not found:
        return None
    chosen = inspect.signature(type(pipeline).encode_prompt).parameters.get("max_sequence_length")
    return (found[-1], length or chosen.default) if chosen else (found[0], found[0].model_max_length)


def open_clip_tokenizer(folder: Path) -> Any | None:
    """Of a pipeline on disk whose captions are read by CLIP alone; None of another."""
    kinds = [path.name for path in folder.glob("tokenizer*") if path.is_dir()]
    if not set(kinds) <= {"tokenizer", "tokenizer_2"} or (folder / "transformer").is_dir():
        return None
    if "tokenizer" not in kinds:
        return None
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder / "tokenizer")
