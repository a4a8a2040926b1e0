"""Fronts against brute force, knees and limits by hand."""

import numpy as np
import pytest

from memcontrol.core.errors import MemControlError
from memcontrol.study.pareto import find_clearly_beaten, find_front, find_knee, parse_limit


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("n_objectives", [1, 2, 3])
def test_front_against_brute_force(seed, n_objectives):
    points = np.random.default_rng(seed).integers(0, 6, (30, n_objectives)).astype(float)
    best = {tuple(p) for p in points if not any((q <= p).all() and (q < p).any() for q in points)}
    found = [tuple(points[i]) for i in find_front(points.tolist())]
    assert set(found) == best and len(found) == len(best) and found == sorted(found)


@pytest.mark.parametrize("n_objectives", [1, 2, 3])
@pytest.mark.parametrize("draw", ["integers", "normal"])
def test_front_of_many_against_brute_force(draw, n_objectives):
    """As of so many most are left out before they are sorted."""
    rng = np.random.default_rng(n_objectives)
    points = (
        rng.integers(0, 9, (600, n_objectives))
        if draw == "integers"
        else rng.normal(size=(600, n_objectives))
    )
    best = {tuple(p) for p in points if not ((points <= p).all(1) & (points < p).any(1)).any()}
    found = find_front(points)
    assert [tuple(points[i]) for i in found] == sorted(best)
    assert all(i == np.flatnonzero((points == points[i]).all(1))[0] for i in found)  # of equals the first


@pytest.mark.parametrize("seed", range(12))
def test_what_is_clearly_beaten_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    n, m = rng.integers(1, 300), rng.integers(1, 4)
    losses = rng.integers(0, 20, (n, m)).astype(float) if seed % 2 else rng.normal(size=(n, m))
    errors = rng.random((n, m)) * rng.choice([0, 0.1, 0.5, 2]) if seed % 3 else np.full((n, m), 0.5)
    others = rng.choice(n, max(n // 2, 1), replace=False)
    some, every = [], []
    for i in range(n):
        gains, beyond = losses[i] - losses[others], 2 * np.hypot(errors[i], errors[others])
        some.append(((gains > beyond).any(1) & ~(-gains > beyond).any(1)).any())
        every.append((gains > beyond).all(1).any())
    assert find_clearly_beaten(losses, errors, others).tolist() == some
    assert find_clearly_beaten(losses, errors, others, in_all=True).tolist() == every


def test_knee_is_nearest_to_the_ideal_after_scaling():
    assert find_knee([[0, 100], [1, 10], [10, 0]]) == 1
    assert find_knee([[5, 5]]) == 0
    assert find_knee([[0, 1], [0, 2]]) == 0
    assert find_knee([[14.0, 0.10], [15.5, 0.05]], scale=[2.0, 0.15]) == 0
    assert find_knee([[14.0, 0.24], [14.5, 0.05]], scale=[2.0, 0.2]) == 1


def test_limits():
    assert parse_limit("fid<=12", ["fid"]).holds({"fid": 12.0})
    assert not parse_limit(" fid >= 12.5 ", ["fid"]).holds({"fid": 12.0})
    for text in ("fid<12", "fid<=", "fid<=a", "<=1"):
        with pytest.raises(MemControlError, match="REWARD<=NUMBER"):
            parse_limit(text, ["fid"])
    with pytest.raises(MemControlError, match="did you mean fid[?] memcontrol rewards lists all$"):
        parse_limit("fod<=1", ["kid", "fid"])


def test_what_was_not_measured_keeps_no_limit():
    assert parse_limit("fid<=1", ["fid"]).holds({"fid": 1.0}) and not parse_limit("fid<=1", ["fid"]).holds(
        {"kid": 0.0}
    )
