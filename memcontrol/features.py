"""Owns feature extractors, pinned by id and sha256, and exact nearest neighbours."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from memcontrol.errors import MemControlError

TINY_FEATURES = Path(__file__).parent / "assets" / "features.safetensors"
N_EXACT = 8


class TinyFeatures(nn.Module):
    """Features of a small network trained on printed characters: [N, 3, 32, 32] in -1..1 to [N, 64]."""

    n_features = 64

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 96)
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(96 * 4 * 4, self.n_features), nn.LayerNorm(self.n_features))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def shrunk(images: np.ndarray, size: int = 32) -> Tensor:
    """uint8 [N, 3, H, W] to float [N, 3, size, size] in 0..1, antialiased."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).float() / 255
    if pixels.shape[-2:] == (size, size):
        return pixels
    return nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)


def pixel_features(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 3, H, W] to float32 [N, 3072]: 32 x 32 pixels in 0..1."""
    return shrunk(images).flatten(1).numpy()


def tiny_features() -> tuple[Callable[[np.ndarray], np.ndarray], int, str]:
    from safetensors.torch import load_file

    network = TinyFeatures().eval()
    network.load_state_dict(load_file(TINY_FEATURES))

    @torch.no_grad()
    def extract(images: np.ndarray) -> np.ndarray:
        chunks = [network(shrunk(images[i : i + 256]) * 2 - 1) for i in range(0, len(images), 256)]
        return torch.cat(chunks).numpy()

    return extract, TinyFeatures.n_features, f"tiny-sha256:{hashlib.sha256(TINY_FEATURES.read_bytes()).hexdigest()[:16]}"


EXTRACTORS = {"tiny": (tiny_features, TinyFeatures.n_features)}


def load_extractor(name: str) -> tuple[Callable[[np.ndarray], np.ndarray], int, str]:
    """The function uint8 [N, 3, H, W] -> float32 [N, D], its D, and its pinned id. Raises MemControlError."""
    check_extractor(name)
    return EXTRACTORS[name][0]()


def check_extractor(name: str) -> int:
    """The extractor's number of features, without loading it. Raises MemControlError."""
    if name not in EXTRACTORS:
        raise MemControlError(f"rewards.extractor '{name}' is unknown; allowed: {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name][1]


def nearest(queries: np.ndarray, references: np.ndarray, k: int = 1, chunk: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest references of each query: Euclidean distances [N, k] and indices [N, k], nearest first.

    Distances come from a product in float64; those of the nearest N_EXACT are computed again as differences, since the
    product form loses digits exactly for near-copies. Ties go to the lower index.
    """
    centre = references.mean(0, dtype=np.float64)
    left, right = (torch.from_numpy(np.asarray(x, np.float64) - centre) for x in (queries, references))
    k, n_exact = min(k, len(right)), min(N_EXACT, len(right))
    norms = right.square().sum(1)  # [M]
    distances, indices = [], []
    for rows in left.split(chunk):
        squares = norms - 2 * rows @ right.T + rows.square().sum(1, keepdim=True)  # [n, M]
        near = squares.topk(max(k, n_exact), dim=1, largest=False)
        for column in range(n_exact):
            near.values[:, column] = (right[near.indices[:, column]] - rows).square().sum(1)
        found, order = near.values.clamp(min=0).sqrt().numpy(), near.indices.numpy()
        ranked = np.lexsort((order, found), axis=1)[:, :k]
        distances.append(np.take_along_axis(found, ranked, 1))
        indices.append(np.take_along_axis(order, ranked, 1))
    return np.concatenate(distances), np.concatenate(indices)
