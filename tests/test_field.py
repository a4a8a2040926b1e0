"""The study of the field: images that no base has seen, the rules by which it settles, its tables by hand."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ttest_rel

from benchmarks.evidence import field
from benchmarks.evidence.field_images import KINDS, SIDE, choose_tuned, read_classes, show_often, write_images
from benchmarks.evidence.field_tables import format_comparisons, format_table, write_tables

RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same images as a folder of classes and as an .npz."""
    folder = tmp_path_factory.mktemp("kinds")
    images, labels = RNG.integers(0, 256, (12, 64, 64), np.uint8), np.repeat([0, 1], 6)
    for i, (image, label) in enumerate(zip(images, labels)):
        path = folder / "classes" / "ab"[label] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    np.savez(folder / "images.npz", images=images, labels=labels)
    return folder / "classes", folder / "images.npz"


def test_classes_of_a_folder_and_of_arrays_are_the_same(sources):
    (images, labels), (others, their_labels) = map(read_classes, sources)
    assert images.shape == (12, SIDE, SIDE, 3) and np.array_equal(images, others)
    assert np.array_equal(labels, their_labels)


def test_half_of_each_class_is_fine_tuned_on_or_whole_classes():
    labels = np.repeat(np.arange(10), 30)
    halves = choose_tuned(KINDS["xrays"], labels)
    assert [halves[labels == label].sum() for label in range(10)] == [15] * 10
    assert set(labels[choose_tuned(KINDS["cifar"], labels)]) == {1, 7}


def test_a_base_is_shown_each_of_its_images_about_as_often():
    images = np.repeat(np.arange(7, dtype=np.uint8), SIDE * SIDE * 3).reshape(7, SIDE, SIDE, 3)
    shown, captions = show_often(images, [f"c{i}" for i in range(7)])
    counts = np.bincount(shown[:, 0, 0, 0], minlength=7)  # flat images stay as they are, moved or mirrored
    assert counts.max() - counts.min() <= 1
    assert captions[:8] == ["c0", "c1", "c2", "c3", "c4", "c5", "c6", "c0"]


def test_images_are_written_with_their_captions(tmp_path):
    images = RNG.integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    write_images(images, ["a, b", "c", "d"], tmp_path)
    assert (tmp_path / "metadata.csv").read_text().splitlines()[:2] == ["file_name,text", '0000.png,"a, b"']
    with Image.open(tmp_path / "0002.png") as picture:
        assert np.array_equal(np.asarray(picture), images[2])


@pytest.mark.parametrize("copies_from, expected", [(0, 1_280), (3_000, 5_120), (10**9, 40_960)])
def test_the_budget_is_the_first_that_copies_for_sure(tmp_path, monkeypatch, copies_from, expected):
    study = field.Field("digits", tmp_path, jobs=None, at_a_time=1, ends=0.0)

    def measure(tried):
        return [{"copy_rate_low": 0.02 if budget >= copies_from else 0.01} for _, _, budget in tried]

    monkeypatch.setattr(study, "measure", measure)
    assert study.find_budget() == expected


def test_rates_are_the_best_of_each_method_and_stopping_early_has_the_least_loss(tmp_path, monkeypatch):
    study = field.Field("digits", tmp_path, jobs=None, at_a_time=1, ends=0.0)
    best = {method: rates[i % 3] for i, (method, rates) in enumerate(field.RATES.items())}
    fids = lambda tried: [{"fid": 1.0 + (rate != best[method])} for method, rate, _ in tried]  # noqa: E731
    monkeypatch.setattr(study, "measure", fids)
    study.settled["rates"] = study.find_rates(1_280)
    assert study.settled["rates"] == best
    losses = lambda tried: [{"membership_holdout_loss": abs(one[2] - 300)} for one in tried]  # noqa: E731
    monkeypatch.setattr(study, "measure", losses)
    assert study.find_stop(1_280) == 320


def make_rows(arm, **by_reward):
    n = len(next(iter(by_reward.values())))
    return [
        {
            "arm": arm,
            "seed": seed,
            "steps": 80,
            "seconds": 60.0,
            "rewards": {name: values[seed] for name, values in by_reward.items()},
        }
        for seed in range(n)
    ]


PICK = dict(fid=[20.0, 22.0, 21.0], membership_auc=[0.6, 0.7, 0.65], memorization=[0.01, 0.02, 0.03])
LORA = dict(fid=[20.5, 21.0, 23.5], membership_auc=[0.7, 0.85, 0.7], memorization=[0.05, 0.01, 0.06])
ROWS = make_rows("plain LoRA", **LORA) + make_rows("pick, masks alone", **PICK)


def test_differences_have_the_interval_of_the_paired_t_test():
    line = format_comparisons(ROWS).splitlines()[2]
    for name, values in PICK.items():
        interval = ttest_rel(values, LORA[name]).confidence_interval()
        mean = np.mean(np.subtract(values, LORA[name]))
        assert f"{mean:+.3g} ({interval.low:+.3g} to {interval.high:+.3g})" in line
    assert line.endswith("| on 1 of 3 splits |")  # the second, where LoRA is better in both


def test_cells_are_means_with_standard_errors_and_empty_where_nothing_was_measured():
    line = format_table(ROWS).splitlines()[3]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "pick, masks alone" and cells[1] == f"21.0 ± {1 / 3**0.5:.1f}" and cells[2] == ""
    assert cells[-2:] == ["80", "1.0"]


def test_tables_and_picture_are_of_all_kinds_that_were_run(tmp_path):
    found = {"kind": "xrays", "budget": 1_280, "stopped after": 320, "rates": {"full": 4.4e-4}, "rows": ROWS}
    (tmp_path / "field-xrays.json").write_text(json.dumps(found))
    write_tables(tmp_path)
    text = (tmp_path / "field-xrays.md").read_text()
    assert text.startswith(
        "Budget 1,280 images; stopped early after 320; rates: full 0.00044. Means over 3 splits"
    )
    with Image.open(tmp_path / "field.png") as picture:
        assert picture.width > 500
