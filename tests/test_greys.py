"""Greys of more than 8 bits: one scale for a folder, shown as a viewer shows them."""

import struct

import numpy as np
import pytest
from PIL import Image

from memcontrol.core.errors import MemControlError
from memcontrol.data.index import examine_files
from memcontrol.data.look import find_greys
from memcontrol.reading.decode import decode_image

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


def save(path, values):
    Image.fromarray(values).save(path)
    return path


def mark_white_is_zero(path):
    """PhotometricInterpretation 0 in a TIFF's first directory (TIFF 6.0, page 37)."""
    content = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", content, 4)
    (n,) = struct.unpack_from("<H", content, start)
    for entry in range(start + 2, start + 2 + 12 * n, 12):
        if struct.unpack_from("<H", content, entry) == (262,):
            struct.pack_into("<H", content, entry + 8, 0)
    path.write_bytes(content)
    return path


def show(folder):
    """Greys of each image as shown, uint8 [H, W], by name."""
    paths = sorted(folder.iterdir())
    found = examine_files(folder, [path.name for path in paths]).images
    greys = find_greys({folder / name: seen for name, seen in found.items()})
    return {path.stem: np.asarray(decode_image(path, greys))[..., 0] for path in paths}


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_whole_numbers_are_shown_by_the_bits_that_the_folder_needs(tmp_path, bits):
    most = 2**bits - 1
    save(tmp_path / "bright.png", (RAMP * most).astype(np.uint16))
    save(tmp_path / "dark.png", (RAMP * most / 4).astype(np.uint16))
    shown = show(tmp_path)
    assert np.abs(shown["bright"] - 255 * RAMP).max() <= 1 and len(np.unique(shown["bright"])) == 256
    assert abs(int(shown["dark"].max()) - 64) <= 1  # not stretched by itself


def test_where_white_is_zero_it_is_white_also_beside_others(tmp_path):
    values = (RAMP * 4095).astype(np.uint16)
    save(tmp_path / "plain.tif", values)
    mark_white_is_zero(save(tmp_path / "inverted.tif", values))
    shown = show(tmp_path)
    assert np.abs(shown["plain"] - 255 * RAMP).max() <= 1
    assert (shown["inverted"] == 255 - shown["plain"]).all()


SIGNED = [(RAMP * 3000 - 1024).astype(kind) for kind in (np.int32, np.float32)]
SIGNED += [(RAMP * 900 - 1000).astype(np.int32), (RAMP - 0.5).astype(np.float32)]
FLOATS = [(RAMP * most).astype(np.float32) for most in (0.005, 1, 300)]


@pytest.mark.parametrize(
    "values", SIGNED + FLOATS, ids=lambda values: f"{values.dtype} {values.min():g} to {values.max():g}"
)
def test_signed_and_float_greys_rise_over_their_whole_range(tmp_path, values):
    save(tmp_path / "a.tiff", values)
    shown = show(tmp_path)["a"].astype(int)
    assert (np.diff(shown.ravel()) >= 0).all() and (shown.min(), shown.max()) == (0, 255)
    assert len(np.unique(shown)) > 200


def test_whole_numbers_and_fractions_have_no_common_scale(tmp_path):
    save(tmp_path / "whole.tiff", (RAMP * 4095).astype(np.int32))
    save(tmp_path / "float.tiff", RAMP.astype(np.float32))
    with pytest.raises(MemControlError, match="no common scale; store all"):
        show(tmp_path)


def test_depths_that_are_mixed_are_refused_and_dark_images_are_not(tmp_path):
    for i in range(10):
        save(tmp_path / f"a{i}.png", (RAMP * 4095).astype(np.uint16))
    save(tmp_path / "black.png", (RAMP * 20).astype(np.uint16))
    assert show(tmp_path)["a3"].max() == 255
    save(tmp_path / "b.tif", (RAMP * 65535).astype(np.uint16))
    with pytest.raises(
        MemControlError, match="two depths: 11 images, .* up to 4095 alone, .*b.tif, up to 65535"
    ):
        show(tmp_path)
