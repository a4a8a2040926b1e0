"""Owns `memcontrol init`: looks at a folder of images and writes a study for it, with the reason beside each value."""

from __future__ import annotations

import json
import os
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from memcontrol.config import NAME, DataConfig, load_config, study_folder
from memcontrol.data import FEWEST_IMAGES, PARTS, Images, Record, checked, decode, read_captions, refuse_results_among, split
from memcontrol.errors import MemControlError
from memcontrol.explain import NAME_RULE
from memcontrol.features import nearest, pixel_features
from memcontrol.files import replacing

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SPACES = {  # of bases that lie on this machine, by the class of their pipeline
    "StableDiffusionPipeline": "sd15-blocks", "StableDiffusionXLPipeline": "sdxl-blocks", "StableDiffusion3Pipeline": "sd3-blocks",
    "FluxPipeline": "flux-blocks", "PixArtAlphaPipeline": "pixart-blocks", "PixArtSigmaPipeline": "pixart-blocks", "SanaPipeline": "sana-blocks",
    "DDPMPipeline": "ddpm-cifar10",
}  # fmt: skip
TINY_SIDE = 32  # pixels of the embedded base
SEED = 0
N_COMPARED, N_GREY = 4_000, 200  # images that are looked at for near copies, and for colour
NEAR = 0.25  # of the median distance between an image and the third nearest other one: the nearest may be a twin of each
FEW = 256  # held-out images below which FID is coarse: four for each feature of the smallest network


@dataclass(frozen=True)
class Look:
    """What a folder of images holds: its images; how many in each part, where the folder has parts; sides in pixels; groups of images with
    the same pixels, and pairs that are nearly the same; what cannot be decoded, and why."""

    records: tuple[Record, ...]
    parts: dict[str, int]
    sides: tuple[int, int, int]  # least, median, most of the shorter side
    is_grey: bool
    copies: tuple[tuple[str, ...], ...]
    near: tuple[tuple[str, str], ...]
    unreadable: tuple[str, ...]
    has_metadata: bool

    @property
    def n(self) -> int:
        return len(self.records)

    @property
    def captions(self) -> Counter[str]:
        return Counter(record.caption for record in self.records)


def look(folder: Path, progress: Callable[[str, int, int], None]) -> Look:
    """Reads every image once, some twice. Raises MemControlError where there are none."""
    if not folder.is_dir():
        raise MemControlError(f"{folder} is no folder; give a folder of images")
    unreadable: list[str] = []
    progress("reading images", 0, 3)
    captions = read_captions(folder)
    records = checked(folder, captions, True, unreadable.append)
    if not records:
        raise MemControlError(f"{folder} holds no images that can be decoded; give a folder of images, with metadata.jsonl or metadata.csv for captions")
    progress("reading images", 1, 3)
    given = [part for part in PARTS if (folder / part).is_dir()]
    parts = {part: sum(record.name.startswith(f"{part}/") for record in records) for part in given}
    near = near_pairs(folder, records)
    progress("reading images", 3, 3)
    unread = tuple(text.removeprefix("skipped: image ") for text in unreadable)
    return Look(tuple(records), parts, sides_of(folder, records), is_grey(folder, records), copies_of(records), near, unread, bool(captions))


def sides_of(folder: Path, records: list[Record]) -> tuple[int, int, int]:
    shorter = []
    for record in records:
        with Image.open(folder / record.name) as image:
            shorter.append(min(image.size))
    return min(shorter), int(statistics.median(shorter)), max(shorter)


def is_grey(folder: Path, records: list[Record]) -> bool:
    """Whether the first images have no colour, however they are stored."""
    pixels = (np.asarray(decode(folder / record.name)) for record in records[:N_GREY])
    return all((image[..., 0] == image[..., 1]).all() and (image[..., 1] == image[..., 2]).all() for image in pixels)


