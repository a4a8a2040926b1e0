"""Owns the attack on a trial's model: which images are told apart, and what an attacker who holds the model
and knows the base tells of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from memcontrol.config.spec import Spec
from memcontrol.core.estimate import Measured
from memcontrol.core.run_folder import StudyFolder
from memcontrol.core.seeds import derive_seed
from memcontrol.data.cache import load_or_make, save_tensors
from memcontrol.data.images import Images
from memcontrol.model.base import Base
from memcontrol.model.encoded import Encoded, load_encoded
from memcontrol.scoring.membership import measure_membership
from memcontrol.training.losses import MOST_AUDITED, N_DRAWS, AttackSize, choose_attack_size, measure_losses
from memcontrol.trial.loaded import LoadedModels, derive_scratch_seed, tell_nobody

_SIDES = ("members", "others")

Losses = tuple[np.ndarray, np.ndarray]  # of members [N, K] and of others [M, K]


@dataclass(frozen=True)
class Attack:
    """Training images and unseen ones, as the denoiser sees them."""

    images: tuple[Images, Images]
    encoded: tuple[Encoded, Encoded]
    n_draws: int
    seed: int
    is_drawn: bool  # whether it was chance that made the ones training images

    def measure(self, base: Base, tell: Callable[[int, int], None] = tell_nobody) -> Losses:
        """Of the model as it is now."""
        found = []
        for i, (images, encoded) in enumerate(zip(self.images, self.encoded)):
            digests = [one.digest for one in images.records]

            def tell_both(done: int, total: int, before: int = i) -> None:
                tell(before * total + done, 2 * total)

            found.append(measure_losses(base, encoded, digests, self.seed, self.n_draws, tell_both))
        return found[0], found[1]

    def judge(self, base: Losses, tuned: Losses) -> Measured:
        members, others = self.images
        return measure_membership(base, tuned, (members.groups, others.groups), self.seed, self.is_drawn)


def make_attack(
    base: Base, train: Images, held: Images, cache: Path, seed: int, progress: Callable[[int, int], None]
) -> Attack:
    """On images of two folders, MOST_AUDITED of each at the most."""
    images = tuple(
        side.take(_choose_rows(len(side), min(len(side), MOST_AUDITED), is_drawn=False))
        for side in (train, held)
    )
    members, others = (load_encoded(base, side, cache, progress) for side in images)
    return Attack((images[0], images[1]), (members, others), N_DRAWS, seed, is_drawn=False)


def plan_attack(
    spec: Spec, loaded: LoadedModels, progress: Callable[..., None] = tell_nobody
) -> Attack | None:
    """On images of the trial's training set and of its reference part; None where a trial is too short for
    it."""
    return loaded.once(
        ("attack", spec.study_folder, spec.reference, spec.n_train, spec.purpose),
        lambda: _make_attack(spec, loaded, progress),
    )


def _make_attack(spec: Spec, loaded: LoadedModels, progress: Callable[..., None]) -> Attack | None:
    train, held = loaded.train_images(spec), loaded.parts(spec)[spec.reference]
    size = choose_attack_size(spec.config.inner, spec.config.rewards, len(train), len(held))
    return None if size is None else size_attack(spec, loaded, size, progress)


def size_attack(spec: Spec, loaded: LoadedModels, size: AttackSize, progress: Callable[..., None]) -> Attack:
    """On so many images of the trial's own."""
    train, held = loaded.train_images(spec), loaded.parts(spec)[spec.reference]
    is_drawn = bool(StudyFolder(spec.study_folder).read_split().get("drawn"))
    mine, theirs = (
        _choose_rows(len(train), size.members, is_drawn),
        _choose_rows(len(held), size.others, is_drawn),
    )
    others = held.take(theirs)
    return Attack(
        (train.take(mine), others),
        (loaded.load_encoded(spec, train, progress).take(mine), loaded.load_encoded(spec, others, progress)),
        size.draws,
        spec.sampling_seed,
        is_drawn,
    )


def _choose_rows(n_all: int, n: int, is_drawn: bool) -> list[int]:
    """The first of parts in an order that chance has made; of others, which may be sorted, all over them."""
    return list(range(n)) if is_drawn else np.linspace(0, n_all - 1, n).round().astype(int).tolist()


def measure_untrained(spec: Spec, loaded: LoadedModels, attack: Attack | None) -> Losses | None:
    """What the base itself loses on the images, once a study; its denoiser must hold no adapter."""
    if attack is None:
        return None
    base, path = loaded.base(spec.config), _name_losses(spec, loaded, attack)

    def make() -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(losses) for name, losses in zip(_SIDES, attack.measure(base))}

    # ranks that share the base all compute, or none; a lock would be in their way
    if base.ranks.size > 1 and not base.ranks.agree(path.exists()):
        found = make()
        if base.ranks.rank == 0:
            save_tensors(path, found)
    else:
        found = load_or_make(path, make)
    return found["members"].numpy(), found["others"].numpy()


def _name_losses(spec: Spec, loaded: LoadedModels, attack: Attack) -> Path:
    """By the content that they depend on."""
    base, anew = loaded.base(spec.config), spec.config.inner.from_scratch
    digests = [images.digest for images in attack.images]
    start = derive_scratch_seed(spec.config) if anew else base.source.digest
    content = derive_seed(*digests, start, base.precision, attack.seed, attack.n_draws)
    return StudyFolder(spec.study_folder).cache / f"losses-{content:016x}.safetensors"


def measure_model(
    spec: Spec, loaded: LoadedModels, attack: Attack | None, untrained: Losses | None
) -> Measured:
    """The figures of the model that the base is now; empty where there is no attack."""
    if attack is None or untrained is None:
        return {}
    # where nothing is trained both are the same to the bit, however they were computed
    is_base = spec.choice.method == "none"
    return attack.judge(untrained, untrained if is_base else attack.measure(loaded.base(spec.config)))
