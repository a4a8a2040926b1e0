"""A run's pictures: which image lies where, by the colours of their pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from memcontrol.trial.pictures import Strip, draw_pairs, draw_samples, save_png
from memcontrol.view.lay_page import cut_pairs

WHITE = (255, 255, 255)


def make_plain(n, side, first=0):
    """n images of one colour each, no two alike: their number in red, the side in green."""
    images = np.zeros((n, 3, side, side), np.uint8)
    images[:, 0] = np.arange(first, first + n)[:, None, None]
    images[:, 1] = 100
    return images


def make_strip(n, side, title="a run"):
    """Images that tell by their colour what they are: generated from 0, training from 100, held out from
    200."""
    generated, training, held_out = (make_plain(n, side, first) for first in (0, 100, 200))
    regions = np.tile([0.0, 0.0, 1.0, 1.0], (n, 1))
    return Strip(
        title,
        generated,
        training,
        held_out,
        np.linspace(1, 2, n),
        np.linspace(0.5, 1, n),
        np.arange(n) < 1,
        regions,
        ["pixels"] * n,
    )


def colour(sheet, x, y):
    return sheet.getpixel((x, y))


@pytest.mark.parametrize(("side", "tile"), [(8, 64), (32, 64), (64, 64), (65, 128), (128, 128), (512, 128)])
def test_samples_lie_in_rows_of_twelve_in_their_order(side, tile):
    """A tile is 64 pixels wide, of larger images 128; six pixels of white between."""
    sheet = draw_samples(make_plain(14, side))
    step = tile + 6
    assert sheet.size == (12 * step, 2 * step)
    for i in range(14):
        x, y = i % 12 * step, i // 12 * step
        for corner in ((x, y), (x + tile - 1, y + tile - 1)):
            assert colour(sheet, *corner) == (i, 100, 0)
        assert colour(sheet, x + tile, y) == colour(sheet, x, y + tile) == WHITE
    assert colour(sheet, 2 * step, step) == WHITE  # after the last


def test_sixty_samples_are_shown_of_many():
    sheet = draw_samples(make_plain(70, 8))
    assert sheet.size == (12 * 70, 5 * 70)
    assert colour(sheet, 11 * 70, 4 * 70) == (59, 100, 0)


def test_a_sample_stays_upright_and_small_ones_keep_their_pixels():
    image = np.zeros((1, 3, 2, 2), np.uint8)
    image[0, :, 0, 0] = 255, 0, 0
    image[0, :, 0, 1] = 0, 255, 0
    image[0, :, 1, 0] = 0, 0, 255
    tile = np.asarray(draw_samples(image))[:64, :64]
    expected = image[0].transpose(1, 2, 0).repeat(32, 0).repeat(32, 1)
    assert (tile == expected).all()


def test_prompts_stand_below_their_samples_and_inside_their_columns():
    captions = ["a handwritten three", "a photograph of a person in a very long room, smiling", ""] * 4
    sheet, bare = (np.asarray(draw_samples(make_plain(14, 32), words)) for words in (captions, ()))
    assert sheet.shape[1] == bare.shape[1] and sheet.shape[0] == bare.shape[0] + 2 * 3 * 12  # lines of 12
    for i in range(12):
        below = (sheet[64:100, i * 70 : i * 70 + 70] < 255).any((0, 2))
        assert below.any() == bool(captions[i]) and not below[66:].any()
    assert (sheet[:64, :64] == bare[:64, :64]).all()


def test_a_picture_of_pairs_says_where_they_lie_and_which_are_copies(tmp_path):
    """What the report cuts out of it is the last run's images, by their colours."""
    first, last = make_strip(3, 32), make_strip(2, 32)
    last.generated[:, 2] = 77
    save_png(draw_pairs([first, last]), tmp_path / "pairs.png")
    found = cut_pairs(tmp_path / "pairs.png")
    assert [is_copy for *_, is_copy in found] == [True, False]
    for i, (generated, training, _) in enumerate(found):
        tiles = [Image.open(io.BytesIO(content)) for content in (generated, training)]
        assert [tile.size for tile in tiles] == [(64, 64)] * 2
        assert [tile.getpixel((9, 9)) for tile in tiles] == [(i, 100, 77), (100 + i, 100, 0)]
    save_png(Image.new("RGB", (9, 9)), tmp_path / "older.png")
    assert cut_pairs(tmp_path / "older.png") == cut_pairs(tmp_path / "none.png") == []


@pytest.mark.parametrize(("side", "tile"), [(32, 64), (100, 128)])
def test_pairs_have_each_training_and_held_out_image_below_the_generated_one(side, tile):
    """Titles take 72 pixels on the left and a line of 18 above; two lines below tell the distances."""
    sheet, step = draw_pairs([make_strip(5, side)]), tile + 6
    height = 18 + 3 * step + 2 * 18
    assert sheet.size == (72 + 12 * step, height)
    for column in range(5):
        for row, first in enumerate((0, 100, 200)):
            x, y = 72 + column * step, 18 + row * step
            for corner in ((x, y), (x + tile - 1, y + tile - 1)):
                assert colour(sheet, *corner) == (first + column, 100, 0)
    pixels = np.asarray(sheet)
    assert (pixels[18 : 18 + 3 * step, 72 + 5 * step :] == 255).all()  # no sixth column
    below = (pixels[18 + 3 * step :] < 255).any((0, 2))  # where distances are written
    assert [below[72 + column * step : 72 + (column + 1) * step].any() for column in range(6)] == [
        True
    ] * 5 + [False]


def test_pairs_of_two_runs_lie_below_each_other_under_their_titles():
    first, second = make_strip(3, 32), make_strip(2, 32, "another")
    alone, both = draw_pairs([first]), draw_pairs([first, second])
    assert both.size == (alone.width, 2 * alone.height)
    assert np.array_equal(np.asarray(both)[: alone.height], np.asarray(alone))
    assert np.array_equal(np.asarray(both)[alone.height :], np.asarray(draw_pairs([second])))
    untitled = np.asarray(draw_pairs([make_strip(3, 32, "")]))
    assert (np.asarray(alone)[:18] < 255).any() and (untitled[:15] == 255).all()


def test_the_part_that_is_compared_is_framed_in_both_images():
    strip = make_strip(3, 32)
    strip.regions[1] = 0.25, 0.5, 0.75, 1
    framed, plain = (np.asarray(draw_pairs([one])).astype(int) for one in (strip, make_strip(3, 32)))
    changed = (framed != plain).any(2)
    for top in (18, 18 + 70):
        left = 72 + 70
        expected = np.zeros((64, 64), bool)
        expected[32:, 16:48] = True
        expected[33:63, 17:47] = False
        assert (changed[top : top + 64, left : left + 64] == expected).all()
        changed[top : top + 64, left : left + 64] = False
    assert not changed.any()
