"""Owns the audit: how much images, or a model's samples, copy a training set, judged against held-out images; audit.json and audit.html."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from memcontrol.bench import Bench
from memcontrol.copying import CLIP, FALSE_POSITIVES, Space, ratio, real_ratios, threshold_of
from memcontrol.data import Images, checked, read_captions, squared
from memcontrol.errors import MemControlError
from memcontrol.evidence import N_PAIRED, Evidence, Views, broken_images, extraction_rewards, flat, score
from memcontrol.extractors import load_extractor
from memcontrol.features import nearest, pixel_features
from memcontrol.figures import BLIND, FIGURES, written
from memcontrol.files import replacing, write_json
from memcontrol.models import load_base
from memcontrol.scoring import read_samples
from memcontrol.seeds import seed_of
from memcontrol.spec import SPEC, read_spec

CHUNK = 512
SIDE = 64  # pixels of a side, to which every image is brought: descriptors use 32, the report shows this
FEWEST = 8
MOST_SAME = 0.05
N_ATTACK = 10  # images of each attacked caption
N_SHOWN = 24
SAMPLING: dict[str, Any] = {"samples": 256, "attacked": 0, "steps": 20, "guidance": 1.0, "seed": 0}  # of an audited pipeline
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Pictures:
    """A named set of images: where they came from, their names, and how to read some of them as uint8 [B, 3, SIDE, SIDE]."""

    title: str
    names: tuple[str, ...]
    digests: tuple[str, ...]
    read: Callable[[list[int]], np.ndarray]

    def __len__(self) -> int:
        return len(self.names)


def folder_pictures(title: str, folder: Path, warn: Callable[[str], None], skip_unreadable: bool = False) -> Pictures:
    """The images of a folder and its sub-folders. Raises MemControlError: none, or one that cannot be decoded."""
    if not folder.is_dir():
        raise MemControlError(f"{title}: {folder} is no folder; give a folder of images")
    records = checked(folder, read_captions(folder), skip_unreadable, warn)
    if not records:
        raise MemControlError(f"{title}: {folder} holds no images; give a folder of images")
    return pictures_of(title, Images(str(folder), SIDE, tuple(records)))


def pictures_of(title: str, images: Images) -> Pictures:
    small = replace(images, resolution=SIDE)
    names, digests = (tuple(getattr(record, key) for record in images.records) for key in ("name", "digest"))
    return Pictures(title, names, digests, lambda rows: small.take(rows).pixels())


def sampled_pictures(pixels: np.ndarray) -> Pictures:
    """uint8 [N, 3, H, W] that a model made."""
    names = tuple(f"sample {i}" for i in range(len(pixels)))

    def read(rows: list[int]) -> np.ndarray:
        tiles = (squared(Image.fromarray(pixels[row].transpose(1, 2, 0)), SIDE) for row in rows)
        return np.stack(list(tiles)).transpose(0, 3, 1, 2)

    return Pictures("generated", names, tuple("" for _ in names), read)


def samples_of(
    model: str, captions: list[str], samples: int, attacked: int, steps: int, guidance: float, seed: int, progress: Progress
) -> tuple[Pictures, np.ndarray | None]:
    """`samples` images of a pipeline (a folder or Hub id in diffusers' format), from captions drawn at random; and N_ATTACK of each of
    `attacked` captions, [P, N_ATTACK, 3, H, W], None where there are no captions. Raises MemControlError."""
    base = load_base(model)

    def sampled(title: str, drawn: list[str]) -> np.ndarray:
        return base.sample(
            base.encode_captions(drawn), base.encode_captions([""]), seeds=[seed_of(seed, title, i) for i in range(len(drawn))], steps=steps,
            guidance=guidance, resolution=base.resolution, progress=lambda done, total: progress(title, done, total),
        )  # fmt: skip

    pixels = sampled("sampling", np.random.default_rng(seed_of(seed, "captions")).choice(captions or [""], size=samples).tolist())
    if attacked and not any(captions):
        raise MemControlError("--attacked samples many images of a training caption, and --train has no captions; give them in metadata.csv, or leave it out")
    prompts = np.random.default_rng(seed_of(seed, "attacked")).permutation(sorted(set(captions)))[:attacked].tolist()
    attack = sampled("extraction attack", [prompt for prompt in prompts for _ in range(N_ATTACK)]) if prompts else None
    return sampled_pictures(pixels), None if attack is None else attack.reshape(len(prompts), N_ATTACK, *attack.shape[1:])


@dataclass(frozen=True)
class Source:
    """What is audited and with what it is compared, as a person names it: images or a model (a run folder, or a pipeline, folder or Hub id); a run
    knows its own training and held-out images. `sampling` of a pipeline: some of SAMPLING's keys."""

    images: Path | None
    train: Path | None
    holdout: Path | None
    model: str | None
    skip_unreadable: bool
    sampling: Mapping[str, Any]

    @property
    def run(self) -> Path | None:
        return Path(self.model) if self.model and (Path(self.model) / SPEC).is_file() else None

    def check(self) -> None:
        """Raises MemControlError."""
        if (self.images is None) == (self.model is None):
            raise MemControlError("audit judges images or a model; give one of --images DIR and --model PIPELINE_OR_RUN")
        if not self.run and not (self.train and self.holdout):
            raise MemControlError("audit compares with training and held-out images; give --train DIR and --holdout DIR")
        if unknown := set(self.sampling) - set(SAMPLING):
            raise MemControlError(f"{', '.join(sorted(unknown))}: no such setting of sampling; allowed: {', '.join(SAMPLING)}")
        if self.sampling and (self.run or self.images):
            given = ", ".join(f"--{name}" for name in self.sampling)
            raise MemControlError(f"{given} say how a pipeline is sampled, and these images are there already; leave them out, or give --model a pipeline")


def audit_of(source: Source, extractor: str, progress: Progress, warn: Callable[[str], None]) -> tuple[dict, Pictures, Pictures]:
    """The audit, and the generated and training images that it tells of. Raises MemControlError."""
    source.check()
    given = {"train": source.train, "holdout": source.holdout}
    parts = {name: folder_pictures(name, folder, warn, source.skip_unreadable) for name, folder in given.items() if folder}
    attack = None
    if source.run:
        spec, bench, samples = read_spec(source.run), Bench(), read_samples(source.run)
        own = {"train": bench.train_images(spec), "holdout": bench.parts(spec)[spec.reference]}
        parts = {name: parts.get(name) or pictures_of(name, found) for name, found in own.items()}
        generated, attack = sampled_pictures(samples["images"]), samples.get("extraction")
    elif source.images:
        generated = folder_pictures("generated", source.images, warn, source.skip_unreadable)
    else:
        captions = sorted(read_captions(source.train).values()) if source.train else []
        generated, attack = samples_of(str(source.model), captions, **{**SAMPLING, **source.sampling}, progress=progress)
    return audit(generated, parts["train"], parts["holdout"], extractor, progress, attack), generated, parts["train"]


def audit(
    generated: Pictures, train: Pictures, holdout: Pictures, extractor: str, progress: Progress, attack: np.ndarray | None = None
) -> dict:
    """Every figure of the audit, as audit.json holds it; `attack` is what an extraction attack sampled, uint8 [P, m, 3, H, W].
    Raises MemControlError where the images cannot be judged."""
    check(generated, train, holdout)
    network = load_extractor(extractor)
    made, known, held = (views_of(pictures, network.extract, progress) for pictures in (generated, train, holdout))
    if broken := broken_images(made.pixels):
        raise MemControlError(f"{broken}, so nothing can be judged")
    evidence = Evidence(made, known, held)
    progress("judging", 0, 2)
    rewards = flat(score(evidence) | attacked(attack, holdout))
    progress("judging", 1, 2)
    space = evidence.space("pixels")
    same = float((space.to_holdout < 1e-6).mean())
    if same > MOST_SAME:
        raise MemControlError(f"{same:.0%} of the generated images are held-out images themselves; hold out images that the model never saw and that are not audited, since copying could not be seen")
    suspicion, limit = ratio(space.to_train[0], space.to_holdout), threshold_of(real_ratios(space))
    order = np.argsort(suspicion, kind="stable")
    copies = [
        {
            "generated": generated.names[i], "training": train.names[space.to_train[1][i]], "distance": float(space.to_train[0][i]),
            "of_holdout": float(suspicion[i]), "copy": bool(suspicion[i] < limit), "rows": [int(i), int(space.to_train[1][i])],
        }
        for i in order[: max(N_SHOWN, int((suspicion < limit).sum()))]
    ]  # fmt: skip
    return {
        "verdict": verdict(rewards, len(generated)), "sizes": {part.title: len(part) for part in (generated, train, holdout)},
        "extractor": network.id, "side": SIDE, "threshold": float(limit), "rewards": rewards, "copies": copies,
        "duplicates": duplicates(space, train, progress), "cannot_see": list(BLIND),
    }  # fmt: skip


def attacked(attack: np.ndarray | None, holdout: Pictures) -> dict[str, float]:
    """What the extraction attack found, all images brought to one size."""
    if attack is None:
        return {}
    small = sampled_pictures(attack.reshape(-1, *attack.shape[2:])).read(list(range(attack.shape[0] * attack.shape[1])))
    return extraction_rewards(small.reshape(*attack.shape[:2], *small.shape[1:]), holdout.read(list(range(len(holdout))[:N_PAIRED])))


def check(generated: Pictures, train: Pictures, holdout: Pictures) -> None:
    for part in (generated, train, holdout):
        if len(part) < FEWEST:
            raise MemControlError(f"{part.title} has {len(part)} images; an audit needs at least {FEWEST} of each, and some hundred to say much")
    held = dict(zip(holdout.digests, holdout.names))
    for digest, name in zip(train.digests, train.names):
        if digest in held:
            raise MemControlError(f"train and holdout share an image: '{name}' and '{held[digest]}' have the same pixels; remove one, since copying could not be told from chance")


def views_of(pictures: Pictures, extract: Callable, progress: Progress) -> Views:
    """Descriptors of all images, read in chunks: pixels [N, 3072], features [N, D]."""
    views: Views | None = None
    for start in range(0, len(pictures), CHUNK):
        rows = list(range(start, min(start + CHUNK, len(pictures))))
        pixels = pictures.read(rows)
        found = Views(pixel_features(pixels), extract(pixels))
        views = views or Views(*(np.empty((len(pictures), rows.shape[1]), np.float32) for rows in (found.pixels, found.features)))
        views.pixels[rows], views.features[rows] = found.pixels, found.features
        progress(pictures.title, rows[-1] + 1, len(pictures))
    assert views is not None  # `check` refuses an empty set
    return views


def duplicates(space: Space, train: Pictures, progress: Progress) -> list[dict]:
    """Pairs of training images at less than half the distance that 99 % of held-out images keep from their nearest training image.

    8 x 8 thumbnails are compared first: block means times 4 are an orthogonal projection, so no pair is nearer than its thumbnails.
    """
    limit = 0.5 * np.quantile(space.held_to_train, FALSE_POSITIVES)
    pairs: dict[tuple[int, ...], float] = {}
    small = 4 * space.train.reshape(-1, 3, 8, 4, 8, 4).mean((3, 5)).reshape(-1, 192)
    for start in range(0, len(small), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(small)))
        near = rows[nearest(small[rows], small, 2)[0][:, 1] < limit]
        distances, indices = nearest(space.train[near], space.train, 2) if len(near) else (np.empty((0, 2)), np.empty((0, 2), int))
        other = np.where(indices[:, 0] == near, indices[:, 1], indices[:, 0])
        pairs |= {tuple(sorted((int(i), int(j)))): float(d) for i, j, d in zip(near, other, distances[:, 1]) if d < limit}
        progress("duplicates", int(rows[-1]) + 1, len(small))
    return [{"images": [train.names[i], train.names[j]], "distance": d} for (i, j), d in sorted(pairs.items(), key=lambda pair: pair[1])]


