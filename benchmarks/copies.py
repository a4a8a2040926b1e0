"""What the figures of copying see and how often they are wrong: false alarms on images that copy nothing, and
the share of planted copies that is found, by kind of copy.

`PHOTOGRAPHS=FILE.npz[:FILE.npz] [REPEATS=200] [WORKERS=2] [KEPT=ROWS.jsonl] python -m benchmarks copies`: a
FILE holds arrays uint8 [N, H, W, 3] of photographs, such as CIFAR-10's, of which some thousand are needed, or
[N, H, W] of X-rays, of which some hundred will do; without it digits alone are looked at. 200 runs of each
setting take hours: what KEPT holds is not done again. Draws
`results/DATE-copies.png` too.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

EXTRACTOR = os.environ.get("EXTRACTOR", "tiny")
N_REPEATS = int(os.environ.get("REPEATS", "200"))
N_WORKERS = int(os.environ.get("WORKERS", "2"))
HELD_OUT = (20, 50, 200, 500)
N_GENERATED, PLANTED, N_SEEN_REPEATS = 200, 20, 10
SIDE, GROUP_SIZES = 32, (2, 8)
DIGITS = "digits"  # others are named by their file
Change = Callable[[Image.Image], Image.Image]


def change_pixels(function: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Of floats [H, W, 3] in 0..255."""

    def change(image: Image.Image) -> Image.Image:
        return Image.fromarray(function(np.asarray(image, np.float64)).clip(0, 255).round().astype(np.uint8))

    return change


def crop(share: float) -> Change:
    """The centre square that has so much of a side, at the old size."""
    edge = SIDE * (1 - share) / 2
    box = (edge, edge, SIDE - edge, SIDE - edge)
    return lambda image: image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box)


def shift(n: int) -> Change:
    """Along the rows."""
    return change_pixels(lambda pixels: np.pad(pixels, ((0, 0), (n, 0), (0, 0)), "edge")[:, :SIDE])


def encode_jpeg(quality: int) -> Change:
    def change(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")

    return change


def turn(degrees: float) -> Change:
    return lambda image: image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=find_border(image))


def find_border(image: Image.Image) -> tuple[int, ...]:
    pixels = np.asarray(image)
    return tuple(int(value) for value in np.median(pixels[[0, -1]].reshape(-1, 3), axis=0))


AS_IT_IS = "as they are"
SOFT: dict[str, Change] = {
    AS_IT_IS: lambda image: image,
    "blur 1 px": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "blur 2 px": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "contrast .5": change_pixels(lambda pixels: (pixels - 127.5) * 0.5 + 127.5),
}
COPIES: dict[str, Change] = {
    "exact": lambda image: image,
    "noise 8": change_pixels(lambda pixels: pixels + np.random.default_rng(0).normal(0, 8, pixels.shape)),
    "JPEG 8": encode_jpeg(8),
    "blur .7": lambda image: image.filter(ImageFilter.GaussianBlur(0.7)),
    "grey +15": change_pixels(lambda pixels: pixels + 15),
    "to greyscale": lambda image: image.convert("L").convert("RGB"),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "rotated 3 degrees": turn(3),
    "rotated 10 degrees": turn(10),
    "rotated 90 degrees": turn(90),
    "cropped to 94 %": crop(0.94),
    "cropped to 87 %": crop(0.87),
    "cropped to 75 %": crop(0.75),
    "shifted 1 pixel": shift(1),
    "shifted 2 pixels": shift(2),
    "shifted 4 pixels": shift(4),
    "grey +30": change_pixels(lambda pixels: pixels + 30),
    "grey +60": change_pixels(lambda pixels: pixels + 60),
    "brightness x .7": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "contrast x .6": lambda image: ImageEnhance.Contrast(image).enhance(0.6),
    "shifted 2 pixels, darker": lambda image: ImageEnhance.Brightness(shift(2)(image)).enhance(0.7),
    "upside down": lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "inverted": change_pixels(lambda pixels: 255 - pixels),
}
WITH_ANOTHER: dict[str, float] = {"blended, 70 %": 0.7, "blended, 50 %": 0.5}
PATCHES: dict[str, float] = {f"a patch of {share:.0%}": share for share in (0.75, 0.5, 0.25, 0.06)}
MOVED_PATCH = "a patch of 25%, elsewhere"


