"""Owns how a fine-tuned model is measured: samples of prompts and noise common to all trials, the rewards
made from them, and what numbers were measured with, since those measured differently are never compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memcontrol.config.spec import Spec
from memcontrol.core.errors import Diverged
from memcontrol.core.estimate import Estimate, Measured
from memcontrol.core.files import replace_file
from memcontrol.core.image_parts import CALIBRATION
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.core.seeds import derive_seed
from memcontrol.data.cache import TensorRows, iterate_rows, map_bytes, map_tensors, write_tensors
from memcontrol.data.images import Images, count_at_once
from memcontrol.model.base import Base
from memcontrol.scoring.evidence import Evidence, describe_broken_images
from memcontrol.scoring.measures import N_PAIRED, measure_extraction
from memcontrol.scoring.score import collect_contributions, collect_labels, score_evidence
from memcontrol.scoring.utility import Classes
from memcontrol.training.mitigations import add_random_words, add_text_noise, list_vocabulary
from memcontrol.training.shard import Material
from memcontrol.trial.loaded import LoadedModels, describe_images

_REWARDS_VERSION = 1  # of the rewards: raised whenever one of them would come out otherwise
_LABELS = " labels"  # after the name of a reward: its statistic under permuted labels


def sample_images(base: Base, material: Material, spec: Spec, progress: Callable) -> dict[str, np.ndarray]:
    """n_samples images from training captions, where copying shows: `images`, the `rows` of the training
    captions used, and the `seeds` of each image's noise; where the study asks for it, the images of an
    `extraction` attack, [P, m, 3, H, W]. Captions and noise are the same for all trials of a purpose."""
    plan = plan_samples(base, material, spec)
    made = {
        name: np.concatenate(list(draw.generate(base, material, spec, progress))).reshape(draw.shape)
        for name, draw in plan.items()
    }
    return made | _list_draws(plan)


def write_samples(
    path: Path, base: Base, material: Material, spec: Spec, model: str, progress: Callable
) -> dict[str, np.ndarray]:
    """The same, written as they come and then mapped from the file: no more than a batch is in memory. Those
    that are there, of the same `model`, are not made again."""
    # all ranks that share a base sample, or none
    if base.ranks.agree(not path.exists() or _read_model(path) != model):
        plan = plan_samples(base, material, spec)
        tensors = {
            name: TensorRows(
                "torch.uint8", draw.shape, _convert(draw.generate(base, material, spec, progress))
            )
            for name, draw in plan.items()
        }
        for name, numbers in _list_draws(plan).items():
            tensors[name] = TensorRows("torch.int64", numbers.shape, [torch.from_numpy(numbers)])
        write_tensors(path, tensors, {"model": model})
    return read_samples(path.parent)


def _convert(blocks: Iterator[np.ndarray]) -> Iterator[torch.Tensor]:
    return (torch.from_numpy(np.ascontiguousarray(block)) for block in blocks)


def _read_model(path: Path) -> str | None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("model")


@dataclass(frozen=True)
class Draw:
    """Images to be made: from which training captions, with which noise, in which shape; `n_before` images
    are made before them, of `n_all`."""

    rows: np.ndarray  # [N], of training captions
    seeds: list[int]  # [N]
    shape: tuple[int, ...]  # [..., 3, H, W]
    n_before: int
    n_all: int

    def generate(
        self, base: Base, material: Material, spec: Spec, progress: Callable
    ) -> Iterator[np.ndarray]:
        """As many at a time as memory holds: each uint8 [n, 3, H, W]."""

        def tell(done: int, total: int) -> None:
            progress(self.n_before + done, self.n_all)

        return _generate_images(base, material, spec, self.rows, self.seeds, tell)


def plan_samples(base: Base, material: Material, spec: Spec) -> dict[str, Draw]:
    """The `images`, and those of an `extraction` attack where the study asks for one."""
    n, attack = spec.config.rewards.n_samples, spec.config.rewards.extraction
    n_captions = len(material.data.caption_rows)
    n_all = n + (attack.prompts * attack.images if attack else 0)
    side = spec.config.data.resolution or base.resolution
    rows = np.random.default_rng(derive_seed(spec.sampling_seed, "captions")).integers(n_captions, size=n)
    seeds = [derive_seed(spec.sampling_seed, "noise", i) for i in range(n)]
    found = {"images": Draw(rows, seeds, (n, 3, side, side), 0, n_all)}
    if attack:
        rng = np.random.default_rng(derive_seed(spec.sampling_seed, "extraction"))
        prompts = rng.permutation(n_captions)[: attack.prompts]
        seeds = [
            derive_seed(spec.sampling_seed, "extraction", i) for i in range(len(prompts) * attack.images)
        ]
        shape = (len(prompts), attack.images, 3, side, side)
        found["extraction"] = Draw(prompts.repeat(attack.images), seeds, shape, n, n_all)
    return found


def _list_draws(plan: Mapping[str, Draw]) -> dict[str, np.ndarray]:
    """What is kept beside the images: their captions' rows and their seeds."""
    return {"rows": plan["images"].rows, "seeds": np.array(plan["images"].seeds)}


def _generate_images(
    base: Base, material: Material, spec: Spec, rows: np.ndarray, seeds: list[int], progress: Callable
) -> Iterator[np.ndarray]:
    """An image for each training caption and noise: uint8 [n, 3, H, W] at a time."""
    rewards, data = spec.config.rewards, material.data
    text = data.texts(data.caption_rows[torch.from_numpy(rows)])
    if rewards.random_words:
        captions = [material.captions[row] for row in rows]
        words = list_vocabulary(base.pipeline.tokenizer)
        text = base.encode_captions(
            add_random_words(captions, rewards.random_words, words, derive_seed(spec.sampling_seed, "words"))
        )
    if rewards.embedding_noise:
        text = add_text_noise(text, rewards.embedding_noise, spec.sampling_seed)
    return base.iterate_samples(
        text,
        data.texts(torch.tensor([0])),
        seeds=seeds,
        steps=rewards.sampling_steps,
        guidance=rewards.guidance,
        resolution=spec.config.data.resolution or base.resolution,
        progress=progress,
        guidance_from=rewards.guidance_from,
    )


