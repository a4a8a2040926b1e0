"""Owns the evidence of a trial: its images, and the references, under every descriptor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np

from memcontrol.data.features import unit_rows
from memcontrol.scoring.copying import Suspects, find_suspects
from memcontrol.scoring.distances import DistanceSpace, Space, Versions, remember_once
from memcontrol.scoring.labels import N_PERMUTATIONS, Labels
from memcontrol.scoring.local import LocalSpace, average_cells
from memcontrol.scoring.moved import MovedSpace
from memcontrol.scoring.quality import Gaussian, fit_gaussian
from memcontrol.scoring.utility import Classes, Utility, measure_utility

COPY_RATES = {  # by descriptor
    "pixels": "copy_rate",
    "features": "copy_rate_features",
    "moved": "copy_rate_moved",
    "local": "local_copy_rate",
}
DESCRIPTORS = tuple(COPY_RATES)
WHOLE = DESCRIPTORS[:2]  # which memorization distances are of


def make_known() -> dict[str, dict]:
    """Room for what is found out about references whatever is generated, by descriptor."""
    return defaultdict(dict)


@dataclass(frozen=True)
class Descriptors:
    """What descriptors are made of, for one set of images: pixels [N, 3072], 32 x 32 in 0..1, and extractor
    features [N, D]."""

    pixels: np.ndarray
    features: np.ndarray

    @cached_property
    def gaussian(self) -> Gaussian:
        """Of the features: what fid needs of a reference."""
        return fit_gaussian(self.features)

    @property
    def versions(self) -> Versions:
        """The pixels as they are, and mirrored: [N, 3072] each."""
        return self.pixels, self.mirrored

    @property
    def mirrored(self) -> np.ndarray:
        """The pixels of the mirror images [N, 3072]."""
        return self.pixels.reshape(-1, 3, 32, 32)[..., ::-1].reshape(len(self.pixels), -1)


@dataclass(frozen=True)
class Evidence:
    """All that rewards may look at: generated images, the training set, and as references images never
    trained on."""

    generated: Descriptors
    train: Descriptors
    holdout: Descriptors
    seed: int = 0
    train_groups: Sequence[str] | None = None  # who is in each training image; None: each another
    holdout_groups: Sequence[str] | None = None
    calibration: Descriptors | None = None  # real images that are neither trained on nor held out
    n_draws: int = 1  # so many sets as this one are judged together
    n_permutations: int = N_PERMUTATIONS  # of the labels of references
    images: np.ndarray | None = None  # uint8 [N, 3, H, W], the generated ones as they are
    captions: tuple[str, ...] = ()  # that they were generated from
    classes: Classes | None = None  # what images show, where that is known
    trains_network: bool = False  # whether utility is measured by a small network too
    # a CLIP model's embeddings of images and captions, [N, D] each
    clip: tuple[np.ndarray, np.ndarray] | None = None
    # of each space, what depends on references alone
    known: dict[str, dict] = field(default_factory=make_known, compare=False)
    cache: dict = field(default_factory=dict, compare=False)

    @property
    def spaces(self) -> list[Space]:
        """Of all descriptors."""
        return [self.space(name) for name in DESCRIPTORS]

    def space(self, name: str) -> Space:
        if name not in self.cache:
            kind, project = _KINDS[name]
            generated, train, holdout, calibration = project(self)
            self.cache[name] = kind(
                generated,
                train,
                holdout,
                calibration or None,
                self.train_groups,
                self.holdout_groups,
                self.seed,
                self.known[name],
                self.labels,
            )
        return self.cache[name]

    def whole_space(self, name: str) -> DistanceSpace:
        """Of whole images: any but `local`."""
        space = self.space(name)
        assert isinstance(space, DistanceSpace), f"{name} compares parts"
        return space

    @property
    def suspects(self) -> Suspects:
        return remember_once(self.cache, "suspects", lambda: find_suspects(self.spaces, self.n_judged))

    @property
    def utility(self) -> Utility | None:
        """None where no two classes are known."""
        if self.classes is None or not self.classes.can_be_told:
            return None
        return remember_once(self.cache, "utility", self._measure_utility)

    def _measure_utility(self) -> Utility:
        sides = (self.generated, self.train, self.holdout)
        images = {"utility": [side.features for side in sides]}
        if self.trains_network:
            images["utility_network"] = [side.pixels for side in sides]
        assert self.classes is not None, "there are classes"
        remember = partial(remember_once, self.known["features"])
        return measure_utility(images, self.classes, self.holdout_groups, self.seed, remember)

    @property
    def labels(self) -> Labels:
        """Labels of the references, permuted alike in all descriptors."""

        def draw() -> Labels:
            train, holdout = (self.train.pixels,), (self.holdout.pixels,)
            drawn = DistanceSpace((), train, holdout, None, self.train_groups, self.holdout_groups).labels
            return replace(drawn, n_permutations=self.n_permutations)

        return remember_once(self.known["pixels"], "labels", draw)

    @property
    def n_judged(self) -> int:
        """Images of all draws of the model."""
        return len(self.generated.pixels) * self.n_draws


def _project_pixels(evidence: Evidence) -> list[Versions]:
    """Generated, training, held-out and calibration images as a space of pixels has them, the last empty
    where there are none."""
    third = evidence.calibration.versions if evidence.calibration else ()
    return [one.versions for one in (evidence.generated, evidence.train, evidence.holdout)] + [third]


def _project_features(evidence: Evidence) -> list[Versions]:
    """Features centred on the mean of both references and scaled to unit length (cosine geometry)."""
    known, references = evidence.known["features"], (evidence.train.features, evidence.holdout.features)
    centre = remember_once(known, "centre", lambda: (references[0].mean(0) + references[1].mean(0)) / 2)

    def project() -> list[Versions]:
        return [(unit_rows(rows - centre),) for rows in references]

    train, held = remember_once(known, "on the sphere", project)
    third = (unit_rows(evidence.calibration.features - centre),) if evidence.calibration else ()
    return [(unit_rows(evidence.generated.features - centre),), train, held, third]


def _project_once(
    evidence: Evidence, name: str, project: Callable[[np.ndarray], np.ndarray]
) -> list[Versions]:
    """What is made of the pixels alone, that of references once."""

    def project_references() -> list[Versions]:
        third = (evidence.calibration,) if evidence.calibration else ()
        return [(project(one.pixels),) for one in (evidence.train, evidence.holdout, *third)]

    references = remember_once(evidence.known[name], "references", project_references)
    return [(project(evidence.generated.pixels),), *references, ()][:4]


_KINDS: dict[str, tuple[type[Space], Callable[[Evidence], list[Versions]]]] = {
    "pixels": (DistanceSpace, _project_pixels),
    "features": (DistanceSpace, _project_features),
    "moved": (MovedSpace, lambda evidence: _project_once(evidence, "moved", lambda pixels: pixels)),
    "local": (LocalSpace, lambda evidence: _project_once(evidence, "local", average_cells)),
}


def describe_broken_images(pixels: np.ndarray) -> str:
    """Why images of pixels [N, 3 S], in 0..1, cannot be judged: a model that makes flat ones is broken. Empty
    if they can."""
    spreads = pixels.reshape(len(pixels), 3, -1).std(axis=2).max(axis=1)  # [N], of the liveliest channel
    flat_share = float((spreads < 1e-3).mean())
    if flat_share <= 0.5:
        return ""
    return (
        f"{flat_share:.0%} of the generated images are one flat colour; the model is broken (NaN, "
        "wrong precision or scaling)"
    )