def said_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def verdict(rewards: dict[str, float], n: int) -> str:
    """One sentence with its error."""
    rate, low, high = (rewards[f"copy_rate{end}"] for end in ("", "_low", "_high"))
    line, chance = rewards["copy_rate_line"], rewards["copy_rate_p"]
    said = (
        f"{rate:.1%} of {n} images ({low:.1%} to {high:.1%}) are nearer to a training image than {1 - FALSE_POSITIVES:.0%} of real images are, where "
        f"{line:.1%} is expected without copying, p {said_p(chance)}"
    )
    m, error, p = rewards["memorization"], rewards["memorization_error"], rewards["memorization_p"]
    beside = f"memorization distance {m:.3f} ± {error:.3f} of at most {CLIP:.2f}, p {said_p(p)}"
    clear = round(rewards["clear_copy_rate"] * n)
    if clear:
        return f"Copying is visible: {clear} of {n} images are far nearer to a training image than any real image would be; {said}; {beside}."
    if chance < 0.01:
        return f"Copying is visible: {said}; {beside}."
    if p < 0.01:
        return f"The images lean towards the training set, without copies that stand out: {said}; {beside}."
    return f"No copying is visible at this sample size: {said}; {beside}."


def write_audit(found: dict, generated: Pictures, train: Pictures, out: Path) -> None:
    """Writes out/audit.json and the self-contained out/audit.html."""
    shown = found["copies"][:N_SHOWN]
    pairs = zip(generated.read([one["rows"][0] for one in shown]), train.read([one["rows"][1] for one in shown]))
    cards = "".join(card(one, *pair) for one, pair in zip(shown, pairs))
    write_json(out / "audit.json", found)
    with replacing(out / "audit.html") as part:
        part.write_text(page(found, cards), encoding="utf-8")


