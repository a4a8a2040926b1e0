"""Utility: AUROCs against scikit-learn's and another classifier fitted by hand, errors against a bootstrap
written out; what images show, from captions, folders and columns; and in a study."""

import csv
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import run
from PIL import Image
from scipy.optimize import minimize
from sklearn.metrics import roc_auc_score

from memcontrol.commands.init import _propose_label
from memcontrol.config.data import DataConfig
from memcontrol.config.load import load_config
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import read_json
from memcontrol.core.run_folder import StudyFolder, locate_study_folder
from memcontrol.data.images import ImageRecord, Images
from memcontrol.data.look import look_at_images, summarize_folder
from memcontrol.data.split import dump_parts, load_parts, parse_parts
from memcontrol.scoring import utility
from memcontrol.scoring.evidence import Descriptors, Evidence
from memcontrol.scoring.membership import membership_auc
from memcontrol.scoring.score import _pool_utility
from memcontrol.scoring.utility import (
    Classes,
    draw_weights,
    measure_skill,
    measure_utility,
    score_by_network,
    score_by_probe,
    weigh_auroc,
)
from memcontrol.trial.prepare import _check_classes
from memcontrol.view.model_card import _make_classes_table

NAMES = ("cat", "dog", "eel")
D = 6
CENTRES = 0.8 * np.random.default_rng(5).normal(size=(len(NAMES), D))


def draw(n, seed, names=NAMES):
    """Features of n images and their classes, which overlap."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(names, n)
    return CENTRES[[NAMES.index(one) for one in labels]] + rng.normal(size=(n, D)), list(labels)


(MADE, OF_MADE), (TRAIN, OF_TRAIN), (TEST, OF_TEST) = draw(90, 0), draw(60, 1), draw(150, 2)


def judge(made=(MADE, OF_MADE), train=(TRAIN, OF_TRAIN), test=(TEST, OF_TEST), groups=None, seed=0):
    images = {"utility": [made[0], train[0], test[0]]}
    classes = Classes(made[1], train[1], test[1])
    return measure_utility(images, classes, groups, seed, lambda name, make: make())


def fit_by_hand(images, labels, test):
    """Multinomial logistic regression by scipy, of the same penalty."""
    centre, spread = images.mean(0), images.std(0)
    rows, held = (np.c_[(part - centre) / spread, np.ones(len(part))] for part in (images, test))
    is_class = np.array(labels)[:, None] == np.array(NAMES)

    def lose(flat):
        weights = flat.reshape(D + 1, len(NAMES))
        logits = rows @ weights
        likelihood = (logits * is_class).sum(1) - np.log(np.exp(logits).sum(1))
        return -likelihood.sum() + np.square(weights[:-1]).sum() / (2 * 0.1)

    weights = minimize(lose, np.zeros((D + 1) * len(NAMES))).x.reshape(D + 1, -1)
    odds = np.exp(held @ weights)
    return odds / odds.sum(1, keepdims=True)


def test_the_probe_is_scikit_learns_and_one_fitted_by_hand():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    found = judge().to_rewards()
    for name, (images, labels) in {"utility": (MADE, OF_MADE), "utility_real": (TRAIN, OF_TRAIN)}.items():
        by_hand = fit_by_hand(images, labels, TEST)
        expected = roc_auc_score(OF_TEST, by_hand, multi_class="ovr", average="macro", labels=NAMES)
        assert found[name].value == pytest.approx(expected, abs=1e-3)
        other = LinearDiscriminantAnalysis().fit(images, labels).predict_proba(TEST)
        apart = found[name].value - roc_auc_score(OF_TEST, other, multi_class="ovr", labels=NAMES)
        assert abs(apart) < 2 * found[name].error
    assert 0.6 < found["utility"].value < 0.98 and found["utility_images"] == 90
    assert found["utility_real_images"] == 60 and found["utility_classes"] == 3
    of_two = judge(made=draw(40, 3))  # as many real ones as there are samples
    assert of_two.n_real == 40


def test_auroc_under_weights_is_scikit_learns():
    rng = np.random.default_rng(0)
    scores, is_class = rng.integers(0, 9, 80) / 8, rng.random(80) < 0.3  # many ties
    weights = draw_weights(range(80))[:20]
    expected = [roc_auc_score(is_class, scores, sample_weight=one) for one in weights]
    assert weigh_auroc(scores, is_class, weights) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(weigh_auroc(scores, is_class, is_class[None].astype(np.uint16))).all()


@pytest.mark.parametrize("size", [1, 5])
def test_errors_are_a_bootstraps_by_group(size):
    """Written out: whole groups drawn with replacement, scikit-learn's AUROC of what is drawn."""
    groups = np.arange(len(TEST)) // size
    scores = score_by_probe(MADE, OF_MADE, TEST, NAMES)
    rng, labels, drawn = np.random.default_rng(9), np.array(OF_TEST), []
    for _ in range(150):
        chosen = rng.integers(groups.max() + 1, size=groups.max() + 1)
        rows = np.concatenate([np.flatnonzero(groups == one) for one in chosen])
        by_class = [roc_auc_score(labels[rows] == name, scores[rows, k]) for k, name in enumerate(NAMES)]
        drawn.append([*by_class, np.mean(by_class)])
    found = judge(groups=[str(one) for one in groups])
    own = [found.describe_classes()[name]["utility_error"] for name in NAMES]
    assert [*own, found.to_rewards()["utility"].error] == pytest.approx(np.std(drawn, axis=0), rel=0.25)


