"""Owns where a base comes from and how its parts are read: a folder, a Hub id, a single file, an adapter over
one of them; and the content that a digest names."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from memcontrol.config.base import CHECKPOINT, BaseConfig, read_base
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import PACKAGE, read_json
from memcontrol.data.cache import digest_file, find_cache_folder, make_folder
from memcontrol.model.families import Family, find_family
from memcontrol.model.hub import (
    download,
    find_commit,
    is_offline,
    list_files,
    list_hub_files,
    refuse_uncached,
)
from memcontrol.model.precision import Precision, find_stored_type, make_quantization_config
from memcontrol.model.saved_adapter import (
    find_adapter_file,
    fuse_file,
    list_left_out,
    read_description,
)
from memcontrol.model.single_file import UNNEEDED, convert_checkpoint, identify_checkpoint
from memcontrol.model.variants import PLAIN, choose_variant, find_variants

TINY = PACKAGE / "assets" / "tiny"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_MODELS = ("unet", "transformer", "vae", "text_encoder")  # how the names of a pipeline's models begin


def find_base_path(name: str) -> str:
    return str(TINY) if name == "tiny" else name


def check_base_path(base: BaseConfig) -> str:
    """Where it lies: a folder, a single file, or a Hub id. Raises MemControlError for what is none of them,
    which libraries would look for on the Hub for half a minute, and for settings that mean nothing for it."""
    path, name = find_base_path(base.id), base.id
    is_file, is_folder = os.path.isfile(path), os.path.isdir(path)
    if is_file:
        _check_file(path, name)
    elif not is_folder and (path.startswith((".", "/")) or path.count("/") != 1 or base.is_file):
        raise MemControlError(
            f"base '{name}': no such {'file' if base.is_file else 'folder'}; give 'tiny', a folder in "
            "diffusers' format, a .safetensors file, or a Hub id (owner/name)"
        )
    kind = "a file" if is_file else "a folder" if is_folder else "a Hub id"
    _check_settings(base, kind)
    return path


def _check_file(path: str, name: str) -> None:
    if path.endswith(_PICKLES):
        raise MemControlError(
            f"base '{name}' is a pickle, which may run code when it is read; give it as .safetensors"
        )
    if not path.endswith(CHECKPOINT):
        raise MemControlError(f"base '{name}' is a file, and no .safetensors; give one, or a folder")


def _check_settings(base: BaseConfig, kind: str) -> None:
    wanted = {"revision": ("a Hub id",), "variant": ("a Hub id", "a folder"), "config": ("a file",)}
    for key, kinds in wanted.items():
        if getattr(base, key) and kind not in kinds:
            raise MemControlError(
                f"base.{key} is {getattr(base, key)}, which belongs to {' or '.join(kinds)}, and base "
                f"'{base.id}' is {kind}; take it out"
            )


@dataclass(frozen=True)
class Source:
    """A base, and where its parts lie: `path` is a folder in diffusers' format or a Hub id, `places` has the
    folders of parts that lie elsewhere.

    `pins` is what a study keeps to: a Hub id's commit, the content of a single file and of an adapter.
    `notes` is what of an adapter's file is not used, in sentences.
    """

    base: BaseConfig
    path: str
    pins: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.base)

    @property
    def commit(self) -> str | None:
        return self.pins.get("commit")

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json. Raises MemControlError."""
        from diffusers import DiffusionPipeline

        with _explain_failure(self.name):
            return DiffusionPipeline.load_config(self.path, revision=self.commit)

    @property
    def family(self) -> Family:
        """Raises MemControlError."""
        return find_family(self.index.get("_class_name", ""), self.base)

    @property
    def unneeded(self) -> dict[str, Any]:
        return dict(UNNEEDED) if self.index.get("_class_name") == "StableDiffusionPipeline" else {}

    @cached_property
    def variants(self) -> dict[str, str | None]:
        """Of the pipeline's models, each the variant whose files are read. Raises MemControlError."""
        models = [name for name, kind in self.index.items() if name.startswith(_MODELS) and kind[0]]
        files = list_hub_files(self.path, self.commit) if self.commit else list_files(Path(self.path))
        found = find_variants(files, [name for name in models if name not in self.places])
        chosen = choose_variant(self.name, found, self.base.variant)
        return {name: chosen if chosen in variants else None for name, variants in found.items()}

    @property
    def variant(self) -> str | None:
        """What parts that have it are read in."""
        return next(filter(None, self.variants.values()), None)

    @cached_property
    def holds_half(self) -> bool:
        """Whether any part is stored in 16 bits. Raises MemControlError."""
        place = Path(self.folder)
        files = [place] if place.is_file() else place.rglob("*.safetensors")
        return any(find_stored_type(file) in ("F16", "BF16") for file in files)

    @cached_property
    def folder(self) -> str:
        """Where all parts are read from, of a Hub id in the Hub's cache. Raises MemControlError."""
        if not self.commit:
            return self.path
        with _explain_failure(self.name):
            place = download(self.path, self.commit, self.variant, self.unneeded)
        names = find_variants(list_files(Path(place)), self.variants)
        if any((variant or PLAIN) not in names[part] for part, variant in self.variants.items()):
            refuse_uncached(self.path, self.base.revision)
        return place

    def check_pins(self, known: Mapping[str, str]) -> None:
        """Raises MemControlError where a study began with another content; what it did not record then is
        not compared."""
        for key, value in known.items():
            if self.pins.get(key) == value or key == "id":
                continue
            if key == "commit":
                raise MemControlError(
                    f"base '{self.base.id}' is at commit {self.commit}, and this study began with {value}; "
                    f"write base: {{id: {self.base.id}, revision: {value}}}, or choose another name"
                )
            place = self.base.adapter if key == "adapter" else self.base.id
            raise MemControlError(
                f"base.{'adapter' if key == 'adapter' else 'id'} {place} is not what this study began with; "
                "restore it, or choose another name"
            )

    def list_encoders(self) -> list[str]:
        """Names of the pipeline's text encoders."""
        return [name for name, kind in self.index.items() if name.startswith("text_encoder") and kind[0]]

    def open(self, precision: Precision | None = None, with_encoders: bool = True) -> Any:
        """The pipeline as diffusers reads it, in float32 unless another precision is given, on the CPU or,
        where it is quantized, on the device that its library wants. Raises MemControlError."""
        from diffusers import DiffusionPipeline

        precision = precision or Precision()
        index, family = self.index, self.family
        given = self.unneeded
        if not with_encoders:
            given |= dict.fromkeys(self.list_encoders())
        with _explain_failure(self.name):
            if precision.quantized:
                given[family.denoiser] = self.load_quantized(family.denoiser, precision)
            elif family.denoiser in self.places:
                given[family.denoiser] = self.load_part(family.denoiser, precision.weights)
            if precision.weights == torch.float16 and "vae" in index:
                # the autoencoders of Stable Diffusion overflow in float16
                given["vae"] = self.load_part("vae", torch.bfloat16)
            return DiffusionPipeline.from_pretrained(
                self.folder, dtype=precision.weights, variant=self.variant, **given
            )

    def load_part(self, part: str, dtype: torch.dtype, **settings: Any) -> Any:
        """One model of the pipeline, on the CPU."""
        library, kind = self.index[part]
        # of a remote pipeline's own classes there is none here
        cls = getattr(importlib.import_module(library), kind)
        if part in self.places:
            return cls.from_pretrained(self.places[part], dtype=dtype, **settings)
        variant = self.variants[part]
        return cls.from_pretrained(self.folder, subfolder=part, variant=variant, dtype=dtype, **settings)

    def load_encoder(self, part: str, dtype: torch.dtype) -> Any:
        """A text encoder. Raises MemControlError."""
        with _explain_failure(self.name):
            return self.load_part(part, dtype)

    def load_quantized(self, part: str, precision: Precision) -> Any:
        """The denoiser with its Linear weights quantized by diffusers' own `quantization_config`."""
        config = make_quantization_config(precision)
        try:
            return self.load_part(part, precision.weights, quantization_config=config)
        except RuntimeError as error:
            raise MemControlError(
                f"base_precision is {precision.quantized}, which its library cannot do here: {error}; choose "
                "bfloat16 or float32"
            ) from None

    @cached_property
    def digest(self) -> str:
        """Names the base's content: what it is pinned to; a folder's files by name, size and, where small,
        bytes."""
        digest = hashlib.sha256(self.base.id.encode())
        chosen = {key: getattr(self.base, key) for key in ("variant", "max_sequence_length")}
        more = self.pins | {key: value for key, value in chosen.items() if value}
        if more:
            digest.update(json.dumps(more, sort_keys=True).encode())
        if not self.pins.keys() & {"commit", "file"}:
            _update_digest(digest, Path(self.path))
        return digest.hexdigest()[:16]


