"""Owns files of tensors that are computed once: whoever comes first makes the file, all others read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from memcontrol.core.files import replace_file

if TYPE_CHECKING:
    from torch import Tensor


def load_or_make(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU and mapped from it. Where there is none it is made, by
    one process at a time: `path` names what its content depends on. Raises DiskFull."""
    # here, since most of core's users need neither
    from filelock import FileLock
    from safetensors.torch import load_file, save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
            with replace_file(path) as part:
                save_file(tensors, part)
    return load_file(path)
