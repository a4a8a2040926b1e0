"""Fronts against brute force, knees and limits by hand."""

import numpy as np
import pytest

from memcontrol.core.errors import MemControlError
from memcontrol.study.pareto import find_front, find_knee, parse_limit


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("n_objectives", [1, 2, 3])
def test_front_against_brute_force(seed, n_objectives):
    points = np.random.default_rng(seed).integers(0, 6, (30, n_objectives)).astype(float)
    best = {tuple(p) for p in points if not any((q <= p).all() and (q < p).any() for q in points)}
    found = [tuple(points[i]) for i in find_front(points.tolist())]
    assert set(found) == best and len(found) == len(best) and found == sorted(found)


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
    with pytest.raises(MemControlError, match="this study has fid, kid"):
        parse_limit("fod<=1", ["kid", "fid"])


def test_what_was_not_measured_keeps_no_limit():
    assert parse_limit("fid<=1", ["fid"]).holds({"fid": 1.0}) and not parse_limit("fid<=1", ["fid"]).holds(
        {"kid": 0.0}
    )
