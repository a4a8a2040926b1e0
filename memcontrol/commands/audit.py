"""Owns `memcontrol.audit`: how much images, or a model's samples, copy a training set, judged against
held-out images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memcontrol.core.config import CALIBRATION, Fit, parse_base
from memcontrol.core.errors import MemControlError
from memcontrol.core.estimate import Measured, Rewards
from memcontrol.core.reward_table import BLIND_SPOTS
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.core.seeds import derive_seed
from memcontrol.core.spec import read_spec
from memcontrol.data.groups import pair_equals
from memcontrol.data.pictures import (
    FITS,
    FolderImages,
    Pictures,
    choose_fits,
    find_common_greys,
    leave_out_twins,
    make_pictures,
    read_folder,
    wrap_samples,
)
from memcontrol.model.base import load_base
from memcontrol.scoring.copying import Suspects, line_ratio
from memcontrol.scoring.evidence import DESCRIPTORS, Descriptors, Evidence, describe_broken_images
from memcontrol.scoring.extractors import load_extractor
from memcontrol.scoring.labels import N_PERMUTATIONS
from memcontrol.scoring.measures import N_PAIRED, measure_extraction
from memcontrol.scoring.score import score_evidence
from memcontrol.trial.loaded import LoadedModels, describe_images
from memcontrol.trial.samples import read_samples
from memcontrol.view.audit_page import N_SHOWN, SHOWN_SIDE
from memcontrol.view.words import write_verdict

_FEWEST, _FEWEST_GROUPS = 8, 8
_TWIN_RULES = ("refuse", "drop", "keep")
_SMALL_SIDE = 64  # pixels of the images that an extraction attack compares
_MOST_SAME = 0.05
_N_ATTACK = 10  # images of each attacked caption
# of an audited pipeline
SAMPLING: dict[str, Any] = {"samples": 256, "attacked": 0, "steps": 20, "guidance": 1.0, "seed": 0}
ShowProgress = Callable[[str, int, int], None]


def _sample_pipeline(
    model: str,
    captions: list[str],
    samples: int,
    attacked: int,
    steps: int,
    guidance: float,
    seed: int,
    progress: ShowProgress,
) -> tuple[Pictures, np.ndarray | None]:
    """`samples` images of a pipeline (a folder, single file or Hub id), from captions drawn at
    random; and N_ATTACK of each of `attacked` captions, [P, N_ATTACK, 3, H, W], None where there are no
    captions. Raises MemControlError."""
    base = load_base(parse_base(model, "--model"))

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


def audit(
    images: str | Path | None = None,
    train: str | Path | None = None,
    holdout: str | Path | None = None,
    *,
    model: str | Path | None = None,
    extractor: str = "tiny",
    skip_unreadable: bool = False,
    group: str | None = None,
    twins: str = "refuse",
    fit: Fit | None = None,
    calibration: str | Path | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """How much a model (a run folder, or a pipeline to sample from) or a folder of images copies a training
    set, judged against held-out images: what audit.json holds. A run knows its own images.

    `group`, `twins` and `fit` are as data.group, data.twins and data.fit of a study; without a fit images are
    compared under each where shapes differ. `calibration` is a folder of further real images, from which the
    line of copies is drawn; a run knows its own. `sampling` of a pipeline: samples, attacked, steps,
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
    )
    return audit_source(source, extractor, lambda title, done, total: None, lambda line: None)[0]


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

    @property
    def run(self) -> Path | None:
        if self.model and RunFolder(Path(self.model)).spec_file.is_file():
            return Path(self.model)
        return None

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
        for name, value, allowed in (("twins", self.twins, _TWIN_RULES), ("fit", self.fit, (None, *FITS))):
            if value not in allowed:
                known = ", ".join(str(one) for one in allowed if one)
                raise MemControlError(f"{name} is '{value}'; allowed: {known}")
        if self.run and not (self.train and self.holdout) and (self.group or self.fit):
            raise MemControlError(
                "a run knows the groups and the fit of its own images; leave out --group and --fit, or give "
                "--train and --holdout"
            )
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


