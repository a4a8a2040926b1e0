"""Search spaces: the grammar, its refusals, and choices."""

import re

import pytest
import yaml

from memcontrol.errors import MemControlError
from memcontrol.space import Choice, load_space, parse_space, shipped_spaces, space_as_dict, three_rates

GOOD = {"groups": {"a": r"a\..*", "b": [r"b\.x", r"b\.y"]}, "learning_rate": {"lora": [1e-4, 1e-2], "full": [1e-5, 1e-3]}}
NAMES = ["a.x", "a.y", "b.x", "b.y", "c"]


def refused(values, words):
    with pytest.raises(MemControlError, match=words):
        parse_space(values, "mine")


def test_patterns_match_whole_names():
    assert parse_space(GOOD, "mine").module_names(NAMES) == {"a": ["a.x", "a.y"], "b": ["b.x", "b.y"]}
    choice = Choice(("b",), "lora", 1e-3, 4)
    assert parse_space(GOOD, "mine").modules(NAMES, choice) == ["b.x", "b.y"]


def test_a_pattern_that_matches_nothing_and_a_shared_module_are_named():
    with pytest.raises(MemControlError, match=re.escape("pattern 'b\\.x' of group 'b' matches no")):
        parse_space(GOOD, "mine").module_names(["a.x", "b.y"])
    shared = {**GOOD, "groups": {"a": r"a\..*", "b": r".\.x"}}
    with pytest.raises(MemControlError, match="groups 'a' and 'b' share module 'a.x'"):
        parse_space(shared, "mine").module_names(NAMES)
    with pytest.raises(MemControlError, match="unknown group 'z'; space 'mine' has a, b"):
        parse_space(GOOD, "mine").modules(NAMES, Choice(("z",), "lora", 1e-3, 4))


def test_a_group_may_name_its_methods():
    values = {
        "groups": {"a": r"a\..*", "b": {"patterns": r"b\..", "methods": ["lora"]}}, "methods": ["lora", "attention"],
        "learning_rate": {"lora": [1e-4, 1e-2], "attention": [1e-5, 1e-3], "full": [1e-5, 1e-3]},
    }  # fmt: skip
    space = parse_space(values, "mine")
    assert space.groups_for("lora") == ("a", "b") and space.groups_for("attention") == ("a",)
    refused({**values, "groups": {"a": {"patterns": "a", "method": ["lora"]}}}, "allowed: patterns, methods")
    refused({**values, "groups": {"a": {"patterns": "a", "methods": ["full"]}}}, "methods is")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"colour": 1}, "unknown key 'colour'; allowed: description, groups"),
        ({"groups": {}}, "'groups' must map"),
        ({"groups": {"a": "("}}, "no regular expression"),
        ({"groups": {"a": 3}}, "group 'a' is 3"),
        ({"methods": ["dora"]}, "allowed: a list of lora, attention"),
        ({"learning_rate": {"lora": [1e-4, 1e-2]}}, "for each of lora, full"),
        ({"learning_rate": {"lora": [1e-2, 1e-4], "full": [1, 2]}}, "0 < low < high"),
        ({"rank": [0]}, "'rank' is"),
        ({"rank": 4}, "'rank' is 4"),
    ],
)
def test_mistakes_are_named(change, words):
    refused({**GOOD, **change}, words)


@pytest.mark.parametrize("name", shipped_spaces())
def test_shipped_spaces_fit_the_embedded_base(name, base):
    from memcontrol.adapters import adaptable_modules

    space = load_space(name)
    groups = space.module_names(adaptable_modules(base.denoiser))
    assert all(groups.values()) and parse_space(space_as_dict(space), name) == space
    assert yaml.safe_load(shipped_spaces()[name].read_text())["description"]


def test_sites_are_the_sixteen_of_stable_diffusion(base):
    from memcontrol.adapters import adaptable_modules

    groups = load_space("sd15-sites").module_names(adaptable_modules(base.denoiser))
    assert len(groups) == 16 and all(len(modules) == 8 for modules in groups.values())


def test_what_counts_as_the_same_choice():
    choice = Choice(("a", "b"), "lora", 1e-3, 4)
    assert choice.same_as(Choice(("b", "a"), "lora", 1.09e-3, 4))
    for other in (("a",), "lora", 1e-3, 4), (("a", "b"), "lora", 1.2e-3, 4), (("a", "b"), "lora", 1e-3, 2), (("a", "b"), "attention", 1e-3, None):
        assert not choice.same_as(Choice(*other))
    assert Choice((), "none", 0.0).same_as(Choice((), "none", 0.0))


def test_choices_survive_json_and_refuse_nonsense():
    choice = Choice(("a",), "lora", 1e-3, 4)
    assert Choice.from_dict(choice.as_dict()) == choice and Choice.from_dict(choice.as_dict()).key == choice.key
    for values, words in [
        ({"groups": []}, "not complete"),
        ({**choice.as_dict(), "method": "x"}, "unknown"),
        ({**choice.as_dict(), "rank": None}, "whole-number rank"),
        ({**choice.as_dict(), "extra": 1}, "not complete"),
    ]:
        with pytest.raises(MemControlError, match=words):
            Choice.from_dict(values)


def test_three_rates_are_the_middles_of_the_thirds():
    assert three_rates(1e-6, 1.0) == (1e-5, 1e-3, 1e-1)


def test_anchors():
    anchors = parse_space(GOOD, "mine").anchors()
    assert [choice.method for choice in anchors["none"]] == ["none"]
    assert {choice.groups for choice in anchors["all"]} == {("a", "b")} and len(anchors["all"]) == len(anchors["full"]) == 3
