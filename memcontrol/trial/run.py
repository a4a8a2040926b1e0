"""Owns one trial: a Choice in, an adapter, its samples and its rewards out; it reads and writes its own
folder and the cache."""

from __future__ import annotations

import hashlib
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from memcontrol.config.spec import Spec, read_spec
from memcontrol.core.errors import Diverged
from memcontrol.core.estimate import Measured, Rewards
from memcontrol.core.files import write_json
from memcontrol.core.jobs import HelpJob
from memcontrol.core.reward_table import COSTS, OF_DENOISER, OF_MODEL
from memcontrol.core.run_folder import RunFolder
from memcontrol.data.split import format_ranges
from memcontrol.model.adapter import Adapter
from memcontrol.model.base import count_bytes
from memcontrol.model.batches import release_memory
from memcontrol.model.cost import Cost
from memcontrol.scoring.score import pool_scores
from memcontrol.training.probe import choose_probe_size, measure_probe_rewards
from memcontrol.training.rounds import ProcessGroup, TrainLog
from memcontrol.training.shard import Material
from memcontrol.trial.bound import describe_bound, list_bound
from memcontrol.trial.learning import fine_tune, learn
from memcontrol.trial.loaded import LoadedModels, tell_nobody
from memcontrol.trial.maps import map_pairs
from memcontrol.trial.membership import Attack, Losses, measure_model, measure_untrained, plan_attack
from memcontrol.trial.memory import StageMemory, measure_peak_mib
from memcontrol.trial.pictures import save_pictures
from memcontrol.trial.samples import (
    describe_measurement,
    gather_evidence,
    sample_images,
    save_contributions,
    score_samples,
    write_samples,
)
from memcontrol.trial.tuned import inject_choice


def run_trial(
    folder: Path, loaded: LoadedModels, progress: Callable[..., None], rung: float | None = None
) -> dict:
    """Fine-tunes, samples and scores what the folder's spec.json says, and writes result.json last. Returns
    the result. To a rung, a share of the budget, it fine-tunes that far, measures a few samples and writes
    the rung's file.

    Each stage takes as many images at a time as memory holds, and fewer where that was too many; what is
    finished stays in the folder, and is not done again by the next attempt.
    """
    spec = read_spec(folder)
    with loaded.lead_ranks(spec, HelpJob(folder, 0, spec.config.search.gpus_per_trial, rung)):
        return _lead_trial(folder, spec, loaded, progress, rung)


def _lead_trial(
    folder: Path, spec: Spec, loaded: LoadedModels, progress: Callable[..., None], rung: float | None
) -> dict:
    started, run, memory = time.monotonic(), RunFolder(folder), StageMemory()
    base = loaded.base(spec.config)
    memory.libraries_mib = loaded.libraries_mib
    with memory.watch("encode"):
        material = loaded.make_material(spec, progress)
        attack = plan_attack(spec, loaded, progress)
    with memory.watch("probe"):
        untrained = measure_untrained(spec, loaded, attack)
    adapter = inject_choice(base.denoiser, spec)
    try:
        # Train: to the end, or to a rung, which is then all.
        with memory.watch("train"):
            log = learn(folder, spec, loaded, adapter, partial(progress, "train"), rung)
        if log.paused and rung:
            probe = partial(_probe_objectives, spec, loaded, attack, untrained)
            return _score_rung(run, rung, spec, loaded, adapter, log, started, progress, probe)

        # Save what was learned, as strong as it is measured; sample and probe the model while it is there.
        adapter.weaken(spec.choice.strength)
        adapter.save(folder, spec.describe_published())
        n_trained, n_all = adapter.n_trained(), base.n_parameters + adapter.n_added()
        cost = loaded.cost(spec, adapter, material.data)
        with adapter.fold():
            with memory.watch("probe"):
                probes = _probe_model(spec, loaded, attack, untrained)
            with memory.watch("sample"):
                samples = write_samples(
                    run.samples_file,
                    base,
                    material,
                    spec,
                    _digest_file(run.adapter_file),
                    partial(progress, "sample"),
                )
    finally:
        adapter.remove()
        release_memory(count_bytes(base.denoiser))

    # Score the samples.
    trained_at = time.monotonic()
    with memory.watch("score"):
        evidence = gather_evidence(samples, spec, loaded)
        measured = score_samples(samples, evidence, spec, loaded)
    with memory.watch("probe"):
        maps = map_pairs(run, spec, loaded, evidence)
    costs = _list_costs(cost, n_trained / n_all, spec) | list_bound(spec, material, log.n_steps)
    rewards = Rewards.from_estimates(measured | probes).to_plain() | costs
    result = _make_result(run, spec, loaded, log, rewards, n_trained, len(samples["images"]))
    if evidence.utility:
        result["utility_by_class"] = evidence.utility.describe_classes()
    result |= describe_bound(spec, material, log.n_steps)
    now = time.monotonic()
    seconds = {"seconds": round(now - started, 2), "scoring_seconds": round(now - trained_at, 2)}

    # Write what is read beside the result, and the result last.
    save_contributions(run.contributions_file, measured, samples["rows"])
    save_pictures(run, samples, evidence, spec, loaded, maps)
    held = {"memory": {"predicted_mib": cost.parts, "peak_mib": memory.peaks}}
    write_json(run.training_file, _make_training_record(log, spec, loaded) | held)
    write_json(run.result_file, result | seconds)
    return result | seconds


