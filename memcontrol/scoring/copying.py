"""Owns the rewards of memorization and copying: the memorization distance, copy rates, clear copies.

Every value is an Estimate, which knows its error or interval. Distances are Euclidean, sums are float64.

Notations, beside those of `distances`

line: The ratio that 99 % of real images exceed: of H real ones, that of rank 1 + int(0.01 (H - 1)).
swapped: The same with training and held-out images in each other's place.
M = mean log(d_H / d_T): The memorization distance, each term clipped to +-log 4.
m: Rows that are drawn of either reference for M, as many as the smaller one has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from memcontrol.core.estimate import Estimate, estimate_share
from memcontrol.core.reward_table import CLEAR_BY_CHANCE, CLIP, FALSE_POSITIVES
from memcontrol.core.seeds import derive_seed
from memcontrol.scoring.distances import (
    DistanceSpace,
    Space,
    Versions,
    make_space,
    nearest_versions,
    take_first,
)
from memcontrol.scoring.labels import trim_groups

_N_REFERENCE_DRAWS = 5
_TAIL_SHARE, _FEWEST_IN_TAIL = 10, 5  # one tenth of the ratios are its tail
_HEAVIEST_TAIL = 10.0


def copy_rate(generated, train, holdout, calibration=None, groups=(None, None)) -> Estimate:
    """The share of generated images nearer to a training image, relative to held-out ones, than 99 % of real
    images are.

    The threshold is the 1 % quantile of d(train) / d(holdout) for `calibration`, real images of neither set;
    without them, for the held-out images, each left out of its own reference, and with it all others of its
    group. `groups` name who is in each training and in each held-out image. A model that copies nothing has
    about 0.01, or `chance_rate` of the number of real images where they are few. The interval is Wilson's, of
    the share below this line; `p` is how often this share less that with train and holdout swapped is as
    large where labels are permuted by group. Raises MemControlError.
    """
    return measure_copy_rate(make_space(generated, train, holdout, calibration, groups))


def measure_copy_rate(space: Space) -> Estimate:
    share = estimate_share(space.ratios < line_ratio(space.real_ratios))
    return replace(share, labels=_permute_hits(space))


def measure_swapped_rate(space: Space) -> Estimate:
    """What the copy rate is with training and held-out images in each other's place: its null, for images
    that are nearer to everything than real ones are."""
    return estimate_share(space.swapped_ratios < line_ratio(space.swapped_real_ratios))


def _line_rank(n_real: int) -> int:
    """Which of the real images' ratios, the smallest being the first, is the line."""
    return 1 + int(FALSE_POSITIVES * (n_real - 1))


def chance_rate(n_real: int) -> float:
    """What a model that copies nothing has on average, the line drawn from n_real images."""
    return _line_rank(n_real) / (n_real + 1)


def line_ratio(real: np.ndarray) -> float:
    """The ratio that 99 % of real images exceed."""
    rank = _line_rank(len(real)) - 1
    return float(np.partition(real, rank)[rank])


def combine_rates(rates: Sequence[tuple[Estimate, Estimate | float]]) -> Estimate:
    """Of copy rates and their swapped ones, one pair a descriptor: the largest excess of the one over the
    other, with the p of the largest of all, in standard deviations of its own null each."""
    value = max(float(rate) - float(swapped) for rate, swapped in rates)
    found = [rate.labels for rate, _ in rates if rate.labels is not None]
    standard = [(labels - labels.mean()) / max(labels.std(), 1e-12) for labels in found]
    return Estimate(value, labels=np.max(standard, axis=0))


def find_chances(spaces: Sequence[Space]) -> np.ndarray:
    """Of each image in each descriptor, the chance that an image which is no copy comes as near: [spaces, N].

    By whichever tail is heavier: of real images, either side taken for the training images, or of the images
    themselves towards the held-out side, to which nothing can have been copied.
    """
    return np.array([_find_chances_in(space) for space in spaces])


def _find_chances_in(space: Space) -> np.ndarray:
    real = np.concatenate([space.real_ratios, space.swapped_real_ratios])
    return np.maximum(tail_chances(real, space.ratios), tail_chances(space.swapped_ratios, space.ratios))


