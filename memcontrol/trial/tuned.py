"""Owns the model that a run has learned: its choice's adapter in the denoiser of its base, and what runs of
the same fine-tuning share of it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from memcontrol.core.choice import CHECKPOINT_KEY
from memcontrol.core.files import read_json
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.core.spec import Spec
from memcontrol.model.adapter import Adapter, inject_adapter
from memcontrol.training.rounds import TrainLog
from memcontrol.trial.loaded import LoadedModels

_OF_LOG = ("n_steps", "images_seen", "first_loss", "last_loss")


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


def list_checkpoints(spec: Spec, rung: float | None) -> list[float]:
    """The shares of the budget at which a search wants a fine-tuning's adapter, before its end or a rung."""
    wanted = sorted(share for share in set(spec.config.search.checkpoints) if share < 1)
    rounds = spec.config.inner.rounds_to
    return [share for share in wanted if rung is None or rounds(share) <= rounds(rung)]


def find_learned(folder: Path, spec: Spec) -> Path | None:
    """The file that a variant's trial has left of their fine-tuning; None where this run must train."""
    choice, study = spec.choice, StudyFolder(spec.study_folder)
    own = study.run(choice).path.resolve()
    if not choice.is_variant or not folder.resolve().is_relative_to(own):
        return None
    inside = folder.resolve().relative_to(own)  # of a replicate its own
    run = RunFolder(study.run(choice.trained).path / inside)
    if choice.checkpoint == 1:
        places = [(run, run.adapter_file)]
    else:  # which goes once the variant that is nothing but it has ended
        as_it_was = study.run(choice.trained.with_settings({CHECKPOINT_KEY: choice.checkpoint})).path / inside
        other = RunFolder(as_it_was)
        places = [(run, run.checkpoint_file(choice.checkpoint)), (other, other.adapter_file)]
    return next((path for one, path in places if one.is_complete and path.is_file()), None)


def describe_log(log: TrainLog) -> dict[str, str]:
    """What `read_log` reads, as a file's header."""
    return {"log": json.dumps({name: getattr(log, name) for name in _OF_LOG})}


def read_log(path: Path) -> TrainLog:
    """What was done to come to a checkpoint, or to the end of a run."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        stored = (file.metadata() or {}).get("log")
    known = json.loads(stored) if stored else read_json(RunFolder(path.parent).result_file)
    first, last = (math.nan if known[name] is None else known[name] for name in ("first_loss", "last_loss"))
    return TrainLog(known["n_steps"], known["images_seen"], first, last)


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
