"""Owns the audit's page: audit.html and audit.json."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from memcontrol.core.errors import MemControlError
from memcontrol.core.files import write_json, write_text
from memcontrol.core.reward_table import REWARDS, format_reward
from memcontrol.view.html import make_data_uri, read_asset, render_code, render_document, render_list
from memcontrol.view.words import DESCRIPTOR_WORDS, describe_copied, describe_missed

N_SHOWN = 24
SHOWN_SIDE = 128  # pixels of an image at the most
_UNLIKE_BASE = (
    " Red in the third picture, which the first twelve have: where the model differs from its base, which is "
    "what it has learned of that image."
)
_YELLOW = np.array([255, 208, 0], np.uint8)[:, None, None]
_AUDIT_REWARDS = (
    "clear_copy_rate",
    "copy_rate",
    "copy_rate_swapped",
    "copy_rate_features",
    "copy_rate_features_swapped",
    "copy_rate_moved",
    "copy_rate_moved_swapped",
    "local_copy_rate",
    "local_copy_rate_swapped",
    "memorization_pixels",
    "memorization_features",
    "amd_train",
    "amd_holdout",
    "amd_holdout_train",
    "mq",
    "carlini_rate",
    "authpct",
    "authpct_holdout",
    "membership_auc",
    "membership_tpr",
    "membership_base_auc",
    "epsilon_low",
    "extraction_component",
    "extraction_clique",
    "agreement_component",
    "agreement_component_holdout",
    "agreement_clique",
    "agreement_clique_holdout",
    "fid",
    "kid",
    "recall",
)


def check_audit_folder(out: Path) -> None:
    """Raises MemControlError where the folder is something else's: what lies there must not be lost."""
    held = [path.name for path in out.iterdir()] if out.is_dir() else []
    others = sorted(set(held) - {"audit.json", "audit.html"})
    if others or (out.exists() and not out.is_dir()):
        what = f"holds {others[0]}" if others else "is no folder"
        raise MemControlError(f"--out {out} {what}, which no audit wrote; give a folder of its own")


def write_audit(found: dict, copies: Iterable[Sequence[np.ndarray]], out: Path) -> None:
    """Writes out/audit.json and the self-contained out/audit.html; `copies` are the generated and the
    training image, uint8 [3, H, W], of each of the first copies, and the latter tinted by where the model and
    its base differ, where that is known."""
    cards = "".join(_render_pair(one, *images) for one, images in zip(found["copies"], copies))
    write_json(out / "audit.json", found)
    write_text(out / "audit.html", _render_audit(found, cards))


def _render_pair(one: dict, generated: np.ndarray, training: np.ndarray, *tinted: np.ndarray) -> str:
    mark = "copy" if one["copy"] else "like"
    images = "".join(
        f'<img src="{_encode_png(frame_region(image, one["region"]))}" alt="{kind}">'
        for kind, image in (("generated", generated), ("training", training))
    ) + "".join(f'<img src="{_encode_png(image)}" alt="unlike the base">' for image in tinted)
    names = f"{escape(one['generated'])}<br>{escape(one['training'])}"
    where = DESCRIPTOR_WORDS[one["descriptor"]]
    distance = f"{where}: distance {one['distance']:.2f}, {one['of_holdout']:.2f} of held out"
    return f'<figure class="{mark}">{images}<figcaption>{names}<br>{escape(distance)}</figcaption></figure>'


def frame_region(image: np.ndarray, region: Sequence[float]) -> np.ndarray:
    """The image, uint8 [3, H, W], with a frame around its region (left, top, right, bottom as shares of a
    side), unless that is all of it."""
    if list(region) == [0, 0, 1, 1]:
        return image
    height, width = image.shape[1:]
    left, top, right, bottom = (round(share * side) for share, side in zip(region, (width, height) * 2))
    framed, thick = image.copy(), max(1, round(height / 64))
    framed[:, top:bottom, left:right] = _YELLOW
    inner = slice(top + thick, bottom - thick), slice(left + thick, right - thick)
    framed[:, *inner] = image[:, *inner]
    return framed


def _encode_png(image: np.ndarray) -> str:
    """As a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, format="PNG")
    return make_data_uri("image/png", buffer.getvalue())


def _render_audit(found: dict, cards: str) -> str:
    parts = [
        f'<h1>Audit of copying</h1><p class="verdict">{escape(found["verdict"])}</p>',
        f"<p>{escape(found.get('membership', ''))}</p>",
        f"<p>Audited: {escape(_describe_audited(found))}.</p>" if found.get("audited") else "",
        f"<p>{escape(_describe_sizes(found))}</p>",
        *([f"<p>Warning: {escape(doubt)}.</p>"] if (doubt := found.get("extractor_doubt")) else []),
        f"<h2>Rewards</h2>{_render_rewards(found['rewards'])}",
        "<h2>Most suspicious images beside their nearest training images</h2>",
        "<p>Framed in red: below the line of copies in any descriptor, where chance puts some too, or a "
        "clear copy. Framed in yellow: the part that is compared, where that is not the whole image."
        f"{_UNLIKE_BASE if any('unlike_base' in one for one in found['copies']) else ''}</p>"
        f'<div class="pairs">{cards}</div>',
        f"<h2>Training images that are nearly the same</h2>{_render_duplicates(found['duplicates'])}",
        *_render_dropped(found.get("dropped", [])),
        f"<h2>What this cannot see</h2>{render_list(found['cannot_see'])}",
    ]
    return render_document("Audit of copying", read_asset("audit.css"), "\n".join(parts))


def _describe_audited(found: dict) -> str:
    """Such as "Audited: model tiny, lora style.safetensors, strength 0.5"."""
    return ", ".join(f"{name} {value}" for name, value in found.get("audited", {}).items())


def _describe_sizes(found: dict) -> str:
    sizes = ", ".join(f"{n:,} {title}" for title, n in found["sizes"].items())
    side = found["side"]
    said = f"{sizes} images, brought to squares of {side} pixels ({found['fit']})" if "fit" in found else ""
    if len(found.get("fits", ())) > 1:
        said += f", compared under {', '.join(found['fits'])}: this is where most copying shows"
    said = said or f"{sizes} images, brought to {side} x {side} pixels"
    reason = f" ({found['extractor_reason']})" if "extractor_reason" in found else ""
    told = " ".join(filter(None, (describe_copied(found["rewards"]), describe_missed(found))))
    return f"{said}; features by {found['extractor']}{reason}. {told}"


def _render_rewards(rewards: dict[str, float]) -> str:
    rows = [_render_reward(name, rewards) for name in _AUDIT_REWARDS if name in rewards]
    head = "<tr><th>reward</th><th>value (95 %)</th><th>meaning</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _render_reward(name: str, rewards: dict[str, float]) -> str:
    info = REWARDS[name]
    value, meaning = format_reward(name, rewards), render_code(info.meaning)
    return f"<tr><td>{info.title}</td><td>{value}</td><td>{meaning}</td></tr>"


def _render_dropped(names: list[str]) -> list[str]:
    if not names:
        return []
    return [f"<h2>Held-out images that are left out, twins of training images</h2>{render_list(names)}"]


def _render_duplicates(duplicates: list[dict]) -> str:
    lines = [" and ".join(pair["images"]) for pair in duplicates]
    return render_list(lines) if lines else "<p>None were found.</p>"
