"""Owns the judgement of an audit: generated images held against training and held-out ones, in every reward,
and what copies are of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from memcontrol.core.errors import MemControlError
from memcontrol.core.estimate import Measured, Rewards
from memcontrol.core.reward_table import BLIND_SPOTS
from memcontrol.data.look import choose_shown, show_photographs
from memcontrol.data.pictures import Pictures, wrap_samples
from memcontrol.data.twins import THUMBNAIL_SIDE
from memcontrol.reading.groups import pair_equals
from memcontrol.scoring.copying import Suspects, line_ratio
from memcontrol.scoring.evidence import DESCRIPTORS, Descriptors, Evidence, describe_broken_images
from memcontrol.scoring.extractor_table import (
    PHOTO_EXTRA,
    PHOTO_NETWORK,
    TINY_NETWORK,
    find_photo_package,
)
from memcontrol.scoring.extractors import load_extractor
from memcontrol.scoring.labels import N_PERMUTATIONS
from memcontrol.scoring.measures import N_PAIRED, measure_extraction
from memcontrol.scoring.score import score_evidence
from memcontrol.trial.loaded import describe_images
from memcontrol.view.audit_page import N_SHOWN
from memcontrol.view.words import NETWORK_DOUBT, write_verdict

AUTO = "auto"  # the feature network that suits the images
_FEWEST = 8
_SMALL_SIDE = 64  # pixels of images that an extraction attack compares, and of thumbnails
_MOST_SAME = 0.05
ShowProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ChosenNetwork:
    """The feature network of an audit, why it is that one, and what speaks against it, if anything does."""

    name: str
    reason: str
    doubt: str


def choose_network(asked: str, train: Pictures) -> ChosenNetwork:
    """The network that is asked for, or the one that suits the training images."""
    shown = [train.read_small([row], THUMBNAIL_SIDE) for row in choose_shown(len(train))]
    are_photographs = show_photographs(np.concatenate(shown))
    name, reason = (asked, "asked for") if asked != AUTO else _choose_for(are_photographs)
    return ChosenNetwork(name, reason, NETWORK_DOUBT if are_photographs and name == TINY_NETWORK else "")


def _choose_for(photographs: bool) -> tuple[str, str]:
    """A network, and why."""
    if not photographs:
        return TINY_NETWORK, "the images look like characters or drawings"
    if find_photo_package():
        return PHOTO_NETWORK, "the images look like photographs"
    missing = f"{PHOTO_NETWORK} is not installed: {PHOTO_EXTRA}"
    return TINY_NETWORK, f"the images look like photographs, but {missing}"


@dataclass(frozen=True)
class _Sets:
    """What an audit compares."""

    generated: Pictures
    train: Pictures
    holdout: Pictures
    calibration: Pictures | None

    def gather_evidence(
        self, extract: Callable, n_judgements: int, progress: ShowProgress, side: int | None = None
    ) -> Evidence:
        """Of the images as they are, or brought to fewer pixels."""

        def describe(pictures: Pictures) -> Descriptors:
            return _describe_pictures(pictures, extract, progress, side)

        return Evidence(
            describe(self.generated),
            describe(self.train),
            describe(self.holdout),
            train_groups=self.train.groups,
            holdout_groups=self.holdout.groups,
            calibration=describe(self.calibration) if self.calibration else None,
            n_draws=n_judgements,
            n_permutations=n_judgements * N_PERMUTATIONS,  # or the p of the largest could not be small
        )

    def count_missed(
        self, found: Suspects, extract: Callable, n_judgements: int, progress: ShowProgress
    ) -> int | None:
        """How many of the clear copies are none in thumbnails; None where that is not asked, since images are
        no larger or there are no clear copies."""
        if min(self.generated.side, self.train.side) <= _SMALL_SIDE or not found.is_clear.any():
            return None
        small = self.gather_evidence(extract, n_judgements, progress, _SMALL_SIDE)
        return int((found.is_clear & ~small.suspects.is_clear).sum())


def _describe_pictures(
    pictures: Pictures, extract: Callable, progress: ShowProgress, side: int | None
) -> Descriptors:
    """Descriptors of all images, read in blocks: pixels [N, 3072], features [N, D]."""
    title = f"{pictures.title} at {side} pixels" if side else pictures.title

    def read() -> Iterator[np.ndarray]:
        for rows in pictures.iterate_rows():
            yield pictures.read_small(rows, side) if side else pictures.read(rows)
            progress(title, rows[-1] + 1, len(pictures))

    return describe_images(read(), extract)


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
    _check_sizes([one for one in (generated, train, holdout, calibration) if one])
    network = load_extractor(extractor)
    sets = _Sets(generated, train, holdout, calibration)
    evidence = sets.gather_evidence(network.extract, n_judgements, progress)
    if broken := describe_broken_images(evidence.generated.pixels):
        raise MemControlError(f"{broken}, so nothing can be judged")
    progress("judging", 0, 2)
    measured = score_evidence(evidence) | _judge_attack(attack, holdout, evidence)
    rewards = Rewards.from_estimates(measured).to_plain()
    for name in ("copying_p", "memorization_p"):  # of the largest of several
        rewards[name] = min(1.0, n_judgements * rewards[name])
    progress("judging", 1, 2)
    space = evidence.whole_space("pixels")
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
        "missed_when_small": sets.count_missed(evidence.suspects, network.extract, n_judgements, progress),
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
            "region": found.regions[i].tolist(),
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
        small.reshape(*attack.shape[:2], *small.shape[1:]), pairs, evidence.whole_space("pixels")
    )


def _check_sizes(parts: Sequence[Pictures]) -> None:
    """Raises MemControlError."""
    for part in parts:
        if len(part) < _FEWEST:
            raise MemControlError(
                f"{part.title} has {len(part)} images; an audit needs at least {_FEWEST} of each, "
                "and some hundred to say much"
            )


def _list_duplicates(train: Pictures) -> list[dict]:
    """Pairs of training images that are the same or nearly so."""
    same = [(train.names[i], train.names[j]) for i, j in pair_equals(train.digests) if i < j]
    return [{"images": sorted(pair)} for pair in (*same, *train.twins)]
