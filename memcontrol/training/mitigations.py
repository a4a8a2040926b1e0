"""Owns published mitigations of copying that the inner loop can compare or combine: caption edits, weights,
noise norms."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from memcontrol.config.methods import CaptionsConfig
from memcontrol.core.seeds import derive_seed
from memcontrol.model.families import Text


def edit_captions(
    captions: Sequence[str], rule: CaptionsConfig, words: Sequence[str], seed: int
) -> list[str]:
    """The captions with the rule's edits, each drawn by its probability (Somepalli et al. 2023, arXiv
    2305.20086, section 5)."""
    draw = random.Random(seed)
    return [_edit_caption(caption, rule, words, draw) for caption in captions]


def _edit_caption(caption: str, rule: CaptionsConfig, words: Sequence[str], draw: random.Random) -> str:
    replace, repeat, add = (
        draw.random() < share for share in (rule.replace, rule.repeat_word, rule.add_words)
    )
    if replace:
        return " ".join(draw.choices(words, k=rule.n_words))
    if repeat and caption.split():
        caption = _insert_words(caption, [draw.choice(caption.split())], draw)
    return _insert_words(caption, draw.choices(words, k=rule.n_words), draw) if add else caption


def _insert_words(caption: str, words: Sequence[str], draw: random.Random) -> str:
    """The caption with each word at a random place."""
    parts = caption.split()
    for word in words:
        parts.insert(draw.randint(0, len(parts)), word)
    return " ".join(parts)


def add_random_words(captions: Sequence[str], n_words: int, words: Sequence[str], seed: int) -> list[str]:
    """Each prompt with n random words at random places, a mitigation at inference (arXiv 2305.20086, section
    6)."""
    return edit_captions(captions, CaptionsConfig(add_words=1.0, n_words=n_words), words, seed)


def list_vocabulary(tokenizer) -> list[str]:
    """Whole words of two Latin letters or more in a tokenizer's vocabulary, in the order of their numbers."""
    pieces = [piece for piece, _ in sorted(tokenizer.get_vocab().items(), key=lambda piece: piece[1])]
    # marks of a word's end or start
    whole = [piece for piece in pieces if piece.endswith("</w>") or piece.startswith(("\u2581", "\u0120"))]
    words = (piece.removesuffix("</w>").lstrip("\u2581\u0120") for piece in whole or pieces)
    return list(dict.fromkeys(word for word in words if len(word) > 1 and word.isascii() and word.isalpha()))


def add_text_noise(text: Text, deviation: float, seed: int) -> Text:
    """Encodings with Gaussian noise on the captions' embeddings [B, L, D] (arXiv 2305.20086, section 6)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "embedding noise"))
    noise = torch.randn(text["prompt_embeds"].shape, generator=generator).to(text["prompt_embeds"])
    return {**text, "prompt_embeds": text["prompt_embeds"] + deviation * noise}


def min_snr_weights(alphas_cumprod: Tensor, timesteps: Tensor, gamma: float, velocity: bool) -> Tensor:
    """Loss weights [B]: min(SNR, gamma) / SNR for noise, / (SNR + 1) for velocity (Hang et al. 2023, arXiv
    2303.09556)."""
    kept = alphas_cumprod.to(timesteps.device)[timesteps].double()
    snr = kept / (1 - kept)
    return (snr.clamp(max=gamma) / (snr + velocity)).float()


def noise_norms(predicted: Tensor, without_caption: Tensor) -> Tensor:
    """|| eps(z_t, t, caption) - eps(z_t, t, "") ||_2 [B] (Wen et al. 2024, arXiv 2407.21720): large where a
    caption is memorized."""
    return (predicted - without_caption).float().flatten(1).norm(dim=1)


def below_threshold(norms: Tensor, threshold: float | Literal["decile"]) -> Tensor:
    """Which images stay [B]: norms below a fixed threshold, or below the batch's 0.9 quantile (`decile`)."""
    limit = torch.quantile(norms, 0.9) if threshold == "decile" else threshold
    return norms < limit
