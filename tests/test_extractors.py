"""Feature networks: each kind against the network called by hand, pinned by its weights, mistakes named."""

import hashlib

import numpy as np
import pytest
import torch
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from memcontrol.core.errors import MemControlError
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


def test_clips_image_embedding(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(
        CLIPConfig(
            text_config=small, vision_config={**small, "image_size": 28, "patch_size": 14}, projection_dim=12
        )
    ).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = load_extractor(f"transformers:{tmp_path}")
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


def test_a_file_that_is_no_torchscript_is_named(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"nothing")
    with pytest.raises(MemControlError, match="no TorchScript file"):
        load_extractor(f"torchscript:{tmp_path / 'net.pt'}")


def test_a_study_keeps_to_the_network_it_began_with(tmp_path):
    from memcontrol.core.config import load_config
    from memcontrol.trial.prepare import record_extractor

    config = load_config({"name": "a", "data": "digits"})
    record_extractor(tmp_path / "extractor.json", "tiny-1", config)
    record_extractor(tmp_path / "extractor.json", "tiny-1", config)
    with pytest.raises(
        MemControlError, match="the feature network is tiny-2, and study 'a' began with tiny-1"
    ):
        record_extractor(tmp_path / "extractor.json", "tiny-2", config)