def _update_digest(digest: Any, root: Path) -> None:
    for file in sorted(root.rglob("*")) if root.is_dir() else ():
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.relative_to(root)} {size}".encode())
            digest.update(file.read_bytes() if size < 2**26 else str(file.stat().st_mtime_ns).encode())


def find_source(base: BaseConfig | str) -> Source:
    """Of a base, or of one by its id alone. What is not in diffusers' format is converted once, an adapter is
    fused once. Raises MemControlError."""
    base = read_base(base)
    path = check_base_path(base)
    with _explain_failure(base.id):
        if base.is_file:
            folder, digest = convert_checkpoint(Path(path), base.config)
            source = Source(base, str(folder), {"file": digest})
        elif os.path.isdir(path):
            source = Source(base, path)
        else:
            source = Source(base, path, {"commit": find_commit(path, base.revision)})
        return _start_from(source, Path(base.adapter)) if base.adapter else source


def _start_from(source: Source, given: Path) -> Source:
    """The base with an adapter fused into its denoiser, in float32, which is kept in the user's cache; or
    with a denoiser that was exported alone. Raises MemControlError."""
    import diffusers

    kind, part = source.index.get("_class_name", ""), source.family.denoiser
    if (given / "model_index.json").is_file():
        raise MemControlError(f"base.adapter {given} is a whole pipeline; give it as base.id")
    if (given / "config.json").is_file():
        return _start_from_denoiser(source, part, given)
    file = find_adapter_file(given)
    pins = source.pins | {"adapter": digest_file(file)[:16]}
    content = hashlib.sha256(f"{source.digest} {pins['adapter']}".encode()).hexdigest()[:16]

    def fuse(place: Path) -> None:
        denoiser = source.load_part(part, torch.float32)
        fuse_file(denoiser, part, getattr(diffusers, kind), file)
        denoiser.save_pretrained(place)

    folder = make_folder(find_cache_folder() / f"start-{content}", fuse)
    notes = (*list_left_out(file), *_compare_bases(source.base, file))
    return replace(source, pins=pins, places={part: str(folder)}, notes=notes)


