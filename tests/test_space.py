"""Search spaces: the grammar, its refusals, and choices."""

import json
import random
import re

import pytest
import yaml

from memcontrol.core.choice import Choice, Setting
from memcontrol.core.errors import MemControlError
from memcontrol.core.space import interpolate_rate
from memcontrol.core.space_yaml import dump_space, list_shipped_spaces, load_space, parse_space

GOOD = {
    "groups": {"a": r"a\..*", "b": [r"b\.x", r"b\.y"]},
    "learning_rate": {"lora": [1e-4, 1e-2], "full": [1e-5, 1e-3]},
}
NAMES = ["a.x", "a.y", "b.x", "b.y", "c"]


def refused(values, words):
    with pytest.raises(MemControlError, match=words):
        parse_space(values, "mine")


def test_patterns_match_whole_names():
    assert parse_space(GOOD, "mine").match_modules(NAMES) == {"a": ["a.x", "a.y"], "b": ["b.x", "b.y"]}


def test_a_pattern_that_matches_nothing_and_a_shared_module_are_named():
    with pytest.raises(MemControlError, match=re.escape("pattern 'b\\.x' of group 'b' matches no")):
        parse_space(GOOD, "mine").match_modules(["a.x", "b.y"])
    shared = {**GOOD, "groups": {"a": r"a\..*", "b": r".\.x"}}
    with pytest.raises(MemControlError, match="groups 'a' and 'b' share module 'a.x'"):
        parse_space(shared, "mine").match_modules(NAMES)
    with pytest.raises(MemControlError, match="unknown group 'z'; space 'mine' has a, b"):
        parse_space(GOOD, "mine").check_choice(Choice(("z",), "lora", 1e-3, 4))


def test_a_group_may_name_its_methods():
    values = {
        "groups": {"a": r"a\..*", "b": {"patterns": r"b\..", "methods": ["lora"]}},
        "methods": ["lora", "attention"],
        "learning_rate": {"lora": [1e-4, 1e-2], "attention": [1e-5, 1e-3], "full": [1e-5, 1e-3]},
    }
    space = parse_space(values, "mine")
    assert space.select_groups("lora") == ("a", "b") and space.select_groups("attention") == ("a",)
    refused(
        {**values, "groups": {"a": {"patterns": "a", "method": ["lora"]}}},
        "allowed: patterns, methods, rank, alpha",
    )
    refused({**values, "groups": {"a": {"patterns": "a", "methods": ["full"]}}}, "'methods' is")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"colour": 1}, "unknown key 'colour'; allowed: description, groups"),
        ({"groups": {}}, "'groups' must map"),
        ({"groups": {"a": "("}}, "no regular expression"),
        ({"groups": {"a": 3}}, "group 'a' is 3"),
        ({"methods": ["vera"]}, "allowed: a list of lora, dora"),
        ({"learning_rate": {"lora": [1e-4, 1e-2]}}, "for each of lora, full"),
        ({"learning_rate": {"lora": [1e-2, 1e-4], "full": [1, 2]}}, "0 < low < high"),
        ({"rank": [0]}, "'rank' is"),
        ({"rank": 4}, "'rank' is 4"),
        ({"alpha": 0}, "'alpha' is 0"),
        ({"mix": "yes"}, "'mix' is 'yes'"),
        ({"always": [{"method": "lora", "patterns": "a"}]}, "'always': method is"),
        ({"always": {"method": "bias"}}, "allowed: a list of"),
        ({"groups": {"rank": "a"}}, "may not be called 'rank'"),
    ],
)
def test_mistakes_are_named(change, words):
    refused({**GOOD, **change}, words)


@pytest.mark.parametrize(
    "name", [name for name in list_shipped_spaces() if name.startswith(("digits", "sd15", "memcontrol"))]
)
def test_spaces_of_stable_diffusion_fit_the_embedded_base(name, base):
    from memcontrol.model.adapter import list_trainable_modules

    space = load_space(name)
    groups = space.match_modules(list_trainable_modules(base.denoiser))
    assert all(groups.values()) and parse_space(dump_space(space), name) == space
    assert yaml.safe_load(list_shipped_spaces()[name].read_text())["description"]


def test_sites_are_the_sixteen_of_stable_diffusion(base):
    from memcontrol.model.adapter import list_trainable_modules

    groups = load_space("sd15-sites").match_modules(list_trainable_modules(base.denoiser))
    assert len(groups) == 16 and all(len(modules) == 8 for modules in groups.values())


