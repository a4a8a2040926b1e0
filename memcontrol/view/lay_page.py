"""Owns the report's first page, for who knows nothing of the field, as HTML: the verdict, the figures, pairs
of images, and what data protection asks."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from memcontrol.config.base import read_base
from memcontrol.core.published import publish_name
from memcontrol.core.run_folder import PAIRS_LAYOUT, RunFolder
from memcontrol.view.html import (
    make_data_uri,
    render_code,
    render_list,
    render_paragraph,
    render_section,
    render_table,
)
from memcontrol.view.lay_words import (
    LayModel,
    Subject,
    find_subject,
    list_lay_figures,
    list_not_looked_at,
    write_lay_certainty,
    write_lay_membership,
    write_lay_quality,
    write_lay_verdict,
)
from memcontrol.view.protection import PROTECTION_ANSWER, PROTECTION_QUESTION, list_protection_evidence

_N_PAIRS = 6  # of each model
_NEAREST = "The pictures that come nearest to a training image"


def render_lay_page(facts: Mapping[str, Any], with_images: bool) -> str:
    subject = find_subject(facts)
    parts = [
        f"<h1>{escape(facts['study'])}: does the model copy?</h1>",
        render_paragraph(_describe_purpose(facts)),
        f'<p class="verdict {subject.pick.grade if subject.pick else ""}">'
        f"{escape(write_lay_verdict(subject))}</p>",
        _render_answers(facts, subject),
        _render_figures(facts, subject),
        *([_render_nearest(subject)] if with_images and subject.pick else []),
        _render_protection(facts, subject),
    ]
    told = "".join(parts).replace(" %", "\N{NO-BREAK SPACE}%")
    return f'<div class="lay">{told}</div>'


def _describe_purpose(facts: Mapping[str, Any]) -> str:
    base = read_base(facts["config"]["base"]).without_paths()
    train = facts["data"].get("parts", {}).get("train", {}).get("images")
    images = publish_name(facts["config"]["data"]["path"])
    own = f"{train:,} images, those of “{images}”" if train else f"the images of “{images}”"
    return (
        f"A program that makes pictures, “{base}”, was trained further on {own}. Such a program may learn "
        "images by heart and give them back. The study trained different parts of it, to find one that "
        "learns to make such pictures without copying them: the chosen model."
    )


def _render_answers(facts: Mapping[str, Any], subject: Subject) -> str:
    answers = {
        "How sure is that?": write_lay_certainty(subject),
        "What could an attacker tell of who it was trained on?": write_lay_membership(subject),
        "Are its pictures any good?": write_lay_quality(subject),
    }
    rows = [f"<dt>{question}</dt><dd>{escape(said)}</dd>" for question, said in answers.items() if said]
    missing = render_list(list_not_looked_at(facts, subject))
    return f'<dl class="answers">{"".join(rows)}<dt>What was not looked at?</dt><dd>{missing}</dd></dl>'


def _render_figures(facts: Mapping[str, Any], subject: Subject) -> str:
    if subject.pick is None:
        return ""
    title = "Figures on test images" if subject.is_test else "Figures of the search, too good by some luck"
    rows = [
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells in list_lay_figures(subject)
    ]
    return render_section(
        title,
        render_paragraph(_describe_source(facts, subject), "note"),
        render_table(["", *subject.models], rows, "plain"),
        render_paragraph(
            "Ranges: where the true figure lies with 95 % certainty; ±: standard error.", "note"
        ),
    )


def _describe_source(facts: Mapping[str, Any], subject: Subject) -> str:
    if subject.is_test:
        test = facts["data"].get("parts", {}).get("test", {}).get("images")
        many = f"{test:,} test images" if test else "test images"
        both = "Both models were" if len(subject.models) > 1 else "The model was"
        return (
            f"{both} trained once more from a new start, and measured on {many}, which nothing was chosen "
            "by. They are the ones told of above."
        )
    others = " (others have been)" if facts["retrained"] else ""
    return (
        f"The chosen model has not been retrained{others}, so there are no figures on test images. These "
        "are of the search itself and optimistic: the best of many tries is partly lucky, and was chosen by "
        f"these very figures. `memcontrol retrain {facts['study']}.yaml` trains it anew and measures it "
        "on images that nothing was chosen by."
    )


def _render_nearest(subject: Subject) -> str:
    figures = [_render_model_pairs(name, model) for name, model in subject.models.items()]
    if not any(figures):
        return ""
    about = (
        "Of each pair the left picture was generated, and the right one is the training image nearest to it. "
        "A frame, and the words below, mark what a rule calls as near as a copy; a few are so by chance. "
        "This part shows training images."
    )
    return render_section(_NEAREST, render_paragraph(about, "note"), *figures)


def _render_model_pairs(name: str, model: LayModel) -> str:
    """Empty where its pictures are not on this machine, or from before they told where a pair lies in
    them."""
    pairs = cut_pairs(RunFolder(Path(model.run)).pairs_picture)
    if not pairs:
        return ""
    shown = "".join(_render_nearest_pair(*pair) for pair in pairs[:_N_PAIRS])
    return f'<figure><figcaption>{escape(name)}</figcaption><div class="pairs">{shown}</div></figure>'


def cut_pairs(path: Path) -> list[tuple[bytes, bytes, bool]]:
    """Of the last run that a picture of pairs shows, each generated image, the training image nearest to it,
    and whether a rule calls it a copy, as PNG; empty where the picture does not say where they lie."""
    if not path.is_file():
        return []
    with Image.open(path) as picture:
        told = picture.info.get(PAIRS_LAYOUT)
        if told is None:
            return []
        layout = json.loads(told)
        top, copies = layout["strips"][-1]["top"], layout["strips"][-1]["copies"]
        places = [layout["left"] + column * layout["step"] for column in range(len(copies))]
        tops = (top, top + layout["step"])
        cut = [[_cut_tile(picture, left, at, layout["side"]) for at in tops] for left in places]
    return [(generated, training, is_copy) for (generated, training), is_copy in zip(cut, copies)]


def _cut_tile(picture: Image.Image, left: int, top: int, side: int) -> bytes:
    buffer = io.BytesIO()
    picture.crop((left, top, left + side, top + side)).save(buffer, format="PNG")
    return buffer.getvalue()


def _render_nearest_pair(generated: bytes, training: bytes, is_copy: bool) -> str:
    kind, said = ("copy", "near as a copy") if is_copy else ("alike", "alike")
    images = "".join(
        f'<img alt="{what}" src="{make_data_uri("image/png", content)}">'
        for what, content in (("generated", generated), ("training image", training))
    )
    return f'<span class="pair {kind}">{images}<small>{said}</small></span>'


def _render_protection(facts: Mapping[str, Any], subject: Subject) -> str:
    rows = [
        f"<tr><td>{escape(kind)}</td><td data-label=here>{render_code(here)}</td>"
        f'<td data-label="not here">{render_code(missing)}</td></tr>'
        for kind, (here, missing) in list_protection_evidence(facts, subject).items()
    ]
    return render_section(
        "What data protection asks",
        render_paragraph(PROTECTION_QUESTION),
        render_paragraph(PROTECTION_ANSWER),
        render_table(["evidence", "what of it is here", "what is not"], rows, "stacked"),
    )