def _probe_model(
    spec: Spec, loaded: LoadedModels, attack: Attack | None, untrained: Losses | None
) -> Measured:
    """What the denoiser itself is asked, as far as that is a small part of the trial."""
    told = measure_model(spec, loaded, attack, untrained)
    size = choose_probe_size(spec.config.inner, spec.config.rewards)
    if size is None:
        return told
    base, material = loaded.base(spec.config), loaded.make_material(spec)
    unseen = loaded.load_unseen(spec, spec.reference)
    return measure_probe_rewards(base, material.data, unseen, spec.sampling_seed, size) | told


def _probe_objectives(
    spec: Spec, loaded: LoadedModels, attack: Attack | None, untrained: Losses | None
) -> Measured:
    """The same at a rung, where trials are judged by it."""
    asked = any(name.startswith(OF_DENOISER) for name in spec.config.rewards.objectives)
    return _probe_model(spec, loaded, attack, untrained) if asked else {}


def _digest_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _list_costs(cost: Cost, trained_fraction: float, spec: Spec) -> dict[str, float]:
    """What is known of the choice itself: the share that it trains of all parameters, what it adds included,
    and what a step costs."""
    return {
        "trained_fraction": trained_fraction,
        "step_gflops": cost.step_gflops * spec.config.inner.passes_per_image,
        "memory_mib": cost.memory_mib,
    }


def _make_result(
    run: RunFolder,
    spec: Spec,
    loaded: LoadedModels,
    log: TrainLog,
    rewards: dict[str, float],
    n_trained: int,
    n_samples: int,
) -> dict:
    """What result.json holds, less its times."""
    return {
        "state": "COMPLETE",
        "choice": spec.choice.as_dict(),
        "rewards": rewards,
        "n_trained": n_trained,
        "n_steps": log.n_steps,
        "images_seen": log.images_seen,
        "first_loss": _keep_finite(log.first_loss),
        "last_loss": _keep_finite(log.last_loss),
        "rungs": run.read_rungs(spec.config.search.rungs, spec.config.rewards.names),
        "reference": spec.reference,
        "measured_with": describe_measurement(spec, loaded),
        "micro_batch_size": log.n_forward if log.n_forward < spec.config.inner.batch_size else None,
        "n_samples": n_samples,
    }


def _score_rung(
    run: RunFolder,
    rung: float,
    spec: Spec,
    loaded: LoadedModels,
    adapter: Adapter,
    log: TrainLog,
    started: float,
    progress: Callable[..., None],
    probe: Callable[[], Measured],
) -> dict:
    """The rewards of few samples, of the prompts and noise that all trials have in common, and of the model
    itself those that are objectives. Writes the rung's file, and what each sample adds beside it."""
    few = _lower_samples(spec)
    base, material = loaded.base(spec.config), loaded.make_material(spec)
    costs = list_bound(spec, material, log.n_steps)
    if set(COSTS) & set(spec.config.rewards.objectives):
        share = adapter.n_trained() / (base.n_parameters + adapter.n_added())
        costs |= _list_costs(loaded.cost(spec, adapter, material.data), share, spec)
    with adapter.fold():
        probes = probe()
        samples = sample_images(base, material, few, partial(progress, "rung"))
        measured = score_samples(samples, gather_evidence(samples, few, loaded), few, loaded)
    save_contributions(run.rung_contributions_file(rung), measured, samples["rows"])
    found = {
        "rung": rung,
        "n_steps": log.n_steps,
        "rewards": Rewards.from_estimates(measured | probes).to_plain() | costs,
        "seconds": round(time.monotonic() - started, 2),
    }
    write_json(run.rung_file(rung), found)
    return found


def _lower_samples(spec: Spec) -> Spec:
    """As many as are drawn at a rung, and no extraction attack."""
    rule = spec.config.search.early_stopping
    assert rule is not None, "only early stopping has rungs"
    fewer = {"rewards.n_samples": rule.n_samples, "rewards.extraction": None}
    return replace(spec, config=spec.config.replaced(fewer))


def confirm_trial(folder: Path, loaded: LoadedModels, progress: Callable[..., None]) -> dict:
    """Samples a finished trial's model again, from fresh prompts and noise, as often as rewards.confirm says,
    and writes confirmed.json: the rewards as means over these draws. A search picks lucky trials; these
    rewards know nothing of that."""
    spec = read_spec(folder)
    job = HelpJob(folder, 0, spec.config.search.gpus_per_trial, None, confirms=True)
    with loaded.lead_ranks(spec, job):
        return _lead_confirming(folder, spec, loaded, progress)