def test_the_error_of_a_class_is_delongs():
    scores, is_cat = score_by_probe(MADE, OF_MADE, TEST, NAMES)[:, 0], np.array(OF_TEST) == "cat"
    expected = membership_auc(scores[is_cat], scores[~is_cat])
    told = judge().describe_classes()["cat"]
    assert told["utility"] == pytest.approx(expected.value, abs=1e-12)
    assert told["utility_error"] == pytest.approx(expected.error, rel=0.15)
    assert told["holdout_images"] == is_cat.sum() and told["generated_images"] == OF_MADE.count("cat")


def test_copies_of_training_images_are_worth_what_those_are():
    order = np.random.default_rng(0).permutation(len(TRAIN))
    found = judge(made=(TRAIN[order], [OF_TRAIN[row] for row in order])).to_rewards()
    assert found["utility"].value == pytest.approx(found["utility_real"].value, abs=2e-3)
    assert found["utility_gap"].value == pytest.approx(0, abs=2e-3)


def test_random_labels_are_worth_chance():
    """Each draw of samples is another classifier; pooled as draws of `confirm` are."""
    draws = []
    for seed in range(30):
        labels = list(np.random.default_rng(seed).permutation(OF_MADE))
        draws.append(judge(made=(draw(90, 100 + seed)[0], labels)).to_rewards())
    pooled = _pool_utility(draws, "utility")
    assert abs(pooled.value - 0.5) < 3 * pooled.error
    values, errors = [one["utility"].value for one in draws], [one["utility"].error for one in draws]
    assert pooled.value == pytest.approx(np.mean(values))
    assert pooled.error**2 == pytest.approx(np.mean(errors) ** 2 + np.var(values, ddof=1) / 30)


def test_a_class_that_is_missing_is_chance_or_left_out():
    two = judge(made=draw(90, 0, NAMES[:2]))
    told, rewards = two.describe_classes(), two.to_rewards()
    assert told["eel"]["utility"] == 0.5 and told["eel"]["generated_images"] == 0
    assert rewards["utility"].value == pytest.approx(np.mean([told[name]["utility"] for name in NAMES]))
    assert rewards["utility_classes_missing"] == 1
    untested = judge(test=draw(80, 4, NAMES[:2])).describe_classes()
    assert list(untested) == ["cat", "dog"]
    one = judge(made=draw(30, 0, NAMES[:1])).to_rewards()
    assert one["utility"].value == 0.5 and one["utility"].error == 0
    assert not Classes(["cat"], ["cat", "dog"], ["cat"]).can_be_told
    # a draw that has none of a class counts by the others
    rare = Classes(OF_MADE, OF_TRAIN, ["cat"] * 10 + ["dog"] * 10 + ["eel"])
    skill = measure_skill(np.random.default_rng(0).random((21, 3)), rare, draw_weights(range(21)))
    assert np.isnan(skill.by_class[:, 2]).any() and np.isfinite(skill.macro).all()


