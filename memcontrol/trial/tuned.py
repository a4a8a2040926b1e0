"""Owns the model that a run has learned: its choice's adapter in the denoiser of its base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from memcontrol.config.spec import Spec
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.model.adapter import Adapter, inject_adapter
from memcontrol.trial.loaded import LoadedModels


def inject_choice(denoiser: torch.nn.Module, spec: Spec) -> Adapter:
    """The adapter that the spec asks for, injected into the denoiser and not yet trained."""
    cache, inner = StudyFolder(spec.study_folder).cache, spec.config.inner
    return inject_adapter(
        denoiser,
        spec.space,
        spec.choice,
        spec.seed,
        cache=cache,
        norm_shift_rate=inner.norm_shift_rate,
        shared_a=inner.ensemble.shares_a,
        low_memory_full=inner.low_memory_full,
    )


@contextlib.contextmanager
def hold_run(run: Path, spec: Spec, loaded: LoadedModels) -> Iterator[None]:
    """What a finished run has learned is part of its base meanwhile. Raises MemControlError where it was
    dropped."""
    RunFolder(run).refuse_dropped(RunFolder(run).adapter_file)
    adapter = inject_choice(loaded.base(spec.config).denoiser, spec)
    try:
        adapter.load(run)
        with adapter.fold():
            yield
    finally:
        adapter.remove()
