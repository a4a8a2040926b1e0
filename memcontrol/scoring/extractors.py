"""Owns feature extractors: networks that turn images into rows of features, each pinned by what it is and a
sha256 of its weights."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memcontrol.core.errors import MemControlError
from memcontrol.core.files import PACKAGE
from memcontrol.data.features import pixel_features, shrink_images
from memcontrol.model.batches import halve_until_it_fits
from memcontrol.scoring.efficientnet import PHOTO_SIDE, EfficientNetLite0, load_efficientnet
from memcontrol.scoring.extractor_table import PHOTO_NETWORK, TINY_NETWORK, resolve_extractor

TINY_FEATURES = PACKAGE / "assets" / "features.safetensors"
_EXTRACT_BATCH = 64
_CORE_BATCH = 4  # images whose layers' outputs stay in a core's cache: a third faster than 64
_NORMALIZE = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5,) * 3, (0.5,) * 3),
    "unit": ((0.0,) * 3, (1.0,) * 3),
}


@dataclass(frozen=True)
class Extractor:
    """uint8 [N, 3, H, W] to float32 [N, n_features]; numbers made with different ids are never compared."""

    id: str
    n_features: int
    extract: Callable[[np.ndarray], np.ndarray]


class TinyFeatures(nn.Module):
    """Features of a small network trained on printed characters: [N, 3, 32, 32] in -1..1 to [N, 64]."""

    n_features = 64

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 96)
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(96 * 4 * 4, self.n_features), nn.LayerNorm(self.n_features)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def _load_tiny() -> Extractor:
    """The embedded network, trained on printed characters."""
    from safetensors.torch import load_file

    network = TinyFeatures().eval()
    network.load_state_dict(load_file(TINY_FEATURES))
    digest = hashlib.sha256(TINY_FEATURES.read_bytes()).hexdigest()[:16]
    return Extractor(
        f"tiny-sha256:{digest}",
        TinyFeatures.n_features,
        _make_batched(lambda pixels: network(shrink_images(pixels) * 2 - 1), torch.device("cpu"), 256),
    )


def _load_photo_network() -> Extractor:
    """EfficientNet-Lite0, images brought to the size that it was trained on."""
    network, digest = load_efficientnet()
    network, device = _place_network(network)
    return Extractor(
        f"{PHOTO_NETWORK}-sha256:{digest[:16]}",
        EfficientNetLite0.n_features,
        _make_batched(
            lambda images: network(shrink_images(images, PHOTO_SIDE).to(device)),
            device,
            _CORE_BATCH if device.type == "cpu" else _EXTRACT_BATCH,
        ),
    )


def _make_pixel_extractor() -> Extractor:
    """32 x 32 pixels in 0..1."""
    return Extractor("pixels-32", 3072, pixel_features)


def _load_transformers(name: str) -> Extractor:
    """A vision model of the transformers library: its pooled output, or its image embedding (CLIP); brought
    to size by its own processor."""
    from memcontrol.model.source import quiet_libraries

    quiet_libraries()
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor, model = AutoImageProcessor.from_pretrained(name), AutoModel.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise MemControlError(
            f"rewards.extractor 'transformers:{name}' cannot be loaded: {' '.join(str(error).split())[:200]}"
        ) from None
    model, device = _place_network(model)

    def features(images: np.ndarray) -> Tensor:
        values = processor(images=list(images), return_tensors="pt")["pixel_values"].to(device)
        if hasattr(model, "get_image_features"):
            found = model.get_image_features(pixel_values=values)
            return found if isinstance(found, Tensor) else found.pooler_output
        output = model(pixel_values=values)
        pooled = getattr(output, "pooler_output", None)
        return output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)

    return _probe_width(
        f"transformers:{name}-sha256:{_digest_network(model)}", _make_batched(features, device)
    )


def load_clip(name: str) -> Callable[[np.ndarray, Sequence[str]], tuple[np.ndarray, np.ndarray]]:
    """A CLIP model of the transformers library: uint8 [N, 3, H, W] and N captions to their embeddings [N, D]
    each."""
    from memcontrol.model.source import quiet_libraries

    quiet_libraries()
    from transformers import AutoProcessor, CLIPModel

    try:
        processor = AutoProcessor.from_pretrained(name)
        model, device = _place_network(CLIPModel.from_pretrained(name))
    except (OSError, ValueError, KeyError) as error:
        raise MemControlError(
            f"rewards.clip '{name}' cannot be loaded as a CLIP model: {' '.join(str(error).split())[:200]}"
        ) from None

    @torch.no_grad()
    def embed(images: np.ndarray, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        def embed_part(rows: slice) -> tuple[np.ndarray, np.ndarray]:
            batch = processor(
                images=list(images[rows]),
                text=list(captions[rows]),
                return_tensors="pt",
                padding=True,
                truncation=True,
            )
            output = model(**batch.to(device))
            return output.image_embeds.float().cpu().numpy(), output.text_embeds.float().cpu().numpy()

        parts = halve_until_it_fits(len(images), _EXTRACT_BATCH, embed_part)
        seen, read = (np.concatenate(rows) for rows in zip(*(part for _, part in parts)))
        return seen, read

    return embed


def _load_torchscript(text: str) -> Extractor:
    """A TorchScript file that takes float [N, 3, side, side] and gives [N, D], such as SSCD's; options follow
    the path after commas."""
    path, *options = text.split(",")
    values = {"side": "224", "normalize": "imagenet"} | dict(
        option.split("=", 1) for option in options if "=" in option
    )
    if (
        not values["side"].isdigit()
        or values["normalize"] not in _NORMALIZE
        or len(values) > 2
        or any("=" not in option for option in options)
    ):
        raise MemControlError(
            f"rewards.extractor 'torchscript:{text}': allowed after the path are side=NUMBER and "
            f"normalize={'|'.join(_NORMALIZE)}"
        )
    if not Path(path).is_file():
        raise MemControlError(
            f"rewards.extractor 'torchscript:{text}': no such file; give a TorchScript file"
        )
    try:
        with warnings.catch_warnings():
            # torch.jit is old, and what descriptors are published in
            warnings.simplefilter("ignore", DeprecationWarning)
            network, device = _place_network(torch.jit.load(path, map_location="cpu"))
    except RuntimeError as error:
        raise MemControlError(
            f"rewards.extractor '{path}' is no TorchScript file: {str(error).splitlines()[0][:150]}"
        ) from None
    side, (mean, deviation) = int(values["side"]), _NORMALIZE[values["normalize"]]

    def features(images: np.ndarray) -> Tensor:
        scaled = (shrink_images(images, side) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(
            deviation
        ).view(3, 1, 1)
        return network(scaled.to(device)).flatten(1)

    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    return _probe_width(
        f"torchscript:{Path(path).name}-{side}-{values['normalize']}-sha256:{digest}",
        _make_batched(features, device),
    )


def _load_inception(weights: str) -> Extractor:
    """Inception's 2,048 pooled features as torch-fidelity computes them for FID; from its own download, or a
    local weights file."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        raise MemControlError(
            "rewards.extractor 'inception' needs torch-fidelity and a matching torchvision, which cannot "
            f"be imported ({type(error).__name__}); install memcontrol[inception], or use another extractor"
        ) from None
    network, device = _place_network(
        FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights or None
        )
    )
    return _probe_width(
        f"inception-2048-sha256:{_digest_network(network)}",
        _make_batched(lambda images: network(torch.from_numpy(images).to(device))[0], device),
    )


