"""Owns counts of a computation as it runs, on the meta device from shapes alone: floating-point operations,
and the bytes that it holds at its peak."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from memcontrol.model.families import Family, Text

_aten = torch.ops.aten
_F = nn.functional
# what torch.autocast computes in 16 bits, and what on a card in float32
_LOWERED = (_F.linear, _F.conv2d, torch.matmul, torch.bmm, torch.baddbmm, _F.scaled_dot_product_attention)
_RAISED = (_F.layer_norm, _F.group_norm, _F.softmax)


def _count_attention(query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _count_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs
) -> int:
    """Twice forward, as the mathematics has it: what a kernel computes again to save memory is no work
    done."""
    return 2 * _count_attention(query, key, value)


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of matrix products, convolutions and attention by torch's formulas. Torch's own
    counter takes every other operation apart too, for ten times the time."""

    formulas: Mapping[Any, Any] = flop_registry | {
        _aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_attention_backward,
        _aten._scaled_dot_product_flash_attention_backward: _count_attention_backward,
        _aten._scaled_dot_product_efficient_attention_backward: _count_attention_backward,
        _aten._scaled_dot_product_cudnn_attention_backward: _count_attention_backward,
    }

    def __init__(self):
        super().__init__()
        self.n_flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := self.formulas.get(func.overloadpacket):
            self.n_flops += formula(*args, **kwargs, out_val=out)
        return out


class PeakBytes(TorchDispatchMode):
    """Follows the storages that operations make: `n_bytes` alive now, `peak` the most at a time. What existed
    before, such as weights, does not count."""

    def __init__(self):
        super().__init__()
        self.n_bytes = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {_locate(tensor) for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and _locate(tensor) not in given:
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive.add(key)
        self.n_bytes += size
        self.peak = max(self.peak, self.n_bytes)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.n_bytes -= size


def _locate(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class FusedAttention(TorchFunctionMode):
    """On the meta device attention as real devices have it: there it would keep [heads, n, n] for
    backward."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_attention = func is nn.functional.scaled_dot_product_attention
        return _attend_fused(*args, **kwargs) if is_attention else func(*args, **kwargs)


def _attend_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.device.type != "meta" or enable_gqa:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


class MetaAutocast(TorchFunctionMode):
    """torch.autocast for the meta device, which has none: the types, and so the bytes, of a card's or a
    CPU's."""

    def __init__(self, kind: torch.dtype, on_card: bool):
        super().__init__()
        self.kind, self.raised = kind, _RAISED if on_card else ()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kind = self.kind if func in _LOWERED else torch.float32 if func in self.raised else None
        args, kwargs = _cast_floats(args, kind), _cast_floats(kwargs or {}, kind)
        return func(*args, **kwargs)


def _cast_floats(values: Any, kind: torch.dtype | None) -> Any:
    if kind is None:
        return values
    return tree_map_only(Tensor, lambda each: each.to(kind) if each.is_floating_point() else each, values)


def make_bare_copy(model: Any, kind: torch.dtype) -> Any:
    """The model of a diffusers class without its weights, on the meta device: names and shapes only."""
    config = {name: value for name, value in model.config.items() if name != "quantization_config"}
    with torch.device("meta"):
        return type(model).from_config(config).to(kind).requires_grad_(False).eval()


def pass_shapes(
    denoiser: nn.Module,
    family: Family,
    latents: Sequence[int],
    text: Mapping[str, Sequence[int]],
    batch: int,
    compute: torch.dtype,
    on_card: bool,
    backward: bool = False,
) -> None:
    """`batch` latents [C, h, w] and caption encodings of these shapes go through a denoiser on the meta
    device, under autocast where it computes in 16 bits, and back where that is asked for."""
    device = next(denoiser.parameters()).device
    noisy, time = torch.zeros(batch, *latents, device=device), torch.zeros(batch, device=device)
    encodings: Text = {name: torch.zeros(batch, *shape, device=device) for name, shape in text.items()}
    with ExitStack() as stack:
        stack.enter_context(FusedAttention())
        if compute != torch.float32:
            stack.enter_context(MetaAutocast(compute, on_card))
        predicted = family.predict(denoiser, noisy, time, encodings)
        if backward:
            _run_backward(predicted.sum())


def _run_backward(loss: Tensor) -> None:
    """`loss.backward()`, but with the modes that are on: that one would leave them for what checkpointing
    computes again."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


@torch.no_grad()
def count_encoding_bytes(autoencoder: Any, side: int, factor: int) -> int:
    """What one image of a side in pixels holds at the peak of its way into the autoencoder."""
    bare = make_bare_copy(autoencoder, autoencoder.dtype)
    with FusedAttention(), PeakBytes() as held:
        bare.encode(torch.zeros(1, 3, side, side, dtype=autoencoder.dtype, device="meta"))
    return held.peak


@torch.no_grad()
def count_decoding_bytes(autoencoder: Any, side: int, factor: int) -> int:
    """What one image of a side in pixels holds at the peak of its way out of the autoencoder, whose latents
    are `factor` times smaller."""
    bare, n_channels = make_bare_copy(autoencoder, autoencoder.dtype), autoencoder.config.latent_channels
    latents = torch.zeros(
        1, n_channels, side // factor, side // factor, dtype=autoencoder.dtype, device="meta"
    )
    with FusedAttention(), PeakBytes() as held:
        bare.decode(latents)
    return held.peak