def _lead_confirming(folder: Path, spec: Spec, loaded: LoadedModels, progress: Callable[..., None]) -> dict:
    base, material, n = loaded.base(spec.config), loaded.make_material(spec), spec.config.rewards.confirm
    adapter, draws = inject_choice(base.denoiser, spec), []
    try:
        adapter.load(folder)
        for i in range(n):
            fresh = _draw_afresh(spec, i)
            with adapter.fold():
                samples = sample_images(
                    base,
                    material,
                    fresh,
                    lambda done, total, i=i: progress("confirm", i * total + done, n * total),
                )
            evidence = replace(gather_evidence(samples, fresh, loaded), n_draws=n)
            draws.append(score_samples(samples, evidence, fresh, loaded))
    finally:
        adapter.remove()
    known = RunFolder(folder).read_result()["rewards"]
    of_model = {name: known[name] for name in known if name.startswith(OF_MODEL)}
    found = {
        "rewards": Rewards.from_estimates(pool_scores(draws)).to_plain() | of_model,
        "n_draws": n,
        "n_samples": n * spec.config.rewards.n_samples,
    }
    write_json(RunFolder(folder).confirmed_file, found)
    return found


def _draw_afresh(spec: Spec, i: int) -> Spec:
    """With prompts and noise of its own."""
    return replace(spec, purpose=f"{spec.purpose} confirmed {i}")


def help_trial(job: HelpJob, loaded: LoadedModels) -> None:
    """This rank's share of a trial that another process leads."""
    spec = read_spec(job.folder)
    if job.port is None:
        return _train_shards(job, spec, loaded)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # rank 0 leaves the checkpoint, and ends this process
    loaded.follow(spec, job)
    base, material = loaded.base(spec.config), loaded.make_material(spec)
    attack = None if job.confirms else plan_attack(spec, loaded)
    untrained = measure_untrained(spec, loaded, attack)
    adapter = inject_choice(base.denoiser, spec)
    try:
        if job.confirms:
            _follow_confirming(job, spec, loaded, adapter, material)
        else:
            _follow_trial(job, spec, loaded, adapter, material, attack, untrained)
    finally:
        adapter.remove()
        shutil.rmtree(RunFolder(job.folder).copy_of_rounds(job.rank), ignore_errors=True)


def _follow_trial(
    job: HelpJob,
    spec: Spec,
    loaded: LoadedModels,
    adapter: Adapter,
    material: Material,
    attack: Attack | None,
    untrained: Losses | None,
) -> None:
    """All that goes through the denoiser, in the order of `run_trial`; nothing of it is written."""
    base = loaded.base(spec.config)
    try:
        log = learn(job.folder, spec, loaded, adapter, tell_nobody, job.rung, ProcessGroup())
    except Diverged:
        return
    if not (log.paused and job.rung):
        adapter.weaken(spec.choice.strength)
    with adapter.fold():
        if log.paused and job.rung:
            _probe_objectives(spec, loaded, attack, untrained)
            sample_images(base, material, _lower_samples(spec), tell_nobody)
            return
        _probe_model(spec, loaded, attack, untrained)
        if base.ranks.agree(None):
            sample_images(base, material, spec, tell_nobody)


def _follow_confirming(
    job: HelpJob, spec: Spec, loaded: LoadedModels, adapter: Adapter, material: Material
) -> None:
    adapter.load(job.folder)
    for i in range(spec.config.rewards.confirm):
        with adapter.fold():
            sample_images(loaded.base(spec.config), material, _draw_afresh(spec, i), tell_nobody)


def _train_shards(job: HelpJob, spec: Spec, loaded: LoadedModels) -> None:
    group = ProcessGroup(job.rank, job.size)
    adapter = inject_choice(loaded.base(spec.config).denoiser, spec)
    try:
        fine_tune(job.folder, spec, loaded, adapter, tell_nobody, group, job.rung)
    finally:
        adapter.remove()


def _make_training_record(log: TrainLog, spec: Spec, loaded: LoadedModels) -> dict:
    """What training.json holds: each shard's rounds, how far shards were apart, how often each image was
    skipped, peak memory. Where there are several shards, also which images each had, as row numbers of the
    training part in split.json; a single one had the first `n_train`, which spec.json says."""
    names = [record.name for record in loaded.train_images(spec).records]
    record = dict(log.record)
    skipped = {name: n for name, n in zip(names, record.pop("skips_by_image", [])) if n}
    shards = [format_ranges(rows) for rows in record.pop("images", [])]
    members = {"images_of_shards": shards} if len(shards) > 1 else {}
    return {
        "n_steps": log.n_steps,
        "images_seen": log.images_seen,
        **record,
        **members,
        "skips_by_image": skipped,
        "peak_mib": round(measure_peak_mib(), 1),  # of the process, its other trials included
    }


def _keep_finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
