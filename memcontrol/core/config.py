"""Owns STUDY.yaml: its keys, their types and defaults, and overrides written as key=value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from memcontrol.core.config_errors import explain_problems
from memcontrol.core.errors import MemControlError
from memcontrol.core.yaml_reader import parse_number, read_yaml

# What may change between two runs of one study: where and how fast it runs, not what it finds. Images may
# move; split.json knows them.
FREE_KEYS = (
    "storage",
    "data.path",
    "search.trials",
    "search.workers",
    "search.executor",
    "search.processes",
    "search.time_limit_minutes",
    "search.accumulate_on_oom",
    "search.stop_when_flat",
    "search.replicates",
    "ray",
    "slurm",
)

DIGITS = "digits"  # data.path of the images that are embedded
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    def replaced(self, values: Mapping[str, Any]) -> Self:
        """A copy with other values at dotted keys, such as {"inner.batch_size": 8}; they are not validated.
        Raises KeyError for a key that is not there, also for one inside a setting that is off."""
        copy = self
        for key, value in values.items():
            copy = replace_at(copy, key.split("."), value)
        return copy


def replace_at(model: Strict, keys: Sequence[str], value: Any) -> Any:
    """A copy of `model` with the value at the nested keys."""
    name, *inside = keys
    if not isinstance(model, Strict) or name not in type(model).model_fields:
        raise KeyError(name)
    new = replace_at(getattr(model, name), inside, value) if inside else value
    return model.model_copy(update={name: new})


class DataConfig(Strict):
    """Images with captions: `digits` (embedded) or a folder; a part is a share of the images (0.5) or a count
    (128)."""

    path: str
    train: Share | Count = 0.5
    holdout: Share | Count = 0.25
    test: Share | Count = 0.25
    resolution: Annotated[int, Field(ge=8)] | None = None
    skip_unreadable: bool = False


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
    split: Literal["random", "balanced", "contiguous", "similar"] = "random"
    average: Literal["shared_a", "refactored"] = "shared_a"
    moments: Literal["reset", "averaged", "kept"] = "averaged"

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
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.8
    start: Literal["zero", "corrected"] = "zero"
    bins: Annotated[int, Field(ge=1, le=1000)] = 1000
    refill: Count = 1


class RedistributionConfig(Strict):
    """Memory samples redistribute (IET-AGC+, arXiv 2502.09434): each shard's most skipped share moves to the
    next shard.

    rounds: `alternate` exchanges in odd rounds and averages in even ones; `every` does both each round.
    order: to the next shard in a `ring`, or in a `random` ring drawn each time.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    order: Literal["ring", "random"] = "ring"
    rounds: Literal["alternate", "every"] = "alternate"


class AugmentationConfig(Strict):
    """Threshold-aware augmentation (IET-AGC+): RandAugment, the stronger the nearer a loss lies to the skip
    threshold.

    rule: `zone` trains u >= bar as it is, queues 1 <= u < bar for augmentation and skips u < 1, where u =
    ratio loss / memory; `kept` queues every image that is not skipped and trains nothing else. retest:
    augmented images may be skipped too.
    """

    rule: Literal["zone", "kept"] = "zone"
    base: Positive = 5.0
    bar: Annotated[float, Field(gt=1)] = 1.5
    retest: bool = True


class CaptionsConfig(Strict):
    """Edits of a training caption, each with a probability, drawn anew every time it is used (Somepalli et
    al. 2023, arXiv 2305.20086): n_words random words added, the caption replaced by as many random words, one
    of its words repeated."""

    add_words: Probability = 0.0
    replace: Probability = 0.0
    repeat_word: Probability = 0.0
    n_words: Count = 4

    @property
    def any(self) -> bool:
        return bool(self.add_words or self.replace or self.repeat_word)


