"""Owns what an audit does with a model that it can open: samples drawn from it, and what an attacker who has
it and its base tells of its training images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from memcontrol.auditing.judge import ShowProgress
from memcontrol.config.base import parse_base
from memcontrol.config.spec import Spec
from memcontrol.core.errors import MemControlError
from memcontrol.core.estimate import Measured
from memcontrol.core.seeds import derive_seed
from memcontrol.data.images import Images
from memcontrol.data.pictures import Pictures, wrap_samples
from memcontrol.model.base import Base, load_base
from memcontrol.model.batches import Found
from memcontrol.model.saved_adapter import find_adapter_file, fuse_file, list_left_out
from memcontrol.training.losses import MOST_AUDITED, AttackSize
from memcontrol.training.maps import compare_predictions, predict_shifted
from memcontrol.trial.loaded import LoadedModels, tell_nobody
from memcontrol.trial.maps import map_images, shrink_maps
from memcontrol.trial.membership import (
    Attack,
    Losses,
    make_attack,
    measure_model,
    measure_untrained,
    plan_attack,
    size_attack,
)
from memcontrol.trial.tuned import hold_run

_N_ATTACK = 10  # images of each attacked caption
# of an audited pipeline
SAMPLING: dict[str, Any] = {"samples": 256, "attacked": 0, "steps": 20, "guidance": 1.0, "seed": 0}


@dataclass(frozen=True)
class ModelFiles:
    """An audited model as a person names it: a pipeline, and what it was fine-tuned from; or a base and the
    LoRA over it, at some strength."""

    model: str
    base: str | None = None
    lora: Path | None = None
    strength: float = 1.0


ImagesAt = Callable[[int], tuple[Images, Images]]  # training and unseen images, at so many pixels


@dataclass(frozen=True)
class Opened:
    """The model, ready to sample from, and what an attacker tells by it: empty where its base is not
    known."""

    base: Base
    told: Measured


def open_model(
    files: ModelFiles, images: ImagesAt, seed: int, progress: ShowProgress, warn: Callable[[str], None]
) -> Opened:
    """Raises MemControlError."""
    if not (files.base or files.lora):
        return Opened(load_base(parse_base(files.model, "--model")), {})
    with tempfile.TemporaryDirectory() as cache:

        def work(base: Base) -> tuple[Attack, Losses]:
            attack = _prepare_attack(base, images, Path(cache), seed, progress)
            return attack, attack.measure(base, partial(progress, "membership"))

        (_, before), (attack, after), model = _visit_models(files, work, warn)
        return Opened(model, attack.judge(before, after))


def _visit_models(
    files: ModelFiles, work: Callable[[Base], Found], warn: Callable[[str], None]
) -> tuple[Found, Found, Base]:
    """What is found out of the base, then of the model, and that one; one is in memory at a time. Raises
    MemControlError."""
    model = load_base(parse_base(files.base, "--base") if files.base else parse_base(files.model, "--model"))
    before = work(model)
    if files.lora:
        _put_on(model, files.lora, files.strength, warn)
    else:
        del model
        model = load_base(parse_base(files.model, "--model"))
    return before, work(model), model


def _prepare_attack(base: Base, images: ImagesAt, cache: Path, seed: int, progress: ShowProgress) -> Attack:
    train, held = images(base.resolution)
    return make_attack(base, train, held, cache, seed, partial(progress, "encoding"))


def _put_on(base: Base, given: Path, strength: float, warn: Callable[[str], None]) -> None:
    """Fuses a LoRA into the denoiser. Raises MemControlError where it does not fit."""
    import diffusers

    file, source = find_adapter_file(given), base.source
    for line in list_left_out(file, "--lora"):
        warn(line)
    pipeline_class = getattr(diffusers, source.index["_class_name"])
    fuse_file(base.denoiser, source.family.denoiser, pipeline_class, file, strength, "--lora")


def attack_run(run: Path, spec: Spec, loaded: LoadedModels) -> Measured:
    """On a run's own images. Raises MemControlError where its base or its weights are not on this machine."""
    train, held = loaded.train_images(spec), loaded.parts(spec)[spec.reference]
    all_that_is_used = AttackSize(min(len(train), MOST_AUDITED), min(len(held), MOST_AUDITED))
    attack = plan_attack(spec, loaded) or size_attack(spec, loaded, all_that_is_used, tell_nobody)
    before = measure_untrained(spec, loaded, attack)
    with hold_run(run, spec, loaded):
        return measure_model(spec, loaded, attack, before)


def attack_run_elsewhere(
    run: Path, spec: Spec, loaded: LoadedModels, images: ImagesAt, seed: int, progress: ShowProgress
) -> Measured:
    """On images of folders. Raises MemControlError as well."""
    base, side = loaded.base(spec.config), loaded.train_images(spec).resolution
    with tempfile.TemporaryDirectory() as cache:
        attack = make_attack(base, *images(side), Path(cache), seed, partial(progress, "encoding"))
        before = attack.measure(base, partial(progress, "losses of the base"))
        with hold_run(run, spec, loaded):
            return attack.judge(before, attack.measure(base, partial(progress, "losses of the model")))


def map_run(run: Path, spec: Spec, loaded: LoadedModels, images: Images, rows: Sequence[int]) -> np.ndarray:
    """Where a run's model and its base differ on some of the images: [n, H, W]."""
    chosen = images.take(rows)
    text = loaded.base(spec.config).encode_captions(chosen.captions)
    return map_images(run, spec, loaded, chosen, text)


def map_model(
    files: ModelFiles, images_at: Callable[[int], Images], seed: int, rows: Sequence[int]
) -> np.ndarray:
    """Where a pipeline, or a LoRA, and its base differ on some of the images: [n, H, W]."""

    def work(base: Base) -> Tensor:
        images = images_at(base.resolution).take(rows)
        return predict_shifted(base, images.pixels(), base.encode_captions(images.captions), seed)

    before, after, model = _visit_models(files, work, lambda line: None)
    return shrink_maps(compare_predictions(model, before, after, model.resolution))


def sample_model(
    base: Base,
    captions: list[str],
    samples: int,
    attacked: int,
    steps: int,
    guidance: float,
    seed: int,
    progress: ShowProgress,
) -> tuple[Pictures, np.ndarray | None]:
    """`samples` images, from captions drawn at random; and N_ATTACK of each of `attacked` captions, [P,
    N_ATTACK, 3, H, W], None where there are no captions. Raises MemControlError."""

    def sampled(title: str, drawn: list[str]) -> np.ndarray:
        return base.sample(
            base.encode_captions(drawn),
            base.encode_captions([""]),
            seeds=[derive_seed(seed, title, i) for i in range(len(drawn))],
            steps=steps,
            guidance=guidance,
            resolution=base.resolution,
            progress=lambda done, total: progress(title, done, total),
        )

    pixels = sampled(
        "sampling",
        np.random.default_rng(derive_seed(seed, "captions")).choice(captions or [""], size=samples).tolist(),
    )
    if attacked and not any(captions):
        raise MemControlError(
            "--attacked samples many images of a training caption, and --train has no captions; "
            "give them in metadata.csv, or leave it out"
        )
    prompts = (
        np.random.default_rng(derive_seed(seed, "attacked"))
        .permutation(sorted(set(captions)))[:attacked]
        .tolist()
    )
    attack = (
        sampled("extraction attack", [prompt for prompt in prompts for _ in range(_N_ATTACK)])
        if prompts
        else None
    )
    return wrap_samples(pixels), None if attack is None else attack.reshape(
        len(prompts), _N_ATTACK, *attack.shape[1:]
    )
