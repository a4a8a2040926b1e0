"""STUDY.yaml: what is accepted, and that each mistake is named in one line."""

import pytest

from memcontrol.core.config import find_differing_keys, load_config
from memcontrol.core.errors import MemControlError
from memcontrol.core.run_folder import locate_study_folder

GOOD = {"name": "a", "data": "digits"}


def refused(values, *overrides):
    with pytest.raises(MemControlError) as caught:
        load_config(values, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_short_and_long_forms_mean_the_same():
    assert load_config(GOOD) == load_config({"name": "a", "data": {"path": "digits"}})


def test_overrides_win_and_take_exponents_and_lists():
    config = load_config(
        GOOD,
        [
            "inner.weight_decay=1e-3",
            "data.train=128",
            "rewards.objectives=[kid, memorization]",
            "search.seed=3",
        ],
    )
    assert (config.inner.weight_decay, config.data.train, config.data.path) == (1e-3, 128, "digits")
    assert config.rewards.objectives == ("kid", "memorization")


@pytest.mark.parametrize(
    "values, overrides, words",
    [
        (
            {**GOOD, "colour": 1},
            [],
            ["unknown key 'colour'", "name, storage, base, data, space, inner, rewards, search"],
        ),
        ({**GOOD, "inner": {"batchsize": 1}}, [], ["unknown key 'inner.batchsize'", "batch_size"]),
        ({**GOOD, "inner": {"batch_size": "big"}}, [], ["'inner.batch_size' is 'big'"]),
        ({**GOOD, "inner": {"batch_size": 0}}, [], ["'inner.batch_size' is 0"]),
        ({**GOOD, "inner": 3}, [], ["'inner' is 3"]),
        (
            {**GOOD, "inner": {"skip": {"ratios": 2}}},
            [],
            ["unknown key 'inner.skip.ratios'", "ratio, decay, start"],
        ),
        ({**GOOD, "inner": {"skip": {"ratio": 0.5}}}, [], ["'inner.skip.ratio' is 0.5"]),
        (
            {**GOOD, "inner": {"ensemble": {"split": "fair"}}},
            [],
            ["'inner.ensemble.split' is 'fair'", "'random', 'balanced'"],
        ),
        (
            {**GOOD, "inner": {"redistribution": {}}},
            [],
            ["inner.redistribution moves skipped images", "needs inner.skip"],
        ),
        ({**GOOD, "inner": {"augmentation": {}}}, [], ["inner.augmentation looks at the skip threshold"]),
        ({**GOOD, "inner": {"norm_threshold": "decile", "batch_size": 4}}, [], ["batches of 10 or more"]),
        (
            GOOD,
            ["inner.ensemble.shards=4", "inner.budget_images=128"],
            ["gives 8 steps, fewer than 4 shards x 5 rounds"],
        ),
        (GOOD, ["inner.micro_batch_size=32"], ["32 > 16"]),
        ({"data": "digits"}, [], ["'name' is missing"]),
        ({"name": "a"}, [], ["'data' is missing"]),
        ({**GOOD, "name": "a/b"}, [], ["'name' is 'a/b'"]),
        ({**GOOD, "data": {"path": "digits", "train": -1}}, [], ["'data.train' is -1"]),
        (
            {**GOOD, "data": {"path": "digits", "train": 1.5}},
            [],
            ["'data.train' is 1.5; it should be less than 1, or should be a valid integer"],
        ),
        (
            GOOD,
            ["rewards.objectives={}"],
            ["'rewards.objectives' is {}; give a list, such as [fid, memorization]"],
        ),
        (GOOD, ["inner.batch_size"], ["key=value"]),
        (GOOD, ["inner.batch_size=[1"], ["not valid YAML"]),
        (GOOD, ["nonsense=1"], ["unknown key 'nonsense'"]),
    ],
)
def test_mistakes_are_named(values, overrides, words):
    message = refused(values, *overrides)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "text, word",
    [
        ("- 1\n", "holds list, not keys"),
        ("", "is empty; a study file has name"),
        ("a: [", "not valid YAML"),
        ("name: a\nname: b\n", "key 'name' is given twice"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_files_that_are_no_studies(tmp_path, text, word):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    assert word in refused(path)
    assert "no such file" in refused(tmp_path / "missing.yaml")


def test_numbers_with_exponents_are_numbers(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("name: 1e3\ndata: digits\ninner: {budget_images: 1e4, weight_decay: 1e-3}\n")
    assert refused(path).count("'name' is 1000")
    path.write_text("name: a\ndata: digits\ninner: {budget_images: 1e4, weight_decay: 1e-3}\n")
    config = load_config(path)
    assert (config.inner.budget_images, config.inner.weight_decay) == (10_000, 1e-3)


def test_settings_within_settings_can_be_overridden():
    config = load_config(
        GOOD, ["inner.skip.ratio=1.25", "inner.ensemble.shards=4", "inner.augmentation.rule=kept"]
    )
    assert (config.inner.skip.ratio, config.inner.ensemble.shards, config.inner.augmentation.rule) == (
        1.25,
        4,
        "kept",
    )
    assert load_config(config.model_dump(mode="json")) == config


def test_what_may_change_between_two_runs():
    config = load_config(GOOD)
    assert (
        find_differing_keys(
            config, load_config(GOOD, ["search.trials=7", "search.workers=1", "search.executor=inline"])
        )
        == []
    )
    assert find_differing_keys(config, load_config(GOOD, ["inner.batch_size=8"])) == [
        "inner.batch_size (16 there, 8 here)"
    ]


def test_where_results_go(tmp_path):
    assert locate_study_folder(tmp_path / "x.yaml", "x") == tmp_path / "runs" / "x"
    assert locate_study_folder(tmp_path / "runs" / "x" / "study.yaml", "x") == tmp_path / "runs" / "x"


def test_a_reward_of_ones_own_is_the_same_wherever_its_folder_lies(tmp_path):
    from memcontrol.core.config import find_differing_keys

    def config(folder, function):
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / "s.yaml"
        path.write_text(f"name: s\ndata: images\nrewards: [fid, 'mine.py:{function}']\n")
        return load_config(path)

    assert find_differing_keys(config("a", "auc"), config("b", "auc")) == []
    assert "rewards.objectives" in find_differing_keys(config("a", "auc"), config("b", "other"))[0]