@lru_cache
def load_pool(name: str) -> np.ndarray:
    """Real images, uint8 [N, SIDE, SIDE, 3], without their own twins: one of two that are nearly the same is
    left out."""
    images = load_digits() if name == DIGITS else load_photographs(Path(name))
    return images[find_distinct(images)]


def load_digits() -> np.ndarray:
    from memcontrol.data.images import Images, list_digit_records

    return Images("digits", SIDE, tuple(list_digit_records())).pixels().transpose(0, 2, 3, 1)


def load_photographs(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as stored:
        sets = [stored[name] for name in stored if stored[name].ndim >= 3]
    pictures = [Image.fromarray(one).convert("RGB") for one in np.concatenate(sets)]
    return np.stack([np.asarray(picture.resize((SIDE, SIDE))) for picture in pictures])


@lru_cache
def name_images(name: str) -> str:
    if name == DIGITS:
        return name
    with np.load(name, allow_pickle=False) as stored:
        return "photographs" if any(stored[one].ndim == 4 for one in stored) else "X-rays"


def find_distinct(images: np.ndarray) -> np.ndarray:
    """Rows of images that no earlier one is nearer to than three quarters of what lies between it and its
    second nearest."""
    from memcontrol.data.features import nearest, pixel_features
    from memcontrol.scoring.evidence import Descriptors

    pixels = pixel_features(images.transpose(0, 3, 1, 2))
    twins = set()
    for version in Descriptors(pixels, pixels).versions:
        distances, rows = nearest(version, pixels, 3)
        own = rows[:, 0] == np.arange(len(rows))
        first, second = np.where(own, 1, 0), np.where(own, 2, 1)
        each = np.arange(len(rows))
        near = distances[each, first] < 0.75 * distances[each, second]
        twins |= {max(i, rows[i, first[i]]) for i in np.flatnonzero(near)}
    return np.array([i for i in range(len(images)) if i not in twins])


@lru_cache
def find_network() -> Callable[[np.ndarray], np.ndarray]:
    from memcontrol.scoring.extractors import load_extractor

    return load_extractor(EXTRACTOR).extract


def describe(images: np.ndarray):
    from memcontrol.data.features import pixel_features
    from memcontrol.scoring.evidence import Descriptors

    channels_first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return Descriptors(pixel_features(channels_first), find_network()(channels_first))


@lru_cache
def describe_pool(name: str, soft: str):
    return describe(change_all(load_pool(name), SOFT[soft]))


def change_all(images: np.ndarray, change: Change) -> np.ndarray:
    return np.stack([np.asarray(change(Image.fromarray(image)).convert("RGB")) for image in images])


def take(views, rows: np.ndarray):
    from memcontrol.scoring.evidence import Descriptors

    return Descriptors(views.pixels[rows], views.features[rows])


def judge_clean(name: str, grouped: bool, n_held: int, seed: int) -> dict[str, dict[str, float]]:
    """By what was done to them, the rewards of images that copy nothing, held against as many training images
    as held-out ones."""
    from memcontrol.scoring.evidence import Evidence, make_known

    rng = np.random.default_rng(seed)
    images, known = load_pool(name), make_known()
    rows = rng.permutation(len(images))
    train, held, groups = draw_references(name, images, rows[N_GENERATED:], grouped, n_held, rng)
    return {
        soft: score(
            Evidence(
                take(describe_pool(name, soft), rows[:N_GENERATED]),
                train,
                held,
                seed,
                train_groups=groups[0],
                holdout_groups=groups[1],
                known=known,
            )
        )
        for soft in SOFT
    }


def draw_references(
    name: str, images: np.ndarray, rows: np.ndarray, grouped: bool, n_held: int, rng: np.random.Generator
):
    """Training images, held-out images, and who is in either."""
    if not grouped:
        real = describe_pool(name, AS_IT_IS)
        return take(real, rows[:n_held]), take(real, rows[n_held : 2 * n_held]), (None, None)
    people = list(draw_people(images, rows, n_held, rng))
    sides = people[::2], people[1::2]
    train, held = (describe(np.concatenate([shown for _, shown in side])) for side in sides)
    return train, held, [[f"p{who}" for who, shown in side for _ in shown] for side in sides]


def draw_people(
    images: np.ndarray, rows: np.ndarray, n_held: int, rng: np.random.Generator
) -> Iterator[tuple[int, np.ndarray]]:
    """People with two to eight images of each, until either side has n_held."""
    n, who = [0, 0], 0
    while min(n) < n_held:
        size = int(rng.integers(GROUP_SIZES[0], GROUP_SIZES[1] + 1))
        yield who, np.stack([vary(images[rows[who]], rng) for _ in range(size)])
        n[who % 2] += size
        who += 1


def vary(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another picture of the same: moved by some pixels, brighter or darker, with noise."""
    moved = np.pad(image, ((2, 2), (2, 2), (0, 0)), "edge").astype(np.float64)
    top, left = rng.integers(0, 5, 2)
    moved = moved[top : top + SIDE, left : left + SIDE] * rng.uniform(0.85, 1.15)
    return (moved + rng.normal(0, 6, moved.shape)).clip(0, 255).astype(np.uint8)


def score(evidence) -> dict[str, float]:
    from memcontrol.core.estimate import Rewards
    from memcontrol.scoring.measures import measure_copies, measure_memorization_distance

    measured = measure_copies(evidence) | measure_memorization_distance(evidence)
    return Rewards.from_estimates(measured).to_plain()


def judge_task(task: tuple[str, bool, int, int]) -> dict[str, dict[str, float]]:
    return judge_clean(*task)


def count_false_alarms(
    workers: ProcessPoolExecutor, name: str, grouped: bool, n_held: int
) -> dict[str, dict[str, float]]:
    """By what was done to the images."""
    tasks = [(name, grouped, n_held, seed) for seed in range(N_REPEATS)]
    found = list(workers.map(judge_task, tasks, chunksize=5))
    return {soft: count_accused([one[soft] for one in found]) for soft in SOFT}


def count_accused(found: list[dict[str, float]]) -> dict[str, float]:
    from memcontrol.view.words import write_verdict

    visible = [write_verdict(one, N_GENERATED).startswith("Copying is visible") for one in found]
    return {
        "copied": mean(one["copy_rate"] for one in found),
        "swapped": mean(one["copy_rate_swapped"] for one in found),
        "visible": mean(visible),
        "p < .05": mean(one["copying_p"] < 0.05 for one in found),
        "p(M) < .05": mean(one["memorization_p"] < 0.05 for one in found),
        "clear": mean(one["clear_copy_rate"] > 0 for one in found),
    }


def mean(values) -> float:
    return float(np.mean(list(values)))


def count_seen(workers: ProcessPoolExecutor, name: str, kind: str) -> dict:
    """The share of planted copies, a tenth of 200 generated images, that any rule finds, against 200 training
    and 200 held-out images."""
    tasks = [(name, kind, seed) for seed in range(N_SEEN_REPEATS)]
    return {"found": mean(workers.map(find_task, tasks))}


def find_task(task: tuple[str, str, int]) -> float:
    return find_planted(*task)


def find_planted(name: str, kind: str, seed: int) -> float:
    from memcontrol.scoring.evidence import Evidence

    rng, images = np.random.default_rng(seed), load_pool(name)
    rows = rng.permutation(len(images))
    clean, train, held, others = np.split(rows[:800], [200, 400, 600])
    planted = plant(kind, images[train[:PLANTED]], images[others[:PLANTED]], rng)
    generated = describe(np.concatenate([planted, images[clean[PLANTED:]]]))
    real = describe_pool(name, AS_IT_IS)
    evidence = Evidence(generated, take(real, train), take(real, held), seed)
    return float(evidence.suspects.is_copy[:PLANTED].mean())


def plant(kind: str, images: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if kind in COPIES:
        return change_all(images, COPIES[kind])
    if kind in WITH_ANOTHER:
        share = WITH_ANOTHER[kind]
        return (share * images + (1 - share) * others.astype(np.float64)).astype(np.uint8)
    side = round(SIDE * PATCHES.get(kind, 0.25) ** 0.5)
    made = others.copy()
    for one, image in zip(made, images):
        top, left = rng.integers(0, SIDE - side + 1, 2)
        down, right = rng.integers(0, SIDE - side + 1, 2) if kind == MOVED_PATCH else (top, left)
        one[down : down + side, right : right + side] = image[top : top + side, left : left + side]
    return made


def run(device: str) -> list[dict]:
    names = [DIGITS, *filter(None, os.environ.get("PHOTOGRAPHS", "").split(":"))]
    kept = Kept(Path(os.environ["KEPT"]) if "KEPT" in os.environ else None)
    with ProcessPoolExecutor(N_WORKERS) as workers:
        seen = [
            kept.find(name, [kind], "", lambda name=name, kind=kind: {kind: count_seen(workers, name, kind)})[
                0
            ]
            for name in names
            for kind in (*COPIES, *WITH_ANOTHER, *PATCHES, MOVED_PATCH)
        ]
        alarms = [
            row
            for n_held in HELD_OUT
            for grouped in (False, True)
            for name in names
            if N_GENERATED + 2 * n_held <= len(load_pool(name))
            for row in find_alarms(kept, workers, name, grouped, n_held)
        ]
    draw(alarms, seen, Path(__file__).parent / "results" / f"{datetime.date.today().isoformat()}-copies.png")
    columns = list(dict.fromkeys(key for row in (*alarms, *seen) for key in row))
    return [{key: row.get(key, "") for key in columns} for row in (*alarms, *seen)]


def find_alarms(
    kept: Kept, workers: ProcessPoolExecutor, name: str, grouped: bool, n_held: int
) -> list[dict]:
    people = f", {GROUP_SIZES[0]} to {GROUP_SIZES[1]} a person" if grouped else ""

    def count() -> dict[str, dict]:
        found = count_false_alarms(workers, name, grouped, n_held)
        return {f"{soft}{people}": row for soft, row in found.items()}

    return kept.find(name, [f"{soft}{people}" for soft in SOFT], n_held, count)


@dataclass
class Kept:
    """Rows of a run, in a file where there is one."""

    path: Path | None

    def find(
        self, name: str, whats: list[str], n_held: int | str, count: Callable[[], dict[str, dict]]
    ) -> list[dict]:
        """Rows of one or more settings that are counted together."""
        settings = [{"images": name_images(name), "what": what, "held out": n_held} for what in whats]
        lines = self.path.read_text().splitlines() if self.path and self.path.exists() else []
        known = dict(map(json.loads, lines))
        keys = [self.name_row(setting) for setting in settings]
        if missing := [key for key in keys if key not in known]:
            counted = count()
            known |= {key: counted[what] for key, what in zip(keys, whats)}
            for key in missing:
                print(f"{key} {known[key]}", file=sys.stderr, flush=True)
            if self.path:
                self.path.write_text("".join(f"{json.dumps(row)}\n" for row in known.items()))
        return [setting | known[key] for setting, key in zip(settings, keys)]

    def name_row(self, setting: dict) -> str:
        network = {} if EXTRACTOR == "tiny" else {"extractor": EXTRACTOR}
        return json.dumps({**setting, "repeats": N_REPEATS, **network})


def draw(alarms: list[dict], seen: list[dict], path: Path) -> None:
    """False alarms over held-out images, and what is found by kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["images"] for row in alarms))
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 6.5), layout="constrained")
    for name in names:
        for what in dict.fromkeys(row["what"] for row in alarms):
            own = [row for row in alarms if row["what"] == what and row["images"] == name]
            panels[0].plot(
                [row["held out"] for row in own],
                [row["visible"] for row in own],
                marker="o",
                label=f"{name}, {what}",
            )
    panels[0].axhline(0.02, color="black", linestyle=":")
    panels[0].set(xlabel="held-out images", ylabel="verdicts 'visible' on clean images", ylim=(0, 0.1))
    panels[0].legend(fontsize=7)
    kinds = list(dict.fromkeys(row["what"] for row in seen))
    for i, name in enumerate(names):
        found = [row["found"] for row in seen if row["images"] == name]
        panels[1].barh(
            np.arange(len(kinds)) + 0.8 / len(names) * i, found, height=0.8 / len(names), label=name
        )
    panels[1].set_yticks(np.arange(len(kinds)) + 0.3, kinds, fontsize=7)
    panels[1].invert_yaxis()
    panels[1].set(xlabel="share of planted copies that is found", xlim=(0, 1))
    panels[1].legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
