"""Owns how like two thumbnails are once one is laid over the other: shifted and scaled a little, brightness,
contrast and a slope of the light left out of account."""

from __future__ import annotations

import torch
from torch import Tensor

_N_MOVES = 3
_MOST_SCALED, _MOST_SHIFTED = 0.15, 0.12  # the shift of half the side
_LEAST_GAIN = 0.2  # of contrast, by which a step is divided
_RIDGE = 1e-6  # of the mean square of the design


def measure_unlikeness(left: Tensor, right: Tensor) -> Tensor:
    """Of pairs of images [n, 3, s, s] in 0..1: sqrt(1 - r^2), [n], r the correlation of what slopes leave
    over of each, where both are defined. 0: the same; 1: nothing in common."""
    moves = _register(*(torch.nn.functional.avg_pool2d(images.mean(1), 2) for images in (left, right)))
    placed = (_compare_moved(left, right, moves) for moves in (torch.zeros_like(moves), moves))
    return torch.minimum(*placed)


def remove_slopes(images: Tensor, mask: Tensor | None = None) -> Tensor:
    """Images [..., s, s] without their mean and slopes, within a mask [n, s, s] of rectangles."""
    side = images.shape[-1]
    inside = images.new_ones(side, side) if mask is None else mask[:, None]
    x = torch.linspace(-1, 1, side)
    n = inside.sum((-2, -1), keepdim=True).clamp(min=1)
    rest = images * inside
    rest = rest - inside * rest.sum((-2, -1), keepdim=True) / n
    for axis in (x, x[:, None]):
        slope = (axis - (inside * axis).sum((-2, -1), keepdim=True) / n) * inside
        share = (rest * slope).sum((-2, -1), keepdim=True) / slope.square().sum((-2, -1), keepdim=True)
        rest = rest - share * slope
    return rest


def _register(left: Tensor, right: Tensor) -> Tensor:
    """[n, 2, 2]: for rows and for columns of grey images [n, s, s], by how much `left` is scaled (less 1) and
    shifted (in half sides) to lie over `right`. Gauss-Newton on gain, slopes and moves (Lucas and Kanade,
    1981)."""
    n, side = len(left), left.shape[-1]
    x = torch.linspace(-1, 1, side)
    moves = left.new_zeros(n, 2, 2)
    most = torch.tensor([_MOST_SCALED, _MOST_SHIFTED])
    for _ in range(_N_MOVES):
        moved, mask = _move(left[:, None], moves)
        moved = moved[:, 0]
        down, along = torch.gradient(moved, spacing=2 / (side - 1), dim=(1, 2))
        one = torch.ones_like(moved)
        columns = [moved, one, one * x, one * x[:, None], down * x[:, None], down, along * x, along]
        design = (torch.stack(columns, -1) * mask[..., None]).flatten(1, 2)  # [n, s s, 8]
        wanted = (right * mask).flatten(1)[..., None]
        gram = design.transpose(1, 2) @ design
        level = gram.diagonal(dim1=1, dim2=2).mean(1)
        gram = gram + _RIDGE * level[:, None, None] * torch.eye(len(columns))
        found = torch.linalg.solve(gram, design.transpose(1, 2) @ wanted)[..., 0]
        steps = found[:, 4:] / found[:, :1].clamp(min=_LEAST_GAIN)
        moves = (moves + steps.reshape(n, 2, 2)).clamp(-most, most)
    return moves


def _move(images: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
    """Images [n, c, s, s] scaled and shifted, and where they are defined, [n, s, s]."""
    side = images.shape[-1]
    x = torch.linspace(-1, 1, side)
    places = ((1 + moves[..., :1]) * x + moves[..., 1:] + 1) * (side - 1) / 2  # [n, 2, s], in pixels
    inside = (places >= -0.25) & (places <= side - 0.75)
    weights = _weigh_cubic(places.clamp(0, side - 1)[..., None] - torch.arange(side))  # [n, 2, s, s]
    moved = weights[:, None, 0] @ images @ weights[:, None, 1].transpose(-2, -1)
    return moved, (inside[:, 0, :, None] & inside[:, 1, None, :]).to(images.dtype)


def _weigh_cubic(apart: Tensor) -> Tensor:
    """The kernel of cubic convolution (Keys 1981), rows summing to 1 where the border cuts them."""
    d = apart.abs()
    near = 1.5 * d**3 - 2.5 * d**2 + 1
    far = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    weights = torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))
    return weights / weights.sum(-1, keepdim=True)


def _compare_moved(left: Tensor, right: Tensor, moves: Tensor) -> Tensor:
    moved, mask = _move(left, moves)
    one, other = remove_slopes(moved, mask), remove_slopes(right, mask)
    products = (one * other).sum((1, 2, 3)).clamp(min=0)
    squares = (one.square().sum((1, 2, 3)) * other.square().sum((1, 2, 3))).clamp(min=1e-12)
    return (1 - products.square() / squares).clamp(min=0).sqrt()
