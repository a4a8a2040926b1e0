"""The images of the study of the field, and the bases that it starts from: each has seen other images of its
kind, and none of those that are fine-tuned on."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from memcontrol.core.seeds import derive_seed
from memcontrol.reading.folder import is_picture_suffix

SIDE = 32
VAE_STEPS, DENOISER_STEPS, N_SHOWN = 1_000, 2_400, 4_000
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Kind:
    """Images of one kind. `tuned`: the classes whose images are fine-tuned on, the base having seen the
    others; none: half of each class is fine-tuned on, the base having seen the other half."""

    captions: tuple[str, ...]  # by label
    tuned: tuple[int, ...]
    parts: tuple[int, int, int]  # train, holdout, test


KINDS = {
    "cifar": Kind(tuple(f"a photo of a {name}" for name in CIFAR), (1, 7), (40, 380, 380)),
    # with a class left to the base, one alone could be fine-tuned on, and no classifier be trained on it
    "xrays": Kind(("a chest x-ray, no finding", "a chest x-ray, abnormal"), (), (40, 150, 160)),
}


def prepare(kind: Kind, source: Path, out: Path) -> None:
    """Writes out/images with metadata.csv, and out/base, a pipeline in diffusers' format; what is there is
    not written again."""
    images, labels = read_classes(source)
    ours = choose_tuned(kind, labels)
    if not (out / "images" / "metadata.csv").exists():
        write_images(images[ours], [kind.captions[label] for label in labels[ours]], out / "images")
    if not (out / "base" / "model_index.json").exists():
        captions = [kind.captions[label] for label in labels[~ours]]
        build_base(*show_often(images[~ours], captions), out / "base")


def read_classes(source: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, SIDE, SIDE, 3] and labels [N]: of an .npz whose arrays of images each have labels, or
    of a folder whose folders are the classes, in the order of their names."""
    if source.is_dir():
        folders = sorted(path for path in source.iterdir() if path.is_dir())
        files = [
            (path, label)
            for label, folder in enumerate(folders)
            for path in sorted(folder.rglob("*"))
            if is_picture_suffix(path.suffix)
        ]
        return np.stack([read_small(path) for path, _ in files]), np.array([label for _, label in files])
    with np.load(source, allow_pickle=False) as stored:
        arrays = [stored[name] for name in stored]
    images = [shrink(Image.fromarray(one)) for array in arrays if array.ndim >= 3 for one in array]
    return np.stack(images), np.concatenate([array for array in arrays if array.ndim == 1])


def read_small(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return shrink(image)


def shrink(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))


def choose_tuned(kind: Kind, labels: np.ndarray) -> np.ndarray:
    """Which images are fine-tuned on, [N]."""
    if kind.tuned:
        return np.isin(labels, kind.tuned)
    rng, found = np.random.default_rng(derive_seed(0, "field", "halves")), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        found[own[: len(own) // 2]] = True
    return found


def write_images(images: np.ndarray, captions: Sequence[str], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows = [(f"{i:04d}.png", caption) for i, caption in enumerate(captions)]
    for (name, _), image in zip(rows, images):
        Image.fromarray(image).save(out / name)
    with (out / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *rows])


def show_often(images: np.ndarray, captions: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """N_SHOWN images: each in turn, moved by up to two pixels, half of them mirrored."""
    rng = np.random.default_rng(derive_seed(0, "field", "shown"))
    rows = np.arange(N_SHOWN) % len(images)
    return np.stack(list(vary_images(images[rows], rng))), [captions[row] for row in rows]


def vary_images(images: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    for image in images:
        top, left = rng.integers(0, 5, 2)
        wide = np.pad(image, ((2, 2), (2, 2), (0, 0)), "edge")[top : top + SIDE, left : left + SIDE]
        yield wide[:, ::-1] if rng.random() < 0.5 else wide


def build_base(images: np.ndarray, captions: list[str], out: Path) -> None:
    """The embedded base, trained on: its autoencoder, then its denoiser and text encoder."""
    import torch
    from diffusers import StableDiffusionPipeline

    from memcontrol.assets.build import encode_images, to_tensor, train_denoiser, train_vae
    from memcontrol.model.source import TINY

    def say(line: str) -> None:
        print(f"{out.parent.name}: {line}", file=sys.stderr, flush=True)

    generator = torch.Generator().manual_seed(derive_seed(0, "field", "base"))
    pipe = StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None, requires_safety_checker=False)
    pixels = to_tensor(images)
    train_vae(pipe.vae, pixels, VAE_STEPS, generator, say)
    train_denoiser(pipe, encode_images(pipe, pixels), captions, DENOISER_STEPS, generator, say)
    pipe.save_pretrained(out)