def _start_from_denoiser(source: Source, part: str, folder: Path) -> Source:
    """Raises MemControlError where it is of another class."""
    kind, expected = read_json(folder / "config.json").get("_class_name"), source.index[part][1]
    if kind != expected:
        raise MemControlError(
            f"base.adapter {folder} is a {kind}, and the denoiser of base '{source.base.id}' a {expected}"
        )
    digest = hashlib.sha256()
    _update_digest(digest, folder)
    pins = source.pins | {"adapter": digest.hexdigest()[:16]}
    return replace(source, pins=pins, places={part: str(folder)})


def _compare_bases(base: BaseConfig, file: Path) -> list[str]:
    """A sentence where the adapter was trained over something else."""
    described = read_description(file)
    known = read_base(described["config"]["base"]) if described else None
    if known is None or (Path(known.id).name == Path(base.id).name and not known.adapter):
        return []
    return [f"base.adapter {file.name} was trained over {known}, and is fused into {base.id}"]


def open_pipeline(base: BaseConfig | str) -> Any:
    """The whole pipeline as plain diffusers reads it, in float32. Raises MemControlError."""
    return find_source(base).open()


@contextlib.contextmanager
def _ignore_arguments() -> Iterator[None]:
    """diffusers gives huggingface_hub an argument that the newer one no longer has and warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")
        yield


@contextlib.contextmanager
def _explain_failure(name: str) -> Iterator[None]:
    """Turns what libraries raise where a base cannot be read into a MemControlError."""
    quiet_libraries()
    try:
        with _ignore_arguments():
            yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MemControlError(f"base '{name}' cannot be loaded as a diffusers pipeline: {reason}") from None


def quiet_libraries() -> None:
    """Keeps the chatter of transformers and diffusers off the user's screen; must come before diffusers is
    imported."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()


def import_libraries() -> None:
    """What opening a base imports, so that its own memory can be told from theirs."""
    quiet_libraries()
    for name in ("peft", "diffusers.models.unets.unet_2d_condition", "diffusers.pipelines.pipeline_utils"):
        importlib.import_module(name)


def make_empty_denoiser(base: BaseConfig | str) -> torch.nn.Module:
    """The base's denoiser without its weights, on the meta device: names and shapes only. Raises
    MemControlError.

    A folder with nothing but config.json files will do: those of a pipeline (unet/ or transformer/), or the
    denoiser's own.
    """
    quiet_libraries()
    import diffusers

    config = read_denoiser_config(base)
    kind = config.get("_class_name", "")
    if not hasattr(diffusers, kind):
        raise MemControlError(
            f"base '{base}': its denoiser is a '{kind}', which this diffusers "
            f"({diffusers.__version__}) does not know"
        )
    with torch.device("meta"):
        return getattr(diffusers, kind).from_config(config)


def read_denoiser_config(base: BaseConfig | str) -> dict:
    """Of a single file, from where its configs are. Raises MemControlError."""
    from diffusers import UNet2DConditionModel

    base = read_base(base)
    path, reason = check_base_path(base), ""
    if base.is_file:
        path = identify_checkpoint(Path(path), base.config)[1]
    places: tuple[str | None, ...] = ("unet", "transformer", None)
    if os.path.isdir(path):
        places = tuple(place for place in places if (Path(path) / (place or "") / "config.json").is_file())
    for place in places:
        try:
            with _ignore_arguments():
                return UNet2DConditionModel.load_config(path, subfolder=place, revision=base.revision)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
    if not os.path.isdir(path) and is_offline():
        refuse_uncached(path, base.revision)
    raise MemControlError(
        (
            f"base '{base}': no unet/config.json, transformer/config.json or config.json can be read. "
            f"{reason}"
        ).strip()
    )