def _place_network(network: nn.Module) -> tuple[Any, torch.device]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return network.eval().to(device), device


def _make_batched(
    features: Callable[[np.ndarray], Tensor], device: torch.device, size: int = _EXTRACT_BATCH
) -> Callable[[np.ndarray], np.ndarray]:
    """The function over images in batches, without gradients. Raises MemControlError where a feature is not
    finite."""

    @torch.no_grad()
    def extract(images: np.ndarray) -> np.ndarray:
        chunks = [
            chunk
            for _, chunk in halve_until_it_fits(
                len(images), size, lambda rows: features(images[rows]).float().cpu()
            )
        ]
        found = torch.cat(chunks).numpy()
        if not np.isfinite(found).all():
            raise MemControlError(
                "the feature network gave values that are not finite; look for broken images or weights"
            )
        return found

    return extract


def _probe_width(pinned: str, extract: Callable[[np.ndarray], np.ndarray]) -> Extractor:
    """With the number of features found out on one grey image."""
    return Extractor(pinned, extract(np.full((1, 3, 64, 64), 128, np.uint8)).shape[1], extract)


def _digest_network(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(
            name.encode()
            + tensor.cpu().contiguous().view(torch.uint8 if tensor.ndim else tensor.dtype).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


_NAMED_LOADERS = {
    TINY_NETWORK: _load_tiny,
    "pixels": _make_pixel_extractor,
    PHOTO_NETWORK: _load_photo_network,
}


def load_extractor(name: str) -> Extractor:
    """By a name of the table or a longer form. Raises MemControlError for one that is neither, or cannot be
    loaded."""
    form = resolve_extractor(name)
    kind, _, rest = form.partition(":")
    if kind == "transformers":
        return _load_transformers(rest)
    if kind == "torchscript":
        return _load_torchscript(rest)
    return _load_inception(rest) if kind == "inception" else _NAMED_LOADERS[form]()