def card(one: dict, generated: np.ndarray, training: np.ndarray) -> str:
    mark = "copy" if one["copy"] else "like"
    return (
        f'<figure class="{mark}"><img src="{png(generated)}" alt="generated"><img src="{png(training)}" alt="training">'
        f"<figcaption>{html.escape(one['generated'])}<br>{html.escape(one['training'])}<br>"
        f"distance {one['distance']:.2f}, {one['of_holdout']:.2f} of held out</figcaption></figure>"
    )


def png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


SHOWN = (
    "clear_copy_rate", "copy_rate", "copy_rate_features", "memorization_pixels", "memorization_features", "amd_train", "amd_holdout", "amd_holdout_train", "mq",
    "carlini_rate", "authpct", "authpct_holdout", "extraction_component", "extraction_component_holdout", "extraction_clique",
    "extraction_clique_holdout", "fid", "kid", "recall",
)  # fmt: skip


STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #c22; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.verdict { font-size: 1.15rem; border-left: 4px solid var(--line); padding-left: .8rem; }
table { border-collapse: collapse; width: 100%; } td, th { border-bottom: 1px solid var(--line); padding: .3rem .6rem .3rem 0; text-align: left; vertical-align: top; }
.pairs { display: flex; flex-wrap: wrap; gap: .8rem; } figure { margin: 0; width: 10.5rem; font-size: .75rem; overflow-wrap: anywhere; }
figure img { width: 5rem; image-rendering: pixelated; margin-right: 2px; } .copy img { outline: 2px solid var(--bad); outline-offset: -2px; }
@media print { figure { break-inside: avoid; } }
"""


def page(found: dict, cards: str) -> str:
    rewards, sizes = found["rewards"], ", ".join(f"{n:,} {title}" for title, n in found["sizes"].items())
    rows = "".join(
        f"<tr><td>{FIGURES[name].title}</td><td>{written(name, rewards)}</td><td>{FIGURES[name].meaning}</td></tr>" for name in SHOWN if name in rewards
    )
    twins = "".join(f"<li>{html.escape(a)} and {html.escape(b)}</li>" for a, b in (pair["images"] for pair in found["duplicates"]))
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Audit of copying</title><style>{STYLE}</style></head><body>
<h1>Audit of copying</h1><p class="verdict">{html.escape(found["verdict"])}</p>
<p>{sizes} images, brought to {found["side"]} x {found["side"]} pixels; features by {html.escape(found["extractor"])}.</p>
<h2>Figures</h2><table><tr><th>figure</th><th>value (95 %)</th><th>meaning</th></tr>{rows}</table>
<h2>Most suspicious images beside their nearest training images</h2><p>Framed in red: nearer than 99 % of real images are.</p><div class="pairs">{cards}</div>
<h2>Training images that are nearly the same</h2>{f"<ul>{twins}</ul>" if twins else "<p>None were found.</p>"}
<h2>What this cannot see</h2><ul>{"".join(f"<li>{html.escape(line)}</li>" for line in found["cannot_see"])}</ul>
</body></html>
"""