def audit_source(
    source: AuditSource, extractor: str, progress: ShowProgress, warn: Callable[[str], None]
) -> tuple[dict, Pictures, Pictures]:
    """The audit, and the generated and training images that it tells of. Raises MemControlError."""
    source.check()
    seen = _read_references(source, warn)
    attack: np.ndarray | None = None
    fits: tuple[Fit, ...]
    thirds: list[Pictures | None]
    if source.run:
        RunFolder(source.run).refuse_dropped(RunFolder(source.run).samples_file)
        spec, loaded, samples = read_spec(source.run), LoadedModels(), read_samples(source.run)
        own = {"train": loaded.train_images(spec), "holdout": loaded.parts(spec)[spec.reference]}
        twins = StudyFolder(spec.study_folder).list_twins([one.name for one in own["train"].records])
        parts = [
            seen[name].make_pictures(source.fit or "crop")
            if name in seen
            else make_pictures(name, found, twins if name == "train" else ())
            for name, found in own.items()
        ]
        sets = [(wrap_samples(samples["images"]), *parts)]
        third = loaded.parts(spec).get(CALIBRATION) if not seen else None
        thirds = [make_pictures(CALIBRATION, third) if third else None]
        attack, fits = samples.get("extraction"), (spec.config.data.fit,)
    else:
        if source.images:
            folder = read_folder("generated", source.images, warn, source.skip_unreadable)
            fits = choose_fits(folder, seen["train"], source.fit)
            shown = [folder.make_pictures(fit) for fit in fits]
        else:
            records = seen["train"].look.records
            captions = sorted({record.caption for record in records} - {""})
            sampled, attack = _sample_pipeline(
                str(source.model), captions, **{**SAMPLING, **source.sampling}, progress=progress
            )
            fits = choose_fits(None, seen["train"], source.fit)
            shown = [sampled for _ in fits]
        thirds = [None for _ in fits]
        sets = [
            (one, seen["train"].make_pictures(fit), seen["holdout"].make_pictures(fit))
            for one, fit in zip(shown, fits)
        ]
    if CALIBRATION in seen:
        thirds = [seen[CALIBRATION].make_pictures(fit) for fit in fits]
    judged = [
        judge_images(made, known, held, extractor, progress, attack, len(sets), third)
        for (made, known, held), third in zip(sets, thirds)
    ]
    # what was copied shows where images are brought to squares as the model's were
    most = max(range(len(judged)), key=lambda i: _rank_copying(judged[i]["rewards"]))
    generated, train, _ = sets[most]
    dropped = list(seen["holdout"].dropped) if "holdout" in seen else []
    return {**judged[most], "fit": fits[most], "fits": list(fits), "dropped": dropped}, generated, train


def _rank_copying(rewards: Mapping[str, float]) -> tuple[float, float]:
    return rewards["clear_copy_rate"], rewards["copying"]


def _read_references(source: AuditSource, warn: Callable[[str], None]) -> dict[str, FolderImages]:
    """The training and held-out folders that are given, without twins of each other. Raises
    MemControlError."""
    given = {"train": source.train, "holdout": source.holdout, CALIBRATION: source.calibration}
    folders = {name: folder for name, folder in given.items() if folder}
    greys = find_common_greys(list(folders.values()))
    seen = {
        name: read_folder(name, folder, warn, source.skip_unreadable, source.group, greys)
        for name, folder in folders.items()
    }
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


