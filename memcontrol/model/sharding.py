"""Owns a denoiser whose frozen weights no single card holds: sharded over the processes of one trial, or kept
in the CPU's memory, both by torch's FSDP2; and what these processes tell each other.

By torch's own `fully_shard`: accelerate, which offers the same, wants the model, the optimizer and the state
of the process for itself, and here adapters come and go under a base that stays. What is trained is injected
after the sharding; it is no part of it, and the same on each rank.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

# how long ranks wait for one that says nothing; one that died is noticed at once on a CPU
_PATIENCE = timedelta(minutes=15)
_HOST, _POLL_SECONDS = "127.0.0.1", 0.05
_WORTH_SHARDING = 2**20  # bytes of a block: a smaller one comes with what is around it
_INNER = ("BasicTransformerBlock", "ResnetBlock2D")  # of a U-Net's parts, which are large


@dataclass(frozen=True)
class Ranks:
    """The processes that hold one base together, as this one sees them. All take the same steps: each calls
    the same of these functions in the same order."""

    rank: int = 0
    size: int = 1

    def agree(self, value: Any) -> Any:
        """What rank 0 has for a value."""
        if self.size == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
        return said[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))

    def select_rows(self, n: int) -> list[int]:
        """Which of n rows this rank computes: as many as each other one, the last row again where there are
        too few."""
        each = -(-n // self.size)
        return [min(row, n - 1) for row in range(self.rank * each, (self.rank + 1) * each)]

    def gather(self, own: Tensor, n: int) -> Tensor:
        """The first n rows [n, ...] of what all ranks have computed, each [ceil(n / size), ...]; gradients
        flow into this rank's own alone."""
        if self.size == 1:
            return own
        sent = own.detach().contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent)
        parts[self.rank] = own
        return torch.cat(parts)[:n]

    @torch.no_grad()
    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Each gradient becomes the sum over all ranks, bit for bit the same on each."""
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.size == 1 or not found:
            return
        flat = torch.cat([gradient.flatten() for gradient in found])
        dist.all_reduce(flat)
        for gradient, total in zip(found, flat.split([gradient.numel() for gradient in found])):
            gradient.copy_(total.view_as(gradient))


class Meeting:
    """Where the processes of one machine find each other: rank 0 opens it, the others come by its port."""

    def __init__(self, size: int, port: int | None = None):
        self.size, opens = size, port is None
        self.store = dist.TCPStore(_HOST, port or 0, size, opens, timeout=_PATIENCE, wait_for_workers=False)
        self.port = self.store.port

    def wait_for_others(self, is_lost: Callable[[], bool]) -> None:
        """Until each has loaded its base. Raises RuntimeError where one is lost."""
        names = [_name_rank(rank) for rank in range(1, self.size)]
        while not self.store.check(names):
            if is_lost():
                raise RuntimeError("a process that was to hold a part of the base ended (see log-1.txt)")
            time.sleep(_POLL_SECONDS)

    def join(self, rank: int, device: torch.device) -> Ranks:
        self.store.set(_name_rank(rank), "here")
        dist.init_process_group(
            _choose_backend(device), store=self.store, rank=rank, world_size=self.size, timeout=_PATIENCE
        )
        return Ranks(rank, self.size)


def _name_rank(rank: int) -> str:
    return f"rank {rank}"


def _choose_backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def join_alone(device: torch.device) -> Ranks:
    """A group of this process alone, for weights in the CPU's memory."""
    if not dist.is_initialized():
        dist.init_process_group(_choose_backend(device), store=dist.HashStore(), rank=0, world_size=1)
    return Ranks()


def leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shard_denoiser(denoiser: Any, device: torch.device, offloads: bool) -> None:
    """Each block's frozen weights come together for its pass, and lie apart before and after it: over all
    ranks, or (`offloads`, on a card) in the CPU's memory."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    policy = CPUOffloadPolicy() if offloads and device.type == "cuda" else OffloadPolicy()
    for module in (*find_repeated_blocks(denoiser), denoiser):
        module.register_forward_hook(_copy_views)  # before FSDP's own
        fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    if offloads:
        # a pipeline takes its device from its first weight, unless a hook in accelerate's manner names one
        denoiser._hf_hook = _Placed(device)


def _copy_views(module: nn.Module, inputs: Any, output: Any) -> Any:
    """What FSDP does in backward hangs on a block's outputs, and would be lost with a view that is changed in
    place."""
    if not torch.is_grad_enabled():
        return output
    return tree_map_only(Tensor, lambda each: each.clone() if each._base is not None else each, output)


@dataclass(frozen=True)
class _Placed:
    execution_device: torch.device


def find_repeated_blocks(denoiser: Any) -> list[Any]:
    """What a denoiser computes one after another, inner blocks before those around them: what its lists
    hold (a transformer's blocks, the parts of a U-Net), a U-Net's middle and what is in these; of all that
    the larger ones."""
    lists = [child for child in denoiser.children() if isinstance(child, nn.ModuleList)]
    around = [block for blocks in lists for block in blocks]
    middle = getattr(denoiser, "mid_block", None)
    around += [] if middle is None else [middle]
    inner = [module for module in denoiser.modules() if type(module).__name__ in _INNER]
    found = [*(module for module in inner if module not in around), *around]
    return [block for block in found if sum(each.nbytes for each in block.parameters()) >= _WORTH_SHARDING]


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether it is a part of a weight, or lies elsewhere than it is used (torch's DTensor)."""
    return hasattr(tensor, "device_mesh")


@contextlib.contextmanager
def show_whole(denoiser: nn.Module) -> Iterator[None]:
    """As long as it lasts sharded weights look like whole ones, of zeros that take no memory, on the device
    that computes: peft takes shapes, types and devices from them."""
    shards: list[tuple[nn.Module, str, Any]] = [
        (module, name, parameter)
        for module in denoiser.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if is_sharded(parameter)
    ]
    for module, name, parameter in shards:
        place = parameter.device_mesh.device_type
        zeros = torch.zeros((), dtype=parameter.dtype, device=place).expand(parameter.shape)
        module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in shards:
            module._parameters[name] = parameter
