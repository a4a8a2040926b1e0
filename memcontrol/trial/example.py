"""Owns the example on a model's card: one of the samples that were measured, which no rule
calls a copy and whose prompt tells of no single image, drawn again by the exported files."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from memcontrol.config.spec import Spec
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.core.seeds import derive_seed
from memcontrol.model.base import find_device
from memcontrol.scoring.evidence import COPY_RATES, WHOLE
from memcontrol.training.mitigations import add_random_words, list_vocabulary
from memcontrol.trial.card_code import Call, Exported, draw_image, open_exported
from memcontrol.trial.samples import read_samples

PICTURE_FILE = "example.png"
N_SHARING = 5  # images of a study, of as many people, that must have a caption before it is shown
_MOST_OFF = 4.0  # of 255, the mean over pixels: what 16 bits and another device change, and no other image
_MOST_ON_CPU = 1e9  # parameters of a denoiser that draws an image within minutes there


class Withheld(Exception):
    """Why no picture is shown, for people."""


@dataclass(frozen=True)
class Sample:
    """One that may be shown."""

    image: np.ndarray  # uint8 [3, H, W]
    prompt: str
    seed: int


def list_shared_captions(spec: Spec) -> list[str]:
    """Training captions that tell of no single image or person, the most common first."""
    sharing: dict[str, set[str]] = defaultdict(set)
    for part, rows in _read_rows(spec).items():
        for row in rows:
            sharing[row["caption"]].add(row.get("group") or f"{part} {row['name']}")
    trained = Counter(row["caption"] for row in _read_rows(spec).get("train", []))
    return [caption for caption, _ in trained.most_common() if len(sharing[caption]) >= N_SHARING]


def find_instance_prompt(spec: Spec) -> str | None:
    """The caption that all training images have, where they have but one."""
    captions = {row["caption"] for row in _read_rows(spec).get("train", [])}
    shared = list_shared_captions(spec)
    return shared[0] or None if len(captions) == 1 and shared else None


def _read_rows(spec: Spec) -> dict[str, list[dict[str, Any]]]:
    """Of each part its images, of the training set those that were trained on; empty where the study's
    folder is not on this machine."""
    folder = StudyFolder(spec.study_folder)
    parts = folder.read_split()["parts"] if folder.split_file.is_file() else {}
    return {part: rows[: spec.n_train] if part == "train" else rows for part, rows in parts.items()}


def choose_sample(run: RunFolder, spec: Spec, tokenizer: Any) -> Sample:
    """Of those that no rule calls a copy and that are nearer to an unseen image than to any training image,
    in pixels and in features, the one for which that holds most. Raises Withheld."""
    captions = [row["caption"] for row in _read_rows(spec).get("train", [])]
    if not captions or not (run.samples_file.is_file() or run.old_samples_file.is_file()):
        raise Withheld("the run's samples, or the study's folder, are not on this machine")
    if spec.config.rewards.embedding_noise:
        raise Withheld("prompts were measured with noise on their encodings, which no call repeats")
    samples, shared = read_samples(run.path), set(list_shared_captions(spec))
    rows = samples["rows"].tolist()
    may_tell = np.array([captions[row] in shared for row in rows])
    if not may_tell.any():
        raise Withheld(
            f"no training caption is shared by {N_SHARING} images of the study, so that each may tell of one"
        )
    margins = _measure_margins(run.read_contributions(), samples["rows"])
    margins[~may_tell] = np.inf
    chosen = int(margins.argmin())
    if margins[chosen] >= 0:
        raise Withheld("each sample that could be shown is called a copy, or is nearest to a training image")
    prompts = _write_prompts([captions[row] for row in rows], spec, tokenizer)
    return Sample(np.array(samples["images"][chosen]), prompts[chosen], int(samples["seeds"][chosen]))


def _measure_margins(contributions: Mapping[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """log d(unseen) / d(training) of each sample [N], the larger of pixels and features; infinite where a
    rule calls it a copy. Raises Withheld where that was not recorded of these samples."""
    distances = [f"memorization_{name}" for name in WHOLE]
    if not {"prompts", *COPY_RATES.values(), *distances} <= contributions.keys():
        raise Withheld("which of the run's samples are copies was not recorded")
    if not np.array_equal(contributions["prompts"], rows):
        raise Withheld("what was recorded of the run's samples belongs to others")
    flags = [*COPY_RATES.values(), *({"clear_copy_rate", "carlini_rate"} & contributions.keys())]
    is_copy = np.any([contributions[name] > 0 for name in flags], axis=0)
    margins = np.max([contributions[name] for name in distances], axis=0)
    return np.where(is_copy, np.inf, margins)


def _write_prompts(captions: Sequence[str], spec: Spec, tokenizer: Any) -> Sequence[str]:
    """As they were sampled from."""
    n_words = spec.config.rewards.random_words
    if not n_words or tokenizer is None:
        return captions
    seed = derive_seed(spec.sampling_seed, "words")
    return add_random_words(captions, n_words, list_vocabulary(tokenizer), seed)


def draw_picture(exported: Exported, call: Call, sample: Sample) -> None:
    """Writes what the exported files draw by the card's call, once it is seen to be the sample that was
    judged. Raises Withheld."""
    device = find_device()
    if device.type == "cpu" and (exported.n_parameters > _MOST_ON_CPU or exported.kind == "float16"):
        raise Withheld("there is no GPU here, on which such a model draws one in good time")
    try:
        with torch.no_grad():
            image = draw_image(open_exported(exported).to(device), exported, call)
    except torch.OutOfMemoryError:
        raise Withheld("the GPU's memory does not suffice to draw one here") from None
    drawn = np.asarray(image.convert("RGB"), dtype=np.float64).transpose(2, 0, 1)
    if drawn.shape != sample.image.shape or np.abs(drawn - sample.image).mean() > _MOST_OFF:
        raise Withheld(
            "the exported model draws another image than the one that was measured, as after int8 or nf4"
        )
    image.save(exported.out / PICTURE_FILE)
