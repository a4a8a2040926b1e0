"""Owns one trial: a Choice in, an adapter, its samples and its rewards out; it reads and writes its own folder and the cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from memcontrol.adapters import Adapter, inject
from memcontrol.cost import cost_of
from memcontrol.data import Images, parts_from_dict
from memcontrol.features import load_extractor, pixel_features
from memcontrol.files import read_json, replacing, write_json
from memcontrol.models import Base, Encoded, empty_denoiser, load_base
from memcontrol.rewards import Evidence, Views, score
from memcontrol.seeds import seed_of
from memcontrol.spec import RESULT, SAMPLES, Spec, read_spec
from memcontrol.train import train


def chosen_adapter(denoiser: torch.nn.Module, spec: Spec) -> Adapter:
    """The adapter that the spec asks for, injected into the denoiser and not yet trained."""
    cache, norm_rate = spec.study_folder / "cache", spec.config.inner.norm_shift_rate
    return inject(denoiser, spec.space, spec.choice, spec.seed, cache=cache, norm_shift_rate=norm_rate)


class Bench:
    """What stays loaded between the trials of one worker: the base, the data as the denoiser sees it, reference features."""

    def __init__(self):
        self.kept: dict[tuple, object] = {}

    def once(self, key: tuple, make: Callable):
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def base(self, name: str) -> Base:
        return self.once(("base", name), lambda: load_base(name))

    def extractor(self, name: str):
        return self.once(("extractor", name), lambda: load_extractor(name))

    def parts(self, spec: Spec) -> dict[str, Images]:
        def read():
            stored = read_json(spec.study_folder / "split.json")
            return parts_from_dict(stored["parts"], stored["source"], stored["resolution"])

        return self.once(("parts", spec.study_folder), read)

    def train_images(self, spec: Spec) -> Images:
        return self.parts(spec)["train"].take(range(spec.n_train))

    def encoded(self, spec: Spec) -> Encoded:
        images, name = self.train_images(spec), spec.config.base
        return self.once(
            ("encoded", images.digest, name), lambda: self.base(name).encoded(images, spec.study_folder / "cache", name)
        )  # fmt: skip

    def cost(self, spec: Spec, data: Encoded) -> dict[str, float]:
        """What the choice costs, from shapes alone: the rewards step_gflops and memory_mib."""
        name = spec.config.base
        denoiser = self.once(("empty", name), lambda: empty_denoiser(name))
        text = {key: tensor.shape[1:] for key, tensor in data.text.items()}
        batch = spec.config.inner.batch_size
        cost = cost_of(denoiser, spec.space, spec.choice, self.base(name).family, data.mean.shape[1:], text, batch)
        return {"step_gflops": cost.step_gflops, "memory_mib": cost.memory_mib}

    def views(self, images: Images, extractor: str) -> Views:
        return self.once(("views", images.digest, extractor), lambda: views_of(images.pixels(), self.extractor(extractor)[0]))


def views_of(pixels: np.ndarray, extract: Callable) -> Views:
    """uint8 [N, 3, H, W] under both descriptors."""
    return Views(pixel_features(pixels), pixel_features(pixels[..., ::-1]), extract(pixels))


def trial(folder: Path, bench: Bench, progress: Callable[[str, int, int], None]) -> dict:
    """Fine-tunes, samples and scores what the folder's spec.json says, and writes result.json last. Returns the result."""
    spec, started = read_spec(folder), time.monotonic()
    base, data = bench.base(spec.config.base), bench.encoded(spec)
    cost = bench.cost(spec, data)
    adapter = chosen_adapter(base.denoiser, spec)
    try:
        log = train(
            base, adapter, data, spec.config.inner, seed=spec.seed, progress=lambda done, total: progress("train", done, total)
        )  # fmt: skip
        n_trained, n_all = adapter.n_trained(), sum(parameter.numel() for parameter in base.denoiser.parameters())
        adapter.save(folder, spec.description())
        samples = sample(base, data, spec, lambda done, total: progress("sample", done, total))
    finally:
        adapter.remove()
    save_samples(folder / SAMPLES, samples)
    trained_at, images = time.monotonic(), samples["images"]
    rewards = score(evidence(images, spec, bench, n_trained / n_all)) | cost
    result = {
        "state": "COMPLETE", "choice": spec.choice.as_dict(), "rewards": rewards, "n_trained": n_trained, "n_steps": log.n_steps,
        "images_seen": log.images_seen, "first_loss": finite(log.first_loss), "last_loss": finite(log.last_loss),
        "extractor": bench.extractor(spec.config.rewards.extractor)[2], "reference": spec.reference, "n_samples": len(images),
        "seconds": round(time.monotonic() - started, 2), "scoring_seconds": round(time.monotonic() - trained_at, 2),
    }  # fmt: skip
    write_json(folder / RESULT, result)
    return result


def finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def sample(base: Base, data: Encoded, spec: Spec, progress: Callable) -> dict[str, np.ndarray]:
    """n_samples images from training captions, where copying shows: `images`, the `rows` of the training captions used,
    and the `seeds` of each image's noise. Captions and noise are the same for all trials of a purpose."""
    rewards, n = spec.config.rewards, spec.config.rewards.n_samples
    rows = np.random.default_rng(seed_of(spec.sampling_seed, "captions")).integers(len(data.caption_rows), size=n)
    seeds = [seed_of(spec.sampling_seed, "noise", i) for i in range(n)]
    images = base.sample(
        data.texts(data.caption_rows[torch.from_numpy(rows)]), data.texts(torch.tensor([0])), seeds=seeds,
        steps=rewards.sampling_steps, guidance=rewards.guidance,
        resolution=spec.config.data.resolution or base.resolution, progress=progress,
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
        generated=views_of(images, bench.extractor(extractor)[0]), train=bench.views(bench.train_images(spec), extractor),
        holdout=bench.views(parts[spec.reference], extractor), seed=spec.sampling_seed, trained_fraction=trained_fraction,
    )  # fmt: skip
