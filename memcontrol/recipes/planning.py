"""Owns how a recipe plan is made of a study's choice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from memcontrol.config.inner import InnerConfig
from memcontrol.config.settings import configure_choice
from memcontrol.config.study import Config
from memcontrol.core.choice import EVERYTHING, Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.run_folder import StudyFolder
from memcontrol.core.space import SearchSpace
from memcontrol.model.adapter import find_targets
from memcontrol.model.source import find_base_path, make_empty_denoiser
from memcontrol.recipes.plan import RecipePlan

# keys of `inner` that every recipe holds, or that say how a fine-tuning is stored and shared
_CARRIED = {"budget_images", "batch_size", "micro_batch_size", "schedule", "warmup", "weight_decay"}
_CARRIED |= {"max_grad_norm", "rounds", "checkpoint_minutes", "checkpoint_gb", "gradient_checkpointing"}
_CARRIED |= {"precision", "low_memory_full", "norm_shift_rate"}


def plan_recipe(config: Config, space: SearchSpace, choice: Choice, folder: StudyFolder) -> RecipePlan:
    """What a trainer must know of a study's choice. Raises MemControlError."""
    _check_choice(choice, config)
    n_images = len(folder.read_split()["parts"]["train"])
    commit = folder.read_pins().get("commit")
    base = config.base.model_copy(update={"revision": commit}) if commit else config.base
    return make_plan(config.replaced({"base": base}), space, choice, n_images)


def make_plan(config: Config, space: SearchSpace, choice: Choice, n_images: int) -> RecipePlan:
    """The choice trained on so many images. Raises MemControlError."""
    config = configure_choice(config, choice)
    denoiser, inner = make_empty_denoiser(config.base), config.inner
    # as many passes over the images as in the search
    budget = round(inner.budget_images / config.search.train_fraction)
    steps = -(-budget // inner.batch_size)
    return RecipePlan(
        architecture=name_architecture(denoiser),
        base=find_base_path(config.base.id),
        names=list_names(denoiser),
        targets=tuple(find_targets(denoiser, space, choice)),
        steps=steps,
        batch_size=inner.batch_size,
        n_images=n_images,
        warmup_steps=round(inner.warmup * steps),
        schedule=inner.schedule,
        weight_decay=inner.weight_decay,
        max_grad_norm=inner.max_grad_norm,
        resolution=config.data.resolution,
        name=config.name,
        widths=tuple(getattr(denoiser.config, "block_out_channels", None) or ()),
        notes=tuple(_list_notes(config, choice, steps)),
    )


def name_architecture(denoiser: nn.Module) -> str:
    """Which of `ARCHITECTURES` it is, or the class's name for one that no trainer here knows."""
    kind, config = type(denoiser).__name__, cast(Any, denoiser).config
    if kind == "UNet2DConditionModel":
        if config.addition_embed_type == "text_time":
            return "sdxl"
        return "sd2" if config.cross_attention_dim == 1024 else "sd15"
    return {
        "SD3Transformer2DModel": "sd3",
        "FluxTransformer2DModel": "flux",
        "PixArtTransformer2DModel": "pixart",
        "SanaTransformer2DModel": "sana",
    }.get(kind, kind)


def list_names(denoiser: nn.Module) -> dict[str, bool]:
    """Every module of the denoiser, and whether it is one that trainers put an adapter on."""
    return {
        name: isinstance(module, (nn.Linear, nn.Conv2d)) for name, module in denoiser.named_modules() if name
    }


def _list_notes(config: Config, choice: Choice, steps: int) -> Iterator[str]:
    """What a trial was that no trainer's config says."""
    if left := _list_left_behind(config):
        yield f"the trial was trained with {', '.join(left)} too, which is not in here"
    if config.base.revision:
        yield f"the study's base is that of revision {config.base.revision}"
    if choice.checkpoint < 1:
        taken = round(choice.checkpoint * steps)
        yield f"the trial is the model after {taken} of {steps} steps: save a checkpoint there"
    if choice.strength != 1:
        yield f"the trial is the adapter at a strength of {choice.strength:g}: load it with that weight"


def _check_choice(choice: Choice, config: Config) -> None:
    """Raises MemControlError for what is no mask of adapters over a published base."""
    if choice.method == "none" or (not choice.groups and not choice.per_group):
        raise MemControlError(
            "the trial trains no group, so there is nothing to write; name one with --trial"
        )
    if EVERYTHING in choice.groups:
        raise MemControlError(
            "the trial is full fine-tuning, which has no mask to write; name another one with --trial"
        )
    if config.inner.from_scratch or config.base.adapter:
        key = "inner.from_scratch" if config.inner.from_scratch else "base.adapter"
        raise MemControlError(
            f"the study sets {key}, so its trials start from other weights than the base's; other trainers "
            "start from the base"
        )


def _list_left_behind(config: Config) -> list[str]:
    """Keys of the study's inner loop, with values that are plain, that say what no recipe holds."""
    plain = InnerConfig(caption_dropout=0.0)  # what other trainers do unasked
    found = {key: getattr(config.inner, key) for key in InnerConfig.model_fields if key not in _CARRIED}
    return [
        f"inner.{key} {value:g}" if isinstance(value, float) else f"inner.{key}"
        for key, value in found.items()
        if value != getattr(plain, key)
    ]
