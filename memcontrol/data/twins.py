"""Owns the search for twins: images that are one picture, encoded again, resized, mirrored, turned by right
angles, slightly cropped or of another brightness. How near is a twin is measured on the images themselves.

Thumbnails are compared without brightness and its slopes; images that have nothing else are plain and left
out. The low frequencies of their cosine transform (of which mirroring and turning change signs and order
alone) find each one's nearest others, in n log n; these are laid over it and compared pixel by pixel.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from memcontrol.core.seeds import derive_seed
from memcontrol.data.neighbour_trees import Questions, find_neighbours
from memcontrol.data.registration import measure_unlikeness, remove_slopes

THUMBNAIL_SIDE = 32
CHANGES = ("re-encoded", "resized", "mirrored", "turned", "cropped", "brighter")
_PLAIN = 4 / 255  # root mean square of its detail, below which an image is plain
_N_LOW = 7  # frequencies along an axis; both together are below it
_N_VERSIONS = 8  # of a square: transposed or not, mirrored down or not, along or not
_N_NEAREST = 3  # others that are compared with an image
_N_CHANGED, _SAMPLED_SIDE = 128, 256  # images whose changed selves are measured, and their side at the most
_COVERED = 0.98  # of the selves with the change that matters most
_WIDER = 1.25  # from one window of distances to the next
_MOST_APART = 0.6  # that twins ever are: noise is that far from its own changed selves
_REACH = 1.5  # of descriptors, by what changed images reach
_LEAST_POWER, _MOST_POWER = 4.0, 32.0
_N_LIMITS, _FINEST = 64, 32.0  # thresholds that are tried, down to a part of what changed images reach
_MOST_FALSE, _MOST_FALSE_SHARE = 0.5, 0.05  # pairs of strangers that are expected, or their share
_BLOCK = 1024  # pairs that are compared at a time
_DESCRIBED = 8192  # thumbnails that are described at a time


@dataclass(frozen=True)
class Twins:
    """Pairs of rows, nearest first; the distance up to which images are twins (0: the same; 1: nothing in
    common); for each change the share of changed images that are as near to themselves; how many images were
    compared, and how many are too plain."""

    pairs: tuple[tuple[int, int], ...] = ()
    threshold: float = 0.0
    covered: Mapping[str, float] = field(default_factory=dict)
    n_compared: int = 0
    n_plain: int = 0


def describe_plain(n: int) -> Iterator[str]:
    if n:
        yield f"{n} images are plain (black frames, say): none can be told from another, nor a copy of it"


def shrink_to_thumbnail(image: Image.Image) -> np.ndarray:
    """The whole of an RGB image squashed, uint8 [3, THUMBNAIL_SIDE, THUMBNAIL_SIDE]; of one of floats,
    float32 [THUMBNAIL_SIDE, THUMBNAIL_SIDE]."""
    side = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    # by whole pixels first, as long as that cannot be seen: a sixth of the time
    small = np.asarray(image.resize(side, Image.Resampling.BICUBIC, reducing_gap=3.0))
    return small.transpose(2, 0, 1) if small.ndim == 3 else small


def find_twins(
    thumbnails: np.ndarray,
    digests: Sequence[str],
    decode: Callable[[int], Image.Image],
    seed: int = 0,
) -> Twins:
    """Twins among thumbnails, uint8 [N, 3, THUMBNAIL_SIDE, THUMBNAIL_SIDE], of which `decode` gives the RGB
    image of a row. Images of one digest are copies: their first stands for them."""
    first_of = {digest: row for row, digest in reversed(list(enumerate(digests)))}
    different = np.array(sorted(first_of.values()), np.int64)
    detailed = different[_measure_detail(thumbnails[different]) >= _PLAIN]
    n_plain = len(different) - len(detailed)
    if len(detailed) < 2:
        return Twins(n_compared=len(detailed), n_plain=n_plain)
    random = np.random.default_rng(derive_seed(seed, "twins"))
    selves = _measure_selves(thumbnails, random.permutation(detailed)[:_N_CHANGED], decode, random)
    distances = _measure_others(thumbnails[detailed], selves, random)
    reached = max(float(np.quantile(found, _COVERED)) for found in selves.distances.values())
    threshold = choose_threshold(np.array(list(distances.values())), reached)
    pairs = sorted(
        (d, int(detailed[i]), int(detailed[j])) for (i, j), d in distances.items() if d <= threshold
    )
    covered = {change: float((found <= threshold).mean()) for change, found in selves.distances.items()}
    return Twins(tuple((i, j) for _, i, j in pairs), threshold, covered, len(detailed), n_plain)


def choose_threshold(distances: np.ndarray, reached: float) -> float:
    """The distance up to which pairs are twins: a little more than `reached`, to which changed images come
    from themselves, or less, where strangers are as near.

    Strangers' distances rise by a power law at their lower end, as a ball's volume does. Its power is told by
    two windows beyond `reached`, where twins are few; how many strangers a threshold lets in, by the pairs
    just beyond it. Those are to be no more than _MOST_FALSE, or than their share of the pairs.
    """
    ends = [_count_within(distances, _WIDER**step * reached) for step in range(3)]
    power = np.log(max(ends[2] - ends[1], 1) / max(ends[1] - ends[0], 1)) / np.log(_WIDER)
    power = np.clip(power, _LEAST_POWER, _MOST_POWER)
    for limit in np.geomspace(min(_WIDER * reached, _MOST_APART), reached / _FINEST, _N_LIMITS):
        within = _count_within(distances, limit)
        n_strangers = (_count_within(distances, _WIDER * limit) - within) / (_WIDER**power - 1)
        if n_strangers <= max(_MOST_FALSE, _MOST_FALSE_SHARE * within):
            return float(limit)
    return 0.0


def _count_within(distances: np.ndarray, limit: float) -> int:
    return int((distances <= limit).sum())


def _measure_detail(thumbnails: np.ndarray) -> np.ndarray:
    """Root mean square [N] of what slopes leave over."""
    blocks = (remove_slopes(grey).square().mean((1, 2)).sqrt() for grey in _split_grey(thumbnails))
    return torch.cat(list(blocks)).numpy() if len(thumbnails) else np.empty(0)


def _split_grey(thumbnails: np.ndarray):
    """Grey levels in 0..1, some images at a time."""
    for start in range(0, len(thumbnails), _DESCRIBED):
        yield torch.from_numpy(thumbnails[start : start + _DESCRIBED]).float().mean(1) / 255


def _describe(thumbnails: np.ndarray) -> Tensor:
    """Low frequencies [N, _N_LOW, _N_LOW] of the cosine transform, of length 1, without the constant."""
    k, x = torch.arange(_N_LOW), torch.arange(THUMBNAIL_SIDE)
    basis = torch.cos(torch.pi * k[:, None] * (x + 0.5) / THUMBNAIL_SIDE)
    both = k[:, None] + k
    kept = (both > 0) & (both < _N_LOW)
    blocks = [basis @ remove_slopes(grey) @ basis.T * kept for grey in _split_grey(thumbnails)]
    points = torch.cat(blocks)
    return points / points.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-12)


def _turn_points(points: Tensor, version: int) -> Tensor:
    """Descriptors of turned images: by the bits of `version` transposed, then mirrored down, then along."""
    signs = (-1.0) ** torch.arange(_N_LOW)
    points = points.transpose(-2, -1) if version & 1 else points
    points = points * signs[:, None] if version & 2 else points
    return points * signs if version & 4 else points


def _turn_images(images: Tensor, version: int) -> Tensor:
    """As `_turn_points`, of pixels."""
    images = images.transpose(-2, -1) if version & 1 else images
    images = images.flip(-2) if version & 2 else images
    return images.flip(-1) if version & 4 else images


def _invert_version(version: int) -> int:
    """That which turns back: after transposing, down and along change places."""
    return version if version in (0, 1, 2, 4, 6, 7) else 8 - version


@dataclass(frozen=True)
class _Selves:
    """How far changed images are from themselves, by change, and to how much their descriptors come."""

    distances: dict[str, np.ndarray]
    reach: float


def _measure_selves(
    thumbnails: np.ndarray,
    rows: np.ndarray,
    decode: Callable[[int], Image.Image],
    random: np.random.Generator,
) -> _Selves:
    changed: dict[str, list[np.ndarray]] = {change: [] for change in CHANGES}
    for row in rows.tolist():
        image = decode(row)
        image.thumbnail((_SAMPLED_SIDE, _SAMPLED_SIDE))
        for change in CHANGES:
            changed[change].append(shrink_to_thumbnail(change_image(image, change, random)))
    places, distances, apart = np.arange(len(rows)), {}, []
    own = _describe(thumbnails[rows])
    for change, found in changed.items():
        version = {"mirrored": 4, "turned": 3}.get(change, 0)
        both = np.concatenate([thumbnails[rows], np.stack(found)])
        distances[change] = _compare(both, places, np.full(len(rows), version), len(rows) + places)
        apart.append((_turn_points(own, version) - _describe(np.stack(found))).flatten(1).norm(dim=1))
    return _Selves(distances, float(max(np.quantile(one.numpy(), _COVERED) for one in apart)))


def change_image(image: Image.Image, change: str, random: np.random.Generator) -> Image.Image:
    """An RGB image with one of CHANGES."""
    if change == "re-encoded":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(random.integers(50, 91)))
        return Image.open(file).convert("RGB")
    if change == "resized":
        scale = random.uniform(0.5, 0.9)
        return image.resize([max(8, round(scale * side)) for side in image.size], Image.Resampling.BILINEAR)
    if change == "mirrored":
        return ImageOps.mirror(image)
    if change == "turned":
        return image.transpose(Image.Transpose.ROTATE_90)
    if change == "cropped":
        left, top = (round(random.uniform(0, 0.06) * side) for side in image.size)
        width, height = (round(0.94 * side) for side in image.size)
        return image.crop((left, top, left + width, top + height))
    gain = random.uniform(0.85, 1.15)
    return image.point([min(255, round(gain * level + 8)) for level in range(256)] * 3)


def _measure_others(
    thumbnails: np.ndarray, selves: _Selves, random: np.random.Generator
) -> dict[tuple[int, int], float]:
    """Distances of images from their nearest others, by pair, the lower row first."""
    points = _describe(thumbnails)
    kept = points.flatten(1).abs().sum(0) > 0
    rows = torch.arange(len(points))
    versions = [_turn_points(points, version).flatten(1)[:, kept] for version in range(_N_VERSIONS)]
    questions = Questions(
        torch.cat(versions),
        rows.repeat(_N_VERSIONS),
        torch.arange(_N_VERSIONS).repeat_interleave(len(rows)),
        _N_VERSIONS,
    )
    found = find_neighbours(points.flatten(1)[:, kept], questions, _N_NEAREST, _REACH * selves.reach, random)
    first, version, second = found
    swapped = first > second
    inverse = np.array([_invert_version(version) for version in range(_N_VERSIONS)])
    version = np.where(swapped, inverse[version], version)
    low, high = np.minimum(first, second), np.maximum(first, second)
    low, high, version = np.unique(np.stack([low, high, version]), axis=1)
    nearest: dict[tuple[int, int], float] = {}
    for i, j, d in zip(low.tolist(), high.tolist(), _compare(thumbnails, low, version, high).tolist()):
        nearest[i, j] = min(d, nearest.get((i, j), 1.0))
    return nearest


def _compare(thumbnails: np.ndarray, left: np.ndarray, versions: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Distances of pairs of rows, the left one turned."""
    distances = np.ones(len(left))
    for version in range(_N_VERSIONS):
        places = np.flatnonzero(versions == version)
        for start in range(0, len(places), _BLOCK):
            some = places[start : start + _BLOCK]
            one, other = (torch.from_numpy(thumbnails[rows[some]]).float() / 255 for rows in (left, right))
            distances[some] = measure_unlikeness(_turn_images(one, version), other).numpy()
    return distances
