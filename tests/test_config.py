"""STUDY.yaml: what is accepted, and that each mistake is named in one line."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from memcontrol.config.base import parse_base
from memcontrol.config.differing import find_differing_keys
from memcontrol.config.load import load_config
from memcontrol.config.problems import Advice, explain_problem, explain_problems
from memcontrol.config.study import Config
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
            [
                "unknown key 'colour'",
                "name, storage, base, base_precision, base_offload, data, space, inner, rewards, search",
            ],
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
            ["'rewards.objectives' is {}; give a list, such as [a, b]"],
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


SENTENCES = [
    ({"name": None}, "key 'name' is None; it should be a valid string"),
    (
        {"name": "a/b"},
        "key 'name' is 'a/b'; use letters, digits, '.', '_' and '-', a letter or digit first, 100 at most",
    ),
    ({"data": None}, "key 'data' is None; it should be keys and values, such as {path: images}"),
    ({"data": {"train": 0.5}}, "key 'data.path' is missing"),
    ({"data": {1: 2, "path": "digits"}}, "key 'data' is 1; keys should be strings"),
    (
        {"data": {"path": "digits", "train": "x"}},
        "key 'data.train' is 'x'; it should be a valid number, or should be a valid integer",
    ),
    (
        {"data": {"path": "digits", "train": 0}},
        "key 'data.train' is 0; it should be greater than 0, or should be greater than or equal to 1",
    ),
    (
        {"data": {"path": "digits", "train": 1.5}},
        "key 'data.train' is 1.5; it should be less than 1, or should be a valid integer",
    ),
    (
        {"data": {"path": "digits", "skip_unreadable": "yes"}},
        "key 'data.skip_unreadable' is 'yes'; it should be a valid boolean",
    ),
    ({"inner": 3}, "key 'inner' is 3; it should be keys and values, such as {budget_images: 20000}"),
    ({"inner": {"rounds": 0}}, "key 'inner.rounds' is 0; it should be greater than or equal to 1"),
    ({"inner": {"rounds": 1.5}}, "key 'inner.rounds' is 1.5; it should be a valid integer"),
    ({"inner": {"batch_size": True}}, "key 'inner.batch_size' is True; it should be a valid integer"),
    (
        {"inner": {"optimizer": "lion"}},
        "key 'inner.optimizer' is 'lion'; it should be 'adamw', 'adamw8bit', 'adam', 'nadam', 'radam', "
        "'adafactor' or 'sgd'",
    ),
    (
        {"inner": {"norm_threshold": "x"}},
        "key 'inner.norm_threshold' is 'x'; it should be a valid number, or should be 'decile'",
    ),
    (
        {"inner": {"norm_threshold": -1}},
        "key 'inner.norm_threshold' is -1; it should be greater than 0, or should be 'decile'",
    ),
    ({"inner": {"warmup": 1}}, "key 'inner.warmup' is 1; it should be less than 1"),
    ({"inner": {"max_grad_norm": 0}}, "key 'inner.max_grad_norm' is 0; it should be greater than 0"),
    (
        {"inner": {"captions": {"replace": 2}}},
        "key 'inner.captions.replace' is 2; it should be less than or equal to 1",
    ),
    ({"inner": {"skip": []}}, "key 'inner.skip' is []; it should be keys and values, such as {ratio: 2}"),
    (
        {"inner": {"skip": {"bins": 1001}}},
        "key 'inner.skip.bins' is 1001; it should be less than or equal to 1000",
    ),
    (
        {"inner": {"skip": {"ratio": 0.5}}},
        "key 'inner.skip.ratio' is 0.5; it should be greater than or equal to 1",
    ),
    ({"inner": {"micro_batch_size": 32}}, "inner.micro_batch_size is larger than inner.batch_size (32 > 16)"),
    ({"rewards": {"limits": 3}}, "key 'rewards.limits' is 3; it should be a valid dictionary"),
    ({"rewards": {"limits": {"fid": "low"}}}, "key 'rewards.limits' is 'low'; it should be a valid number"),
    (
        {"rewards": {"objectives": "fid", "clip": 1}},
        "key 'rewards.objectives' is 'fid'; give a list, such as [a, b]; key "
        "'rewards.clip' is 1; it should be a valid string",
    ),
    (
        {"rewards": {}, "search": {"warm_start": ""}},
        "key 'search.warm_start' is ''; string should have at least 1 character",
    ),
    (
        {"rewards": []},
        "key 'rewards.objectives' is (); tuple should have at least 1 item after validation, not 0",
    ),
    (
        {"rewards": 3},
        "key 'rewards' is 3; it should be keys and values, such as {objectives: [fid, memorization]}",
    ),
    ({"rewards": [1, "fid"]}, "key 'rewards.objectives' is 1; it should be a valid string"),
    (
        {"rewards": {"objectives": {"fid": 1}}},
        "key 'rewards.objectives' is {'fid': 1}; give a list, such as [a, b]",
    ),
    (
        {"search": {"early_stopping": True}},
        "key 'search.early_stopping' is True; it should be keys and values, such as {rungs: [0.25, "
        "0.5]}, or {} for all defaults",
    ),
    (
        {"search": {"early_stopping": {"rungs": []}}},
        "key 'search.early_stopping.rungs' is []; value should have at least 1 item after validation, not 0",
    ),
    (
        {"search": {"early_stopping": {"rungs": 0.5}}},
        "key 'search.early_stopping.rungs' is 0.5; give a list, such as [a, b]",
    ),
    (
        {"search": {"early_stopping": {"rungs": [0.5, 1]}}},
        "key 'search.early_stopping.rungs' is 1; it should be less than 1",
    ),
    (
        {
            "inner": {"rounds": 8},
            "search": {"early_stopping": {"rungs": [0.5]}},
            "rewards": {"objectives": ["fid", "extraction_clique"], "extraction": {}},
        },
        "rewards.objectives has extraction_clique, which no rung of search.early_stopping measures; take one "
        "of the two out",
    ),
    (
        {"search": {"early_stopping": {"rungs": [0.5, 0.25]}}},
        "search.early_stopping.rungs is [0.5, 0.25]; give rising shares of the budget, such as [0.25, 0.5]",
    ),
    (
        {"search": {"sampler": "cma"}},
        "key 'search.sampler' is 'cma'; it should be 'auto', 'gp', 'tpe', 'nsga2' or 'random'",
    ),
    (
        {"slurm": {"extra": {"qos": [1]}}},
        "key 'slurm.extra' is [1]; it should be a valid string, or should be a valid integer",
    ),
    ({"ray": {"gpus": -1}}, "key 'ray.gpus' is -1; it should be greater than or equal to 0"),
    (
        {"colour": 1},
        "unknown key 'colour'; allowed: name, storage, base, base_precision, base_offload, data, space, "
        "inner, rewards, search, ray, slurm",
    ),
    (
        {"trials": 3},
        "unknown key 'trials'; did you mean search.trials? allowed: name, storage, base, base_precision, "
        "base_offload, data, space, inner, rewards, search, ray, slurm",
    ),
    (
        {"data": {"path": "digits", "batch_size": 4}},
        "unknown key 'data.batch_size'; did you mean inner.batch_size? allowed: path, split, train, "
        "holdout, test, calibration, resolution, fit, caption, group, label, twins, pages, max_pixels, "
        "skip_unreadable",
    ),
    (
        {"name": "a b", "inner": {"rounds": 0, "skip": {"ratios": 2}}},
        "key 'name' is 'a b'; use letters, digits, '.', '_' and '-', a letter or digit first, 100 at most; "
        "key "
        "'inner.rounds' is 0; it should be greater than or equal to 1; unknown key "
        "'inner.skip.ratios'; did you mean inner.skip.ratio? allowed: ratio, decay, start, bins, refill",
    ),
]


@pytest.mark.parametrize("values, sentence", SENTENCES, ids=[sentence[:40] for _, sentence in SENTENCES])
def test_mistakes_are_one_sentence_in_our_own_words(values, sentence):
    """Whatever words pydantic has for it: a version of it that says it otherwise changes nothing."""
    assert refused({**GOOD, **values}) == f"the config: {sentence}"
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({**GOOD, **values})
    problems = [problem | {"msg": "Said; otherwise."} for problem in caught.value.errors()]
    assert explain_problems(problems, Config) == sentence


def test_missing_keys_are_named_together():
    assert refused({}) == "the config: key 'name' is missing; key 'data' is missing"


def test_mistakes_of_an_unknown_kind_are_said_in_the_words_of_pydantic():
    problem = {"type": "odd", "loc": ("inner", "rounds"), "input": "{5}", "msg": "Input should be {even}"}
    assert explain_problem(problem, Config) == (
        "key 'inner.rounds' is '{5}'",
        [Advice("Input should be {even}")],
    )
    assert explain_problems([problem], Config) == "key 'inner.rounds' is '{5}'; Input should be {even}"


def test_value_with_a_semicolon_is_one_value():
    assert refused({**GOOD, "data": {"path": "digits", "train": "a;b"}}) == (
        "the config: key 'data.train' is 'a;b'; it should be a valid number, or should be a valid integer"
    )


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


def test_copies_with_other_values_at_dotted_keys():
    config = load_config({**GOOD, "inner": {"skip": {"ratio": 1.5}}})
    other = config.replaced({"inner.skip.ratio": 3.0, "inner.rounds": 7, "name": "b"})
    assert other == load_config(
        {"name": "b", "data": "digits", "inner": {"skip": {"ratio": 3.0}, "rounds": 7}}
    )
    assert (config.name, config.inner.rounds, config.inner.skip.ratio) == ("a", 5, 1.5)
    assert config.inner.replaced({"skip": None}) == load_config(GOOD).inner


@pytest.mark.parametrize("key", ["colour", "inner.batchsize", "inner.skip.ratio", "name.first"])
def test_copies_have_no_keys_that_are_not_there(key):
    with pytest.raises(KeyError):
        load_config(GOOD).replaced({key: 2.0})


@pytest.mark.parametrize(
    "fraction, n_images, n_train", [(1.0, 9, 9), (0.5, 9, 4), (0.5, 11, 6), (0.01, 9, 1)]
)
def test_trials_see_a_share_of_the_training_images_and_at_least_one(fraction, n_images, n_train):
    search = load_config({**GOOD, "search": {"train_fraction": fraction}}).search
    assert search.count_train(n_images) == n_train


def test_where_results_go(tmp_path):
    assert locate_study_folder(tmp_path / "x.yaml", "x") == tmp_path / "runs" / "x"
    assert locate_study_folder(tmp_path / "runs" / "x" / "study.yaml", "x") == tmp_path / "runs" / "x"


def test_a_reward_of_ones_own_is_the_same_wherever_its_folder_lies(tmp_path):
    from memcontrol.config.differing import find_differing_keys

    def config(folder, function):
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / "s.yaml"
        path.write_text(f"name: s\ndata: images\nrewards: [fid, 'mine.py:{function}']\n")
        return load_config(path)

    assert find_differing_keys(config("a", "auc"), config("b", "auc")) == []
    assert "rewards.objectives" in find_differing_keys(config("a", "auc"), config("b", "other"))[0]


def test_a_base_that_is_only_a_name_is_written_as_one():
    plain, more = (
        load_config({**GOOD, "base": base}) for base in ("owner/a", {"id": "owner/a", "revision": "b"})
    )
    assert plain == load_config({**GOOD, "base": {"id": "owner/a"}})
    assert plain.model_dump(mode="json")["base"] == "owner/a"
    assert more.model_dump(mode="json")["base"] == {"id": "owner/a", "revision": "b"}
    for config in (plain, more):
        assert load_config(config.model_dump(mode="json")) == config
    assert load_config({**GOOD, "base": "owner/a"}, ["base.revision=b"]) == more
    assert str(more.base) == "owner/a (revision b)"


def test_files_of_a_base_lie_beside_the_study_file(tmp_path, monkeypatch):
    (tmp_path / "studies").mkdir()
    for place in ("studies/first", "second", "folder", "studies/own", "own"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path)
    study = tmp_path / "studies" / "a.yaml"
    for given in ("first", "second", "../second", "none"):
        study.write_text(f"{{name: a, data: digits, base: {{id: folder, adapter: {given}}}}}")
        base = load_config(study).base
        assert base.id == "folder" and Path(base.adapter) == tmp_path / "studies" / given
    study.write_text("{name: a, data: digits, base: ./own}")
    assert load_config(study).base.id == str(tmp_path / "studies" / "own")


def test_a_base_on_the_command_line():
    assert (
        parse_base("owner/a").id == "owner/a" and parse_base("{id: owner/a, variant: fp16}").variant == "fp16"
    )
    with pytest.raises(MemControlError, match="--base: unknown key 'revison'; did you mean revision?"):
        parse_base("{id: owner/a, revison: b}")
    with pytest.raises(MemControlError, match="--base is '{id', which is not valid YAML"):
        parse_base("{id")


@pytest.mark.parametrize(
    "key, value",
    [
        ("micro_batch_size", 8),
        ("gradient_checkpointing", True),
        ("checkpoint_minutes", 1),
        ("checkpoint_gb", 1),
    ],
)
def test_keys_of_memory_alone_may_change_between_two_runs(key, value):
    plain, other = load_config(GOOD), load_config(GOOD, [f"inner.{key}={value}"])
    assert plain != other and find_differing_keys(plain, other) == []


def test_images_in_a_forward_may_not_change_where_the_top_decile_of_each_is_dropped():
    rule = "inner.norm_threshold=decile"
    plain, other = load_config(GOOD, [rule]), load_config(GOOD, [rule, "inner.micro_batch_size=12"])
    assert find_differing_keys(plain, other) == ["inner.micro_batch_size (None there, 12 here)"]