class InnerConfig(Strict):
    """One fine-tuning: its budget in images seen, batch and optimizer, and the training methods that fight
    copying."""

    budget_images: Count = 10_000
    batch_size: Count = 16
    micro_batch_size: Count | None = None  # images in one forward: gradients accumulate to the batch
    # of equal length: a killed run goes on from the last one; shards are averaged after each
    rounds: Count = 5
    optimizer: Literal["adamw", "adam", "nadam", "radam", "adafactor", "sgd"] = "adamw"
    weight_decay: NotNegative = 0.01
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    schedule: Literal["constant", "cosine"] = "cosine"
    max_grad_norm: Positive = 1.0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    # decay; the averaged weights are what is sampled and saved
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    from_scratch: bool = False  # the denoiser's weights are drawn anew instead of read
    norm_shift_rate: Positive | None = 1e-6  # of SV-Diff's norm shifts, as published; None: the choice's own
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    captions: CaptionsConfig = CaptionsConfig()
    embedding_noise: NotNegative = 0.0  # standard deviation of Gaussian noise on the caption's encoding
    noise_offset: NotNegative = 0.0
    input_perturbation: NotNegative = 0.0
    min_snr: Positive | None = None
    norm_threshold: Positive | Literal["decile"] | None = None
    stop_gap: Annotated[float, Field(gt=0, lt=1)] | None = None
    ensemble: EnsembleConfig = EnsembleConfig()
    skip: SkipConfig | None = None
    redistribution: RedistributionConfig | None = None
    augmentation: AugmentationConfig | None = None

    @model_validator(mode="after")
    def parts_fit(self) -> InnerConfig:
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
    images: Annotated[int, Field(ge=3)] = 10


class RewardsConfig(Strict):
    """What each trial is scored on, and how its images are sampled.

    An objective is a reward of ours, or FILE.py:FUNCTION, a user's own: from the evidence of a trial to a
    number.
    """

    objectives: Annotated[tuple[str, ...], Field(min_length=1)] = ("fid", "memorization")
    limits: dict[str, float] = {}  # bounds of rewards, upper where less is better: constraints of the search
    extractor: str = "tiny"
    clip: str | None = None  # a CLIP model, for clip_score
    extraction: ExtractionConfig | None = None
    n_samples: Count = 256
    # fresh draws of n_samples that the front is measured on before it is reported
    confirm: Annotated[int, Field(ge=0)] = 4
    force: bool = False  # take a fid of too few samples all the same
    sampling_steps: Count = 20
    guidance: Annotated[float, Field(ge=1)] = 1.0
    # share of the sampling steps without guidance (arXiv 2411.16738)
    guidance_from: Annotated[float, Field(ge=0, lt=1)] = 0.0
    random_words: Annotated[int, Field(ge=0)] = 0  # added to each prompt when sampling (arXiv 2305.20086)
    embedding_noise: NotNegative = 0.0  # on the prompt's encoding when sampling

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives as values are named after them: a user's function by its own name."""
        return tuple(objective.rpartition(":")[2] for objective in self.objectives)

    @property
    def functions(self) -> dict[str, str]:
        """Name to FILE.py:FUNCTION of a user's own objectives."""
        return {name: objective for name, objective in zip(self.names, self.objectives) if ":" in objective}


def convert_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class EarlyStopping(Strict):
    """At each rung, a share of a trial's budget, both rewards are measured on few samples; a trial that many
    others beat stops."""

    rungs: Annotated[tuple[Share, ...], BeforeValidator(convert_list), Field(min_length=1)] = (0.25, 0.5)
    n_samples: Count = 64
    beaten_by: Share = 0.05  # of the trials that came to the rung, in every objective
    beyond: NotNegative = 0.25  # and in each by more than so many standard errors of the difference
    min_peers: Count = 4

    @model_validator(mode="after")
    def rising(self) -> EarlyStopping:
        if list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(
                f"search.early_stopping.rungs is {list(self.rungs)}; give rising shares of the "
                "budget, such as [0.25, 0.5]"
            )
        return self


class SearchConfig(Strict):
    """The outer loop: how many sampled trials beside the three anchors, how many at a time, and the study's
    seed."""

    trials: Annotated[int, Field(ge=0)] = 20
    workers: Count = 2
    processes: Count = 1  # that train the shards of one trial side by side, a GPU each
    seed: int = 0
    sampler: Literal["auto", "gp", "tpe", "nsga2", "random"] = "auto"
    executor: Literal["inline", "local", "ray", "slurm"] = "local"
    early_stopping: EarlyStopping | None = None
    # so many trials in a row that raised the hypervolume by no more than its noise end the search
    stop_when_flat: Count | None = None
    # more fine-tunings, from other seeds, of the trials on the front and of full fine-tuning
    replicates: Annotated[int, Field(ge=0)] = 0
    # the study file of an earlier search, whose front is tried first
    warm_start: Annotated[str, Field(min_length=1)] | None = None
    time_limit_minutes: Annotated[float, Field(gt=0)] | None = None  # of one attempt at a trial
    # a trial that runs out of GPU memory goes on once with half the images in a forward
    accumulate_on_oom: bool = True
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0

    def count_train(self, n_images: int) -> int:
        """How many of so many training images a trial sees."""
        return max(1, round(n_images * self.train_fraction))


