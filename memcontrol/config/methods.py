"""Owns the training methods inside `inner`: shards, skipping, redistribution, augmentation, captions,
privacy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from memcontrol.config.strict import Count, Positive, Probability, Strict
from memcontrol.core.bound import NO_BOUND


class EnsembleConfig(Strict):
    """Iterative ensemble training (IET-AGC, arXiv 2407.15328): shards of the training set, each with a proxy,
    averaged by size.

    average: `shared_a` freezes LoRA's A, the same for all shards, so that the mean of B is exact (FFA-LoRA,
    arXiv 2403.12313); `refactored` trains both and keeps what rank-r factors of the mean change leave over as
    a dense offset.
    moments: what an optimizer's moments become after an averaging. `kept` per shard is what the published
    code does; `averaged` had the lowest FID on each of three seeds in benchmarks/evidence.
    """

    shards: Count = 1
    """parts of the training set; 1: none"""
    split: Literal["random", "balanced", "contiguous", "similar"] = "random"
    """how images are dealt out: at `random`, `balanced` by caption, `contiguous`, or `similar` ones
    together"""
    average: Literal["shared_a", "refactored"] = "shared_a"
    """of LoRA: `shared_a` trains only B, whose mean is exact (arXiv 2403.12313); `refactored` trains both and
    keeps what is left over as a dense offset, which no LoRA file can hold"""
    moments: Literal["reset", "averaged", "kept"] = "averaged"
    """the optimizer's moments after an averaging: `averaged`, `reset`, or `kept` by each shard, as published;
    `averaged` had the lowest FID on each of three seeds"""
    split_groups: bool = False
    """whether the images of a group (`data.group`) may be dealt to several shards"""

    @property
    def shares_a(self) -> bool:
        return self.shards > 1 and self.average == "shared_a"


class SkipConfig(Strict):
    """Anti-gradient control (IET-AGC): an image is skipped where loss < memory[timestep] / ratio.

    Published: ratio 2 for CIFAR, 1.25 for LAION, decay 0.8, memory from zero. `corrected` divides the memory
    by the weight that it has gathered, as Adam does. `bins` smaller than 1000 lets neighbouring timesteps
    share a memory, for budgets in which each is seen a few times only. A step whose images were skipped draws
    up to `refill` batches to be whole again.
    """

    ratio: Annotated[float, Field(ge=1)] = 2.0
    """skip an image where its loss < memory at its timestep / ratio; published: 2 for CIFAR, 1.25 for
    LAION"""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """memory = decay memory + (1 - decay) loss"""
    start: Literal["zero", "corrected"] = "zero"
    """the memory starts at `zero`, as published, or is `corrected` for that, as Adam's moments are"""
    bins: Annotated[int, Field(ge=1, le=1000)] = 1000
    """memories; fewer than the 1000 timesteps let neighbours share one, for budgets in which each is seen a
    few times"""
    refill: Count = 1
    """batches that a step whose images were skipped may draw until it is whole again"""


class RedistributionConfig(Strict):
    """Memory samples redistribute (IET-AGC+, arXiv 2502.09434): each shard's most skipped share moves to the
    next shard.

    rounds: `alternate` exchanges in odd rounds and averages in even ones; `every` does both each round.
    order: to the next shard in a `ring`, or in a `random` ring drawn each time.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """of each shard's images, the most skipped ones, that move on"""
    order: Literal["ring", "random"] = "ring"
    """to the next shard in a `ring`, or in a `random` ring that is drawn each time"""
    rounds: Literal["alternate", "every"] = "alternate"
    """`alternate`: exchange in odd rounds, average in even ones; `every`: both in each"""


class AugmentationConfig(Strict):
    """Threshold-aware augmentation (IET-AGC+): RandAugment, the stronger the nearer a loss lies to the skip
    threshold.

    rule: `zone` trains u >= bar as it is, queues 1 <= u < bar for augmentation and skips u < 1, where u =
    ratio loss / memory; `kept` queues every image that is not skipped and trains nothing else. retest:
    augmented images may be skipped too.
    """

    rule: Literal["zone", "kept"] = "zone"
    """with u = ratio loss / memory, `zone` trains u >= bar as it is, augments 1 <= u < bar and skips u < 1;
    `kept` augments everything not skipped"""
    base: Positive = 5.0
    """the strength is base exp(-5 d) of RandAugment's 30, with d = (ratio loss - memory) / memory"""
    bar: Annotated[float, Field(gt=1)] = 1.5
    """where the zone ends"""
    retest: bool = True
    """whether augmented images may be skipped too"""


class CaptionsConfig(Strict):
    """Edits of a training caption, each with a probability, drawn anew every time it is used (Somepalli et
    al. 2023, arXiv 2305.20086): n_words random words added, the caption replaced by as many random words, one
    of its words repeated."""

    add_words: Probability = 0.0
    """probability that random words are added"""
    replace: Probability = 0.0
    """probability that random words take the caption's place"""
    repeat_word: Probability = 0.0
    """probability that one of its words is repeated"""
    n_words: Count = 4
    """how many random words"""

    @property
    def any(self) -> bool:
        return bool(self.add_words or self.replace or self.repeat_word)


def refuse_unbounded(asked: Mapping[str, object], prefix: str = "inner.") -> None:
    """Raises ValueError that names the first key whose reason is not false."""
    for key, reason in asked.items():
        if reason:
            raise ValueError(
                f"{prefix}{key} {reason}; inner.privacy could not bound what such a model tells: leave "
                f"{prefix}{key} as it is by default, or inner.privacy out"
            )


class PrivacyConfig(Strict):
    """Differential privacy (DP-SGD, arXiv 1607.00133): the model is nearly as likely without any one unit,
    which is an image, or a group with all its images (`data.group`, or images that are nearly the same).

    Each step draws each unit with chance inner.batch_size / units, clips its gradient, adds noise to the sum
    and divides by inner.batch_size, however many were drawn. The noise follows from epsilon, delta, that
    chance and the number of steps.
    """

    epsilon: Annotated[float, Field(gt=0, lt=NO_BOUND)] = 8.0
    """the bound: with chance 1 - delta no output is more than exp(epsilon) times as likely with any one unit
    as without it"""
    delta: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = "auto"
    """the chance that the bound fails; `auto`: 1 / (10 units)"""
    clip: Positive = 1.0
    """norm to which each unit's gradient, over all that is trained, is clipped"""
    multiplicity: Count = 4
    """noise and timestep draws of each unit, averaged before its gradient is clipped (arXiv 2210.09929); the
    budget counts them as one image. Those of a group are spread over its images"""
    seed: int | None = None
    """none: noise, and who is drawn, come from the operating system and are kept only until the fine-tuning
    has ended, so that no other run has the same numbers. With a seed all have, and whoever knows it can take
    the noise away again: for tests, not for models that are given away"""
