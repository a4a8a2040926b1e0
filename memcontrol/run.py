"""Owns one trial: a Choice in, an adapter, its samples and its rewards out; it reads and writes its own folder and the cache."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from memcontrol.adapters import Adapter, inject
from memcontrol.config import Config
from memcontrol.cost import cost_of
from memcontrol.data import Images, parts_from_dict
from memcontrol.ensemble import Team, TrainLog, train
from memcontrol.evidence import Evidence, Views, score
from memcontrol.extractors import Extractor, load_extractor
from memcontrol.features import pixel_features
from memcontrol.files import read_json, replacing, write_json
from memcontrol.mitigate import noisy_text, vocabulary, with_random_words
from memcontrol.models import Base, Encoded, empty_denoiser, load_base, redraw_weights
from memcontrol.probe import N_IMAGES as N_PROBED
from memcontrol.probe import probe_rewards
from memcontrol.seeds import seed_of
from memcontrol.spec import RESULT, SAMPLES, TRAINING, Spec, read_spec
from memcontrol.train import Material


ROUNDS = "rounds"  # the trial's checkpoints, until its result is there


def scratch_seed(config: Config) -> int:
    return seed_of(config.search.seed, "from scratch")


def chosen_adapter(denoiser: torch.nn.Module, spec: Spec) -> Adapter:
    """The adapter that the spec asks for, injected into the denoiser and not yet trained."""
    cache, inner = spec.study_folder / "cache", spec.config.inner
    return inject(
        denoiser, spec.space, spec.choice, spec.seed, cache=cache, norm_shift_rate=inner.norm_shift_rate, shared_a=inner.ensemble.shares_a
    )  # fmt: skip


class Bench:
    """What stays loaded between the trials of one worker: the base, the data as the denoiser sees it, reference features."""

    def __init__(self):
        self.kept: dict[tuple, object] = {}
        self.helpers: dict[int, subprocess.Popen] = {}

    def once(self, key: tuple, make: Callable):
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def base(self, config: Config) -> Base:
        """The base that fine-tuning starts from."""
        seed = scratch_seed(config) if config.inner.from_scratch else None

        def load() -> Base:
            base = load_base(config.base)
            if seed is not None:
                redraw_weights(base.denoiser, seed)
            return base

        return self.once(("base", config.base, seed), load)

    def extractor(self, name: str) -> Extractor:
        return self.once(("extractor", name), lambda: load_extractor(name))

    def parts(self, spec: Spec) -> dict[str, Images]:
        def read():
            stored = read_json(spec.study_folder / "split.json")
            return parts_from_dict(stored["parts"], stored["source"], stored["resolution"])

        return self.once(("parts", spec.study_folder), read)

    def train_images(self, spec: Spec) -> Images:
        return self.parts(spec)["train"].take(range(spec.n_train))

    def encoded(self, spec: Spec, images: Images) -> Encoded:
        base, name = self.base(spec.config), spec.config.base
        return self.once(("encoded", images.digest, name), lambda: base.encoded(images, spec.study_folder / "cache", name))

    def material(self, spec: Spec) -> Material:
        images = self.train_images(spec)
        return Material(
            self.encoded(spec, images), images.captions, lambda rows: images.take(rows).pixels(),
            lambda: self.unseen(spec, "holdout"),
        )  # fmt: skip

    def unseen(self, spec: Spec, part: str) -> Encoded:
        """The first images of a part that is not trained on, for probes."""
        images = self.parts(spec)[part]
        return self.encoded(spec, images.take(range(len(images))[:N_PROBED]))

    def cost(self, spec: Spec, data: Encoded) -> dict[str, float]:
        """What the choice costs, from shapes alone: the rewards step_gflops and memory_mib."""
        name = spec.config.base
        denoiser = self.once(("empty", name), lambda: empty_denoiser(name))
        text = {key: tensor.shape[1:] for key, tensor in data.text.items()}
        batch = spec.config.inner.batch_size
        family, shared_a = self.base(spec.config).family, spec.config.inner.ensemble.shares_a
        cost = cost_of(denoiser, spec.space, spec.choice, family, data.mean.shape[1:], text, batch, shared_a)
        return {"step_gflops": cost.step_gflops, "memory_mib": cost.memory_mib}

    def views(self, images: Images, extractor: str) -> Views:
        return self.once(("views", images.digest, extractor), lambda: views_of(images.pixels(), self.extractor(extractor).extract))

    def team(self, folder: Path, spec: Spec) -> Team:
        """This process and its helpers, which are told to train their shards of the trial."""
        size = min(spec.config.search.processes, spec.config.inner.ensemble.shards)
        helpers = [self.helper(rank) for rank in range(1, size)]
        for rank, process in enumerate(helpers, start=1):
            with contextlib.suppress(BrokenPipeError):  # it died: rank 0 trains its shards
                process.stdin.write(json.dumps({"help": str(folder), "rank": rank, "size": size}) + "\n")
                process.stdin.flush()
        return Team(0, size, lambda rank: rank == 0 or helpers[rank - 1].poll() is None)

    def helper(self, rank: int) -> subprocess.Popen:
        """The process of that rank, started when first needed, again if it died; it keeps the base loaded, as this one does."""
        if rank not in self.helpers or self.helpers[rank].poll() is not None:
            self.helpers[rank] = start_helper(rank)
        return self.helpers[rank]

    def close(self) -> None:
        for process in self.helpers.values():
            process.kill()
            with contextlib.suppress(BrokenPipeError), process:
                pass


def start_helper(rank: int) -> subprocess.Popen:
    """A worker process that shares this one's trials, on the GPU of its rank where this process sees several."""
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    own = {"CUDA_VISIBLE_DEVICES": gpus[rank % len(gpus)]} if gpus else {}
    return subprocess.Popen(
        [sys.executable, "-m", "memcontrol.worker"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        text=True, env={**os.environ, **own},
    )  # fmt: skip


def views_of(pixels: np.ndarray, extract: Callable) -> Views:
    """uint8 [N, 3, H, W] under both descriptors."""
    return Views(pixel_features(pixels), extract(pixels))


def trial(folder: Path, bench: Bench, progress: Callable[..., None]) -> dict:
    """Fine-tunes, samples and scores what the folder's spec.json says, and writes result.json last. Returns the result."""
    spec, started = read_spec(folder), time.monotonic()
    base, material = bench.base(spec.config), bench.material(spec)
    cost = bench.cost(spec, material.data)
    adapter = chosen_adapter(base.denoiser, spec)
    try:
        log = fine_tune(folder, spec, bench, adapter, lambda done, total, **said: progress("train", done, total, **said))
        n_trained, n_all = adapter.n_trained(), sum(parameter.numel() for parameter in base.denoiser.parameters())
        adapter.save(folder, spec.description())
        probes = probe_rewards(base, material.data, bench.unseen(spec, spec.reference), spec.sampling_seed)
        samples = sample(base, material, spec, lambda done, total: progress("sample", done, total))
    finally:
        adapter.remove()
    save_samples(folder / SAMPLES, samples)
    trained_at, images = time.monotonic(), samples["images"]
    rewards = score(evidence(images, spec, bench, n_trained / n_all), spec.config.rewards.functions) | probes | cost
    result = {
        "state": "COMPLETE", "choice": spec.choice.as_dict(), "rewards": rewards, "n_trained": n_trained, "n_steps": log.n_steps,
        "images_seen": log.images_seen, "first_loss": finite(log.first_loss), "last_loss": finite(log.last_loss),
        "extractor": bench.extractor(spec.config.rewards.extractor).id, "reference": spec.reference, "n_samples": len(images),
        "seconds": round(time.monotonic() - started, 2), "scoring_seconds": round(time.monotonic() - trained_at, 2),
    }  # fmt: skip
    write_json(folder / TRAINING, training_record(log, spec, bench))
    write_json(folder / RESULT, result)
    return result


def fine_tune(folder: Path, spec: Spec, bench: Bench, adapter: Adapter, progress: Callable[..., None], team: Team | None = None) -> TrainLog:
    """Trains the injected adapter, its rounds kept in the trial's folder; alone, or with the other processes of a team."""
    base, identity = bench.base(spec.config), f"{spec.config.base} {spec.choice} {spec.space} {bench.train_images(spec).digest}"
    if spec.config.inner.gradient_checkpointing:
        base.denoiser.enable_gradient_checkpointing()
    try:
        return train(
            base, adapter, bench.material(spec), spec.config.inner, seed=spec.seed, folder=folder / ROUNDS, identity=identity,
            progress=progress, team=team or bench.team(folder, spec),
        )  # fmt: skip
    except BaseException:
        bench.close()  # helpers would wait for ever for the end of a round that never comes, and for the next trial with it
        raise


def help_train(folder: Path, rank: int, size: int, bench: Bench) -> None:
    """Trains this rank's shards of a trial that another process leads."""
    spec = read_spec(folder)
    adapter = chosen_adapter(bench.base(spec.config).denoiser, spec)
    try:
        fine_tune(folder, spec, bench, adapter, lambda *_, **said: None, Team(rank, size))
    finally:
        adapter.remove()


def training_record(log: TrainLog, spec: Spec, bench: Bench) -> dict:
    """What training.json holds: each shard's rounds, how far shards were apart, how often each image was skipped, peak memory."""
    names = [record.name for record in bench.train_images(spec).records]
    record = dict(log.record)
    skipped = {name: n for name, n in zip(names, record.pop("skips_by_image", [])) if n}
    members = [[names[row] for row in rows] for rows in record.pop("images", [])]
    return {
        "n_steps": log.n_steps, "images_seen": log.images_seen, **record, "images_of_shards": members, "skips_by_image": skipped,
        "peak_mib": round(peak_mib(), 1),
    }  # fmt: skip


def peak_mib() -> float:
    """The most memory that this process has held so far: on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def sample(base: Base, material: Material, spec: Spec, progress: Callable) -> dict[str, np.ndarray]:
    """n_samples images from training captions, where copying shows: `images`, the `rows` of the training captions used,
    and the `seeds` of each image's noise. Captions and noise are the same for all trials of a purpose."""
    rewards, n, data = spec.config.rewards, spec.config.rewards.n_samples, material.data
    rows = np.random.default_rng(seed_of(spec.sampling_seed, "captions")).integers(len(data.caption_rows), size=n)
    seeds = [seed_of(spec.sampling_seed, "noise", i) for i in range(n)]
    text = data.texts(data.caption_rows[torch.from_numpy(rows)])
    if rewards.random_words:
        captions = [material.captions[row] for row in rows]
        words = vocabulary(base.pipeline.tokenizer)
        text = base.encode_captions(with_random_words(captions, rewards.random_words, words, seed_of(spec.sampling_seed, "words")))
    if rewards.embedding_noise:
        text = noisy_text(text, rewards.embedding_noise, spec.sampling_seed)
    images = base.sample(
        text, data.texts(torch.tensor([0])), seeds=seeds, steps=rewards.sampling_steps, guidance=rewards.guidance,
        guidance_from=rewards.guidance_from, resolution=spec.config.data.resolution or base.resolution, progress=progress,
    )  # fmt: skip
    return {"images": images, "rows": rows, "seeds": np.array(seeds)}


def save_samples(path: Path, samples: dict[str, np.ndarray]) -> None:
    with replacing(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, **samples)


def read_samples(folder: Path) -> dict[str, np.ndarray]:
    """`images` uint8 [N, 3, H, W], `rows` [N] and `seeds` [N], as `sample` made them."""
    with np.load(folder / SAMPLES, allow_pickle=False) as stored:
        return dict(stored)


def evidence(images: np.ndarray, spec: Spec, bench: Bench, trained_fraction: float) -> Evidence:
    extractor, parts = spec.config.rewards.extractor, bench.parts(spec)
    return Evidence(
        generated=views_of(images, bench.extractor(extractor).extract), train=bench.views(bench.train_images(spec), extractor),
        holdout=bench.views(parts[spec.reference], extractor), seed=spec.sampling_seed, trained_fraction=trained_fraction,
    )  # fmt: skip
