"""Owns whether what a search reads from elsewhere is here: the base, the weights of feature networks, and the
Hub's cache. It asks the Hub for nothing."""

from __future__ import annotations

import os
import shlex
import socket
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from memcontrol.checks.finding import FAIL, OK, WARN, Finding
from memcontrol.config.study import Config
from memcontrol.core.errors import MemControlError
from memcontrol.scoring.extractor_table import (
    EXTRACTORS,
    PHOTO_EXTRA,
    PHOTO_NETWORK,
    TINY_NETWORK,
    find_photo_package,
    resolve_extractor,
)

_HUB_SECONDS = 3.0
_INSTALL_INCEPTION = "pip install 'memcontrol[inception]', or another rewards.extractor"


def find_base_folder(config: Config) -> Path | None:
    """Where the base's configs are on this machine; None where they are not. Raises MemControlError for what
    is no base."""
    from memcontrol.model.single_file import identify_checkpoint
    from memcontrol.model.source import check_base_path

    path = check_base_path(config.base)
    if config.base.is_file:
        path = identify_checkpoint(Path(path), config.base.config)[1]
    if os.path.isdir(path):
        return Path(path)
    return _find_cached(path, "model_index.json", config.base.revision)


def _find_cached(name: str, file: str, revision: str | None = None) -> Path | None:
    """The folder of the Hub's cache that has a file of a model."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def check_base(config: Config) -> Finding:
    """Whether its weights are here."""
    from memcontrol.model.hub import is_offline

    folder = find_base_folder(config)
    if folder and (config.base.is_file or any(folder.rglob("*.safetensors"))):
        return Finding("base", OK, f"{config.base.without_paths()} is on this machine")
    revision = f" --revision {shlex.quote(config.base.revision)}" if config.base.revision else ""
    cure = f"hf download {shlex.quote(config.base.id)}{revision}"
    if folder and os.path.isdir(config.base.id):
        text = f"{config.base.id} holds no .safetensors file"
        return Finding("base", FAIL, text, "give a folder with weights, as save_pretrained writes it")
    if is_offline():
        return Finding(
            "base", FAIL, f"{config.base} is not in the Hub's cache, and HF_HUB_OFFLINE is set", cure
        )
    return Finding("base", WARN, f"{config.base} is not here yet: the search downloads it", cure)


def check_usual_extractor() -> Finding:
    """Without a study: which of those that need no Hub are here."""
    if find_photo_package():
        return Finding("extractor", OK, f"{TINY_NETWORK} and, for photographs, {PHOTO_NETWORK} are here")
    text = (
        f"{TINY_NETWORK}, which knows printed characters, is here; {PHOTO_NETWORK}, for photographs, is not"
    )
    return Finding("extractor", OK, f"{text} ({PHOTO_EXTRA})")


def check_extractor(config: Config) -> Finding:
    """Whether the feature network's weights are here, and it can know the images. Raises MemControlError for
    a name that is none."""
    from memcontrol.view.words import describe_network_doubt

    found = _check_network(config.rewards.extractor)
    if found.state != OK or not describe_network_doubt(config.rewards.extractor, config.data.path):
        return found
    text = f"{TINY_NETWORK} is here, but knows printed characters: of photographs its figures say little"
    cure = f"rewards.extractor: {PHOTO_NETWORK}" + ("" if find_photo_package() else f", after {PHOTO_EXTRA}")
    return Finding("extractor", WARN, text, cure)


def _check_network(name: str) -> Finding:
    kind, _, rest = resolve_extractor(name).partition(":")
    if kind == PHOTO_NETWORK and find_photo_package() is None:
        return Finding("extractor", FAIL, f"{name} is not installed", PHOTO_EXTRA)
    if kind == "transformers":
        return _check_model("extractor", name, rest)
    if kind == "inception" and not (find_spec("torch_fidelity") and find_spec("torchvision")):
        return Finding("extractor", FAIL, f"{name} is not installed", _INSTALL_INCEPTION)
    file = rest.partition(",")[0]
    if file and not Path(file).is_file():
        source = EXTRACTORS["sscd"].source if name.startswith("sscd") else "or correct rewards.extractor"
        return Finding("extractor", FAIL, f"{name}: there is no file {file}", f"put it there: {source}")
    return Finding("extractor", OK, f"{name} is here")


def check_clip(name: str) -> Finding:
    return _check_model("clip", name, name)


def _check_model(what: str, name: str, model: str) -> Finding:
    """Of the transformers library: a folder, or an id of the Hub."""
    from memcontrol.model.hub import is_offline

    if os.path.isdir(model):
        return Finding(what, OK, f"{name} is here")
    weights = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")
    if any(_find_cached(model, file) for file in weights):
        return Finding(what, OK, f"{name} is in the Hub's cache")
    cure = f"hf download {shlex.quote(model)}"
    if is_offline():
        text = f"{name} is not in the Hub's cache, and HF_HUB_OFFLINE is set"
        return Finding(what, FAIL, text, f"{cure}, where there is a network, and copy the cache")
    return Finding(what, WARN, f"{name} is not here yet: the first trial downloads it", cure)


def check_hub() -> Finding:
    """The cache, and whether the Hub may and can be asked."""
    from huggingface_hub import constants

    from memcontrol.model.hub import is_offline

    cache = Path(constants.HF_HUB_CACHE)
    place = next(path for path in (cache, *cache.parents) if path.exists())
    if not os.access(place, os.W_OK):
        text = f"its cache {cache} cannot be written"
        return Finding("hub", WARN, text, "export HF_HOME=DIR, a folder of your own")
    said = f"cache {cache}"
    if is_offline():
        return Finding("hub", OK, f"{said}; it is not asked, by HF_HUB_OFFLINE")
    parts = urlsplit(constants.ENDPOINT)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=_HUB_SECONDS).close()
    except OSError:
        text = f"{said}; the Hub cannot be reached (a proxy may be between): what is not here is not found"
        return Finding("hub", WARN, text, "export HF_HUB_OFFLINE=1 (so that nothing waits for it)")
    return Finding("hub", OK, f"{said}; the Hub can be reached")


def check_data(config: Config) -> Finding:
    """Whether the images are where the study file says; they are not read."""
    from memcontrol.core.image_parts import DIGITS
    from memcontrol.core.published import HUB

    path = config.data.path
    if path == DIGITS:
        return Finding("data", OK, "the embedded digits")
    if path.startswith(HUB):
        if find_spec("datasets") is None:
            return Finding("data", FAIL, f"{path} needs datasets", "pip install 'memcontrol[datasets]'")
        return Finding("data", OK, f"{path} is read from the Hub, or from what a search has kept")
    if not os.path.exists(path):
        raise MemControlError(
            f"data.path {path}: no such folder; correct it (it is seen from the study file)"
        )
    if not os.access(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0)):
        return Finding("data", FAIL, f"{path} cannot be read", f"chmod u+rX {shlex.quote(path)}")
    return Finding("data", OK, f"{path} can be read")