def test_evidence_has_a_network_where_it_is_asked_for(monkeypatch):
    """A network tells bright images from dark ones, and is the same again; without classes none is."""
    monkeypatch.setattr(utility, "_NETWORK_STEPS", 25)

    def show(n, seed):
        rng = np.random.default_rng(seed)
        labels = rng.choice(["dark", "light"], n)
        pixels = rng.random((n, 3072)) * 0.5 + 0.4 * (labels == "light")[:, None]
        return Descriptors(pixels.astype(np.float32), rng.random((n, 4)).astype(np.float32)), list(labels)

    (made, of_made), (train, of_train), (held, of_held) = (show(24, seed) for seed in range(3))
    classes = Classes(of_made, of_train, of_held)
    evidence = Evidence(made, train, held, classes=classes, trains_network=True)
    found = evidence.utility.to_rewards()
    assert found["utility_network"].value > 0.9 and found["utility_network_real"].value > 0.9
    network = partial(score_by_network, 0, made.pixels, of_made, held.pixels, classes.names)
    assert (network() == network()).all()
    plain = Evidence(made, train, held, classes=classes)
    assert "utility_network" not in plain.utility.to_rewards()
    assert Evidence(made, train, held).utility is None


def fill(root, n=60):
    """Cats and dogs in folders, in captions and in a column, which is the other way round."""
    with_table = root / "metadata.csv"
    rows = []
    for i in range(n):
        name = f"{NAMES[i % 2]}/{i}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
        rows.append((name, f"a {NAMES[i % 2]}", NAMES[1 - i % 2], f"p{i}"))
    with with_table.open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text", "finding", "patient"), *rows])


def test_labels_are_read_from_captions_folders_columns_and_patterns(tmp_path):
    fill(tmp_path)
    read = {}
    for rule in ("caption", "folder", "finding", r"(cat|dog)/"):
        parts = load_parts(DataConfig(path=str(tmp_path), label=rule), 32, 0).parts
        read[rule] = {record.name: record.label for images in parts.values() for record in images.records}
        stored = {"source": str(tmp_path), "resolution": 32, "parts": dump_parts(parts)}
        assert parse_parts(stored)["test"].labels == parts["test"].labels
    for i in range(60):
        name, own, other = f"{NAMES[i % 2]}/{i}.png", NAMES[i % 2], NAMES[1 - i % 2]
        assert [told[name] for told in read.values()] == [f"a {own}", own, other, own]
    digits = load_parts(DataConfig(path="digits", label="caption"), 32, 0).parts["train"]
    assert digits.labels == digits.captions
    for rule, said in {
        "species": "data.label is 'species'.*no column of the metadata, which has file_name, text, finding",
        "(eel)": "does not match image 'cat/0.png'; each image needs a label",
    }.items():
        with pytest.raises(MemControlError, match=said):
            look_at_images(tmp_path, DataConfig(path=str(tmp_path), label=rule), print)
    with pytest.raises(MemControlError, match="of the embedded digits the caption alone"):
        load_parts(DataConfig(path="digits", label="folder"), 32, 0)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "cat" / "0.txt").write_text("a cat")
    with pytest.raises(MemControlError, match="image 'cat/10.png' has no caption; each image needs one"):
        look_at_images(tmp_path, DataConfig(path=str(tmp_path), label="caption"), print)


def test_init_proposes_a_label_where_classes_show(tmp_path):
    fill(tmp_path / "said")
    fill(tmp_path / "apart")
    (tmp_path / "apart" / "metadata.csv").write_text(
        "file_name,text\n" + "\n".join(f"{NAMES[i % 2]}/{i}.png,image {i}" for i in range(60))
    )
    fill(tmp_path / "few", 14)
    tell = lambda title, done, total: None  # noqa: E731
    found = {
        name: _propose_label(summarize_folder(tmp_path / name, tell)) for name in ("said", "apart", "few")
    }
    assert found == {"said": "caption", "apart": "folder", "few": None}


