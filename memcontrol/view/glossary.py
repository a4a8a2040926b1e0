"""Owns what the report's terms mean, and that each is explained where it first stands."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape, unescape

from memcontrol.view.html import render_code

_TERMS = {  # by the words that stand for it, as a pattern, what it is called and means
    r"trials?": ("trial", "one fine-tuning of the base, with what was measured on its pictures"),
    r"fine-tun\w+": ("fine-tuning", "training a finished model further, on one's own images"),
    r"base": ("base", "the model as it was before fine-tuning"),
    r"front": (
        "front",
        "the trials that no other beats in everything that was to be good: what is left to choose among",
    ),
    r"anchors?": ("anchor", "a trial that every study has, to compare with: no training, plain PEFT, full"),
    r"full|full fine-tuning": ("full fine-tuning", "training all of the model's numbers"),
    r"plain PEFT": (
        "plain PEFT",
        "parameter-efficient fine-tuning in every group of layers: few numbers are trained, beside those of "
        "the model",
    ),
    r"pick": (
        "pick",
        "the trial that `memcontrol pick` chooses from the front: the chosen model of page one",
    ),
    r"masks?": ("mask", "which groups of layers are trained, and which are left as they were"),
    r"groups?": ("group", "of layers: parts of the network that are trained, or not, together"),
    r"held-out": ("held-out images", "real images of the same kind that nothing was trained on"),
    r"FID": (
        "FID",
        "Fréchet (Inception) distance: how far generated pictures as a whole are from held-out ones, in "
        "what an image-recognition network sees; 0 for the same, less is better",
    ),
    r"KID": ("KID", "kernel (Inception) distance: the same by another formula, right for few images too"),
    r"memorization|M": (
        "memorization, M",
        "how much nearer generated pictures lie to training images than to held-out ones; 0: no nearer",
    ),
    r"copied \(95 %\)": (
        "copied (95 %)",
        "copy rate: the share of pictures nearer to a training image than 99 % of real images are, and in "
        "brackets where it lies with 95 % certainty; about 1 % is chance",
    ),
    r"AUC": (
        "membership AUC",
        "how often an attacker who has the model, shown a training image and another, points at the right "
        "one; 0.5 is guessing",
    ),
    r"epsilon": (
        "epsilon",
        "of differential privacy: how much one image can change what the model does; the larger, the more",
    ),
    r"trained": ("trained", "as a column: the share of the model's numbers that was trained"),
    r"lora|LoRA": (
        "LoRA",
        "low-rank adaptation: what is learned is the product of two small matrices beside each layer",
    ),
    r"dora|loha|lokr|oft|ia3|ln_tuning": (
        "DoRA, LoHa, LoKr, OFT, IA3, LN tuning",
        "kin of LoRA: other small additions to a layer, learned beside its own numbers",
    ),
    r"attention|norm|bias": (
        "attention, norm, bias",
        "as methods: of the layers that a mask names, those of this kind are trained themselves",
    ),
    r"svdiff": ("SV-Diff", "only how strong each direction of a layer is (its singular values) is trained"),
    r"difffit": ("DiffFit", "only biases, norms and a factor for each layer are trained"),
    r"r\d+|ranks?": ("rank, r4", "the size of those matrices, here 4: the larger, the more can be learned"),
    r"lr|learning rates?": ("learning rate, lr", "how large a training step is"),
    r"denoiser": ("denoiser", "the network inside the model that turns noise into a picture, step by step"),
    r"blocks?": ("block", "a part of that network, in the order in which a picture passes through it"),
    r"hypervolume": ("hypervolume", "one number for how good the whole front is"),
    r"p (?:&lt;|<|=)": (
        "p",
        "how often chance alone would give as much; below 0.005 it is called something here",
    ),
    r"±|standard errors?": (
        "±",
        "standard error: the true figure lies within twice as much, in 95 of 100 cases",
    ),
    r"intervals?": ("95 % interval", "the range in which the true figure lies in 95 of 100 cases"),
    r"guidance": ("guidance", "how strongly a picture is drawn towards its caption"),
    r"seeds?": ("seed", "the number that all chance is drawn from: the same seed, the same chance"),
    r"shards?": ("shard", "a part of the training images, trained on by itself; results are averaged"),
    r"noise norm": (
        "noise norm",
        "how far a caption moves what the denoiser does: large where it is learned",
    ),
    r"sampler": ("sampler", "the rule that chooses what is tried next"),
    r"SHA-256": ("SHA-256", "a fingerprint: other images give another one"),
}


def gloss_sections(sections: Iterable[str]) -> list[str]:
    """HTML sections, each with the meanings of the terms that stand in it and in none before it, behind its
    heading."""
    left, glossed = dict(_TERMS), []
    for section in sections:
        text = _read_text(section)
        found = [pattern for pattern in left if re.search(rf"(?<![\w-])(?:{pattern})(?![\w-])", text)]
        terms = [left.pop(pattern) for pattern in found]
        glossed.append(section.replace("</h2>", f"</h2>{_render_terms(terms)}", 1) if terms else section)
    return glossed


def _read_text(section: str) -> str:
    """What a reader sees of it at once."""
    shown = re.sub(r"<(pre|details|style|title)\b.*?</\1>", " ", section, flags=re.DOTALL)
    return unescape(re.sub(r"<[^>]*>", " ", shown))


def _render_terms(terms: Iterable[tuple[str, str]]) -> str:
    said = "; ".join(f"<dfn>{escape(name)}</dfn>: {render_code(meaning)}" for name, meaning in terms)
    return f'<p class="terms">{said}.</p>'
