"""Owns `inner`: one fine-tuning, and which of its keys go together."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from memcontrol.config.methods import (
    AugmentationConfig,
    CaptionsConfig,
    EnsembleConfig,
    PrivacyConfig,
    RedistributionConfig,
    SkipConfig,
    refuse_unbounded,
)
from memcontrol.config.strict import Count, NotNegative, Positive, Strict


class InnerConfig(Strict):
    """One fine-tuning: its budget in images seen, batch and optimizer, and the training methods that fight
    copying."""

    budget_images: Count = 10_000
    """images in all steps together, the same for every choice and any number of shards"""
    batch_size: Count = 16
    """images in a step"""
    micro_batch_size: Count | None = None
    """images in one forward, gradients accumulate to the batch; none: the batch"""
    rounds: Count = 5
    """parts of equal length; a killed run goes on from the last one, shards are averaged after each"""
    checkpoint_minutes: Positive = 10.0
    """a checkpoint at least so often, beside those at the rounds' ends"""
    checkpoint_gb: NotNegative = 4.0
    """the largest checkpoint that is written; a fine-tuning whose is larger (full fine-tuning of a large
    base) begins again when it is killed"""
    optimizer: Literal["adamw", "adamw8bit", "adam", "nadam", "radam", "adafactor", "sgd"] = "adamw"
    """as in torch; `adamw8bit` is that of bitsandbytes, on a GPU"""
    weight_decay: NotNegative = 0.01
    """of the optimizer"""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """share of the steps with rising learning rate"""
    schedule: Literal["constant", "cosine"] = "cosine"
    """of the learning rate, after the warmup"""
    max_grad_norm: Positive = 1.0
    """gradients are clipped to this norm"""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """of forward and backward over float32 weights; the 16-bit ones by autocast. Under a 16-bit
    `base_precision` that one counts"""
    gradient_checkpointing: bool = False
    """recompute activations to save memory"""
    low_memory_full: bool = False
    """full fine-tuning in the type of the base's weights, 16-bit ones rounded by chance, with Adafactor and
    gradient checkpointing: about two bytes of weights and two of gradients a parameter on a card"""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """decay of a moving average of the weights, which is then what is sampled and saved"""
    from_scratch: bool = False
    """draw the denoiser's weights anew instead of reading them"""
    norm_shift_rate: Positive | None = 1e-6
    """learning rate of SV-Diff's shifts of norm layers, as published; none: the choice's own"""
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """share of captions replaced by the empty one, for guidance"""
    captions: CaptionsConfig = CaptionsConfig()
    """edits of training captions, drawn anew every time one is used (arXiv 2305.20086)"""
    embedding_noise: NotNegative = 0.0
    """standard deviation of Gaussian noise on the caption's encoding"""
    noise_offset: NotNegative = 0.0
    """weight of noise that is equal over a channel, added to the training noise"""
    input_perturbation: NotNegative = 0.0
    """weight of noise on the input that the target does not know (arXiv 2301.11706)"""
    min_snr: Positive | None = None
    """gamma of min-SNR weighting of the loss (arXiv 2303.09556)"""
    norm_threshold: Positive | Literal["decile"] | None = None
    """drop images whose text-conditional noise norm is at or above it, or the top `decile` of each forward
    (arXiv 2407.21720)"""
    stop_gap: Annotated[float, Field(gt=0, lt=1)] | None = None
    """end, after a round, when (held-out loss - training loss) / held-out loss has grown by so much since the
    start"""
    ensemble: EnsembleConfig = EnsembleConfig()
    """IET-AGC: parts of the training set, trained side by side and averaged"""
    skip: SkipConfig | None = None
    """IET-AGC: images whose loss is already low are skipped; `{}` turns it on with its defaults"""
    redistribution: RedistributionConfig | None = None
    """IET-AGC+: much-skipped images move to another shard; needs `skip`, and shards and rounds of 2 or
    more"""
    augmentation: AugmentationConfig | None = None
    """IET-AGC+: images near the skip threshold are augmented; needs `skip`"""
    privacy: PrivacyConfig | None = None
    """differential privacy; `{}` turns it on with its defaults. Needs `memcontrol[privacy]`"""

    @model_validator(mode="after")
    def parts_fit(self) -> InnerConfig:
        if self.low_memory_full and (self.ema or self.ensemble.shards > 1):
            raise ValueError(
                "inner.low_memory_full holds one set of weights; it cannot be combined with inner.ema or "
                "inner.ensemble.shards of 2 or more"
            )
        if self.redistribution and (self.skip is None or self.ensemble.shards < 2 or self.rounds < 2):
            raise ValueError(
                "inner.redistribution moves skipped images between shards; it needs inner.skip, "
                "ensemble.shards and rounds of 2 or more"
            )
        if self.augmentation and self.skip is None:
            raise ValueError(
                "inner.augmentation looks at the skip threshold; it needs inner.skip, for example "
                "inner.skip={ratio: 2}"
            )
        if self.norm_threshold == "decile" and (self.micro_batch_size or self.batch_size) < 10:
            raise ValueError(
                "inner.norm_threshold=decile drops a tenth of each forward's images; it needs "
                "batches of 10 or more"
            )
        if self.micro_batch_size and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"inner.micro_batch_size is larger than inner.batch_size ({self.micro_batch_size} > "
                f"{self.batch_size})"
            )
        if 1 < self.ensemble.shards and self.budget_steps < self.ensemble.shards * self.rounds:
            raise ValueError(
                f"inner.budget_images / inner.batch_size gives {self.budget_steps} steps, fewer "
                f"than {self.ensemble.shards} shards "
                f"x {self.rounds} rounds; raise the budget or lower one of them"
            )
        return self

    @model_validator(mode="after")
    def bound_holds(self) -> InnerConfig:
        if self.privacy:
            refuse_unbounded(self._list_unbounded())
        return self

    def _list_unbounded(self) -> dict[str, object]:
        """By key, what of it a private fine-tuning cannot have, and why; false where it asks for nothing of
        the kind. All other keys change what is done with gradients that have their noise, or with one image
        by itself."""
        return {
            "skip": self.skip and "leaves images out by a memory of other images' losses",
            "redistribution": self.redistribution and "moves images by their losses",
            "augmentation": self.augmentation and "trains on an image again by its loss",
            "ensemble.shards": self.ensemble.shards > 1
            and "has each image drawn more often, from fewer, which is not accounted for",
            "norm_threshold": self.norm_threshold and "leaves images out by how the model knows them",
            "stop_gap": self.stop_gap and "ends the training by the losses of training images",
            "low_memory_full": self.low_memory_full
            and "keeps one 16-bit gradient, where a unit's own and the sum of all are needed in 32",
            "precision": self.precision == "float16"
            and "is float16, under which gradients that overflow decide whether a step is taken",
        }

    @property
    def passes_per_image(self) -> int:
        """How often an image of the budget goes through the denoiser."""
        return self.privacy.multiplicity if self.privacy else 1

    @property
    def memory_keys(self) -> tuple[str, ...]:
        """Keys that say how a fine-tuning fits into memory and on disk, and nothing of what it finds. With
        norm_threshold=decile micro_batch_size is none of them: the top decile is each forward's."""
        keys = ("gradient_checkpointing", "checkpoint_minutes", "checkpoint_gb")
        return keys if self.norm_threshold == "decile" else (*keys, "micro_batch_size")

    @property
    def budget_steps(self) -> int:
        return -(-self.budget_images // self.batch_size)

    def averages_after(self, number: int) -> bool:
        """IET-AGC averages after each round (from 0); with alternate redistribution the odd ones (from 1)
        exchange images instead."""
        if self.ensemble.shards == 1:
            return False
        rule = self.redistribution
        return number == self.rounds - 1 or rule is None or rule.rounds == "every" or (number + 1) % 2 == 0

    def rounds_to(self, rung: float) -> int:
        """How many rounds it takes to a rung, a share of the budget: to the end of the first round that
        reaches it and leaves one model."""
        number = math.ceil(rung * self.rounds) - 1
        while self.ensemble.shards > 1 and not self.averages_after(number):
            number += 1
        return number + 1