class RayConfig(Strict):
    """An existing Ray cluster, or one started on the spot; what each trial reserves."""

    address: str | None = None  # such as ray://head:10001 or auto; none starts one on this machine
    gpus: NotNegative | None = None  # a trial's; none: one where the cluster has any
    cpus: NotNegative = 1


class SlurmConfig(Strict):
    """Jobs of a Slurm cluster, through submitit; `search.workers` is how many are in flight."""

    partition: str | None = None
    time_minutes: Count = 240
    gres: str | None = None  # such as gpu:1
    cpus: Count = 1
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    account: str | None = None
    extra: dict[str, str | int] = {}  # other options of sbatch, such as {qos: long}


def expand_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Config(Strict):
    """A study: everything that its numbers depend on."""

    name: Annotated[str, Field(pattern=NAME)]
    # never written anywhere: it may hold a password
    storage: Annotated[str | None, Field(exclude=True)] = None
    base: str = "tiny"
    data: Annotated[DataConfig, BeforeValidator(expand_path)]
    space: str = "sd15-blocks"
    inner: InnerConfig = InnerConfig()
    rewards: RewardsConfig = RewardsConfig()
    search: SearchConfig = SearchConfig()
    ray: RayConfig = RayConfig()
    slurm: SlurmConfig = SlurmConfig()

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
        values = apply_override(values, override)
    try:
        config = Config.model_validate(values)
        return (
            config if isinstance(source, dict) else make_paths_absolute(config, Path(source).resolve().parent)
        )
    except ValidationError as error:
        where = "the config" if isinstance(source, dict) else str(source)
        raise MemControlError(f"{where}: {explain_problems(error.errors(), Config)}") from None


def make_paths_absolute(config: Config, folder: Path) -> Config:
    """Images and a user's own objectives lie relative to the study file; workers may run elsewhere."""
    objectives = tuple(
        f"{folder / objective.rpartition(':')[0]}:{name}" if ":" in objective else objective
        for objective, name in zip(config.rewards.objectives, config.rewards.names)
    )
    path = config.data.path if config.data.path == DIGITS else str(folder / config.data.path)
    return config.replaced({"data.path": path, "rewards.objectives": objectives})


def apply_override(values: dict, override: str) -> dict:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise MemControlError(f"override '{override}': write it as key=value, for example inner.batch_size=8")
    try:
        return set_at(values, key.split("."), parse_number(text))
    except yaml.YAMLError:
        raise MemControlError(f"override '{override}': '{text}' is not valid YAML") from None


def set_at(values: Any, keys: list[str], value: Any) -> dict:
    """`values` with `value` at the dotted place; a short form such as `data: digits` keeps its meaning."""
    inside = expand_path(values) if values is not None else {}
    if not isinstance(inside, dict):
        inside = {}
    return {**inside, keys[0]: set_at(inside.get(keys[0]), keys[1:], value) if keys[1:] else value}


def flatten_keys(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flatten_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def find_differing_keys(stored: Config, given: Config, beside: Sequence[str] = ()) -> list[str]:
    """Dotted keys, of those that numbers depend on and are not below one of `beside`, whose values differ:
    "inner.batch_size (8 there, 16 here)"."""
    there, here = (flatten_keys(make_comparable(config)) for config in (stored, given))
    return [
        f"{key} ({there.get(key)} there, {here.get(key)} here)"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
        and not any(f"{key}.".startswith(f"{free}.") for free in (*FREE_KEYS, *beside))
    ]


def make_comparable(config: Config) -> dict:
    """The config as a mapping, a user's own objectives by their files' names: a study's folder may move."""
    values = config.model_dump(mode="json")
    values["rewards"]["objectives"] = [Path(objective).name for objective in config.rewards.objectives]
    return values


PARTS = ("train", "holdout", "test")
