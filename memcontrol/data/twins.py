"""Owns twins: images that are nearly the same (re-encoded, resized, mirrored, turned by right angles,
slightly cropped, brighter), found by content.

How near is a twin is read off the data: farther than most of some images' own changed selves lie from them,
and nearer than any other image should.

Notations

n: Images. S: Side of a thumbnail; s: side of what is compared.
view: A thumbnail's whole or one of its slight crops, grey, less its mean, of unit length: [s, s].
key: What of a view's low frequencies neither mirroring nor turning changes.
apart: The least distance between the views of two images, either of which is whole, in all turns.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor, nn

from memcontrol.core.seeds import derive_seed

THUMBNAIL_SIDE = 64  # S
_SIDE, _N_FREQUENCIES = 16, 5  # s
# share of a side that a crop keeps, and where it lies in the slack: left and top
_CROPS = (
    *((0.97, x, y) for x, y in ((0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))),
    *((0.94, x, y) for x in (0.0, 0.5, 1.0) for y in (0.0, 0.5, 1.0)),
)
_KEYED = (0, *range(6, 6 + 9, 2))  # views whose keys look for candidates: the whole, and five of 94 %
_N_NEAREST = 4  # candidates of each view
_FEWEST_OTHERS = 4
_N_CALIBRATED = 100  # images whose changed selves are looked at
_FLAT = 2.0  # root mean square of a thumbnail's greys, of 255, below which there is nothing to compare
_BLOCK, _PAIRS = 2048, 1024
# of log distances to the nearest other image, in standard deviations: one in 300,000 where they are normal
_FAR_BELOW = 4.5
_NORMAL_20 = 0.8416


@dataclass(frozen=True)
class Twins:
    """Pairs of rows that are twins, and what was taken for one: distances below `threshold`, where changed
    selves lie at `selves` (95 %) and other images from `others` on."""

    pairs: tuple[tuple[int, int], ...]
    threshold: float
    selves: float
    others: float


def shrink_to_thumbnail(image: Image.Image) -> np.ndarray:
    """uint8 [S, S], the whole image squashed."""
    side = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    return np.asarray(image.convert("L").resize(side, Image.Resampling.BICUBIC))


def find_twins(thumbnails: np.ndarray, seed: int = 0) -> Twins:
    """Among uint8 thumbnails [n, S, S]. Candidates are neighbours in keys of few dimensions, by a tree, so
    that time grows as n log n."""
    views, is_flat = _make_views(thumbnails)
    if (~is_flat).sum() < 2:
        return Twins((), 0.0, 0.0, np.inf)
    found: dict[tuple[int, int], float] = {}
    nearest = np.full(len(views), np.inf)  # to another image
    for rows, others in _iterate_candidates(views):
        apart = _measure_apart(views, views, rows, others)
        np.minimum.at(nearest, rows, apart)
        for i, j, distance in zip(rows.tolist(), others.tolist(), apart.tolist()):
            found[min(i, j), max(i, j)] = distance
    threshold, selves, others_from = _calibrate(thumbnails, views, nearest, np.flatnonzero(~is_flat), seed)
    pairs = sorted(
        pair for pair, apart in found.items() if apart < threshold and not is_flat[list(pair)].any()
    )
    return Twins(tuple(pairs), threshold, selves, others_from)


def _make_views(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each image its views, the whole first, float16 [n, v, s, s]; and whether it is flat [n]."""
    n = len(thumbnails)
    views, is_flat = np.empty((n, 1 + len(_CROPS), _SIDE, _SIDE), np.float16), np.empty(n, bool)
    for start in range(0, n, _BLOCK):
        rows = slice(start, start + _BLOCK)
        views[rows], is_flat[rows] = _make_views_of_block(thumbnails[rows])
    return views, is_flat


