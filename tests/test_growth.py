"""How far a search has come: hypervolume against brute force, its noise, and the end of a search that no
longer grows."""

import itertools
import json
import sys

import numpy as np
import pytest
import yaml
from simulated import Simulated, search

from memcontrol.core.errors import MemControlError
from memcontrol.core.jobs import Warned
from memcontrol.study.hypervolume import estimate_hypervolume, find_reference_point, is_flat
from memcontrol.study.pareto import hypervolume
from memcontrol.study.record import Record

OBJECTIVES = {"fid": "minimize", "recall": "maximize"}


def record(number, fid, recall, anchor=None, error=0.0, state="COMPLETE"):
    searched = {"fid": fid, "recall": recall, "fid_error": error, "recall_error": error / 100}
    return Record(
        number,
        state,
        (),
        anchor,
        objectives=OBJECTIVES,
        searched=searched if state == "COMPLETE" else {},
        ended=f"{number:03}",
    )


@pytest.mark.parametrize("n_objectives", [1, 2, 3])
def test_hypervolume_is_the_share_of_cells_that_are_dominated(n_objectives):
    rng, side = np.random.default_rng(n_objectives), 20
    for _ in range(5):
        points = rng.integers(0, side + 3, (6, n_objectives))  # some beyond the reference
        cells = np.array(list(itertools.product(range(side), repeat=n_objectives))) + 0.5
        inside = (points[None] <= cells[:, None]).all(2).any(1).sum()
        assert hypervolume(points.tolist(), [side] * n_objectives) == inside


def test_the_reference_is_the_anchors_worst_and_a_little_more():
    anchors = [record(0, 100.0, 0.0, "none"), record(1, 20.0, 0.4, "all"), record(2, 10.0, 0.5, "full")]
    # as losses: recall with its sign turned
    assert find_reference_point(anchors) == pytest.approx([109.0, 0.05])
    assert (
        find_reference_point([*anchors[:2], record(2, 0, 0, "full", state="RUNNING")]) is None
        and find_reference_point(anchors[:1]) is None
    )
    assert find_reference_point([*anchors, record(3, 500.0, 0.0)]) == find_reference_point(anchors)


def test_the_noise_is_that_of_measuring_again():
    records = [record(0, 10.0, 0.5, error=1.0), record(1, 20.0, 0.9, error=1.0)]
    rng, areas = np.random.default_rng(5), []
    for _ in range(4000):
        (a, b), (c, d) = (
            (fid + rng.normal(0, 1), -recall + rng.normal(0, 0.01)) for fid, recall in ((10, 0.5), (20, 0.9))
        )
        areas.append((30 - a) * (0 - b) + (30 - c) * (b - d))
    found = estimate_hypervolume(records, [30.0, 0.0])
    assert found.value == pytest.approx(20 * 0.5 + 10 * 0.4) and found.error == pytest.approx(
        np.std(areas), rel=0.15
    )


def test_a_search_is_flat_when_nothing_new_rises_above_the_noise():
    grew = [record(0, 10.0, 0.5, error=0.5), record(1, 10.0, 0.2, error=0.5), record(2, 9.9, 0.5, error=0.5)]
    assert is_flat(grew, [30.0, 0.0], 2) and not is_flat(grew, [30.0, 0.0], 4)
    assert not is_flat([*grew, record(3, 2.0, 0.5, error=0.5)], [30.0, 0.0], 2)


def study_in(folder, **keys):
    path = folder / f"{keys.get('name', 's')}.yaml"
    path.write_text(
        yaml.safe_dump({"name": "s", "data": "digits", "space": "digits", "rewards": {"confirm": 0}, **keys})
    )
    return path


def test_a_flat_search_ends_itself_and_stays_ended(tmp_path):
    """Every sampled trial is as bad as no training: nothing grows."""
    said = []
    worse = lambda choice: {
        "fid": 90.0 - 60 * (choice["method"] == "full"),
        "memorization": 0.1 + 0.3 * (choice["method"] == "full"),
    }  # noqa: E731
    study = study_in(tmp_path, search={"trials": 50, "workers": 1, "sampler": "random", "stop_when_flat": 6})
    found = search(study, Simulated(rewards=worse), said.append)
    assert len(found.records()) == 3 + 6 and found.attributes["reference"] == pytest.approx([96.0, 0.43])
    assert [
        "has not grown beyond its noise in 6 trials" in event.text
        for event in said
        if isinstance(event, Warned)
    ] == [True]
    found.close()
    again = search(study, Simulated(rewards=worse))
    assert len(again.records()) == 9
    again.close()


def test_a_warm_start_tries_the_earlier_front_first(tmp_path):
    earlier = study_in(tmp_path, name="earlier", search={"trials": 12, "workers": 1, "sampler": "random"})
    first = search(earlier, Simulated())
    from memcontrol.study.pick import select_front

    wanted = [
        record.choice
        for record in select_front(
            [
                record
                for record in first.records()
                if record.finished and record.anchor not in ("none", "full")
            ]
        )
    ]
    first.close()
    study = search(
        study_in(tmp_path, name="later", search={"trials": 8, "workers": 1, "warm_start": "earlier.yaml"}),
        Simulated(),
    )
    sampled = [record.choice for record in study.records() if record.anchor is None]
    anchors = [record.choice for record in study.records() if record.anchor]
    fresh = [choice for choice in wanted if choice not in anchors]
    assert fresh and sampled[: len(fresh)] == fresh[:8]
    study.close()


def test_a_warm_start_that_cannot_be_is_refused_before_anything_is_made(tmp_path):
    study_in(tmp_path, name="never")
    for name, said in (
        ("later.yaml", "is this study itself"),
        ("none.yaml", "no such file"),
        ("never.yaml", "has not been searched yet"),
    ):
        later = study_in(tmp_path, name="later", search={"warm_start": name})
        with pytest.raises(MemControlError, match=rf"^search\.warm_start: {name}: .*{said}"):
            search(later, Simulated())
        assert not list(tmp_path.glob("runs/later/study.db"))


def test_choices_that_the_space_lacks_are_said(tmp_path):
    search(study_in(tmp_path, name="earlier", search={"trials": 2, "workers": 1}), Simulated()).close()
    said = []
    search(
        study_in(
            tmp_path,
            name="later",
            space="sd15-sites",
            search={"trials": 1, "workers": 1, "warm_start": "earlier.yaml"},
        ),
        Simulated(),
        said.append,
    ).close()
    assert any(
        "have groups or methods that space 'sd15-sites' lacks" in event.text
        for event in said
        if isinstance(event, Warned)
    )


def test_status_says_that_a_flat_search_is_over(tmp_path, capsys, monkeypatch):
    from memcontrol.cli import main

    worse = lambda choice: {
        "fid": 90.0 - 60 * (choice["method"] == "full"),
        "memorization": 0.1 + 0.3 * (choice["method"] == "full"),
    }  # noqa: E731
    study = study_in(tmp_path, search={"trials": 50, "workers": 1, "sampler": "random", "stop_when_flat": 6})
    search(study, Simulated(rewards=worse)).close()
    monkeypatch.setattr(sys, "argv", ["memcontrol", "status", str(study), "--json"])
    assert main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["flat"] is True and found["minutes_left"] == 0
    sys.argv.pop()
    main()
    assert "which ends the search (search.stop_when_flat)" in capsys.readouterr().out
