"""A first look at a folder of images: sides, colour, copies and near copies, by images made for it."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits, load_sample_images

from memcontrol.core.errors import MemControlError
from memcontrol.data.look import summarize_folder


def look(folder):
    return summarize_folder(folder, lambda title, done, total: None)


def test_sides_are_those_of_the_shorter_edge(photographs):
    folder = photographs(2, size=(40, 30))
    photographs(1, folder="photos/wide", size=(100, 90))
    assert look(folder).sides == (30, 30, 90)


@pytest.mark.parametrize("mode, is_grey", [("L", True), ("RGB", False)])
def test_folder_is_grey_where_no_image_has_colour(photographs, mode, is_grey):
    assert look(photographs(3, mode=mode)).is_grey == is_grey


def test_grey_images_stored_in_colour_are_grey(photographs):
    folder = photographs(3, mode="L")
    for path in folder.iterdir():
        Image.open(path).convert("RGB").save(path)
    assert look(folder).is_grey


def pages(n, ground, ink):
    """Lines of text, as they are printed."""
    for number in range(n):
        page = Image.new("RGB", (96, 96), ground)
        for line in range(6):
            ImageDraw.Draw(page).text((4, 4 + 15 * line), f"page {number}, line {line}", ink)
        yield page


def tiles():
    """Of the two photographs that scikit-learn has."""
    for photograph in load_sample_images().images:
        for top, left in itertools.product(range(0, 384, 128), range(0, 512, 128)):
            yield Image.fromarray(photograph[top : top + 128, left : left + 128])


DRAWN = {
    "digits": lambda: (Image.fromarray(255 - np.uint8(15 * image)) for image in load_digits().images[:40]),
    "black on white": lambda: pages(20, "white", "black"),
    "white on black": lambda: pages(20, "black", "white"),
    "in colours": lambda: pages(20, "wheat", "navy"),
}
PHOTOGRAPHED = {
    "photographs": tiles,
    "in grey": lambda: (tile.convert("L") for tile in tiles()),
    "small": lambda: (tile.resize((32, 32)) for tile in tiles()),
}


@pytest.mark.parametrize("kind", [*DRAWN, *PHOTOGRAPHED])
def test_photographs_are_told_from_characters(kind, tmp_path):
    for number, image in enumerate({**DRAWN, **PHOTOGRAPHED}[kind]()):
        image.save(tmp_path / f"{number}.png")
    assert look(tmp_path).are_photographs == (kind in PHOTOGRAPHED)


def test_copies_are_images_of_the_same_pixels_whatever_their_format(photographs):
    folder = photographs(4)
    Image.open(folder / "001.png").save(folder / "same.bmp")
    found = look(folder)
    assert found.copies == (("001.png", "same.bmp"),) and found.n == 5


def test_near_copies_are_found_and_copies_are_not_among_them(photographs):
    folder = photographs(30)
    for i, noise in ((3, 8), (5, 2)):
        pixels = np.asarray(Image.open(folder / f"{i:03}.png"), int)
        moved = pixels + np.random.default_rng(i).integers(-noise, noise + 1, pixels.shape)
        Image.fromarray(np.clip(moved, 0, 255).astype(np.uint8)).save(folder / f"near{i}.png")
    Image.open(folder / "007.png").save(folder / "same.bmp")
    assert look(folder).near == (("005.png", "near5.png"), ("003.png", "near3.png"))  # the nearest first


def test_parts_and_captions_are_counted(photographs):
    photographs(3, folder="photos/train")
    photographs(4, folder="photos/Validation")
    folder = photographs(2, folder="photos/test").parent
    found = look(folder)
    assert found.parts == {"train": 3, "holdout": 4, "test": 2}
    assert sum(found.captions.values()) == 9 and found.look.captions.source == "nothing"


def test_what_cannot_be_decoded_is_told_and_left_out(photographs):
    folder = photographs(2)
    (folder / "broken.png").write_bytes(b"no image")
    found = look(folder)
    assert found.n == 2 and len(found.unreadable) == 1 and "broken.png" in found.unreadable[0]


@pytest.mark.parametrize("name, words", [("none", "is no folder"), (".", "holds no images")])
def test_folder_without_images_is_named(tmp_path, name, words):
    with pytest.raises(MemControlError, match=words):
        look(tmp_path / name)
