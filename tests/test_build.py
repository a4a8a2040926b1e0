"""The embedded base's making: what is drawn, what is said of it, its words and its structure; nothing is
trained."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from memcontrol.assets.build import (
    CAPTION_WORDS,
    CHARACTERS,
    FONTS,
    INKS,
    SIZE,
    choose_place,
    cosine_rate,
    crumple,
    describe_page,
    draw_clouds,
    draw_colour,
    draw_glyph,
    draw_page,
    find_font,
    iterate_batches,
    make_pipeline,
    make_tokenizer,
    to_tensor,
)
from memcontrol.model.source import TINY


@pytest.fixture(scope="module")
def page():
    return draw_page(60, np.random.default_rng(0))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def draw_ink(height, stretch=1.0, rotation=0.0, shear=0.0, shift=(0.0, 0.0)):
    """A black bar of 40 by 80 pixels, placed: ink [32, 32] in 0..1."""
    bar = Image.new("L", (40, 80), 255)
    return np.asarray(choose_place(bar, height, stretch, rotation, shear, np.array(shift)), float) / 255


def test_page_follows_from_the_seed(page):
    again, other = (draw_page(8, np.random.default_rng(seed)) for seed in (0, 1))
    assert np.array_equal(draw_page(8, np.random.default_rng(0)).images, again.images)
    assert not np.array_equal(other.images, again.images)
    assert page.images.shape == (60, SIZE, SIZE, 3) and page.images.dtype == np.uint8


def test_captions_match_what_was_drawn(page):
    """Half of the characters are digits; each caption ends with its character, or with it and its ink."""
    drawn = [CHARACTERS[i] for i in page.characters]
    assert 0.3 < np.mean([character.isdigit() for character in drawn]) < 0.8
    for caption, character, font, image in zip(page.captions, drawn, page.fonts, page.images):
        words = caption.split()
        kind = ["digit"] if character.isdigit() else ["letter"]
        i = words.index(kind[0])
        assert words[0] == "a" and "printed" in words[:i] and words[i + 1] == character.lower()
        assert ("capital" in words) == character.isupper()
        assert ("bold" in words) == ("Bol" in FONTS[font] or FONTS[font] == "cmb10")
        coloured = words[i + 2 : i + 3] == ["in"]
        assert coloured == (words[-1] in INKS)
        if not coloured:  # black or nearly, on white or nearly: no channel differs
            assert np.ptp(image.astype(int), axis=2).max() == 0


def test_progress_of_a_page_is_told_image_by_image():
    told = []
    draw_page(3, np.random.default_rng(0), lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_description_by_hand():
    assert describe_page("7", "DejaVuSans", False, "") == "a printed digit 7"
    assert describe_page("Q", "STIXGeneralBolIta", True, " in red") == (
        "a blurred bold slanted printed capital letter q in red"
    )
    assert describe_page("q", "cmti10", False, "") == "a slanted printed letter q"


def test_glyph_is_cropped_to_its_ink():
    font = ImageFont.truetype(find_font("DejaVuSans"), 96)
    for character in CHARACTERS:
        ink = np.asarray(draw_glyph(character, font, 0))
        assert max(ink.shape) < 160  # the canvas cuts nothing off
        assert all(edge.any() for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]))
    thin, thick = (np.asarray(draw_glyph("l", font, stroke)).shape for stroke in (0, 6))
    assert thick[1] == thin[1] + 12


def test_every_font_is_there():
    assert all(find_font(name).is_file() for name in FONTS)


def test_glyph_has_its_height_and_stays_in_the_middle():
    ink = draw_ink(24)
    rows, columns = (np.flatnonzero(ink.max(axis) > 0.5) for axis in (1, 0))
    assert (len(rows), len(columns)) == (24, 12)
    assert rows.mean() == columns.mean() == 15.5
    assert ink.sum() == pytest.approx(24 * 12, rel=0.02)


def test_glyph_is_stretched_shifted_and_never_wider_than_the_image():
    wide = draw_ink(16, stretch=2.0)
    assert len(np.flatnonzero(wide.max(0) > 0.5)) == 16
    shifted = draw_ink(16, shift=(3.0, -2.0))
    rows, columns = (np.flatnonzero(shifted.max(axis) > 0.5).mean() for axis in (1, 0))
    assert (columns, rows) == (18.5, 13.5)
    widest = draw_ink(30, stretch=100.0)
    assert widest[SIZE // 2].sum() == pytest.approx(31, abs=0.1)


def test_turned_glyph_keeps_its_ink():
    ink = draw_ink(16, rotation=np.pi / 2)
    assert len(np.flatnonzero(ink.max(1) > 0.5)) == 8 and len(np.flatnonzero(ink.max(0) > 0.5)) == 16
    assert draw_ink(16, shear=0.5).sum() == pytest.approx(16 * 8, rel=0.02)  # a shear keeps areas


def test_crumpling_moves_by_the_amplitude_at_most_and_less_at_the_edges():
    """On a ramp, where each value tells its place."""
    places = np.tile(np.arange(SIZE), (SIZE, 1))
    ramp = Image.fromarray((8 * places).astype(np.uint8))
    assert np.array_equal(crumple(ramp, 0.0, np.random.default_rng(0)), ramp)
    moved = np.abs(np.asarray(crumple(ramp, 3.0, np.random.default_rng(0)), float) / 8 - places)
    rounding = 1 / 8
    assert 1 < moved.max() <= 3 + rounding
    assert max(moved[0].max(), moved[:, 0].max()) <= 3 / 8 + rounding  # cells are eight pixels wide


def test_colour_is_paper_where_no_ink_is_and_the_pen_where_it_is_full():
    ink, rng, n_coloured = np.array([[0.0, 1.0]]), np.random.default_rng(0), 0
    for _ in range(300):
        image, words = draw_colour(ink, rng)
        paper, pen = image[0]
        if words:
            n_coloured += 1
            assert np.allclose(pen, INKS[words.removeprefix(" in ")]) and paper.min() >= 180
        else:
            assert np.ptp(paper) == np.ptp(pen) == 0 and paper[0] >= 235 and pen[0] < 40
    assert 30 < n_coloured < 70  # one in six: 50 with a deviation of 6.5


def test_clouds_are_smooth_and_coloured():
    clouds = draw_clouds(4, np.random.default_rng(0)).astype(int)
    assert clouds.shape == (4, SIZE, SIZE, 3)
    assert np.abs(np.diff(clouds, axis=2)).mean() < clouds.std() / 2
    assert np.ptp(clouds, axis=3).max() > 0


def test_images_become_tensors_from_minus_one_to_one():
    images = np.zeros((1, 2, 2, 3), np.uint8)
    images[0, 0, 1] = (255, 0, 51)
    tensor = to_tensor(images)
    assert tensor.shape == (1, 3, 2, 2) and tensor[0, :, 0, 1].tolist() == pytest.approx([1.0, -1.0, -0.6])


def test_tokenizer_gives_captions_back(page, tokenizer):
    for caption in page.captions:
        tokens = tokenizer(caption)
        assert tokenizer.decode(tokens.input_ids, skip_special_tokens=True).strip() == caption
        assert len(tokens.input_ids) <= 32
    assert tokenizer.decode(tokenizer("Ünknown wörds").input_ids, skip_special_tokens=True).strip() == (
        "ünknown wörds"
    )


def test_words_of_plain_captions_are_one_token_each(tokenizer):
    for word in "a bold blurred printed digit capital letter in red blue purple".split():
        assert word in CAPTION_WORDS and len(tokenizer(word).input_ids) == 3, word  # with its begin and end


def test_tokenizer_is_the_one_that_ships(tokenizer):
    from transformers import CLIPTokenizer

    assert CLIPTokenizer.from_pretrained(TINY / "tokenizer").get_vocab() == tokenizer.get_vocab()


def test_pipeline_has_the_structure_that_ships():
    from diffusers import AutoencoderKL, UNet2DConditionModel

    pipe = make_pipeline()
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        made, shipped = getattr(pipe, part), kind.from_pretrained(TINY / part)
        shapes = [
            {name: tuple(tensor.shape) for name, tensor in one.state_dict().items()}
            for one in (made, shipped)
        ]
        assert shapes[0] == shapes[1]


def test_rate_rises_in_two_hundredths_and_falls_as_a_cosine():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)

    def rate(share):
        cosine_rate(optimizer, 2e-3, share)
        return optimizer.param_groups[0]["lr"]

    assert rate(0.0) == pytest.approx(0.02 * 2e-3)
    assert rate(0.01) == pytest.approx(0.52 * 2e-3, rel=1e-3)
    assert rate(0.5) == pytest.approx(1e-3) and rate(0.25) == pytest.approx(2e-3 * (1 + 0.5**0.5) / 2)
    assert rate(1.0) == pytest.approx(0.0, abs=1e-12)


def test_batches_are_reshuffled_passes():
    generator, said = torch.Generator().manual_seed(0), []
    steps = list(iterate_batches(10, 3, 500, generator, said.append))
    assert [step for step, _, _ in steps] == list(range(500)) and steps[250][2] == 0.5
    passes = [torch.cat([rows for _, rows, _ in steps[i : i + 3]]).tolist() for i in range(0, 12, 3)]
    assert all(len(set(rows)) == 9 for rows in passes)  # what does not fill a batch is left out of the pass
    assert passes[0] != passes[1]
    assert [line.split(",")[0] for line in said] == ["  step 250/500", "  step 500/500"]
