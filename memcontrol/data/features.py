"""Owns feature matrices [n, d]: their checks, the pixel descriptor, distances and exact nearest
neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from memcontrol.core.errors import MemControlError

# candidates beyond those asked for: float32 products may rank neighbours of equal distance wrongly
_N_SPARE = 32
REFERENCE_BLOCK = 16384
_SHRUNK_BYTES = 2**24
PIXEL_SIDE = 32  # of the images whose pixels are compared


def check_matrix(features, name: str, least: int = 1, dtype=np.float64) -> np.ndarray:
    """[n, d] of a numpy array, a torch tensor or lists; `dtype` None keeps float32 as it is, for large sets.

    Raises MemControlError: another shape, too few rows, not finite.
    """
    found = np.asarray(
        features.detach().cpu().to(_widen_type(features.dtype)) if hasattr(features, "detach") else features
    )
    try:
        found = found.astype(dtype or (np.float32 if found.dtype == np.float32 else np.float64), copy=False)
    except (TypeError, ValueError):
        raise MemControlError(f"{name} holds {found.dtype}; give a matrix of numbers [n, d]") from None
    if found.ndim != 2:
        raise MemControlError(f"{name} has shape {list(found.shape)}; give a matrix of features [n, d]")
    if len(found) < least:
        raise MemControlError(f"{name} needs at least {least} images and has {len(found)}")
    if not np.isfinite(found).all():
        raise MemControlError(
            f"{name} holds values that are not finite; look for broken images or an extractor in "
            "half precision"
        )
    return found


def _widen_type(dtype):
    """A torch type that numpy knows: float32 in place of half precision."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def refuse_unlike_widths(*sets: np.ndarray) -> None:
    """Raises MemControlError where feature matrices differ in width."""
    widths = [rows.shape[1] for rows in sets]
    if len(set(widths)) > 1:
        raise MemControlError(
            f"the feature sets have {', '.join(map(str, widths))} dimensions; use one extractor for "
            "all of them"
        )


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def shrink_images(images: np.ndarray, size: int = PIXEL_SIDE) -> Tensor:
    """uint8 [N, 3, H, W] to float [N, 3, size, size] in 0..1, antialiased; some at a time, since in floats
    large images take four times their room."""
    if images.shape[-2:] == (size, size):
        return torch.from_numpy(np.ascontiguousarray(images)).float() / 255
    n = max(1, _SHRUNK_BYTES // images[0].nbytes)
    return torch.cat([_shrink_block(images[i : i + n], size) for i in range(0, len(images), n)])


def _shrink_block(images: np.ndarray, size: int) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(images)).float() / 255
    return nn.functional.interpolate(
        pixels, (size, size), mode="bilinear", antialias=True, align_corners=False
    )


