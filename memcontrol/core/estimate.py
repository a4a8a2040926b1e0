"""Owns numbers that know their error: estimates and their plain form, intervals of shares, comparisons in
pairs, rank correlation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from memcontrol.core.errors import MemControlError

_NORMAL_95 = 1.959963984540054
_ERROR, _LOW, _HIGH, _P = "_error", "_low", "_high", "_p"  # spelt here and nowhere else
# Half a 95 % interval in standard errors, as it is read back. Rounded, unlike NORMAL_95: plots, ties,
# hypervolumes and what a search draws next rest on it from the first study on, and stay as they were.
READ_95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error, its 95 % interval, or the p-value of what it says, as far as they are
    known. An error gives the interval, where none is given.

    `contributions` [N], where there are any: what each generated image adds, with the value as their mean;
    for a value that is no mean of images, its first-order part (its influence function). They make two models
    comparable image by image.

    `labels` [1 + B], where there are any: a statistic of the references as they are, then with their labels
    permuted; the same permutations wherever the references are the same. It gives the p.

    It is no number itself, since sums and ratios would lose the error in silence: `value`, or float() of it,
    is the number, and format() writes that one.
    """

    value: float
    error: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    contributions: np.ndarray | None = field(default=None, repr=False, compare=False)
    labels: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "value", float(self.value))  # as dataclasses set what is frozen
        if self.labels is not None and self.p is None:
            object.__setattr__(self, "p", permutation_p(self.labels))
        if self.error is None:
            return
        for name, sign in (("low", -1), ("high", 1)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.value + sign * _NORMAL_95 * self.error)

    def __float__(self) -> float:
        return self.value

    def __format__(self, form: str) -> str:
        return format(self.value, form)

    @property
    def holds_zero(self) -> bool:
        """Whether its interval does: its sign is not known."""
        return self.low is not None and self.high is not None and self.low <= 0 <= self.high


Measured = dict[str, Estimate | float]  # rewards by name, Estimates where they know an error


@dataclass(frozen=True)
class Rewards:
    """The rewards of one model in their plain form, as files, the database and every --json hold them: the
    value under its NAME, and beside it NAME_error, or NAME_low and NAME_high, and NAME_p."""

    plain: Mapping[str, float]

    @classmethod
    def from_estimates(cls, measured: Mapping[str, Estimate | float]) -> Rewards:
        plain: dict[str, float] = {}
        for name, value in measured.items():
            plain[name] = float(value)
            if isinstance(value, Estimate):
                plain |= _list_beside(name, value)
        return cls(plain)

    def to_plain(self) -> dict[str, float]:
        return dict(self.plain)

    def interval(self, name: str) -> tuple[float, float]:
        """The 95 % interval; the value twice where nothing is known of its error."""
        if self.has_ends(name):
            return self.plain[name + _LOW], self.plain[name + _HIGH]
        reach = READ_95 * self.plain.get(name + _ERROR, 0.0)
        return self.plain[name] - reach, self.plain[name] + reach

    def error(self, name: str) -> float:
        """The standard error, from what is beside the value; 0 where nothing is."""
        if name + _ERROR in self.plain:
            return self.plain[name + _ERROR]
        if self.has_ends(name):
            return (self.plain[name + _HIGH] - self.plain[name + _LOW]) / (2 * READ_95)
        return 0.0

    def low(self, name: str) -> float | None:
        """The lower end of the interval, where one was measured."""
        return self.plain[name + _LOW] if self.has_ends(name) else None

    def has_ends(self, name: str) -> bool:
        """Whether both ends were measured: `epsilon_low` is a reward of its own, and no end of `epsilon`."""
        return name + _LOW in self.plain and name + _HIGH in self.plain

    def p(self, name: str) -> float:
        """The p-value of what the value says, such as that there is copying."""
        return self.plain[name + _P]

    def written(self, name: str, form: str, mark: str = "") -> str:
        """The value in a form such as "{:.1f}", with its error and a mark behind that, or with its interval:
        "22.6 ± 0.8", "1.2% (0.4%-2.8%)"; empty where it was not measured."""
        if name not in self.plain:
            return ""
        text = form.format(self.plain[name])
        if name + _ERROR in self.plain:
            return f"{text} ± {form.format(self.plain[name + _ERROR])}{mark}"
        if self.has_ends(name):
            return f"{text} ({form.format(self.plain[name + _LOW])}-{form.format(self.plain[name + _HIGH])})"
        return text


