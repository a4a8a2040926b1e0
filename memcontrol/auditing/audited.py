"""Owns what an audit is asked: what is audited, with what it is compared, and which of that goes together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from memcontrol.auditing.attack import SAMPLING
from memcontrol.config.data import DataConfig, Fit, Pages
from memcontrol.core.errors import MemControlError
from memcontrol.core.run_folder import RunFolder
from memcontrol.data.pictures import FITS

_TWIN_RULES = ("refuse", "drop", "keep")


@dataclass(frozen=True)
class AuditSource:
    """What is audited and with what it is compared, as a person names it: images or a model (a run folder, or
    a pipeline, folder or Hub id); a run knows its own training and held-out images. `sampling` of a pipeline:
    some of SAMPLING's keys."""

    images: Path | None
    train: Path | None
    holdout: Path | None
    model: str | None
    skip_unreadable: bool
    sampling: Mapping[str, Any]
    group: str | None = None
    twins: str = "refuse"
    fit: Fit | None = None
    calibration: Path | None = None
    pages: str = "refuse"
    max_pixels: int | None = None
    base: str | None = None
    lora: Path | None = None
    strength: float = 1.0

    @property
    def reading(self) -> DataConfig:
        """How folders are read."""
        return DataConfig(
            path=".",
            skip_unreadable=self.skip_unreadable,
            pages=cast(Pages, self.pages),
            max_pixels=self.max_pixels,
        )

    @property
    def run(self) -> Path | None:
        if self.model and RunFolder(Path(self.model)).spec_file.is_file():
            return Path(self.model)
        return None

    def describe(self) -> dict[str, Any]:
        """What is audited, files and folders by their names: a path of a machine is nobody's business."""
        given = {"images": self.images, "model": self.model, "base": self.base, "lora": self.lora}
        named = {
            key: Path(value).name if Path(value).exists() else str(value)
            for key, value in given.items()
            if value
        }
        strength = {"strength": self.strength} if self.lora else {}
        sampled = {**SAMPLING, **self.sampling} if self.model and not self.run else {}
        return {**named, **strength, **sampled}

    def check(self) -> None:
        """Raises MemControlError."""
        if (self.images is None) == (self.model is None):
            raise MemControlError(
                "audit judges images or a model; give one of --images DIR and --model PIPELINE_OR_RUN"
            )
        if not self.run and not (self.train and self.holdout):
            raise MemControlError(
                "audit compares with training and held-out images; give --train DIR and --holdout DIR"
            )
        for name, value, allowed in (
            ("twins", self.twins, _TWIN_RULES),
            ("fit", self.fit, (None, *FITS)),
            ("pages", self.pages, get_args(Pages)),
        ):
            if value not in allowed:
                known = ", ".join(str(one) for one in allowed if one)
                raise MemControlError(f"{name} is '{value}'; allowed: {known}")
        if self.run and not (self.train and self.holdout) and (self.group or self.fit):
            raise MemControlError(
                "a run knows the groups and the fit of its own images; leave out --group and --fit, or give "
                "--train and --holdout"
            )
        self._check_base()
        if unknown := set(self.sampling) - set(SAMPLING):
            raise MemControlError(
                f"{', '.join(sorted(unknown))}: no such setting of sampling; allowed: {', '.join(SAMPLING)}"
            )
        if self.sampling and (self.run or self.images):
            given = ", ".join(f"--{name}" for name in self.sampling)
            raise MemControlError(
                f"{given} say how a pipeline is sampled, and these images are there already; leave "
                "them out, or give --model a pipeline"
            )

    def _check_base(self) -> None:
        """Raises MemControlError."""
        given = "--base" if self.base else "--lora"
        if (self.base or self.lora) and (self.images or self.run):
            what = "a run knows its base" if self.run else "images have none"
            raise MemControlError(
                f"{given} belongs to a pipeline, and {what}; leave it out, or give --model a pipeline"
            )
        if self.base and self.lora:
            raise MemControlError("--lora is put on --model, which is its base; leave out --base")
        if self.strength != 1 and not self.lora:
            raise MemControlError("--strength says how far a LoRA is put on; give it with --lora")
        if not 0 <= self.strength <= 2:
            raise MemControlError(f"--strength is {self.strength:g}; allowed: 0 to 2")
