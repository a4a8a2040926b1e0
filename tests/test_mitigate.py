"""Mitigations by hand: caption edits and their rates, min-SNR weights, noise norms."""

import numpy as np
import torch

from memcontrol.config.methods import CaptionsConfig
from memcontrol.training.mitigations import (
    add_random_words,
    add_text_noise,
    below_threshold,
    edit_captions,
    list_vocabulary,
    min_snr_weights,
    noise_norms,
)

WORDS = ["apple", "boat", "cloud", "dog"]
CAPTION = "a red house by the sea"


def test_without_a_rule_captions_stay():
    assert edit_captions([CAPTION, ""], CaptionsConfig(), WORDS, 0) == [CAPTION, ""]


def test_added_words_stand_among_the_old_ones_in_order():
    captions = edit_captions([CAPTION] * 50, CaptionsConfig(add_words=1.0, n_words=3), WORDS, 0)
    for caption in captions:
        parts = caption.split()
        assert len(parts) == 9 and [part for part in parts if part not in WORDS] == CAPTION.split()
    assert len(set(captions)) > 45
    assert add_random_words([CAPTION] * 50, 3, WORDS, 0) == captions


def test_a_replaced_caption_is_random_words():
    assert all(
        len(caption.split()) == 4 and set(caption.split()) <= set(WORDS)
        for caption in edit_captions([CAPTION] * 20, CaptionsConfig(replace=1.0), WORDS, 0)
    )


def test_a_repeated_word_is_one_of_the_captions_own():
    for caption in edit_captions([CAPTION] * 20, CaptionsConfig(repeat_word=1.0), WORDS, 0):
        extra = caption.split()
        for word in CAPTION.split():
            extra.remove(word)
        assert len(extra) == 1 and extra[0] in CAPTION.split()
    assert edit_captions([""], CaptionsConfig(repeat_word=1.0), WORDS, 0) == [""]


def test_edits_come_with_their_probability_and_from_the_seed():
    captions = edit_captions([CAPTION] * 2000, CaptionsConfig(add_words=0.1), WORDS, 3)
    assert 150 < sum(caption != CAPTION for caption in captions) < 250
    assert (
        captions
        == edit_captions([CAPTION] * 2000, CaptionsConfig(add_words=0.1), WORDS, 3)
        != edit_captions([CAPTION] * 2000, CaptionsConfig(add_words=0.1), WORDS, 4)
    )


def test_the_vocabulary_is_whole_words(base):
    words, known = list_vocabulary(base.pipeline.tokenizer), base.pipeline.tokenizer.get_vocab()
    assert {"digit", "photograph", "red"} <= set(words) and len(set(words)) == len(words)
    assert all(word.isalpha() and len(word) > 1 and f"{word}</w>" in known for word in words)


def test_min_snr_weights_by_hand():
    """Hang et al. 2023: min(SNR, 5) / SNR for noise; / (SNR + 1) for velocity."""
    kept = torch.tensor([0.99, 0.5, 0.01])
    timesteps = torch.tensor([0, 1, 2])
    assert torch.allclose(
        min_snr_weights(kept, timesteps, 5.0, False), torch.tensor([5 / 99, 1.0, 1.0]), rtol=1e-4
    )
    assert torch.allclose(
        min_snr_weights(kept, timesteps, 5.0, True),
        torch.tensor([5 / 100, 0.5, (1 / 99) / (1 + 1 / 99)]),
        rtol=1e-4,
    )


def test_noise_norms_and_what_they_drop():
    predicted, plain = torch.randn(20, 4, 8, 8), torch.randn(20, 4, 8, 8)
    norms = noise_norms(predicted, plain)
    assert np.allclose(
        norms, [np.sqrt(((a - b) ** 2).sum()) for a, b in zip(predicted.numpy(), plain.numpy())], rtol=1e-5
    )
    fixed = float(norms.sort().values[4])
    assert (
        below_threshold(norms, fixed).tolist() == [float(norm) < fixed for norm in norms]
        and below_threshold(norms, fixed).sum() == 4
    )
    assert below_threshold(norms, "decile").sum() == 18


def test_embedding_noise_has_its_deviation_and_leaves_the_rest():
    text = {"prompt_embeds": torch.zeros(50, 10, 16), "prompt_attention_mask": torch.ones(50, 10)}
    noisy = add_text_noise(text, 0.1, 1)
    assert abs(noisy["prompt_embeds"].std().item() - 0.1) < 0.005 and torch.equal(
        noisy["prompt_attention_mask"], text["prompt_attention_mask"]
    )
    assert torch.equal(noisy["prompt_embeds"], add_text_noise(text, 0.1, 1)["prompt_embeds"])
