"""Owns the evidence of a trial: its images, and the references, under both descriptors."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from memcontrol.data.features import unit_rows
from memcontrol.scoring.copying import DistanceSpace, remember_once
from memcontrol.scoring.quality import Gaussian, fit_gaussian


@dataclass(frozen=True)
class Descriptors:
    """One set of images under the two descriptors: pixels [N, 3072], 32 x 32 in 0..1, and extractor features
    [N, D]."""

    pixels: np.ndarray
    features: np.ndarray

    @cached_property
    def gaussian(self) -> Gaussian:
        """Of the features: what fid needs of a reference."""
        return fit_gaussian(self.features)

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
    images: np.ndarray | None = None  # uint8 [N, 3, H, W], the generated ones as they are
    captions: tuple[str, ...] = ()  # that they were generated from
    # a CLIP model's embeddings of images and captions, [N, D] each
    clip: tuple[np.ndarray, np.ndarray] | None = None
    # of each space, what depends on references alone
    known: dict[str, dict] = field(default_factory=lambda: {"pixels": {}, "features": {}}, compare=False)
    cache: dict = field(default_factory=dict, compare=False)

    def space(self, name: str) -> DistanceSpace:
        if name not in self.cache:
            make = _make_pixel_space if name == "pixels" else _make_feature_space
            self.cache[name] = make(self)
        return self.cache[name]


def _make_pixel_space(evidence: Evidence) -> DistanceSpace:
    generated, held = evidence.generated, evidence.holdout
    return DistanceSpace(
        (generated.pixels, generated.mirrored),
        evidence.train.pixels,
        held.pixels,
        (held.pixels, held.mirrored),
        evidence.seed,
        evidence.known["pixels"],
    )


def _make_feature_space(evidence: Evidence) -> DistanceSpace:
    """Features centred on the mean of both references and scaled to unit length (cosine geometry)."""
    known, references = evidence.known["features"], (evidence.train.features, evidence.holdout.features)
    centre = remember_once(known, "centre", lambda: (references[0].mean(0) + references[1].mean(0)) / 2)

    def project() -> list[np.ndarray]:
        return [unit_rows(rows - centre) for rows in references]

    train, held = remember_once(known, "on the sphere", project)
    return DistanceSpace(
        (unit_rows(evidence.generated.features - centre),), train, held, (held,), evidence.seed, known
    )


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
