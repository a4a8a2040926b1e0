"""Owns the figures of membership: how well an attacker who holds the model tells its training images from
unseen ones. They are of the attack that was tried, and so lower bounds of what can be told.

Notations

members, others: Scores of training and of unseen images, or of the people in them; high: looks trained on.
L_base, L_tuned: Losses of an image at K timesteps with fixed noise, of the model before and after.
r: Guesses of the epsilon audit, half of them "member" of the highest scores, half "no member" of the lowest.
v: Right ones among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import beta, rankdata

from memcontrol.core.estimate import Estimate, Measured
from memcontrol.core.seeds import derive_seed

_FALSE_POSITIVES = {100: 0.01, 0: 0.05}  # by how many others there are at least
_MOST_GUESSES = 100  # of either kind: the surest ones say most
_EPSILON_LEVEL = 0.05


def score_membership(base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """How much more an image's loss fell in training than it would by itself, the base being the reference
    (RMIA, Zarifzadeh et al. 2024, arXiv 2312.03262): mean over timesteps of log L_base - log L_tuned, from
    losses [N, K] each. [N]; exactly 0 where nothing was trained."""
    return (_take_log(base) - _take_log(tuned)).mean(1)


def _take_log(losses: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(losses, 1e-12))


def average_groups(scores: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """The mean score of each group, in the order in which they come first: [G]."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    rows = np.array([numbers[name] for name in groups])
    return np.bincount(rows, scores) / np.bincount(rows)


def membership_auc(members: np.ndarray, others: np.ndarray) -> Estimate:
    """The chance that a member's score is above another's, ties counting half (Mann and Whitney 1947), with
    the standard error of DeLong et al. (Biometrics 1988). Scores [N] and [M]."""
    n, m = len(members), len(others)
    ranks = rankdata(np.concatenate([members, others]))
    above = (ranks[:n] - rankdata(members)) / m  # of each member, the share of others below it
    below = 1 - (ranks[n:] - rankdata(others)) / n  # of each other, the share of members above it
    if min(n, m) < 2:
        return Estimate(float(above.mean()))
    variance = above.var(ddof=1) / n + below.var(ddof=1) / m
    return Estimate(float(above.mean()), math.sqrt(variance))


def _measure_loss(scores: np.ndarray) -> Estimate:
    """The loss over the base's, as a geometric mean over those whose scores [N] are given."""
    loss = math.exp(-scores.mean())
    return Estimate(loss, loss * scores.std(ddof=1) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0)


def membership_tpr(members: np.ndarray, others: np.ndarray, false_positives: float) -> Estimate:
    """The share of members that are told where at most this share of others is taken for members, with the 95
    % interval of Clopper and Pearson (1934). Of scores that are equal, as many count as would by chance."""
    allowed = int(false_positives * len(others) + 1e-9)
    line = np.sort(others)[::-1][allowed]
    tied_others = (others == line).sum()
    of_ties = (allowed - (others > line).sum()) / tied_others
    told = (members > line).sum() + of_ties * (members == line).sum()
    return _bound_share(float(told), len(members))


def _bound_share(hits: float, n: int) -> Estimate:
    low = beta.ppf(_EPSILON_LEVEL / 2, hits, n - hits + 1) if hits > 0 else 0.0
    high = beta.ppf(1 - _EPSILON_LEVEL / 2, hits + 1, n - hits) if hits < n else 1.0
    return Estimate(hits / n, low=float(low), high=float(high))


def choose_false_positives(n_others: int) -> float:
    """The share of false alarms that so many others can show."""
    return next(share for least, share in _FALSE_POSITIVES.items() if n_others >= least)


def choose_guesses(n: int) -> int:
    """r for n members and n others, fixed before anything is looked at: the surest third of each."""
    return 2 * min(math.ceil(n / 3), _MOST_GUESSES)


def find_epsilon(right: int, guesses: int) -> float:
    """The epsilon that so many right guesses show, at 95 % (Steinke, Nasr and Jagielski 2023, arXiv
    2305.08846): under epsilon-DP a guess is right with a chance of at most e^eps / (1 + e^eps), so that v is
    below a binomial. At least 0."""
    p = float(beta.ppf(_EPSILON_LEVEL, right, guesses - right + 1)) if right else 0.0
    return max(0.0, math.log(p / (1 - p))) if 0 < p < 1 else 0.0


def count_right_guesses(members: np.ndarray, others: np.ndarray, seed: int) -> tuple[int, int]:
    """v and r, of as many members as others: where there are more of one side, of some that are drawn. Equal
    scores come in a random order."""
    rng, n = np.random.default_rng(derive_seed(seed, "guesses")), min(len(members), len(others))
    scores = np.concatenate([rng.permutation(side)[:n] for side in (members, others)])
    order = np.lexsort((rng.random(2 * n), scores))
    r = choose_guesses(n)
    lowest, highest = order[: r // 2], order[-(r // 2) :]
    return int((highest < n).sum() + (lowest >= n).sum()), r


def epsilon_low(members: np.ndarray, others: np.ndarray, seed: int = 0) -> float:
    """The least epsilon of differential privacy that the model can have, at 95 %. Valid only where chance
    alone has made members of some and not of others."""
    return find_epsilon(*count_right_guesses(members, others, seed))


def measure_membership(
    base: tuple[np.ndarray, np.ndarray],
    tuned: tuple[np.ndarray, np.ndarray],
    groups: tuple[Sequence[str], Sequence[str]],
    seed: int,
    is_drawn: bool,
) -> Measured:
    """Every figure, from losses of members [N, K] and others [M, K], of the base and of the model, and who is
    in each image; a group is one unit. `is_drawn`: chance has made members of some, which epsilon needs."""
    members, others = (
        average_groups(score_membership(*losses), own) for losses, own in zip(zip(base, tuned), groups)
    )
    before = [average_groups(-_take_log(losses).mean(1), own) for losses, own in zip(base, groups)]
    share = choose_false_positives(len(others))
    found: Measured = {
        "membership_auc": membership_auc(members, others),
        "membership_tpr": membership_tpr(members, others, share),
        "membership_fpr": share,
        "membership_base_auc": membership_auc(*before),
        "membership_holdout_loss": _measure_loss(others),
        "membership_images": len(groups[0]),  # of members
        "membership_members": len(members),
        "membership_others": len(others),
    }
    if not is_drawn:
        return found
    right, guesses = count_right_guesses(members, others, seed)
    return found | {
        "epsilon_low": find_epsilon(right, guesses),
        "epsilon_most": find_epsilon(guesses, guesses),
        "epsilon_right": right,
        "epsilon_guesses": guesses,
    }