def test_what_counts_as_the_same_choice():
    choice = Choice(("a", "b"), "lora", 1e-3, 4)
    assert choice.is_same_as(Choice(("b", "a"), "lora", 1.09e-3, 4))
    for other in (
        (("a",), "lora", 1e-3, 4),
        (("a", "b"), "lora", 1.2e-3, 4),
        (("a", "b"), "lora", 1e-3, 2),
        (("a", "b"), "attention", 1e-3, None),
    ):
        assert not choice.is_same_as(Choice(*other))
    assert Choice((), "none", 0.0).is_same_as(Choice((), "none", 0.0))


def test_choices_survive_json_and_refuse_nonsense():
    choice = Choice(("a",), "lora", 1e-3, 4)
    assert (
        Choice.from_dict(choice.as_dict()) == choice and Choice.from_dict(choice.as_dict()).key == choice.key
    )
    for values, words in [
        ({"groups": []}, "not complete"),
        ({**choice.as_dict(), "method": "x"}, "unknown"),
        ({**choice.as_dict(), "rank": None}, "whole-number rank"),
        ({**choice.as_dict(), "extra": 1}, "not complete"),
    ]:
        with pytest.raises(MemControlError, match=words):
            Choice.from_dict(values)


def test_anchors_are_tried_at_the_middles_of_the_thirds():
    space = parse_space({**GOOD, "learning_rate": {"lora": [1e-6, 1.0], "full": [1e-6, 1.0]}}, "mine")
    for anchor in ("all", "full"):
        assert [choice.learning_rate for choice in space.list_anchors()[anchor]] == [1e-5, 1e-3, 1e-1]
    assert interpolate_rate((1e-4, 1e-2), 0.5) == 1e-3


def test_anchors():
    anchors = parse_space(GOOD, "mine").list_anchors()
    assert [choice.method for choice in anchors["none"]] == ["none"]
    assert {choice.groups for choice in anchors["all"]} == {("a", "b")} and len(anchors["all"]) == len(
        anchors["full"]
    ) == 3


MIXED = {
    "groups": {
        "a": "a",
        "b": {"patterns": "b", "methods": ["lora", "svdiff"], "rank": [8, 16], "alpha": 2},
        "c": {"patterns": "c", "methods": ["difffit"]},
    },
    "methods": ["lora", "svdiff", "difffit"],
    "mix": True,
    "always": [{"method": "bias", "patterns": "d"}],
    "rank": [2, 4],
    "learning_rate": {
        "lora": [1e-4, 1e-2],
        "svdiff": [1e-5, 1e-3],
        "difffit": [1e-3, 1e-1],
        "full": [1e-6, 1e-4],
    },
}


def test_a_mixed_choice_by_hand():
    space = parse_space(MIXED, "mixed")
    assert space.list_coordinates() == {
        "a": (False, True),
        "b": (False, True),
        "c": (False, True),
        "a.method": ("lora", "svdiff", "difffit"),
        "b.method": ("lora", "svdiff"),
        "rank": (2, 4),
        "b.rank": (8, 16),
    }
    choice = space.make_choice_at(
        {
            "a": True,
            "b": True,
            "c": True,
            "a.method": "svdiff",
            "b.method": "lora",
            "rank": 2,
            "b.rank": 16,
            "rate": 0.5,
        }
    )
    assert choice.methods == ("svdiff", "lora", "difffit")
    assert choice.setting("a") == Setting("svdiff", 1e-4) and choice.setting("b") == Setting("lora", 1e-3, 16)
    assert choice.setting("c") == Setting("difffit", 1e-2)
    other = space.make_choice_at(
        {
            "a": True,
            "b": True,
            "c": True,
            "a.method": "svdiff",
            "b.method": "lora",
            "rank": 4,
            "b.rank": 8,
            "rate": 0.5,
        }
    )
    assert not choice.is_same_as(other) and choice.is_same_as(choice)


@pytest.mark.parametrize("values", [GOOD, MIXED], ids=["uniform", "mixed"])
def test_a_thousand_random_choices_survive_json_and_the_samplers_coordinates(values):
    space, rng = parse_space(values, "mine"), random.Random(0)
    for _ in range(1000):
        point = {name: rng.choice(options) for name, options in space.list_coordinates().items()} | {
            "rate": rng.random()
        }
        choice = space.make_choice_at(point)
        assert Choice.from_dict(json.loads(json.dumps(choice.as_dict()))) == choice
        back = space.make_choice_at(space.find_point(choice))
        assert back.groups == choice.groups and back.is_same_as(choice)


def test_a_mask_with_no_group_on_is_a_choice():
    space = parse_space(MIXED, "mine")
    assert space.choice((), "lora", 0.5) == Choice((), "lora", 1e-3, 4)