def test_what_cannot_be_measured_is_refused():
    values = {"name": "a", "data": "digits", "rewards": ["fid", "utility"]}
    with pytest.raises(MemControlError, match="'utility' is measured only where data.label says"):
        load_config(values)
    limits = {"limits": {"utility_low": 0.8}}
    with pytest.raises(MemControlError, match="'utility_low' is measured only where data.label says"):
        load_config({**values, "rewards": limits})
    config = load_config({**values, "data": {"path": "digits", "label": "caption"}})

    def check(*labels, config=config):
        said = []
        records = tuple(ImageRecord(str(i), label[0], label=label) for i, label in enumerate(labels))
        _check_classes(
            config, dict.fromkeys(("train", "holdout", "test"), Images("x", 8, records)), said.append
        )
        return said

    assert check(*"aabb") == []
    assert "of 3 classes 1 have under 2 images in a part, such as 'c' (1 train" in check(*"aabbc")[0]
    with pytest.raises(MemControlError, match="'utility' needs two classes with 2 images or more in each"):
        check(*"aab")
    assert check(*"aab", config=config.replaced({"rewards.objectives": ("fid",)}))
    assert "images of several classes have the caption 'a'" in check("a1", "a2", "a1", "a2")[0]
    with pytest.raises(MemControlError, match="which gives 150 classes, such as '0'; at most 100"):
        check(*map(str, range(150)))


def test_a_card_names_classes_of_several_training_images_alone():
    told = judge(
        made=draw(90, 0), train=(TRAIN, ["ann" if row < 4 else of for row, of in enumerate(OF_TRAIN)])
    )
    shown = _make_classes_table(told.describe_classes() | {"ann": {"train_images": 4}})
    assert "ann" not in shown and "utility of real images" in shown
    cats = told.describe_classes()["cat"]
    assert f"| cat | {OF_MADE.count('cat')} | {cats['utility']:.3f} ± {cats['utility_error']:.3f} |" in shown
    assert _make_classes_table({}) == ""


def shorten():
    utility._NETWORK_STEPS = 4


def test_a_study_optimises_utility_and_retrain_has_a_network(study_file):
    rewards = {"n_samples": 32, "sampling_steps": 1, "confirm": 2, "force": True}
    study = study_file(
        data={"path": "digits", "train": 64, "holdout": 60, "test": 60, "label": "caption"},
        rewards={**rewards, "objectives": ["fid", "utility"]},
        search={"trials": 1, "anchors": ["none"], "workers": 1, "executor": "inline"},
    )
    run("search", study, check=True)
    folder = locate_study_folder(study, "small")
    results = [read_json(path) for path in folder.glob("*/result.json")]
    for result in results:
        rewards, by_class = result["rewards"], result["utility_by_class"]
        assert (
            0 < rewards["utility"] < 1 and rewards["utility_error"] > 0 and result["measured_with"]["classes"]
        )
        assert len(by_class) == rewards["utility_classes"] > 5
        assert rewards["utility"] == pytest.approx(np.mean([one["utility"] for one in by_class.values()]))
        assert "utility_network" not in rewards
    assert len({result["rewards"]["utility_real"] for result in results}) == 1
    assert results[0]["rewards"]["utility_real"] > 0.8
    confirmed = [read_json(path)["rewards"] for path in folder.glob("*/confirmed.json")]
    assert confirmed and all(one["utility_error"] > 0 for one in confirmed)
    assert "utility" in run("front", study, check=True).stdout
    run("retrain", study, check=True, before=shorten)
    retrained = [run_folder.read_result() for run_folder in StudyFolder(Path(folder)).list_retrained()]
    assert retrained and all(0 <= one["rewards"]["utility_network_real"] <= 1 for one in retrained)
