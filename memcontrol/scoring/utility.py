"""Owns utility: how well a classifier that has seen generated images alone tells the classes of real images,
beside one that has seen as many real training images (as CheXGenBench does, arXiv 2505.10496).

Notations

AUROC of a class: The chance that an image of it has a higher score for it than an image of another, ties
    counting half; 0.5 is chance. Utility is the mean over classes that the reference has (macro).
N, K, B: Images and classes of the reference, and draws of its images, by group, with replacement.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from memcontrol.core.estimate import Estimate, Measured
from memcontrol.core.seeds import derive_seed

MOST_CLASSES = 100
FEWEST_OF_CLASS = 2  # images in a part, of a class that something can be said of
N_REDRAWN = 200
_MOST_WEIGHTS = 2**22  # that are in memory at a time
_STRENGTH = 0.1  # scikit-learn's C of the probe, over standardised features
_MOST_ITERATIONS = 500
_NETWORK_STEPS, _N_IN_STEP, _RATE = 300, 32, 3e-3  # of the network
_WIDTHS = (16, 32, 64)

Score = Callable[[np.ndarray, Sequence[str], np.ndarray, Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Classes:
    """What is in each generated, training and reference image, as `data.label` says; in a generated one, what
    is in the training image whose caption it was made from."""

    generated: Sequence[str]
    train: Sequence[str]
    holdout: Sequence[str]

    @property
    def names(self) -> list[str]:
        """Those of the reference: others cannot be tested."""
        return sorted(set(self.holdout))

    @property
    def can_be_told(self) -> bool:
        """Whether there are two to tell apart, in the reference and among training images."""
        return len(self.names) > 1 and len(set(self.train)) > 1


@dataclass(frozen=True)
class Skill:
    """AUROCs of a classifier on the reference: by class, and their mean."""

    by_class: np.ndarray  # [1 + B, K], first as the reference is, then of its draws; NaN where one lacks it

    @property
    def macro(self) -> np.ndarray:
        """[1 + B]."""
        known = np.isfinite(self.by_class)
        total, n = np.where(known, self.by_class, 0).sum(1), known.sum(1)
        return np.where(n > 0, total / np.maximum(n, 1), 0.5)


@dataclass(frozen=True)
class Utility:
    """Of classifiers that were trained on generated images, and on as many real ones."""

    classes: Classes
    skills: dict[str, tuple[Skill, Skill]]  # by the name of the reward
    n_real: int

    def to_rewards(self) -> Measured:
        found: Measured = {}
        for name, (made, real) in self.skills.items():
            found[name] = _estimate_from_draws(made.macro)
            found[f"{name}_real"] = _estimate_from_draws(real.macro)
            found[f"{name}_gap"] = _estimate_from_draws(real.macro - made.macro)
        names = self.classes.names
        return found | {
            "utility_images": len(self.classes.generated),
            "utility_real_images": self.n_real,
            "utility_classes": len(names),
            "utility_classes_missing": len(set(names) - set(self.classes.generated)),
        }

    def describe_classes(self) -> dict[str, dict[str, float]]:
        """By class: its AUROCs with their errors, and how many images there are of it."""
        counts = {
            f"{part}_images": Counter(getattr(self.classes, part))
            for part in ("generated", "train", "holdout")
        }
        return {
            one: self._describe_class(k) | {part: count[one] for part, count in counts.items()}
            for k, one in enumerate(self.classes.names)
        }

    def _describe_class(self, k: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, pair in self.skills.items():
            for own, skill in zip((name, f"{name}_real"), pair):
                told = _estimate_from_draws(skill.by_class[:, k])
                found |= {own: told.value, f"{own}_error": told.error or 0.0}
        return found


def _estimate_from_draws(values: np.ndarray) -> Estimate:
    """The value, with the spread over draws that have one, from [1 + B]."""
    drawn = values[1:][np.isfinite(values[1:])]
    return Estimate(float(values[0]), float(drawn.std(ddof=1)) if len(drawn) > 1 else 0.0)


def measure_utility(
    images: Mapping[str, Sequence[np.ndarray]],
    classes: Classes,
    groups: Sequence[str] | None,
    seed: int,
    remember: Callable[[str, Callable[[], Any]], Any],
) -> Utility:
    """By name of the reward, of generated, training and reference images [n, D] each, the last of `groups`:
    features for `utility`, pixels for `utility_network`. What depends on real images alone is looked up by
    `remember`."""
    rows = choose_real(len(classes.generated), len(classes.train), seed)
    labels = [classes.train[row] for row in rows]
    about = f"{derive_seed(seed, len(rows), *classes.train, *classes.holdout):016x}"
    ways: dict[str, Score] = {"utility": score_by_probe, "utility_network": partial(score_by_network, seed)}
    skills: dict[str, tuple[Skill, Skill]] = {}
    for name, (generated, train, holdout) in images.items():
        test = partial(_test_classifier, ways[name], holdout, classes, groups)
        real = remember(f"{name} of real images {about}", partial(test, train[rows], labels))
        skills[name] = (test(generated, classes.generated), real)
    return Utility(classes, skills, len(rows))


def choose_real(n: int, n_train: int, seed: int) -> np.ndarray:
    """Rows of as many training images as there are generated ones, or of all where they are fewer."""
    order = np.random.default_rng(derive_seed(seed, "utility")).permutation(n_train)
    return np.sort(order[:n])


def _test_classifier(
    score: Score,
    holdout: np.ndarray,
    classes: Classes,
    groups: Sequence[str] | None,
    images: np.ndarray,
    labels: Sequence[str],
) -> Skill:
    """One that is trained on these images."""
    scores = score(images, labels, holdout, classes.names)
    return measure_skill(scores, classes, draw_weights(groups or range(len(holdout))))


def draw_weights(groups: Sequence[object]) -> np.ndarray:
    """How often each image counts, as they are and in each draw of whole groups: [1 + B, N]. The same for all
    that is tested on these images."""
    _, own = np.unique(np.asarray(groups), return_inverse=True)
    n = int(own.max()) + 1
    rng = np.random.default_rng(derive_seed("utility", "draws"))
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=N_REDRAWN)  # [B, groups]
    return np.concatenate([np.ones((1, n), int), drawn]).astype(np.uint16)[:, own]


def measure_skill(scores: np.ndarray, classes: Classes, weights: np.ndarray) -> Skill:
    """Of scores [N, K] of the reference, under weights [1 + B, N]."""
    labels = np.asarray(classes.holdout)
    found = [weigh_auroc(scores[:, k], labels == name, weights) for k, name in enumerate(classes.names)]
    return Skill(np.stack(found, axis=1))


def weigh_auroc(scores: np.ndarray, is_class: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The AUROC of scores [N] under each of the weights [D, N]: [D], NaN where nothing of one side is
    left."""
    order = np.argsort(scores, kind="stable")
    firsts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0)  # of equal scores
    n_blocks = -(-weights.size // _MOST_WEIGHTS)
    blocks = np.array_split(weights[:, order], n_blocks)
    return np.concatenate([_count_wins(block.astype(float), is_class[order], firsts) for block in blocks])


def _count_wins(weights: np.ndarray, is_class: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """Of rising scores, of which equal ones begin at `firsts`."""
    mine, others = (np.add.reduceat(weights * side, firsts, axis=1) for side in (is_class, ~is_class))
    below = np.cumsum(others, axis=1) - others / 2  # others at a lower score, and half of those at the same
    pairs = mine.sum(1) * others.sum(1)
    return np.where(pairs > 0, (mine * below).sum(1) / np.maximum(pairs, 1), np.nan)


def score_by_probe(
    images: np.ndarray, labels: Sequence[str], holdout: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """Probabilities of the classes [N, K] by logistic regression on standardised features [n, D]. Of a class
    that it never saw it says nothing: all are 0, which is an AUROC of 0.5."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(set(labels)) < 2:
        return np.zeros((len(holdout), len(names)))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=_STRENGTH, max_iter=_MOST_ITERATIONS))
    with warnings.catch_warnings():
        # what is left then moves hardly an image past another
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(images.astype(np.float64), np.asarray(labels))
    return _order_columns(probe.predict_proba(holdout.astype(np.float64)), list(probe.classes_), names)


def _order_columns(scores: np.ndarray, known: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Those of `known` classes as those of `names`, 0 where one is not known."""
    columns = [scores[:, known.index(name)] if name in known else np.zeros(len(scores)) for name in names]
    return np.stack(columns, axis=1)


def score_by_network(
    seed: int, pixels: np.ndarray, labels: Sequence[str], holdout: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """The same by a small convolutional network on pixels [n, 3072], 32 x 32, trained anew for some 10,000
    images, on the CPU."""
    import torch
    from torch.nn.functional import cross_entropy

    known = sorted(set(labels))
    if len(known) < 2:
        return np.zeros((len(holdout), len(names)))
    centre, spread = pixels.mean(), pixels.std() + 1e-6
    train, held = (
        torch.from_numpy(((rows - centre) / spread).astype(np.float32)).reshape(-1, 3, 32, 32)
        for rows in (pixels, holdout)
    )
    targets = torch.tensor([known.index(label) for label in labels])
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed % 2**63)
        network = _make_network(len(known))
        optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _NETWORK_STEPS)
        for _ in range(_NETWORK_STEPS):
            rows = torch.randint(len(train), (_N_IN_STEP,))
            optimizer.zero_grad()
            cross_entropy(network(train[rows]), targets[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        scores = torch.cat([network(block).softmax(1) for block in held.split(512)]).double().numpy()
    return _order_columns(scores, known, names)


def _make_network(n_classes: int) -> Any:
    from torch import nn

    layers: list[nn.Module] = []
    for inside, width in zip((3, *_WIDTHS), _WIDTHS):
        layers += [nn.Conv2d(inside, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_WIDTHS[-1], n_classes))
