"""Settings that choices have of their own: what may be searched over, and the config under a choice."""

import hashlib
import json
import random

import numpy as np
import pytest

from memcontrol.config.load import load_config
from memcontrol.config.settings import configure_choice, is_allowed, load_study_space
from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.space_yaml import dump_space, parse_space
from memcontrol.search.encoding import SpaceEncoding
from memcontrol.view.words import describe_choice

OVER = {
    "inner.budget_images": {"low": 1000, "high": 20000, "log": True},
    "inner.skip": [None, {}],
    "inner.skip.ratio": {"low": 1.1, "high": 3, "steps": 4},
    "inner.ensemble.shards": [1, 4, 8],
    "inner.ema": [None, 0.999],
}


def make_config(over=None, inner=None, **search):
    values = {"name": "a", "data": "digits", "space": "digits", "inner": inner or {}}
    return load_config({**values, "search": {**search, "over": OVER if over is None else over}})


def test_a_range_is_a_grid_of_equal_steps():
    space = load_study_space(make_config())
    budgets = space.over["inner.budget_images"].options
    assert budgets == tuple(np.geomspace(1000, 20000, 21).round().astype(int).tolist())
    assert space.over["inner.skip.ratio"].options == (1.1, 1.58, 2.05, 2.52, 3)


def test_a_choice_without_settings_keeps_its_name():
    choice = Choice(("up_attention",), "lora", 1e-3, 4)
    told = {"groups": ["up_attention"], "learning_rate": 1e-3, "method": "lora", "rank": 4}
    assert choice.as_dict() == told
    assert choice.key == hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def test_points_choices_and_rows_are_each_others_inverse():
    space = load_study_space(make_config(strengths=[0.5, 0.75]))
    coordinates, rng, encoding = space.list_coordinates(), random.Random(0), SpaceEncoding(space)
    for _ in range(200):
        point = {name: rng.choice(options) for name, options in coordinates.items()} | {"rate": rng.random()}
        choice = space.make_choice_at(point)
        settings = dict(choice.settings)
        assert ("inner.skip.ratio" in settings) == (settings["inner.skip"] is not None)
        assert space.make_choice_at(space.find_point(choice)).settings == choice.settings
        assert Choice.from_dict(json.loads(json.dumps(choice.as_dict()))) == choice
        for own in (choice, *space.list_variants(choice)):
            assert encoding.choice(encoding.row(own)).settings == own.settings
            assert encoding.holds(own)
    assert parse_space(dump_space(space), space.name).over.keys() == OVER.keys()


def test_the_config_under_a_choice_is_that_of_the_same_overrides():
    config = make_config(inner={"budget_images": 5000})
    settings = {"inner.budget_images": 1234, "inner.skip": {}, "inner.skip.ratio": 1.58, "inner.ema": 0.999}
    choice = Choice.from_dict({**Choice(("*",), "full", 1e-3).as_dict(), "settings": settings})
    found = configure_choice(config, choice)
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    plain = {"name": "a", "data": "digits", "space": "digits"}
    assert found.inner == load_config(plain, overrides).inner
    assert configure_choice(config, choice.trained) == found and config.inner.budget_images == 5000
    assert describe_choice(choice, 1).endswith("budget_images 1234, ema 0.999, skip on, ratio 1.58")


def test_settings_that_do_not_go_together_are_no_choice():
    config = make_config({"inner.ensemble.shards": [1, 8], "inner.budget_images": [32, 3200]})

    def make(shards, budget):
        settings = {"inner.ensemble.shards": shards, "inner.budget_images": budget}
        return Choice(("*",), "full", 1e-3).with_settings(settings)

    assert is_allowed(config, make(8, 3200)) and is_allowed(config, make(1, 32))
    assert not is_allowed(config, make(8, 32))  # two steps for forty rounds of shards


def test_variants_are_all_that_needs_no_training():
    over = {"rewards.guidance": [1, 2]}
    space = load_study_space(make_config(over, strengths=[0.5], checkpoints=[0.2, 1]))
    choice = Choice(("up_attention",), "lora", 1e-3, 4)
    found = space.list_variants(choice)
    assert len(found) == len(set(found)) == 2 * 2 * 2 - 1 and choice not in found
    assert {one.trained for one in found} == {choice} and all(one.is_variant for one in found)
    assert {one.strength for one in found} == {1.0, 0.5} and {one.checkpoint for one in found} == {1.0, 0.2}
    assert space.list_variants(Choice((), "none", 0.0)) == []


def test_each_proposal_is_judged_by_the_best_that_it_is_measured_at():
    encoding = SpaceEncoding(load_study_space(make_config({}, strengths=[0.5], checkpoints=[0.2])))
    rows = encoding.random(3, random.Random(0))
    each = encoding.expand(rows)
    assert each.shape == (4, 3, rows.shape[1]) and np.array_equal(each[0], rows)
    choices = [[encoding.choice(row) for row in block] for block in each]
    for i in range(3):
        assert {block[i].trained for block in choices} == {choices[0][i]}
        assert {(block[i].strength, block[i].checkpoint) for block in choices} == {
            (strength, checkpoint) for strength in (1, 0.5) for checkpoint in (1, 0.2)
        }


@pytest.mark.parametrize(
    ("over", "said"),
    (
        ({"inner.bugdet_images": [1]}, "near are inner.budget_images"),
        ({"inner.checkpoint_gb": [1.0]}, "nothing that a choice may decide"),
        ({"rewards.n_samples": [8]}, "nothing that a choice may decide"),
        ({"inner.batch_size": [8, 0]}, "inner.batch_size"),
        ({"inner.weight_decay": {"low": -1, "high": 1}}, "inner.weight_decay"),
        ({"inner.skip.ratio": [2]}, "lies inside inner.skip, which is off"),
        ({"rewards.guidance": {"low": 1, "high": 2}}, "is a range"),
        ({"inner.ema": [[0.9]]}, "may not be lists"),
        ({"inner.ema": [0.9, 0.9]}, "once"),
        ({"inner.ema": {"low": 0.9, "high": 0.5}}, "low must be below high"),
        ({"inner.weight_decay": {"low": 0, "high": 0.5, "log": True}}, "above 0 where log is true"),
        ({"inner.ema": {"low": 0.9}}, "allowed: {low, high}"),
        ({"inner.ema": 0.9}, "a list of values, or a range"),
        ({"rewards.sampling_steps": list(range(1, 40))}, "give fewer values"),
    ),
)
def test_what_cannot_be_searched_over_is_said_in_a_line(over, said):
    with pytest.raises(MemControlError, match=said.replace("{", r"\{")) as caught:
        load_study_space(make_config(over))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), (("strengths", [0]), ("strengths", [1.5]), ("checkpoints", [0.19, 0.2]), ("over", 3))
)
def test_shares_that_are_none_are_said_in_a_line(key, value):
    with pytest.raises(MemControlError, match=f"search.{key}") as caught:
        make_config({}, **{key: value}) if key != "over" else make_config(value)
    assert "\n" not in str(caught.value)