def _list_beside(name: str, estimate: Estimate) -> dict[str, float]:
    """What stands beside an estimate's value: its error or, without one, its interval; and its p."""
    ends = {_LOW: estimate.low, _HIGH: estimate.high} if estimate.error is None else {_ERROR: estimate.error}
    beside = ends | {_P: estimate.p}
    return {name + suffix: float(number) for suffix, number in beside.items() if number is not None}


def strip_end(name: str) -> str:
    """NAME of NAME_low and NAME_high, which limits may be put on; any other name as it is."""
    return name.removesuffix(_LOW).removesuffix(_HIGH)


def estimate_from_contributions(value: float, added: np.ndarray) -> Estimate:
    """The value, with its first-order part by image [N] and the standard error that follows from it."""
    error = float(added.std(ddof=1) / math.sqrt(len(added)))
    return Estimate(value, error, contributions=value + added - added.mean())


def estimate_share(hits: np.ndarray) -> Estimate:
    """The share of a boolean array, with its Wilson interval."""
    share = float(hits.mean())
    low, high = wilson_interval(share, len(hits))
    return Estimate(share, low=low, high=high, contributions=hits.astype(np.float64))


def convert_to_percent(share: Estimate) -> Estimate:
    low, high = (None if end is None else 100 * end for end in (share.low, share.high))
    return Estimate(100 * share.value, low=low, high=high)


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n (Wilson 1927)."""
    centre = share + _NORMAL_95**2 / (2 * n)
    half = _NORMAL_95 * math.sqrt(share * (1 - share) / n + _NORMAL_95**2 / (4 * n * n))
    total = 1 + _NORMAL_95**2 / n
    # rounding must not shut out 0 or 1
    return min(share, max(0.0, (centre - half) / total)), max(share, min(1.0, (centre + half) / total))


def beta_binomial_p(hits: int, n: int, rank: int, n_real: int) -> float:
    """The chance of at least `hits` of n images below the `rank`-th smallest of n_real values, all drawn
    alike.

    The share below such a value is Beta(rank, n_real + 1 - rank) distributed, so the number of hits is
    beta-binomial: with few real images the line itself errs, however many images are held against it.
    """
    a, b = rank, n_real + 1 - rank

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    terms = (
        math.exp(log_beta(j + a, n - j + b) - log_beta(a, b) - log_beta(j + 1, n - j + 1) - math.log(n + 1))
        for j in range(hits, n + 1)
    )
    return min(1.0, sum(terms))


def permutation_p(labels: np.ndarray) -> float:
    """How often a statistic under permuted labels is as large as under the true ones, which come first
    (Phipson and Smyth 2010)."""
    return float((1 + (labels[1:] >= labels[0] - 1e-12).sum()) / len(labels))


def paired_difference(a: Estimate, b: Estimate, prompts=None, n_draws: int = 1000, seed: int = 0) -> Estimate:
    """a - b for two models that were given the same prompts and noise, image by image, with its error and 95
    % interval.

    Prompts are drawn with replacement, and all images of a prompt with them (`prompts` [N] names each
    image's; without it every image has its own): what both models share, such as a prompt that is easily
    copied, cancels. Where both know it, the error has the part that comes from which references happen to
    be training images. Raises MemControlError where the estimates have no contributions, or of different
    numbers of images.
    """
    # a plain number has none
    mine, theirs = (getattr(estimate, "contributions", None) for estimate in (a, b))
    if mine is None or theirs is None:
        raise MemControlError(
            "only estimates with a contribution of each image can be compared in pairs; compare "
            "errors instead"
        )
    if len(mine) != len(theirs) or (prompts is not None and len(prompts) != len(mine)):
        raise MemControlError(
            "models compared in pairs need the same prompts and noise, and so equal numbers of images"
        )
    apart = mine - theirs
    names = np.arange(len(apart)) if prompts is None else np.asarray(prompts)
    _, groups = np.unique(names, return_inverse=True)
    sums, counts = np.bincount(groups, apart), np.bincount(groups)  # [prompts]
    rng, shares = np.random.default_rng(seed), np.full(len(sums), 1 / len(sums))
    drawn = rng.multinomial(len(sums), shares, size=n_draws)  # [draws, prompts]
    spread = drawn @ sums / (drawn @ counts) - apart.mean()
    low, high = np.quantile(spread, (0.025, 0.975))
    value, of_labels = float(a) - float(b), _compare_labels(a, b)
    reach = _NORMAL_95 * of_labels
    return Estimate(
        value,
        math.hypot(spread.std(), of_labels),
        low=value - math.hypot(low, reach),
        high=value + math.hypot(high, reach),
    )


def _compare_labels(a: Estimate, b: Estimate) -> float:
    """The standard deviation of the difference under permuted labels; 0 where it is not known."""
    if a.labels is None or b.labels is None or len(a.labels) != len(b.labels):
        return 0.0
    return float((a.labels - b.labels)[1:].std())


def spearman(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Rank correlation, ties at their mean rank, with the 95 % interval of Fisher's z and Bonett and Wright's
    variance (2000)."""
    ranks = _mean_ranks(x), _mean_ranks(y)
    if any(rank.std() == 0 for rank in ranks):
        return Estimate(0.0, low=-1.0, high=1.0)
    rho = float(np.clip(np.corrcoef(*ranks)[0, 1], -1, 1))
    half = _NORMAL_95 * math.sqrt((1 + rho**2 / 2) / max(len(x) - 3, 1))
    z = math.atanh(min(max(rho, -1 + 1e-12), 1 - 1e-12))
    return Estimate(rho, low=math.tanh(z - half), high=math.tanh(z + half))


def _mean_ranks(values: Sequence[float]) -> np.ndarray:
    """The place of each value [N] among all, the mean of their places for equal ones."""
    rising = np.sort(values)
    return np.array([np.flatnonzero(rising == value).mean() for value in values])


def pool_estimates(draws: Sequence[Estimate]) -> Estimate:
    """The mean of one reward over independent draws of the same number of images: as biased as each, with a
    smaller error."""
    value, contributions = float(np.mean([draw.value for draw in draws])), _pool_contributions(draws)
    labels = _pool_labels(draws)
    errors = [draw.error for draw in draws if draw.error is not None]
    if len(errors) == len(draws):
        # what the labels add is common to all draws, and no draw makes it less
        error = (
            math.sqrt(sum(error**2 for error in errors)) / len(draws)
            if labels is None
            else float(labels[1:].std())
        )
        return Estimate(value, error, contributions=contributions, labels=labels)
    if draws[0].low is not None and contributions is not None:  # a share
        low, high = wilson_interval(value, len(contributions))
        return Estimate(value, low=low, high=high, contributions=contributions, labels=labels)
    reaches = [
        (draw.value - draw.low, draw.high - draw.value)
        for draw in draws
        if draw.low is not None and draw.high is not None
    ]
    if len(reaches) == len(draws):
        below, above = map(_pooled_reach, zip(*reaches))
        return Estimate(value, low=value - below, high=value + above, contributions=contributions)
    return Estimate(value, contributions=contributions)


def _pool_labels(draws: Sequence[Estimate]) -> np.ndarray | None:
    """Their mean; None where one has none."""
    known = [draw.labels for draw in draws if draw.labels is not None]
    return np.mean(known, axis=0) if len(known) == len(draws) else None


def _pool_contributions(draws: Sequence[Estimate]) -> np.ndarray | None:
    """Those of all draws, end to end; None where one has none."""
    known = [draw.contributions for draw in draws if draw.contributions is not None]
    return np.concatenate(known) if len(known) == len(draws) else None


def _pooled_reach(reaches: Sequence[float]) -> float:
    """How far a mean's interval goes to one side, from those of its independent parts (MOVER: Zou and Donner,
    Statistics in Medicine 2008)."""
    return math.sqrt(sum(reach**2 for reach in reaches)) / len(reaches)
