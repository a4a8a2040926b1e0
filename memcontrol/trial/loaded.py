"""Owns what stays loaded between the trials of one worker, and the helper processes that share its trials."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from memcontrol.config.spec import Spec
from memcontrol.config.study import Config
from memcontrol.core.choice import EVERYTHING
from memcontrol.core.errors import Diverged, MemControlError
from memcontrol.core.jobs import HelpJob
from memcontrol.core.run_folder import StudyFolder
from memcontrol.core.seeds import derive_seed
from memcontrol.data.cache import load_or_make
from memcontrol.data.features import pixel_features
from memcontrol.data.images import Images, count_at_once
from memcontrol.data.split import parse_parts
from memcontrol.model.adapter import Adapter
from memcontrol.model.base import Base, count_bytes, find_device, load_base, redraw_weights
from memcontrol.model.cost import Cost, StepSettings, measure_cost, measure_step_cost
from memcontrol.model.encoded import Encoded, load_encoded
from memcontrol.model.precision import choose_precision
from memcontrol.model.sharding import Meeting, Ranks, leave_ranks
from memcontrol.model.source import import_libraries
from memcontrol.scoring.evidence import Descriptors, make_known
from memcontrol.scoring.extractors import Extractor, load_clip, load_extractor
from memcontrol.training.optimizers import MOMENT_BYTES
from memcontrol.training.probe import N_PROBE_IMAGES as N_PROBED
from memcontrol.training.rounds import ProcessGroup
from memcontrol.training.shard import Material
from memcontrol.trial.memory import read_process_mib

TellStage = Callable[..., None]  # (stage, done, total)
_SMALL_DENOISER = 5e7  # parameters
_ONE_THREAD = 4e9  # parameters times places of a latent


def tell_nobody(*given: object, **said: object) -> None:
    pass


def derive_scratch_seed(config: Config) -> int:
    return derive_seed(config.search.seed, "from scratch")


def choose_threads(base: Base, n_threads: int) -> int:
    """How many of so many threads compute a base: on a CPU a small one has one, since several, which sleep
    while they wait, wait longer for each other than its layers take. A step of the embedded one took two
    threads three times as long; at 38 M parameters and 16 x 16 latents they began to gain."""
    places = (base.resolution // base.pixels_per_latent) ** 2
    is_small = base.device.type == "cpu" and base.n_parameters * places < _ONE_THREAD
    return 1 if is_small else n_threads


class LoadedModels:
    """What stays loaded between the trials of one worker: the base, the data as the denoiser sees it,
    reference features."""

    def __init__(self, helper_command: Sequence[str] = ()):
        """`helper_command` starts the processes that share a trial's shards; without one a trial is trained
        by this process alone."""
        self.helper_command = helper_command
        self.n_threads = torch.get_num_threads()  # which the process gets back
        self.libraries_mib = 0.0  # what the process held before its first base
        self.kept: dict[tuple, object] = {}
        self.meeting: Meeting | None = None  # of the processes that hold the base together
        self.ranks = Ranks()
        self.helpers: dict[int, subprocess.Popen] = {}

    def once(self, key: tuple, make: Callable):
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def base(self, config: Config) -> Base:
        """The base that fine-tuning starts from."""
        seed = derive_scratch_seed(config) if config.inner.from_scratch else None
        precision = choose_precision(config.base_precision, config.inner.precision, find_device())

        def load() -> Base:
            import_libraries()
            self.libraries_mib = read_process_mib()
            waits = config.search.gpus_per_trial > 1 and bool(self.helper_command)
            base = load_base(config.base, precision, config.base_offload, waits)
            if seed is not None:
                redraw_weights(base.denoiser, seed)
            return base

        base = self.once(("base", config.base, seed, precision, config.base_offload), load)
        torch.set_num_threads(choose_threads(base, self.n_threads))
        return base

    def extractor(self, name: str) -> Extractor:
        return self.once(("extractor", name), lambda: load_extractor(name))

    def clip(self, name: str) -> Callable:
        return self.once(("clip", name), lambda: load_clip(name))

    def parts(self, spec: Spec) -> dict[str, Images]:
        def read():
            return parse_parts(StudyFolder(spec.study_folder).read_split())

        return self.once(("parts", spec.study_folder), read)

    def train_images(self, spec: Spec) -> Images:
        return self.once(
            ("train", spec.study_folder, spec.n_train),
            lambda: self.parts(spec)["train"].take(range(spec.n_train)),
        )

    def load_encoded(self, spec: Spec, images: Images, progress: TellStage = tell_nobody) -> Encoded:
        base = self.base(spec.config)
        return self.once(
            ("encoded", images.digest, base.source.name, str(base.precision)),
            lambda: self.encode(spec, images, progress),
        )

    def encode(self, spec: Spec, images: Images, progress: TellStage) -> Encoded:
        """Raises MemControlError where the base is no longer what the study began with."""
        base, place = self.base(spec.config), StudyFolder(spec.study_folder)
        base.source.check_pins(place.read_pins())
        return load_encoded(base, images, place.cache, partial(progress, "encode"))

    def make_material(self, spec: Spec, progress: TellStage = tell_nobody) -> Material:
        images = self.train_images(spec)
        return Material(
            self.load_encoded(spec, images, progress),
            images.captions,
            lambda rows: images.take(rows).pixels(),
            lambda: self.load_unseen(spec, "holdout"),
            images.groups if spec.config.data.group else (),
            images.further_captions,
            images.groups,
        )

    def load_unseen(self, spec: Spec, part: str, progress: TellStage = tell_nobody) -> Encoded:
        """The first images of a part that is not trained on, for probes."""
        images = self.parts(spec)[part]
        return self.load_encoded(spec, images.take(range(len(images))[:N_PROBED]), progress)

    def cost(self, spec: Spec, adapter: Adapter, data: Encoded) -> Cost:
        """What a step of the choice costs, counted from shapes; on a small denoiser, whose `adapter` is
        injected, in a step that is really taken, since that is faster."""
        base, text = self.base(spec.config), {name: tensor.shape[1:] for name, tensor in data.text.items()}
        inner, low = spec.config.inner, is_low_memory(spec)
        given = (base.family, data.mean.shape[1:], text, _describe_step(spec, base))
        with base.checkpoint_gradients(inner.gradient_checkpointing or low):
            is_small = base.n_parameters < _SMALL_DENOISER and not base.is_sharded
            if base.device.type == "cpu" and base.precision.is_plain and is_small:
                return measure_step_cost(base.denoiser, adapter, *given)
            shared_a = inner.ensemble.shares_a
            return measure_cost(base.bare_denoiser, spec.space, spec.choice, *given, shared_a, low)

    def views(
        self, images: Images, extractor: str, cache: Path, progress: TellStage = tell_nobody
    ) -> Descriptors:
        """Both descriptors of images of the data, computed once per content and network and kept under the
        study's cache."""
        network = self.extractor(extractor)
        name = f"features-{images.digest}-{hashlib.sha256(network.id.encode()).hexdigest()[:16]}"
        return self.once(
            ("views", name),
            lambda: _load_or_make_descriptors(
                cache / f"{name}.safetensors",
                lambda: describe_images(_tell_blocks(images, progress), network.extract),
            ),
        )

    def known(self, spec: Spec) -> dict[str, dict]:
        """What is found out about a study's training and reference images whatever is generated, by space."""
        digests = (self.train_images(spec).digest, self.parts(spec)[spec.reference].digest)
        return self.once(("known", *digests, spec.config.rewards.extractor), make_known)

    def team(self, folder: Path, spec: Spec, rung: float | None = None) -> ProcessGroup:
        """This process and its helpers, which are told to train their shards of the trial."""
        size = (
            min(spec.config.search.processes, spec.config.inner.ensemble.shards) if self.helper_command else 1
        )
        helpers = self.tell_helpers(HelpJob(folder, 0, size, rung))
        return ProcessGroup(0, size, lambda rank: rank == 0 or helpers[rank - 1].poll() is None)

    def tell_helpers(self, job: HelpJob) -> list[subprocess.Popen]:
        """All ranks but this one get the job."""
        helpers = [self.helper(rank) for rank in range(1, job.size)]
        for rank, process in enumerate(helpers, start=1):
            with contextlib.suppress(BrokenPipeError):  # it died, which whoever waits for it sees
                print(json.dumps(replace(job, rank=rank).to_json()), file=process.stdin, flush=True)
        return helpers

    @contextlib.contextmanager
    def lead_ranks(self, spec: Spec, job: HelpJob) -> Iterator[None]:
        """As long as it lasts the processes that `search.gpus_per_trial` asks for hold the base together and
        do the job in step. What fails on one of them ends all, and they begin anew; but a loss that is not
        finite is seen by each."""
        if job.size == 1 or not self.helper_command:
            yield
            return
        try:
            self.meet(spec, job)
            yield
        except BaseException as error:
            if job.confirms or not isinstance(error, Diverged):
                self.close()
            raise

    def meet(self, spec: Spec, job: HelpJob) -> None:
        """Raises MemControlError where there are fewer GPUs, RuntimeError where a process is lost."""
        n_gpus = torch.cuda.device_count()
        if 0 < n_gpus < job.size:
            raise MemControlError(
                f"search.gpus_per_trial is {job.size} and a worker has {n_gpus} GPU(s) here; lower it, or "
                "search.workers, so that each has as many"
            )
        if any(process.poll() is not None for process in self.helpers.values()):
            self.close()  # their parts of the base are lost
        is_new = self.meeting is None
        meeting = self.meeting = self.meeting or Meeting(job.size)
        helpers = self.tell_helpers(replace(job, port=meeting.port))
        base = self.base(spec.config)
        if is_new:
            meeting.wait_for_others(lambda: any(process.poll() is not None for process in helpers))
        self.join(base, meeting, 0, is_new)

    def follow(self, spec: Spec, job: HelpJob) -> None:
        """Takes this rank's part of the base that rank 0 has called together."""
        assert job.port is not None
        is_new = self.meeting is None
        meeting = self.meeting = self.meeting or Meeting(job.size, job.port)
        self.join(self.base(spec.config), meeting, job.rank, is_new)

    def join(self, base: Base, meeting: Meeting, rank: int, is_new: bool) -> None:
        if is_new:
            self.ranks = meeting.join(rank, base.device)
        if not base.is_sharded:
            base.share(self.ranks)

    def helper(self, rank: int) -> subprocess.Popen:
        """The process of that rank, started when first needed, again if it died; it keeps the base loaded, as
        this one does."""
        if rank not in self.helpers or self.helpers[rank].poll() is not None:
            self.helpers[rank] = _start_helper(self.helper_command, rank)
        return self.helpers[rank]

    def close(self) -> None:
        """Ends the helpers; what they held of a base is lost, and so is the rest. The process has its threads
        again."""
        torch.set_num_threads(self.n_threads)
        for process in self.helpers.values():
            process.kill()
            with contextlib.suppress(BrokenPipeError), process:
                pass
        if self.meeting:
            self.kept = {key: kept for key, kept in self.kept.items() if key[0] != "base"}
            self.meeting, self.ranks = None, Ranks()
            leave_ranks()