def copies_of(records: list[Record]) -> tuple[tuple[str, ...], ...]:
    groups: dict[str, list[str]] = {}
    for record in records:
        groups.setdefault(record.digest, []).append(record.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def near_pairs(folder: Path, records: list[Record]) -> tuple[tuple[str, str], ...]:
    """Images that are nearly the same and not quite, of the first N_COMPARED, nearest first."""
    different = list({record.digest: record for record in records}.values())[:N_COMPARED]
    if len(different) < FEWEST_IMAGES:
        return ()
    features = pixel_features(Images(str(folder), 32, tuple(different)).pixels())
    distances, indices = nearest(features, features, 4)
    own = indices[:, 0] == np.arange(len(indices))
    other, apart = np.where(own, indices[:, 1], indices[:, 0]), distances[:, 1]
    found = {tuple(sorted((i, int(other[i])))): float(apart[i]) for i in np.flatnonzero(apart < NEAR * np.median(distances[:, 3])).tolist()}
    return tuple((different[i].name, different[j].name) for i, j in sorted(found, key=lambda pair: found[pair]))


@dataclass(frozen=True)
class Proposal:
    path: Path
    text: str
    seen: Look


def propose(folder: Path, out: Path | None, name: str | None, base: str | None, progress: Callable[[str, int, int], None]) -> Proposal:
    """Looks at the images and writes a study for them. Raises MemControlError: what `out`, `name` or `base` is, or too few images."""
    name = name or name_of(folder)
    path = out or Path(f"{name}.yaml")
    if not re.fullmatch(NAME, name):
        raise MemControlError(f"--name is '{name}'; {NAME_RULE}")
    if path.exists():
        raise MemControlError(f"{path} exists; give another file with --out, or remove it")
    check_base(base)
    refuse_results_among(str(folder), study_folder(path, name))
    seen = look(folder, progress)
    proposal = Proposal(path, proposed(folder, seen, name, base, path), seen)
    with replacing(path) as part:
        part.write_text(proposal.text, encoding="utf-8")
    load_config(path)
    return proposal


def check_base(base: str | None) -> None:
    """Raises MemControlError for what is no pipeline, as far as can be told without loading it."""
    from memcontrol.models import checked_path

    if base and Path(checked_path(base)).is_dir() and not (Path(checked_path(base)) / "model_index.json").is_file():
        raise MemControlError(f"base '{base}' is a folder without model_index.json; give one in diffusers' format")


def proposed(folder: Path, seen: Look, name: str, base: str | None, path: Path) -> str:
    """The study file. Raises MemControlError where there are too few images."""
    n_gpus = gpus()
    base = base or (STABLE_DIFFUSION if n_gpus else "tiny")
    shares = {} if seen.parts else shares_of(seen)
    sizes = split_sizes(seen, shares) if shares else given_sizes(seen)
    n_train = sizes["train"]
    budget = min(max(100 * n_train, 2_000), max(10_000, 10 * n_train))
    text = "\n".join([
        f"# Proposed by memcontrol init, after a look at {seen.n} images. Change what you know better; docs/study.md has every key.",
        f"name: {name}",
        line("base", json.dumps(base), why_base(base, n_gpus)),
        "data:",
        line("  path", json.dumps(seen_from(path, folder), ensure_ascii=False), why_data(seen, base)),
        *(line(f"  {part}", str(share), f"{sizes[part]} images, {USES[part]}") for part, share in shares.items()),
        *([line("  skip_unreadable", "true", f"{len(seen.unreadable)} cannot be decoded")] if seen.unreadable else []),
        line("space", space_for(base), "which layers may be trained: memcontrol spaces show, or check with --base"),
        "inner:",
        line("  budget_images", str(budget), f"each fine-tuning sees every one of the {n_train} training images {budget / n_train:.0f} times: enough to see copying"),
        line("  batch_size", str(min(16, n_train)), "less where the GPU's memory does not suffice"),
        "rewards:",
        line("  objectives", "[fid, memorization]", why_objectives(sizes["holdout"])),
        "search:",
        line("  trials", "20", "beside the three anchors: no training, plain PEFT, full fine-tuning"),
        line("  workers", str(n_gpus or min(os.cpu_count() or 1, 8)), "one for each GPU" if n_gpus else "one for each core, at most 8"),
        line("  seed", str(SEED), "of everything that is drawn"),
    ])  # fmt: skip
    return f"{text}\n"


USES = {"train": "to fine-tune on", "holdout": "to compare with in the search", "test": "for retrain alone"}


def line(key: str, value: str, why: str) -> str:
    return f"{f'{key}: {value}':30} # {why}"


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def name_of(folder: Path) -> str:
    plain = unicodedata.normalize("NFKD", folder.resolve().name).encode("ascii", "ignore").decode()  # accents go, their letters stay
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._") or "study"


def seen_from(study_file: Path, folder: Path) -> str:
    """The images' path in the study file: relative where they lie beside or below it, so that both may move together."""
    images, home = folder.resolve(), study_file.resolve().parent
    return images.relative_to(home).as_posix() if images.is_relative_to(home) else str(images)


def shares_of(seen: Look) -> dict[str, float | int]:
    """Half is trained on; where a quarter is too few to hold out, as many as it takes. Copies of an image stay together, and count once."""
    n = seen.n - sum(len(names) - 1 for names in seen.copies)
    if n < 3 * FEWEST_IMAGES:
        raise MemControlError(f"{n} different images are too few: training, held-out and test images must be {FEWEST_IMAGES} each at least, and some hundred to say much; add images")
    halves: dict[str, float | int] = {"train": 0.5, "holdout": 0.25, "test": 0.25}
    enough = min(split_sizes(seen, halves).values()) >= FEWEST_IMAGES
    return halves if enough else {"train": n - 2 * FEWEST_IMAGES, "holdout": FEWEST_IMAGES, "test": FEWEST_IMAGES}


def split_sizes(seen: Look, shares: dict[str, float | int]) -> dict[str, int]:
    """How many images each part will have, by the split that a search with this seed makes."""
    return {part: len(records) for part, records in split(list(seen.records), DataConfig.model_validate({"path": "-", **shares}), SEED).items()}


def given_sizes(seen: Look) -> dict[str, int]:
    missing = [part for part in PARTS if not seen.parts.get(part)]
    if missing:
        raise MemControlError(f"there is a folder {next(iter(seen.parts))}/, and no images in {', '.join(f'{part}/' for part in missing)}; add them, or put all images in one folder to be split")
    return seen.parts


def why_base(base: str, n_gpus: int) -> str:
    if base == "tiny":
        return "embedded, knows printed characters: to try the whole way; for photographs give a real one, such as " + STABLE_DIFFUSION
    return "a folder in diffusers' format, or a Hub id" if n_gpus else "without a GPU each fine-tuning will take very long"


def why_data(seen: Look, base: str) -> str:
    least, median, most = seen.sides
    said = [f"shorter sides {least} to {most} pixels, median {median}" if least != most else f"{least} pixels"]
    said[0] += "; squares are cut and resized to the base's own resolution" + (f", {TINY_SIDE}" if base == "tiny" else "") + " (data.resolution: another)"
    if seen.parts:
        said.append(f"split by its folders into {', '.join(f'{n} {part}' for part, n in seen.parts.items())}")
    said.append("greyscale, read as RGB" if seen.is_grey else "colour")
    n_captioned = seen.n - seen.captions[""]
    source = "from metadata" if seen.has_metadata else "named by their folders"
    said.append(f"captions for {n_captioned} of {seen.n}, {len(set(seen.captions) - {''})} different, {source}" if n_captioned else "no captions: every prompt is the empty one")
    if seen.near:
        said.append(f"{len(seen.near)} pairs that are nearly the same, which may come into two parts")
    if seen.copies:
        said.append(f"{sum(len(names) - 1 for names in seen.copies)} exact copies, which stay in one part")
    return "; ".join(said)


def why_objectives(n_holdout: int) -> str:
    return "quality, then copying" + (f"; FID against {n_holdout} held-out images is coarse: read it with its error" if n_holdout < FEW else "")


def space_for(base: str) -> str:
    index = Path(base) / "model_index.json"
    if index.is_file():
        return SPACES.get(json.loads(index.read_text(encoding="utf-8")).get("_class_name", ""), "sd15-blocks")
    return "digits" if base == "tiny" else "sd15-blocks"


def warnings_of(seen: Look) -> list[str]:
    """What a person should know before anything is trained."""
    found = [f"nearly the same: {a} and {b}; in two parts they would hide copying: remove one, or put both into train/" for a, b in seen.near]
    found += [f"not decoded: {name}" for name in seen.unreadable]
    found += [f"the same pixels, which stay in one part: {', '.join(names)}" for names in seen.copies]
    if seen.captions[""] and len(seen.captions) > 1:
        found.append(f"{seen.captions['']} images have no caption and the others have; their prompt is the empty one")
    return found