def read_pairs(found: dict, generated: Pictures, train: Pictures) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The generated image and its nearest training image, uint8 [3, H, W], of the first copies of an
    audit."""
    rows = [one["rows"] for one in found["copies"][:N_SHOWN]]
    return zip(
        generated.read_small([row for row, _ in rows], min(generated.side, SHOWN_SIDE)),
        train.read_small([row for _, row in rows], min(train.side, SHOWN_SIDE)),
    )


def judge_images(
    generated: Pictures,
    train: Pictures,
    holdout: Pictures,
    extractor: str,
    progress: ShowProgress,
    attack: np.ndarray | None = None,
    n_judgements: int = 1,
    calibration: Pictures | None = None,
) -> dict:
    """Every reward of the audit, as audit.json holds it; `attack` is what an extraction attack sampled, uint8
    [P, m, 3, H, W]; the most suspicious of `n_judgements` is taken. Raises MemControlError where the images
    cannot be judged."""
    _check_pictures(generated, train, holdout)
    network = load_extractor(extractor)
    made, known, held = (
        _describe_pictures(pictures, network.extract, progress) for pictures in (generated, train, holdout)
    )
    third = _describe_pictures(calibration, network.extract, progress) if calibration else None
    if broken := describe_broken_images(made.pixels):
        raise MemControlError(f"{broken}, so nothing can be judged")
    evidence = Evidence(
        made,
        known,
        held,
        train_groups=train.groups,
        holdout_groups=holdout.groups,
        calibration=third,
        n_draws=n_judgements,
        n_permutations=n_judgements * N_PERMUTATIONS,  # or the p of the largest could not be small
    )
    progress("judging", 0, 2)
    measured = score_evidence(evidence) | _judge_attack(attack, holdout, evidence)
    rewards = Rewards.from_estimates(measured).to_plain()
    for name in ("copying_p", "memorization_p"):  # of the largest of several
        rewards[name] = min(1.0, n_judgements * rewards[name])
    progress("judging", 1, 2)
    space = evidence.space("pixels")
    same = float((space.to_holdout[0] < 1e-6).mean())
    if same > _MOST_SAME:
        raise MemControlError(
            f"{same:.0%} of the generated images are held-out images themselves; hold out images "
            "that the model never saw and that are not audited, since copying could not be seen"
        )
    return {
        "verdict": write_verdict(rewards, len(generated)),
        "sizes": {part.title: len(part) for part in (generated, train, holdout, calibration) if part},
        "extractor": network.id,
        "side": train.side,
        "threshold": line_ratio(space.real_ratios),
        "rewards": rewards,
        "copies": _list_copies(evidence.suspects, generated, train),
        "duplicates": _list_duplicates(train),
        "cannot_see": list(BLIND_SPOTS),
    }


def _list_copies(found: Suspects, generated: Pictures, train: Pictures) -> list[dict]:
    """What any rule calls a copy, and some more, the most suspicious first; each in the descriptor in which
    it is that."""
    return [
        {
            "generated": generated.names[i],
            "training": train.names[found.training[i]],
            "descriptor": DESCRIPTORS[found.descriptors[i]],
            "distance": float(found.distances[i]),
            "of_holdout": float(found.ratios[i]),
            "chance": float(found.chances[i]),
            "copy": bool(found.is_copy[i]),
            "rows": [int(i), int(found.training[i])],
        }
        for n, i in enumerate(found.order)
        if n < N_SHOWN or found.is_copy[i]
    ]


def _judge_attack(attack: np.ndarray | None, holdout: Pictures, evidence: Evidence) -> Measured:
    """What the extraction attack found, all images brought to one size."""
    if attack is None:
        return {}
    flat = wrap_samples(attack.reshape(-1, *attack.shape[2:]))
    small = flat.read_small(list(range(len(flat))), _SMALL_SIDE)
    pairs = holdout.read_small(list(range(len(holdout))[:N_PAIRED]), _SMALL_SIDE)
    return measure_extraction(
        small.reshape(*attack.shape[:2], *small.shape[1:]), pairs, evidence.space("pixels")
    )


def _check_pictures(generated: Pictures, train: Pictures, holdout: Pictures) -> None:
    for part in (generated, train, holdout):
        if len(part) < _FEWEST:
            raise MemControlError(
                f"{part.title} has {len(part)} images; an audit needs at least {_FEWEST} of each, "
                "and some hundred to say much"
            )
    _refuse_same_images(train, holdout)


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


def _describe_pictures(pictures: Pictures, extract: Callable, progress: ShowProgress) -> Descriptors:
    """Descriptors of all images, read in blocks: pixels [N, 3072], features [N, D]."""

    def read() -> Iterator[np.ndarray]:
        for rows in pictures.iterate_rows():
            yield pictures.read(rows)
            progress(pictures.title, rows[-1] + 1, len(pictures))

    return describe_images(read(), extract)


def _list_duplicates(train: Pictures) -> list[dict]:
    """Pairs of training images that are the same or nearly so."""
    same = [(train.names[i], train.names[j]) for i, j in pair_equals(train.digests) if i < j]
    return [{"images": sorted(pair)} for pair in (*same, *train.twins)]
