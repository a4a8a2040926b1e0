"""Problems over masks of 13 bits with two objectives to minimise, small enough to know the whole front: what
samplers are measured on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

N_BITS = 13
Points = np.ndarray  # [..., 2]


def masks() -> np.ndarray:
    return np.array(list(itertools.product((0, 1), repeat=N_BITS)))


def mask_family(rng: np.random.Generator) -> Callable[[np.ndarray], Points]:
    """Groups of layers that learn features: each feature is learned by any of its groups, less and less by
    every further one; against it the parameters that are trained, and what pairs of groups memorize
    together."""
    share = rng.random((N_BITS, 6)) * (rng.random((N_BITS, 6)) < 0.4) * 0.8
    weight, size, pairs = (
        rng.dirichlet(np.ones(6)),
        rng.lognormal(0, 0.6, N_BITS),
        np.triu(rng.random((N_BITS, N_BITS)) ** 4, 1),
    )

    def values(x: np.ndarray) -> Points:
        missed = np.prod(1 - x[:, :, None] * share[None], axis=1) @ weight
        return np.stack(
            [missed, (x @ size) / size.sum() + 0.5 * np.einsum("ni,ij,nj->n", x, pairs, x) / pairs.sum()], 1
        )

    return values


def knapsack(rng: np.random.Generator) -> Callable[[np.ndarray], Points]:
    """Two profits under one capacity of half the weight; what exceeds it is taken off both, and more."""
    profit, weight = rng.integers(10, 100, (N_BITS, 2)), rng.integers(10, 100, N_BITS)

    def values(x: np.ndarray) -> Points:
        excess = np.maximum(x @ weight - weight.sum() / 2, 0)
        return -(x @ profit) + 2.0 * excess[:, None]

    return values


def rmnk(rng: np.random.Generator, k: int = 4) -> Callable[[np.ndarray], Points]:
    """Rugged: what each bit contributes depends on four others, at random (NK landscapes; Verel et al.
    2013)."""
    links = np.array(
        [[i, *rng.choice([j for j in range(N_BITS) if j != i], k, replace=False)] for i in range(N_BITS)]
    )
    table = rng.random((2, N_BITS, 2 ** (k + 1)))

    def values(x: np.ndarray) -> Points:
        index = (x[:, links] * 2 ** np.arange(k + 1)).sum(2)  # [N, bits]
        return np.stack([-table[m][np.arange(N_BITS), index].mean(1) for m in (0, 1)], 1)

    return values


def mubqp(rng: np.random.Generator) -> Callable[[np.ndarray], Points]:
    """Two quadratic forms over bits, dense, with entries from -100 to 100 (Liefooghe et al. 2014)."""
    forms = [rng.integers(-100, 101, (N_BITS, N_BITS)) * (rng.random((N_BITS, N_BITS)) < 0.8) for _ in (0, 1)]

    def values(x: np.ndarray) -> Points:
        return np.stack([-np.einsum("ni,ij,nj->n", x, form, x).astype(float) for form in forms], 1)

    return values


FAMILIES = {"mask": mask_family, "knapsack": knapsack, "rmnk": rmnk, "mubqp": mubqp}


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """The area that two-dimensional points dominate below the reference."""
    total, height = 0.0, reference[1]
    for x, y in sorted(map(tuple, points)):
        if x < reference[0] and y < height:
            total += (reference[0] - x) * (height - y)
            height = y
    return total


N_BUDGETS, N_RATIOS = 9, 5  # options of the two further coordinates
N_FEWER = 9  # bits of a mask that has them


class ProblemWithSettings:
    """An instance of a family over masks of N_FEWER bits, with a budget and a skipping ratio beside: quality
    is gained by the budget, ever less, and memorization grows with it, the more the more bits are on;
    skipping takes of both. Points are (bits..., budget, ratio), options by their numbers."""

    def __init__(self, family: str, seed: int):
        rng = np.random.default_rng([seed, 1, list(FAMILIES).index(family)])
        whole = Problem(family, seed)
        of_masks = whole.values[(whole.masks[:, N_FEWER:] == 0).all(1)]  # [2 ** N_FEWER, 2]
        bits = np.array(list(itertools.product((0, 1), repeat=N_FEWER)))
        z = (of_masks - of_masks.min(0)) / np.ptp(of_masks, 0)
        t, s = np.meshgrid(np.linspace(0, 1, N_BUDGETS), np.linspace(0, 1, N_RATIOS), indexing="ij")
        a, b, c, d, best = rng.uniform(0.5, 1.5, 4).tolist() + [rng.uniform(0.2, 0.8)]
        share = bits.mean(1)[:, None, None]  # [masks, 1, 1]
        lost = a * (1 - t) ** 2 + 0.3 * b * (s - best) ** 2 + 0.2 * (1 - t) * s
        kept = c * t**2 * (0.3 + share) * (1 - 0.7 * d * s)
        self.values = np.stack([z[:, 0, None, None] + lost, z[:, 1, None, None] + kept], -1)
        flat = self.values.reshape(-1, 2)
        self.reference = flat.max(0)
        self.whole = hypervolume(flat, self.reference)

    def value(self, point: Sequence[int]) -> tuple[float, float]:
        *bits, budget, ratio = point
        return tuple(self.values[int("".join(map(str, bits)), 2), budget, ratio])

    def ratio(self, seen: Sequence[Sequence[int]]) -> float:
        """The hypervolume of these points over the true front's."""
        return hypervolume([self.value(point) for point in seen], self.reference) / self.whole


class Problem:
    """One instance of a family: every mask's values, and its front's hypervolume against the worst of all
    masks."""

    def __init__(self, family: str, seed: int):
        self.masks = masks()
        self.values = FAMILIES[family](np.random.default_rng([seed, list(FAMILIES).index(family)]))(
            self.masks
        )
        self.reference = self.values.max(0)
        self.whole = hypervolume(self.values, self.reference)
        self.index = {tuple(mask): i for i, mask in enumerate(self.masks.tolist())}

    def value(self, mask: Sequence[int]) -> tuple[float, float]:
        return tuple(self.values[self.index[tuple(mask)]])

    def ratio(self, seen: Sequence[Sequence[int]]) -> float:
        """The hypervolume of these masks over the true front's."""
        return hypervolume([self.value(mask) for mask in seen], self.reference) / self.whole