def _start_helper(command: Sequence[str], rank: int) -> subprocess.Popen:
    """A worker process that shares this one's trials, on the GPU of its rank where this process sees
    several."""
    n_gpus = torch.cuda.device_count()
    all_gpus = ",".join(map(str, range(n_gpus)))
    # a name that is none, such as -1, hides what comes after it
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", all_gpus).split(",")[:n_gpus]
    own = {"CUDA_VISIBLE_DEVICES": gpus[rank % len(gpus)]} if gpus else {}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,  # stderr is this process's own, the log of the job that it leads
        env={**os.environ, **own},
    )


def is_low_memory(spec: Spec) -> bool:
    """Whether it is full fine-tuning that keeps to the base's own type."""
    return spec.config.inner.low_memory_full and EVERYTHING in spec.choice.groups


def _describe_step(spec: Spec, base: Base) -> StepSettings:
    """What a step's memory depends on beside the choice."""
    inner = spec.config.inner
    n_forward = inner.micro_batch_size or inner.batch_size
    ranks = base.ranks.size
    # on a CPU the base's own values lie beside those that are trained as they are
    # a private step holds the sum of units' gradients, and those of the units that are computed together
    units = 0 if inner.privacy is None else max(n_forward // inner.passes_per_image, 1)
    originals = 4.0 if base.device.type == "cpu" and EVERYTHING in spec.choice.groups else 0.0
    return StepSettings(
        forward=-(-n_forward // ranks),
        accumulates=n_forward < inner.batch_size,
        moments=MOMENT_BYTES["adafactor" if is_low_memory(spec) else inner.optimizer],
        copies=originals + (4.0 if inner.ema else 0.0) + 4.0 * units,
        beside=_count_autoencoder_bytes(base),
        precision=base.precision,
        on_card=base.device.type == "cuda",
        ranks=ranks,
        in_blocks=base.is_sharded,
    )


def _count_autoencoder_bytes(base: Base) -> int:
    """Of what stays beside the denoiser while that is trained."""
    stays = base.autoencoder is not None and (base.device.type == "cpu" or base.offload == "none")
    return count_bytes(base.autoencoder) if stays else 0


def _tell_blocks(images: Images, progress: TellStage) -> Iterator[np.ndarray]:
    """The images' pixels, a block at a time."""
    done = 0
    for block in images.iterate_pixels(count_at_once(images.resolution)):
        yield block
        progress("describe", done := done + len(block), len(images))


def describe_images(blocks: Iterable[np.ndarray], extract: Callable) -> Descriptors:
    """Images in blocks, each uint8 [n, 3, H, W], under both descriptors; one block is in memory at a time."""
    found = [(pixel_features(block), extract(block)) for block in blocks]
    return Descriptors(*map(_join_rows, zip(*found)))


def _join_rows(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """By torch, whose memory lies at multiples of 64 bytes: what sums round by depends on where it lies."""
    return blocks[0] if len(blocks) == 1 else torch.cat(list(map(_convert_to_tensor, blocks))).numpy()


def _load_or_make_descriptors(path: Path, make: Callable[[], Descriptors]) -> Descriptors:
    """What the file holds; made and written where there is none."""

    def make_tensors() -> dict[str, torch.Tensor]:
        made = make()
        return {"pixels": _convert_to_tensor(made.pixels), "features": _convert_to_tensor(made.features)}

    return Descriptors(**{name: tensor.numpy() for name, tensor in load_or_make(path, make_tensors).items()})


def _convert_to_tensor(array: np.ndarray) -> torch.Tensor:
    # one that may not be written is copied: torch, which does not know of such, would warn
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