def pixel_features(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 3, H, W] to float32 [N, 3072]: 32 x 32 pixels in 0..1."""
    return shrink_images(images).flatten(1).numpy()


def view_images(pixels: np.ndarray) -> Tensor:
    """float32 [N, 3, 32, 32] of pixels [N, 3072]; a copy where they may not be written, of which torch would
    warn."""
    rows = torch.from_numpy(np.require(pixels, np.float32, ["C", "W"]))
    return rows.view(-1, 3, PIXEL_SIDE, PIXEL_SIDE)


def nearest(
    queries: np.ndarray, references: np.ndarray, k: int = 1, chunk: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest references of each query: Euclidean distances [N, k] and indices [N, k], nearest first.

    A float32 product, block by block, finds candidates; the distances of those that may be among the k
    nearest are then computed again as float64 differences, since the product form loses digits exactly for
    near-copies; of a float64 product only those that it leaves in doubt. Ties go to the lower index. Memory
    beyond the inputs does not grow with their number.
    """
    k = min(k, len(references))
    n_candidates = min(k + _N_SPARE, len(references))
    # anywhere among them will do: products of small numbers lose fewer digits
    centre = blockwise_mean(references[:REFERENCE_BLOCK])
    found = []
    for rows in np.array_split(queries, max(1, -(-len(queries) // chunk))):
        if 4 * n_candidates > len(references):  # nearly all of them: one product gives every distance
            candidates = _score_all(rows, references, centre)
        else:
            candidates = _score_candidates(rows, references, centre, n_candidates)
        found.append(_nearest_among(rows, references, candidates, k))
    distances, indices = zip(*found)
    return np.concatenate(distances), np.concatenate(indices)


def blockwise_mean(references: np.ndarray) -> np.ndarray:
    """float64 [d], without a float64 copy of them all."""
    return sum(block.sum(0, dtype=np.float64) for block in split_blocks(references)) / len(references)


def split_blocks(rows: np.ndarray, size: int = REFERENCE_BLOCK) -> list[np.ndarray]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@dataclass(frozen=True)
class _Candidates:
    """Of each query some references [N, n], their squared distances less the query's own square [N, n], by
    how much these may be wrong [N], and that square [N]."""

    rows: np.ndarray
    scores: np.ndarray
    errors: np.ndarray
    squares: np.ndarray

    def find_doubtful(self) -> np.ndarray:
        """Whose distance has fewer than nine digits, or is as good as another's: [N, n]."""
        errors = self.errors[:, None]
        order = self.scores.argsort(axis=1)
        is_close = np.diff(np.take_along_axis(self.scores, order, 1), axis=1) <= 2 * errors
        doubtful = np.zeros(self.scores.shape, bool)
        doubtful[:, 1:] |= is_close
        doubtful[:, :-1] |= is_close
        np.put_along_axis(doubtful, order, doubtful.copy(), 1)
        return doubtful | (self.scores + self.squares[:, None] <= 1e9 * errors)


def _score_candidates(queries: np.ndarray, references: np.ndarray, centre: np.ndarray, n: int) -> _Candidates:
    """The n nearest by a float32 product, in any order."""
    centre = centre.astype(np.float32)
    left = torch.from_numpy(queries.astype(np.float32, copy=False) - centre)
    best, longest = (torch.empty(len(left), 0), torch.empty(len(left), 0, dtype=torch.long)), 0.0
    for number, block in enumerate(split_blocks(references)):
        right = torch.from_numpy(block.astype(np.float32, copy=False) - centre)
        squares = torch.linalg.vector_norm(right, dim=1).square()
        longest = max(longest, float(squares.max()) ** 0.5)
        values, places = _least_columns(torch.addmm(squares, left, right.T, alpha=-2), n)
        values = torch.cat([best[0], values], 1)
        places = torch.cat([best[1], places + number * REFERENCE_BLOCK], 1)
        order = values.topk(min(n, values.shape[1]), dim=1, largest=False, sorted=False).indices
        best = values.gather(1, order), places.gather(1, order)
    lengths = torch.linalg.vector_norm(left, dim=1).double().numpy()
    errors = _bound_errors(lengths, longest, left.shape[1], np.float32)
    return _Candidates(best[1].numpy(), best[0].double().numpy(), errors, np.square(lengths))


def _score_all(queries: np.ndarray, references: np.ndarray, centre: np.ndarray) -> _Candidates:
    """All references, by a float64 product."""
    left, right = (np.asarray(x, np.float64) - centre for x in (queries, references))
    squares = np.square(right).sum(1)
    lengths = np.linalg.norm(left, axis=1)
    errors = _bound_errors(lengths, float(squares.max()) ** 0.5, left.shape[1], np.float64)
    rows = np.broadcast_to(np.arange(len(right)), (len(left), len(right)))
    return _Candidates(rows, squares - 2 * left @ right.T, errors, np.square(lengths))


def _bound_errors(lengths: np.ndarray, longest: float, d: int, dtype: type) -> np.ndarray:
    """Of |r|^2 - 2 q r in a floating point type (Higham, Accuracy and Stability, 3.1), for queries of these
    lengths [N] and references up to the longest."""
    return (d + 8) * np.finfo(dtype).eps * (longest**2 + 2 * longest * lengths)


def _least_columns(scores: Tensor, n: int, depth: int = 16) -> tuple[Tensor, Tensor]:
    """The n least of each row [N, M] and their columns [N, n]. Columns go in groups of `depth` first: the n
    least are in the n groups whose minima are least, and a minimum is ten times as fast as a selection."""
    width = scores.shape[1] // depth
    if width <= n or scores.shape[1] % depth:
        return scores.topk(min(n, scores.shape[1]), dim=1, largest=False, sorted=False)
    # [N, n]
    groups = (
        scores.view(len(scores), depth, width).amin(1).topk(n, dim=1, largest=False, sorted=False).indices
    )
    columns = (groups[:, None, :] + width * torch.arange(depth)[:, None]).flatten(1)  # [N, depth n]
    values, places = scores.gather(1, columns).topk(n, dim=1, largest=False, sorted=False)
    return values, columns.gather(1, places)


def _nearest_among(
    queries: np.ndarray, references: np.ndarray, candidates: _Candidates, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of each query's candidates, by float64 differences of the doubtful that may be among
    them."""
    most = np.partition(candidates.scores, k - 1, axis=1)[:, k - 1] + 2 * candidates.errors
    may_be = candidates.scores <= most[:, None]
    squares = np.where(may_be, candidates.scores + candidates.squares[:, None], np.inf)
    open_rows = may_be & candidates.find_doubtful()
    for query, rows, chosen, found in zip(queries, candidates.rows, open_rows, squares):
        difference = np.subtract(references[rows[chosen]], query, dtype=np.float64)
        found[chosen] = np.einsum("nd,nd->n", difference, difference)
    order = np.lexsort((candidates.rows, squares), axis=1)[:, :k]
    distances = np.sqrt(np.take_along_axis(squares, order, 1))
    return distances, np.take_along_axis(candidates.rows, order, 1)


def pairwise_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """All distances [N, M]."""
    squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None] - 2 * x @ y.T
    return np.sqrt(np.maximum(squares, 0.0))


def nearest_others(points: np.ndarray, k: int, rows: np.ndarray | None = None) -> np.ndarray:
    """Distances of each point, or of those in `rows`, to its k nearest other points of the set: [N, k]."""
    rows = np.arange(len(points)) if rows is None else rows
    distances, indices = nearest(points[rows], points, k + 1)
    own = indices == rows[:, None]
    # among many equal points its own may not be listed: any of them stands for it
    own[~own.any(1), -1] = True
    return distances[~own].reshape(len(rows), k)
