"""Owns `memcontrol.audit`: how much images, or a model's samples, copy a training set, judged against
held-out images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from memcontrol.auditing.attack import (
    SAMPLING,
    ModelFiles,
    attack_run,
    attack_run_elsewhere,
    map_model,
    map_run,
    open_model,
    sample_model,
)
from memcontrol.auditing.audited import AuditSource
from memcontrol.auditing.judge import AUTO, ShowProgress, choose_network, judge_images
from memcontrol.config.data import Fit
from memcontrol.config.spec import read_spec
from memcontrol.core.errors import MemControlError
from memcontrol.core.estimate import Measured, Rewards
from memcontrol.core.image_parts import CALIBRATION
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.data.images import Images
from memcontrol.data.pictures import (
    FolderImages,
    Pictures,
    choose_fits,
    leave_out_twins,
    make_pictures,
    read_folder,
    share_greys,
    wrap_samples,
)
from memcontrol.training.maps import frame_regions
from memcontrol.trial.loaded import LoadedModels
from memcontrol.trial.pictures import tint_images
from memcontrol.trial.samples import read_samples
from memcontrol.view.audit_page import N_SHOWN, SHOWN_SIDE
from memcontrol.view.words import describe_membership

_FEWEST_GROUPS = 8  # of one part, below which no p can be small
_N_MAPPED = 12  # of the copies that are shown


def audit(
    images: str | Path | None = None,
    train: str | Path | None = None,
    holdout: str | Path | None = None,
    *,
    model: str | Path | None = None,
    extractor: str = AUTO,
    skip_unreadable: bool = False,
    group: str | None = None,
    twins: str = "refuse",
    fit: Fit | None = None,
    calibration: str | Path | None = None,
    pages: str = "refuse",
    max_pixels: int | None = None,
    base: str | None = None,
    lora: str | Path | None = None,
    strength: float = 1.0,
    **sampling: Any,
) -> dict[str, Any]:
    """How much a model (a run folder, or a pipeline to sample from) or a folder of images copies a training
    set, judged against held-out images: what audit.json holds. A run knows its own images.

    `base` is what a pipeline was fine-tuned from; or `lora` a LoRA file over `model` as the base, at a
    `strength`. Either, and a run, which knows its base, shows what an attacker can tell of training images.

    `extractor` is a feature network as `rewards.extractor` names one; auto: efficientnet-lite0 for
    photographs, where it is installed, else tiny.

    `group`, `twins`, `fit`, `pages` and `max_pixels` are as those of `data` in a study; without a fit images
    are compared under each where shapes differ. `calibration` is a folder of further real images, from which
    the line of copies is drawn; a run knows its own. `sampling` of a pipeline: samples, attacked, steps,
    guidance, seed. Raises MemControlError."""
    generated, known, held = (Path(path) if path else None for path in (images, train, holdout))
    source = AuditSource(
        generated,
        known,
        held,
        str(model) if model else None,
        skip_unreadable,
        sampling,
        group,
        twins,
        fit,
        Path(calibration) if calibration else None,
        pages,
        max_pixels,
        base,
        Path(lora) if lora else None,
        strength,
    )
    return audit_source(source, extractor, lambda title, done, total: None, lambda line: None).found


MapRows = Callable[[Sequence[int]], np.ndarray]  # of training images, to [n, H, W]


@dataclass(frozen=True)
class _Comparison:
    """By fit, the generated, training, held-out and, where there are any, calibration images; what an
    extraction attack sampled, uint8 [P, m, 3, H, W]; and what the model itself tells."""

    sets: dict[Fit, tuple[Pictures, Pictures, Pictures, Pictures | None]]
    attack: np.ndarray | None
    told: Measured
    map_rows: MapRows | None = None  # where the model and its base differ, where that is known


@dataclass(frozen=True)
class Audited:
    """What audit.json holds, the generated and training images that it tells of, and maps [n, H, W] of where
    the model and its base differ, on the training images of the first copies."""

    found: dict[str, Any]
    generated: Pictures
    train: Pictures
    maps: np.ndarray

    def read_copies(self) -> Iterator[list[np.ndarray]]:
        """Of the first copies the generated image, its nearest training image and, where there is a map, that
        one tinted by it: uint8 [3, H, W] each."""
        rows = [one["rows"] for one in self.found["copies"][:N_SHOWN]]
        sides = (min(pictures.side, SHOWN_SIDE) for pictures in (self.generated, self.train))
        made, known = (
            pictures.read_small([pair[i] for pair in rows], side)
            for i, (pictures, side) in enumerate(zip((self.generated, self.train), sides))
        )
        tinted = tint_images(known[: len(self.maps)], self.maps) if len(self.maps) else known[:0]
        for i, pair in enumerate(zip(made, known)):
            yield [*pair, *tinted[i : i + 1]]


def audit_source(
    source: AuditSource, extractor: str, progress: ShowProgress, warn: Callable[[str], None]
) -> Audited:
    """Raises MemControlError."""
    source.check()
    seen = _read_references(source, progress, warn)
    if source.run:
        compared = _compare_run(source, source.run, seen, progress, warn)
    else:
        compared = _compare_folders(source, seen, progress, warn)
    network = choose_network(extractor, next(iter(compared.sets.values()))[1])
    if network.doubt:
        warn(network.doubt)
    judged = {
        fit: judge_images(
            made, known, held, network.name, progress, compared.attack, len(compared.sets), third
        )
        for fit, (made, known, held, third) in compared.sets.items()
    }
    # what was copied shows where images are brought to squares as the model's were
    fit = max(judged, key=lambda fit: _rank_copying(judged[fit]["rewards"]))
    generated, train, *_ = compared.sets[fit]
    dropped = list(seen["holdout"].dropped) if "holdout" in seen else []
    copies, maps = judged[fit]["copies"], np.empty((0, 1, 1), np.float32)
    if compared.map_rows and copies:
        maps = compared.map_rows([one["rows"][1] for one in copies[:_N_MAPPED]])
        for one, box in zip(copies, frame_regions(maps)):
            one["unlike_base"] = box
    rewards = judged[fit]["rewards"] | Rewards.from_estimates(compared.told).to_plain()
    found = {
        **judged[fit],
        "rewards": rewards,
        "audited": source.describe(),
        "membership": describe_membership(rewards),
        "extractor_reason": network.reason,
        "extractor_doubt": network.doubt,
    }
    found |= {"fit": fit, "fits": list(judged), "dropped": dropped}
    return Audited(found, generated, train, maps)


def _compare_run(
    source: AuditSource,
    run: Path,
    seen: Mapping[str, FolderImages],
    progress: ShowProgress,
    warn: Callable[[str], None],
) -> _Comparison:
    """What a run generated, beside its own images where no others are given."""
    RunFolder(run).refuse_dropped(RunFolder(run).samples_file)
    spec, loaded, samples = read_spec(run), LoadedModels(), read_samples(run)
    parts, known = loaded.parts(spec), loaded.train_images(spec)
    twins = StudyFolder(spec.study_folder).list_twins([one.name for one in known.records])
    own = {"train": make_pictures("train", known, twins)}
    own["holdout"] = make_pictures("holdout", parts[spec.reference])
    if CALIBRATION in parts and not seen:  # further images belong to the run's own references
        own[CALIBRATION] = make_pictures(CALIBRATION, parts[CALIBRATION])
    own |= {name: one.make_pictures(source.fit or "crop") for name, one in seen.items()}
    if source.twins == "refuse" and len({"train", "holdout"} & seen.keys()) == 1:
        _refuse_same_images(own["train"], own["holdout"])
    sets = (wrap_samples(samples["images"]), own["train"], own["holdout"], own.get(CALIBRATION))
    told: Measured = {}
    map_rows: MapRows | None = None
    try:
        if not seen:
            told = attack_run(run, spec, loaded)
            map_rows = partial(map_run, run, spec, loaded, known)
        elif {"train", "holdout"} <= seen.keys():
            pair = partial(_make_pair, source, seen)
            told = attack_run_elsewhere(run, spec, loaded, pair, SAMPLING["seed"], progress)
            map_rows = partial(map_run, run, spec, loaded, pair(known.resolution)[0])
    except MemControlError as error:
        warn(f"what an attacker could tell is not measured: {error}")
    return _Comparison({spec.config.data.fit: sets}, samples.get("extraction"), told, map_rows)


def _compare_folders(
    source: AuditSource,
    seen: Mapping[str, FolderImages],
    progress: ShowProgress,
    warn: Callable[[str], None],
) -> _Comparison:
    """A folder's images, or a pipeline's samples, beside the references that are given, under each fit."""
    attack: np.ndarray | None = None
    told: Measured = {}
    map_rows: MapRows | None = None
    if source.images:
        tell = partial(progress, "reading generated images")
        folder = read_folder("generated", source.images, source.reading, warn, tell)
        fits = choose_fits(folder, seen["train"], source.fit)
        shown = [folder.make_pictures(fit) for fit in fits]
    else:
        captions = sorted({record.caption for record in seen["train"].look.records} - {""})
        sampling = {**SAMPLING, **source.sampling}
        files = ModelFiles(str(source.model), source.base, source.lora, source.strength)
        pair = partial(_make_pair, source, seen)
        opened = open_model(files, pair, sampling["seed"], progress, warn)
        told = opened.told
        if told:
            map_rows = partial(map_model, files, lambda side: pair(side)[0], sampling["seed"])
        sampled, attack = sample_model(opened.base, captions, **sampling, progress=progress)
        fits = choose_fits(None, seen["train"], source.fit)
        shown = [sampled for _ in fits]
    third = seen.get(CALIBRATION)
    sets = {
        fit: (
            one,
            seen["train"].make_pictures(fit),
            seen["holdout"].make_pictures(fit),
            third.make_pictures(fit) if third else None,
        )
        for fit, one in zip(fits, shown)
    }
    return _Comparison(sets, attack, told, map_rows)


def _make_pair(source: AuditSource, seen: Mapping[str, FolderImages], side: int) -> tuple[Images, Images]:
    """Training and held-out images, as a model sees them."""
    train, held = (seen[name].make_images(side, source.fit or "crop") for name in ("train", "holdout"))
    return train, held


def _rank_copying(rewards: Mapping[str, float]) -> tuple[float, float]:
    return rewards["clear_copy_rate"], rewards["copying"]


def _read_references(
    source: AuditSource, progress: ShowProgress, warn: Callable[[str], None]
) -> dict[str, FolderImages]:
    """The training and held-out folders that are given, without twins of each other. Raises
    MemControlError."""
    given = {"train": source.train, "holdout": source.holdout, CALIBRATION: source.calibration}
    config = source.reading.model_copy(update={"group": source.group})
    seen = share_greys(
        {
            name: read_folder(name, folder, config, warn, partial(progress, f"reading {name} images"))
            for name, folder in given.items()
            if folder
        }
    )
    pictures = [one.make_pictures("crop") for one in seen.values()]
    for one, other in itertools.combinations(pictures, 2):
        if source.twins == "refuse" or CALIBRATION in (one.title, other.title):
            _refuse_same_images(one, other)
    _warn_of_few_groups(pictures, source.group, warn)
    if {"train", "holdout"} <= seen.keys():
        train, holdout = leave_out_twins(seen["train"], seen["holdout"], source.twins, warn)
        return {**seen, "train": train, "holdout": holdout}
    return {name: one.name_twins(one.look.find_twins().pairs) for name, one in seen.items()}


def _warn_of_few_groups(pictures: Sequence[Pictures], rule: str | None, warn: Callable[[str], None]) -> None:
    if not rule:
        return
    for one in pictures:
        n = len(set(one.groups))
        if n < _FEWEST_GROUPS:
            warn(f"{one.title}: images of {n} groups alone; with so few no p can be small, whatever shows")


def _refuse_same_images(one: Pictures, other: Pictures) -> None:
    """Raises MemControlError."""
    known = dict(zip(other.digests, other.names))
    shared = [(name, known[digest]) for name, digest in zip(one.names, one.digests) if digest in known]
    if shared:
        more = f", as have {len(shared) - 1} more pairs" if len(shared) > 1 else ""
        raise MemControlError(
            f"{one.title} and {other.title} share an image: '{shared[0][0]}' and '{shared[0][1]}' have the "
            f"same pixels{more}; remove one of each, since copying could not be told from chance"
        )
