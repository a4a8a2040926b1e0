"""Captions beyond what a text encoder reads are counted, with the limit and what becomes equal."""

import json

import numpy as np
from commands import run
from PIL import Image

from memcontrol.model.caption_length import describe_cut, find_limit, open_clip_tokenizer
from memcontrol.model.source import TINY, open_pipeline

LONG = " ".join(["finding"] * 40)


def test_cut_captions_are_those_that_the_base_encodes_alike():
    """Against the encodings themselves."""
    pipeline = open_pipeline("tiny")
    tokenizer, limit = find_limit(pipeline, None)
    captions = [f"{LONG} number {i}" for i in range(4)] + ["short"] * 3
    said = describe_cut(tokenizer, limit, captions)
    assert (
        said.startswith(f"4 of 7 captions are cut at {limit} tokens") and "3 that differ become equal" in said
    )
    first, second = (
        tokenizer(one, truncation=True, max_length=limit).input_ids for one in (captions[0], captions[3])
    )
    assert first == second and len(first) == limit == 32
    words = " ".join("abcdefgh"[i % 8] for i in range(limit - 2))  # with begin and end, the limit
    assert describe_cut(tokenizer, limit, [words]) == "" and describe_cut(tokenizer, limit, [f"{words} a"])
    assert open_clip_tokenizer(TINY).model_max_length == limit


def test_init_says_that_captions_are_cut(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(32):
        pixels = np.random.default_rng(i).integers(0, 255, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i:03}.png")
    rows = (json.dumps({"file_name": f"{i:03}.png", "text": f"{LONG} number {i}"}) for i in range(32))
    (images / "metadata.jsonl").write_text("\n".join(rows))
    done = run("init", images, cwd=tmp_path, check=True)
    assert "32 of 32 captions are cut at 32 tokens" in done.stderr
