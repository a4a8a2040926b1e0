"""Owns how a run comes to its adapter: by training, with a file of it at each checkpoint of the search, or
from what the fine-tuning of another run has left."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

from memcontrol.config.spec import Spec
from memcontrol.core.choice import CHECKPOINT_KEY
from memcontrol.core.errors import Diverged
from memcontrol.core.files import read_json
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.model.adapter import Adapter
from memcontrol.model.base import Base
from memcontrol.training.rounds import ProcessGroup, TrainLog, train_rounds
from memcontrol.trial.loaded import LoadedModels

_OF_LOG = ("n_steps", "images_seen", "first_loss", "last_loss")


def learn(
    folder: Path,
    spec: Spec,
    loaded: LoadedModels,
    adapter: Adapter,
    progress: Callable[..., None],
    rung: float | None,
    team: ProcessGroup | None = None,
) -> TrainLog:
    """Has the adapter hold what the choice's fine-tuning learns: of a variant what that of its trial has
    left, else by training, with a file of the adapter at each checkpoint of the search. To a rung, if there
    is one; a choice's own checkpoint is the end."""
    base, run, choice = loaded.base(spec.config), RunFolder(folder), spec.choice
    source = base.ranks.agree(_find_learned(folder, spec))
    if source is not None:
        adapter.read(source)
        return _read_log(source)
    for share in _list_checkpoints(spec, rung) if spec.purpose.startswith("search") else []:
        path = run.checkpoint_file(share)
        if base.ranks.agree(not path.is_file()):
            log = fine_tune(folder, spec, loaded, adapter, progress, team, share)
            if base.ranks.rank == 0:
                adapter.write(path, _describe_log(log))
    end = rung or (choice.checkpoint if choice.checkpoint < 1 else None)
    return fine_tune(folder, spec, loaded, adapter, progress, team, end)


def fine_tune(
    folder: Path,
    spec: Spec,
    loaded: LoadedModels,
    adapter: Adapter,
    progress: Callable[..., None],
    team: ProcessGroup | None = None,
    rung: float | None = None,
) -> TrainLog:
    """Trains the injected adapter, its rounds kept in the trial's folder; alone, or with the other processes
    of a team; to the end or to a rung."""
    base, inner = loaded.base(spec.config), spec.config.inner
    recomputes = inner.gradient_checkpointing or adapter.is_low_memory
    identity = f"{spec.config.base} {spec.choice} {spec.space} {loaded.train_images(spec).digest}"
    rounds = _place_rounds(RunFolder(folder), base)
    try:
        with base.checkpoint_gradients(recomputes):
            return train_rounds(
                base,
                adapter,
                loaded.make_material(spec),
                inner,
                seed=spec.seed,
                folder=rounds,
                identity=identity,
                progress=progress,
                team=team or loaded.team(folder, spec, rung),
                n_rounds=inner.rounds_to(rung) if rung else None,
                may_halve=spec.config.search.accumulate_on_oom,
            )
    except BaseException as error:
        if base.ranks.size > 1 and isinstance(error, Diverged):
            raise  # each rank has seen it
        # helpers would wait for ever for the end of a round that never comes, and for the next trial with it
        loaded.close()
        raise


def _place_rounds(run: RunFolder, base: Base) -> Path:
    """Where the rounds are kept. Ranks that share a base take the same steps, each over files of its own:
    those above 0 begin with a copy of what rank 0 begins with."""
    rank = base.ranks.rank
    place = run.copy_of_rounds(rank) if rank else run.rounds
    if rank:
        shutil.rmtree(place, ignore_errors=True)
        if run.rounds.is_dir():
            shutil.copytree(run.rounds, place)
    base.ranks.wait()
    return place


def _list_checkpoints(spec: Spec, rung: float | None) -> list[float]:
    """The shares of the budget at which a search wants a fine-tuning's adapter, before its end or a rung."""
    wanted = sorted(share for share in set(spec.config.search.checkpoints) if share < 1)
    rounds = spec.config.inner.rounds_to
    return [share for share in wanted if rung is None or rounds(share) <= rounds(rung)]


def _find_learned(folder: Path, spec: Spec) -> Path | None:
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


def _describe_log(log: TrainLog) -> dict[str, str]:
    """What `_read_log` reads, as a file's header."""
    return {"log": json.dumps({name: getattr(log, name) for name in _OF_LOG})}


def _read_log(path: Path) -> TrainLog:
    """What was done to come to a checkpoint, or to the end of a run."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        stored = (file.metadata() or {}).get("log")
    known = json.loads(stored) if stored else read_json(RunFolder(path.parent).result_file)
    first, last = (math.nan if known[name] is None else known[name] for name in ("first_loss", "last_loss"))
    return TrainLog(known["n_steps"], known["images_seen"], first, last)