def read_samples(folder: Path) -> dict[str, np.ndarray]:
    """`images` uint8 [N, 3, H, W], `rows` [N] and `seeds` [N], as `write_samples` made them."""
    run = RunFolder(folder)
    if run.samples_file.is_file():
        return {
            name: map_bytes(run.samples_file, name) if tensor.dtype == torch.uint8 else tensor.numpy()
            for name, tensor in map_tensors(run.samples_file).items()
        }
    with np.load(run.old_samples_file, allow_pickle=False) as stored:
        return dict(stored)


def gather_evidence(samples: Mapping[str, np.ndarray], spec: Spec, loaded: LoadedModels) -> Evidence:
    rewards, images, train = spec.config.rewards, samples["images"], loaded.train_images(spec)
    captions = tuple(train.captions[row] for row in samples["rows"])
    cache, network = StudyFolder(spec.study_folder).cache, loaded.extractor(rewards.extractor)
    parts = loaded.parts(spec)
    held, third = parts[spec.reference], parts.get(CALIBRATION)
    return Evidence(
        train_groups=train.groups,
        holdout_groups=held.groups,
        generated=describe_images(iterate_rows(images, count_at_once(images.shape[-1])), network.extract),
        train=loaded.views(train, rewards.extractor, cache),
        holdout=loaded.views(held, rewards.extractor, cache),
        calibration=loaded.views(third, rewards.extractor, cache) if third else None,
        seed=spec.sampling_seed,
        images=images,
        captions=captions,
        classes=_list_classes(samples["rows"], train, held) if spec.config.data.label else None,
        trains_network=spec.reference == "test",  # once or twice a study, by `retrain`
        clip=loaded.clip(rewards.clip)(images, captions) if rewards.clip else None,
        known=loaded.known(spec),
    )


def _list_classes(rows: np.ndarray, train: Images, held: Images) -> Classes:
    """Of images generated from the captions of these rows, of training images and of the reference."""
    labels = train.labels
    return Classes([labels[row] for row in rows], labels, held.labels)


def score_samples(
    samples: Mapping[str, np.ndarray], evidence: Evidence, spec: Spec, loaded: LoadedModels
) -> Measured:
    """The rewards of one set of samples, whose evidence is given. Raises Diverged where they cannot be
    judged."""
    broken = describe_broken_images(evidence.generated.pixels)
    if broken:
        raise Diverged(broken)
    attack: Measured = {}
    if "extraction" in samples:
        held = loaded.parts(spec)[spec.reference]
        pairs = held.take(range(len(held))[:N_PAIRED]).pixels()
        attack = measure_extraction(samples["extraction"], pairs, evidence.whole_space("pixels"))
    return score_evidence(evidence, spec.config.rewards.functions) | attack


def describe_measurement(spec: Spec, loaded: LoadedModels) -> dict[str, object]:
    """All that rewards depend on beside the model itself."""
    rewards = spec.config.rewards
    sampling = rewards.model_dump(
        mode="json",
        include={
            "sampling_steps",
            "guidance",
            "guidance_from",
            "random_words",
            "embedding_noise",
            "clip",
            "extraction",
        },
    )
    precision = loaded.base(spec.config).precision
    return {
        "figures": _REWARDS_VERSION,
        "extractor": loaded.extractor(rewards.extractor).id,
        "pixels": "32 x 32, bilinear, antialiased",
        "resolution": loaded.parts(spec)[spec.reference].resolution,
        "reference": loaded.parts(spec)[spec.reference].digest,
        "train": loaded.train_images(spec).digest,
        "n_samples": rewards.n_samples,
        "sampling": sampling,
        "prompts_and_noise": spec.sampling_seed,
        **({} if precision.is_plain else {"precision": str(precision)}),
        **({"classes": _digest_classes(spec, loaded)} if spec.config.data.label else {}),
        # what agreed was enough before
        **({"extracted": "what agrees and matches"} if rewards.extraction else {}),
    }


def _digest_classes(spec: Spec, loaded: LoadedModels) -> str:
    labels = (*loaded.train_images(spec).labels, *loaded.parts(spec)[spec.reference].labels)
    return f"{derive_seed('classes', *labels):016x}"


def save_contributions(path: Path, measured: Measured, prompts: np.ndarray) -> None:
    """What each image adds to each reward [N], and the prompt that it was made from, for comparisons in
    pairs."""
    added: dict[str, Any] = {
        name: values
        for name, values in collect_contributions(measured).items()
        if len(values) == len(prompts)
    } | {f"{name}{_LABELS}": values for name, values in collect_labels(measured).items()}
    with replace_file(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, prompts=prompts, **added)


def read_estimates(folder: Path, rewards: Mapping[str, float]) -> tuple[dict[str, Estimate], np.ndarray]:
    """The rewards of a run that know what each image adds, with that, and the prompts of the images [N]."""
    stored = RunFolder(folder).read_contributions()
    found = {
        name: Estimate(rewards[name], contributions=values, labels=stored.get(f"{name}{_LABELS}"))
        for name, values in stored.items()
        if name != "prompts" and not name.endswith(_LABELS)
    }
    return found, stored["prompts"]
