"""Owns the study file as a whole: all of its keys, and which of them go together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from memcontrol.config.base import BaseConfig, expand_id
from memcontrol.config.clusters import RayConfig, SlurmConfig
from memcontrol.config.data import DataConfig, expand_path
from memcontrol.config.inner import InnerConfig
from memcontrol.config.methods import refuse_unbounded
from memcontrol.config.rewards import RewardsConfig
from memcontrol.config.search import SearchConfig
from memcontrol.config.strict import Strict, get_value

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


class Config(Strict):
    """A study: everything that its numbers depend on."""

    name: Annotated[str, Field(pattern=NAME)]
    """names the study and its folder"""
    storage: Annotated[str | None, Field(exclude=True)] = None
    """a database URL; none: `study.db` in the study's folder. A relative SQLite path starts at the study
    file. It is never written into the study or a run folder, since it may hold a password"""
    base: Annotated[BaseConfig, BeforeValidator(expand_id)] = BaseConfig()
    """the model to fine-tune: `tiny` (embedded), a folder in diffusers' format, a single `.safetensors` file,
    or a Hub id; `base: tiny` is short for `base: {id: tiny}`"""
    base_precision: Literal["auto", "float32", "bfloat16", "float16", "int8", "nf4"] = "auto"
    """in what the base's frozen weights are held and computed: `auto` is bfloat16 on a card and float32 on a
    CPU; `int8` and `nf4` quantise the denoiser, for LoRA and its kin. What is trained is float32 over it"""
    base_offload: Literal["none", "encoders", "all"] = "encoders"
    """what leaves the card while it is not used: the text `encoders` and the autoencoder, or `none`; `all`:
    the denoiser's frozen weights too, each block of which comes for its own pass (slow, for a base that no
    card holds; methods beside the weights, such as LoRA; on a CPU there is nothing to leave)"""
    data: Annotated[DataConfig, BeforeValidator(expand_path)]
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

    def placed(self, found: Mapping[str, Any], folder: Path) -> Config:
        """A copy with absolute paths at these dotted keys, which knows the folder, and how they are written
        here."""
        copy = self.replaced(found)
        copy._folder = folder
        copy._written = {key: get_value(self, key) for key in found}
        return copy

    @property
    def paths_as_written(self) -> Mapping[str, Any]:
        """By dotted key, its paths as the study file has them; empty where it was not read from one."""
        return self._written

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
        refuse_unbounded(
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
