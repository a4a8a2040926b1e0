"""RandAugment: nothing at magnitude 0, more at more, any whole or broken magnitude, the same for the same
seed."""

import numpy as np
import pytest

from memcontrol.training.augment import OPERATIONS, augment_images


@pytest.fixture
def pixels():
    steps = np.linspace(0, 255, 32).astype(np.uint8)
    picture = np.stack(
        [np.tile(steps, (32, 1)), np.tile(steps[:, None], (1, 32)), np.full((32, 32), 90, np.uint8)]
    )
    return np.stack([np.roll(picture, i, axis=2) for i in range(40)])


def test_magnitude_zero_changes_nothing(pixels):
    assert np.array_equal(augment_images(pixels, 0.0, 1), pixels)


def test_change_grows_with_the_magnitude(pixels):
    changes = [
        np.abs(augment_images(pixels, magnitude, 1).astype(int) - pixels).mean()
        for magnitude in (0.7, 3, 5, 15, 30)
    ]
    assert changes == sorted(changes) and changes[0] > 0.1


def test_the_seed_decides(pixels):
    one, again, other = (
        augment_images(pixels, 9, 1),
        augment_images(pixels, 9, 1),
        augment_images(pixels, 9, 2),
    )
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert one.dtype == np.uint8 and one.shape == pixels.shape


def test_every_operation_keeps_size_and_colours():
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 32, 3), dtype=np.uint8))
    for operation in OPERATIONS:
        for strength in (-1.0, -0.3, 0.0, 0.3, 1.0):
            found = operation(image, strength)
            assert (found.size, found.mode) == (image.size, "RGB")
        assert np.array_equal(operation(image, 0.0), image)


def test_a_shifted_image_is_the_image_elsewhere():
    from PIL import Image

    pixels = np.full((20, 20, 3), 255, np.uint8)
    pixels[8:12, 8:12] = 0
    moved = np.asarray(OPERATIONS[3](Image.fromarray(pixels), -1 / 9))  # 0.45 * 20 / 9 = 1 pixel to the right
    assert np.array_equal(moved, np.roll(pixels, 1, axis=1))