def _make_views_of_block(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    greys = torch.from_numpy(np.ascontiguousarray(thumbnails)).float()[:, None]  # [n, 1, S, S]
    parts = [greys, *(_crop_thumbnails(greys, *crop) for crop in _CROPS)]
    shrunk = [
        nn.functional.interpolate(part, (_SIDE, _SIDE), mode="bilinear", antialias=True, align_corners=False)
        for part in parts
    ]
    views = torch.cat(shrunk, 1)  # [n, v, s, s]
    views -= views.mean((2, 3), keepdim=True)
    lengths = torch.linalg.vector_norm(views, dim=(2, 3), keepdim=True)
    is_flat = lengths[:, 0, 0, 0] < _FLAT * _SIDE
    return (views / lengths.clamp_min(1e-3)).half().numpy(), is_flat.numpy()


def _crop_thumbnails(greys: Tensor, share: float, left: float, top: float) -> Tensor:
    n_kept = round(share * THUMBNAIL_SIDE)
    x, y = (round(place * (THUMBNAIL_SIDE - n_kept)) for place in (left, top))
    return greys[:, :, y : y + n_kept, x : x + n_kept]


def _iterate_candidates(views: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows that may be twins: [m], [m]."""
    from scipy.spatial import cKDTree

    keys = _make_keys(views[:, _KEYED])  # [n, 6, k]
    tree, n = cKDTree(keys[:, 0]), len(views)
    for start in range(0, n, _BLOCK):
        block = keys[start : start + _BLOCK]
        _, near = tree.query(block, k=min(_N_NEAREST, n))  # [m, 6, _N_NEAREST]
        rows = np.broadcast_to(np.arange(start, start + len(block))[:, None, None], near.shape)
        pairs = np.unique(np.stack([rows[rows != near], near[rows != near]], 1), axis=0)
        yield pairs[:, 0], pairs[:, 1]


def _make_keys(views: np.ndarray) -> np.ndarray:
    """Of views [n, v, s, s]: amplitudes of low frequencies, of (u, v) and (v, u) the larger and the smaller:
    [n, v, k]."""
    from scipy.fft import dct

    basis = dct(np.eye(_SIDE), axis=0, norm="ortho")[:_N_FREQUENCIES].astype(np.float32)  # [f, s]
    blocks = [
        np.abs(
            np.einsum(
                "fy,nvyx,gx->nvfg", basis, views[i : i + _BLOCK].astype(np.float32), basis, optimize=True
            )
        )
        for i in range(0, len(views), _BLOCK)
    ]
    found = np.concatenate(blocks)
    turned = found.swapaxes(2, 3)
    u, v = np.triu_indices(_N_FREQUENCIES)
    larger, smaller = np.maximum(found, turned)[:, :, u, v], np.minimum(found, turned)[:, :, u, v]
    return np.concatenate([larger[:, :, 1:], smaller[:, :, u != v]], 2)


def _measure_apart(
    views: np.ndarray, others: np.ndarray, rows: np.ndarray, other_rows: np.ndarray
) -> np.ndarray:
    """Of pairs of images, by their rows [m] in views [n, v, s, s]: [m]."""
    blocks = (slice(start, start + _PAIRS) for start in range(0, len(rows), _PAIRS))
    found = [
        _measure_block(
            torch.from_numpy(views[rows[block]]).float(), torch.from_numpy(others[other_rows[block]]).float()
        )
        for block in blocks
    ]
    return np.concatenate(found) if found else np.zeros(0)


def _measure_block(mine: Tensor, theirs: Tensor) -> np.ndarray:
    best = torch.full((len(mine),), -1.0)
    for turned in _turn(mine):
        flat = turned.flatten(2)  # [m, v, s s]
        own = torch.einsum("mvp,mp->mv", flat, theirs[:, 0].flatten(1)).amax(1)
        other = torch.einsum("mp,mvp->mv", flat[:, 0], theirs.flatten(2)).amax(1)
        best = torch.maximum(best, torch.maximum(own, other))
    return (2 - 2 * best).clamp_min(0).sqrt().numpy()


def _turn(views: Tensor) -> list[Tensor]:
    """In all eight ways that right angles and mirrors give."""
    turned = [torch.rot90(views, k, (2, 3)) for k in range(4)]
    return turned + [one.flip(3) for one in turned]


def _calibrate(
    thumbnails: np.ndarray, views: np.ndarray, nearest: np.ndarray, lively: np.ndarray, seed: int
) -> tuple[float, float, float]:
    """The threshold, and what it lies between; from the rows that are not flat."""
    rng = np.random.default_rng(derive_seed(seed, "twins"))
    rows = rng.permutation(lively)[:_N_CALIBRATED]
    changed = [np.stack([change(thumbnails[row]) for row in rows]) for change in _CHANGES]
    each = np.arange(len(rows))
    apart = [_measure_apart(views, _make_views(one)[0], rows, each) for one in changed]
    selves = float(np.quantile(np.concatenate(apart), 0.95))
    apart_from_others = nearest[lively]
    # what is nearer may be twins
    known = apart_from_others[np.isfinite(apart_from_others) & (apart_from_others > 1.5 * selves)]
    if len(known) < _FEWEST_OTHERS:
        return selves, selves, np.inf
    low, middle = np.quantile(np.log(known), (0.2, 0.5))
    others = float(np.exp(middle - (middle - low) * _FAR_BELOW / _NORMAL_20))
    return (float(np.sqrt(selves * others)) if selves < others else others), selves, others


def _change_image(change: Callable[[Image.Image], Image.Image]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda pixels: shrink_to_thumbnail(change(Image.fromarray(pixels)))


def _encode_again(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    return Image.open(buffer)


def _cut_edges(share: float) -> Callable[[Image.Image], Image.Image]:
    edge = THUMBNAIL_SIDE * share
    box = (edge, edge / 2, THUMBNAIL_SIDE - edge / 2, THUMBNAIL_SIDE - edge)
    return lambda image: image.resize(image.size, Image.Resampling.BICUBIC, box)


_CHANGES: Sequence[Callable[[np.ndarray], np.ndarray]] = (
    _change_image(_encode_again),
    _change_image(lambda image: image.resize((THUMBNAIL_SIDE // 2,) * 2, Image.Resampling.BICUBIC)),
    _change_image(_cut_edges(0.03)),
    _change_image(lambda image: ImageEnhance.Brightness(image).enhance(1.15)),
    _change_image(lambda image: image.rotate(90)),
)
