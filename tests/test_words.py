"""What is said in the same words wherever it is said."""

import json
from pathlib import Path

import pytest

from memcontrol.core.choice import EVERYTHING, Choice, Setting
from memcontrol.core.reward_table import BLIND_SPOTS, REWARDS
from memcontrol.view.words import (
    describe_choice,
    describe_copied,
    find_title,
    format_markdown_table,
    format_p,
    name_groups,
    write_verdict,
)

CLEAN = {
    "clear_copy_rate": 0.0,
    "copy_rate": 0.02,
    "copy_rate_low": 0.01,
    "copy_rate_high": 0.034,
    "copy_rate_line": 0.011,
    "copy_rate_p": 0.5,
    "memorization": 0.04,
    "memorization_error": 0.02,
    "memorization_p": 0.3,
}


def test_title_is_the_rewards_own_or_the_name_of_a_users():
    assert find_title("fid") == REWARDS["fid"].title != "fid"
    assert find_title("my_reward") == "my_reward"


@pytest.mark.parametrize(
    "choice, words",
    [
        (Choice((), "none", 0.0), "no training"),
        (Choice(("a", "b"), "lora", 3e-3, 4), "lora r4, lr 0.003, 2/7 groups"),
        (Choice(("a",), "attention", 1e-5), "attention, lr 1e-05, 1/7 groups"),
        (Choice((EVERYTHING,), "full", 1e-3), "full, lr 0.001"),
        (
            Choice(("a", "b"), "lora", 1e-3, 4, per_group=(("b", Setting("svdiff", 1e-3)),)),
            "lora+svdiff r4, lr 0.001, 2/7 groups",
        ),
    ],
)
def test_choice_in_a_few_words(choice, words):
    assert describe_choice(choice, 7) == words


def test_groups_are_named_or_what_stands_for_them():
    assert name_groups((EVERYTHING,), "none") == "the whole denoiser"
    assert name_groups(("a", "b"), "none") == "a, b" and name_groups((), "none") == "none"


def test_table_in_markdown_keeps_its_columns():
    assert format_markdown_table(["a", "b"], [["1", "x|y"]]) == "| a | b |\n| --- | --- |\n| 1 | x/y |"


def test_p_is_not_said_finer_than_it_is_known():
    assert [format_p(p) for p in (0.5, 0.001, 0.0009)] == ["= 0.500", "= 0.001", "< 0.001"]


@pytest.mark.parametrize(
    "told, begins",
    [
        ({}, "No copying is visible at this sample size: 2.0% of 500 images (1.0% to 3.4%)"),
        (
            {"memorization_p": 0.004},
            "The images lean towards the training set, without copies that stand out",
        ),
        ({"copy_rate_p": 0.0001}, "Copying is visible: 2.0% of 500 images"),
        (
            {"clear_copy_rate": 0.006},
            "Copying is visible: 3 of 500 images are far nearer to a training image",
        ),
        ({"clear_copy_rate": 0.006, "copy_rate_p": 0.0001}, "Copying is visible: 3 of 500 images"),
    ],
)
def test_verdict_says_the_strongest_thing_that_is_sure(told, begins):
    assert write_verdict({**CLEAN, **told}, 500).startswith(begins)


def test_verdict_ends_with_both_measures_and_their_errors():
    said = write_verdict(CLEAN, 500)
    assert "where 1.1% is expected without copying, p = 0.500;" in said
    assert "memorization distance 0.040 ± 0.020 of at most" in said and said.endswith("p = 0.300.")


def test_copies_are_counted_by_training_image_and_by_person():
    assert describe_copied({}) == describe_copied({"copied_images": 0, "copied_groups": 0}) == ""
    said = describe_copied({"copied_images": 3, "copied_groups": 3})
    assert said.endswith("are nearest to 3 training images.")
    said = describe_copied({"copied_images": 12, "copied_groups": 5})
    assert said.endswith("are nearest to 12 training images, of 5 groups (people, or twins).")


def test_what_is_not_seen_is_what_the_benchmark_found():
    """Kinds of copies of which less than a third is found on photographs are named where it is said what is
    not seen; of those that are half found, fewer than three quarters are."""
    said = " ".join(BLIND_SPOTS)
    latest = max((Path(__file__).parent.parent / "benchmarks" / "results").glob("*-copies-cpu.json"))
    rows = json.loads(latest.read_text())["rows"]
    found = {
        row["what"]: row["found"] for row in rows if row["images"] == "photographs" and row["found"] != ""
    }
    words = {
        "inverted": "inverted",
        "a patch of 6%": "a sixteenth",
        "a patch of 25%, elsewhere": "elsewhere",
    }
    assert {kind for kind, share in found.items() if share < 1 / 3} == set(words)
    assert all(word in said for word in words.values())
    half = {"cropped to 75 %": "cropped to 75 %", "blended, 50 %": "half and half"}
    assert {kind for kind, share in found.items() if 1 / 3 <= share < 2 / 3} == set(half)
    assert all(word in said for word in half.values())