def tail_chances(known: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Of each ratio [N], the chance that one like the `known` [n] is as low.

    Near 0, P(ratio < r) goes as r to the power of the data's dimension, so the logarithm has an exponential
    lower tail. Its scale s is the mean excess of the k known ratios that are lowest, a tenth of them (Hill
    1975); that this is an estimate makes the tail a Lomax, k / (n + 1) (1 + e / (a s))^-a with a = k. Images
    differ in their dimension, and a mixture has a heavier tail: a is 10 at the most, which holds on
    photographs (docs/rewards.md). Above the tail, the share of the known that are lower.
    """
    logs, own = np.sort(np.log(known)), np.log(r)
    n = len(logs)
    k = min(max(_FEWEST_IN_TAIL, n // _TAIL_SHARE), n - 1)
    s = max(float((logs[k] - logs[:k]).mean()), 1e-6)
    a = min(float(k), _HEAVIEST_TAIL)
    e = np.maximum(logs[k] - own, 0)  # [N]
    body = np.maximum(np.searchsorted(logs, own, side="right"), k) / (n + 1)
    return np.where(e > 0, k / (n + 1) * (1 + e / (a * s)) ** -a, body)


@dataclass(frozen=True)
class Suspects:
    """What each generated image comes nearest to, in the descriptor in which that is least likely without
    copying (of parts, where it is no clear copy of a whole image): [N] each."""

    chances: np.ndarray  # that an image which is no copy comes as near
    descriptors: np.ndarray  # numbers of the spaces
    training: np.ndarray  # rows of the nearest training images
    held_out: np.ndarray  # and of the nearest held-out ones
    distances: np.ndarray  # to the training images
    ratios: np.ndarray  # r
    regions: np.ndarray  # where it is compared: left, top, right, bottom as shares of a side [N, 4]
    is_clear: np.ndarray  # whether it is a clear copy
    is_copy: np.ndarray  # whether any rule calls it one, in any descriptor

    @property
    def order(self) -> np.ndarray:
        """The most suspicious first."""
        return np.lexsort((self.ratios, self.chances))

    @property
    def copied(self) -> np.ndarray:
        """Rows of the training images that copies are of."""
        return np.unique(self.training[self.is_copy])


def find_suspects(spaces: Sequence[Space], n_judged: int) -> Suspects:
    """In the descriptors of all spaces, among `n_judged` images of the model.

    A clear copy is so near to a training image, relative to held-out ones, that without copying one such
    among `n_judged` images and all descriptors has a chance of 0.5 % at most. Few held-out images suffice for
    it, since it goes by how far below the line an image lies.
    """
    chances = find_chances(spaces)
    most = CLEAR_BY_CHANCE / (n_judged * len(spaces))
    is_clear = chances.min(0) < most
    # a copy of a whole image is shown as one, however near its parts are
    of_whole = np.where([[space.is_whole] for space in spaces], chances, 1.0)
    strongest = np.where(of_whole.min(0) < most, of_whole.argmin(0), chances.argmin(0))

    def choose(by_space: list[np.ndarray]) -> np.ndarray:
        return np.array(by_space)[strongest, np.arange(len(strongest))]

    below = np.any([space.ratios < line_ratio(space.real_ratios) for space in spaces], axis=0)
    return Suspects(
        chances.min(0),
        strongest,
        choose([space.to_train[1] for space in spaces]),
        choose([space.to_holdout[1] for space in spaces]),
        choose([space.to_train[0] for space in spaces]),
        choose([space.ratios for space in spaces]),
        choose([space.regions for space in spaces]),
        is_clear,
        below | is_clear,
    )


def memorization(generated, train, holdout, seed: int = 0, groups=(None, None)) -> Estimate:
    """M, its standard deviation under permuted labels, and the p-value of M > 0.

    M is the mean over generated images of log(d(holdout) / d(train)), clipped to +-log 4, with references of
    equal size: the larger one is drawn down, five times. 0 where training images are no nearer than held-out
    ones, positive for copying. The null keeps the pooled references and permutes by group (`groups`, of
    training and of held-out images) which of them are called training images.
    """
    return measure_memorization(make_space(generated, train, holdout, None, groups, seed))


def measure_memorization(space: DistanceSpace) -> Estimate:
    order_train, order_holdout = trim_groups(space.orders, space.groups)
    m = min(len(order_train), len(order_holdout))
    n_draws = 1 if len(order_train) == len(order_holdout) else _N_REFERENCE_DRAWS
    draws = [_draw_references(space, (order_train, order_holdout), m, draw) for draw in range(n_draws)]
    terms = [
        np.clip(-np.log(space.divide(*(_find_nearest(space.generated, rows) for rows in pair))), -CLIP, CLIP)
        for pair in draws
    ]
    contributions = np.mean(terms, axis=0)  # [N]
    labels = _permute_distances(space)
    return Estimate(
        float(contributions.mean()), float(labels[1:].std()), contributions=contributions, labels=labels
    )


def _draw_references(
    space: DistanceSpace, orders: tuple[np.ndarray, np.ndarray], m: int, draw: int
) -> list[np.ndarray]:
    """m training and m held-out images at random, without replacement: [m, D] each. All of a side that has no
    more."""
    rng = np.random.default_rng(derive_seed(space.seed, "memorization", draw))
    references = zip((space.train[0], space.holdout[0]), orders)
    return [
        rows[order] if len(order) == m else rows[order[rng.permutation(len(order))[:m]]]
        for rows, order in references
    ]


def _find_nearest(queries: Versions, references: np.ndarray) -> np.ndarray:
    return take_first(*nearest_versions(queries, references, 1))[0]


def _permute_hits(space: Space) -> np.ndarray:
    """The copy rate less the swapped one, under each labelling: [1 + B]."""
    found = zip(space.iterate_relabelled(), _find_lines(space))
    return np.array([(r < line).mean() - (swapped < other).mean() for (r, swapped), (line, other) in found])


def _permute_distances(space: DistanceSpace) -> np.ndarray:
    """M over all pooled references, under each labelling: [1 + B]."""
    return np.array([np.clip(-np.log(r), -CLIP, CLIP).mean() for r in space.relabelled_ratios])


def _find_lines(space: Space) -> list[tuple[float, float]]:
    """The line, and that of swapped labels, under each labelling."""
    return space.remember(
        "lines",
        lambda: [
            (line_ratio(held), line_ratio(trained)) for held, trained in space.iterate_relabelled_real()
        ],
    )
