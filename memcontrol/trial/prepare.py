"""Owns what must hold before the first trial: base, space, rewards and data fit each other; the split is
recorded."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from memcontrol.config.load import load_config
from memcontrol.config.settings import PRIVACY_KEY, apply_settings, load_study_space
from memcontrol.config.spec import Spec
from memcontrol.config.study import Config
from memcontrol.core.choice import Choice, thaw
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import read_json, write_json
from memcontrol.core.image_parts import CALIBRATION, DIGITS, PARTS
from memcontrol.core.run_folder import StudyFolder
from memcontrol.core.space import SearchSpace
from memcontrol.data.images import Images
from memcontrol.data.split import Split, dump_parts, load_parts
from memcontrol.data.twins import describe_plain
from memcontrol.model.adapter import check_space
from memcontrol.model.base import Base
from memcontrol.model.caption_length import describe_cut, find_limit
from memcontrol.model.cost import list_blocks
from memcontrol.model.families import Unconditional
from memcontrol.scoring.evidence import Evidence
from memcontrol.scoring.extractors import Extractor
from memcontrol.scoring.own_rewards import check_rewards, compute_own_reward, find_directions
from memcontrol.scoring.utility import FEWEST_OF_CLASS, MOST_CLASSES, Classes
from memcontrol.training.privacy import open_account
from memcontrol.trial.loaded import LoadedModels, TellStage, describe_images, tell_nobody
from memcontrol.trial.membership import plan_attack

_MADE_WITH = ("memcontrol", "torch", "diffusers", "peft", "transformers", "optuna")


def prepare_study(
    values: dict,
    folder: Path,
    loaded: LoadedModels,
    warn: Callable[[str], None],
    kept: Path | None = None,
    progress: TellStage = tell_nobody,
) -> dict:
    """Checks the config against base, space and data and writes split.json; what is read of images is kept in
    a file. Returns the parts' sizes and the objectives' directions.

    Raises MemControlError, also where the data is not what the study began with.
    """
    config = load_config(values)
    space = load_study_space(config)
    _check_sharded(config, space)
    _warn_of_device(config, warn)

    # What is measured, and with what.
    extractor = loaded.extractor(config.rewards.extractor)
    n_features = extractor.n_features
    check_rewards(config.rewards, n_features)
    if config.rewards.clip:
        loaded.clip(config.rewards.clip)

    # The base, and what is to be trained in it.
    base, place = loaded.base(config), StudyFolder(folder)
    base.source.check_pins(place.read_pins())
    for note in base.source.notes:
        warn(note)
    check_space(base.denoiser, space, config.shards_base)
    check_mitigations(config, base)
    _check_quantized(config, base)
    _check_low_memory(config, base)

    # The images, and whether a user's own rewards run on them.
    resolution = _choose_resolution(config, base)
    known = place.read_split() if place.split_file.is_file() else None
    tell = partial(progress, "read")
    split = load_parts(config.data, resolution, config.search.seed, warn, known, kept, tell)
    parts = split.parts
    for line in _describe_split(split):
        warn(line)
    _warn_of_cut_captions(base, parts, warn)
    _check_shards(config, parts["train"])
    _check_classes(config, parts, warn)
    _check_accounts(config, space, parts["train"])
    _try_own_rewards(config, parts, extractor)

    # What the study was begun with.
    if base.source.pins and not place.split_file.exists():
        write_json(place.base_file, {"id": config.base.id} | base.source.pins)
    _record_split(place, split, config, resolution)
    write_json(place.network_file, list_blocks(base.denoiser, space))
    record_extractor(place.extractor_file, extractor.id, config)
    if "fid" in config.rewards.objectives and len(parts["holdout"]) < 4 * n_features:
        warn(
            f"fid over {n_features} features against {len(parts['holdout'])} held-out images is coarse; "
            f"{4 * n_features} or more make it a fair measure"
        )
    return {
        "sizes": {part: len(images) for part, images in parts.items()},
        "directions": find_directions(config.rewards),
        "made_with": _list_versions() | ({"base commit": base.source.commit} if base.source.commit else {}),
    }


def encode_study(
    values: dict,
    folder: Path,
    loaded: LoadedModels,
    n_train: int,
    reference: str,
    progress: Callable[..., None],
) -> None:
    """Latents, encodings and reference features of a prepared study, before its first trial and outside that
    one's time limit. Several processes share the work."""
    config = load_config(values)
    space = load_study_space(config)
    spec = Spec(config, space, Choice((), "none", 0.0), folder, "encode", reference, n_train)
    loaded.make_material(spec, progress)
    loaded.load_unseen(spec, reference, progress)
    plan_attack(spec, loaded, progress)
    parts = loaded.parts(spec)
    third = [parts[CALIBRATION]] if CALIBRATION in parts else []
    for images in (loaded.train_images(spec), parts[reference], *third):
        loaded.views(images, config.rewards.extractor, StudyFolder(folder).cache, progress)


def _list_versions() -> dict[str, str]:
    """The versions and the device that the study's numbers were made with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    return {"device": device, "python": platform.python_version()} | {
        name: version(name) for name in _MADE_WITH
    }


def _try_own_rewards(config: Config, parts: dict[str, Images], extractor: Extractor) -> None:
    """Calls each reward of the user's once, held-out images taking the place of generated ones, so that a
    mistake in it costs no training. Raises MemControlError."""
    if not config.rewards.functions:
        return
    known, held = (
        parts[name].take(range(len(parts[name]))[: config.rewards.n_samples]) for name in ("train", "holdout")
    )
    pixels, train = held.pixels(), known.pixels()
    seen, views = (describe_images([images], extractor.extract) for images in (pixels, train))
    classes = Classes(held.labels, known.labels, held.labels) if config.data.label else None
    evidence = Evidence(seen, views, seen, images=pixels, captions=tuple(held.captions), classes=classes)
    for place in config.rewards.functions.values():
        compute_own_reward(place, evidence)


def check_mitigations(config: Config, base: Base) -> None:
    """Raises MemControlError for a setting that means nothing for this kind of base."""
    inner, rewards = config.inner, config.rewards
    on_text = {
        "inner.captions": inner.captions.any,
        "inner.embedding_noise": inner.embedding_noise,
        "inner.norm_threshold": inner.norm_threshold,
        "rewards.random_words": rewards.random_words,
        "rewards.embedding_noise": rewards.embedding_noise,
    }
    for key, value in on_text.items():
        if value and isinstance(base.family, Unconditional):
            raise MemControlError(f"{key} changes captions and base '{config.base}' has none; take it out")
    if config.data.label and isinstance(base.family, Unconditional):
        raise MemControlError(
            f"data.label is '{config.data.label}', and base '{config.base}' has no captions to say what "
            "class a sample is of; take it out"
        )
    if inner.min_snr and base.family.flow:
        raise MemControlError(
            f"inner.min_snr weighs the steps of a diffusion and base '{config.base}' is a flow; take it out"
        )
    if rewards.guidance_from and not base.family.guides_late:
        raise MemControlError(
            f"rewards.guidance_from is {rewards.guidance_from}; the pipeline of base "
            f"'{config.base}' cannot begin guidance late; take it out"
        )


def _check_quantized(config: Config, base: Base) -> None:
    """Raises MemControlError for what a quantised base cannot do."""
    if base.precision.quantized is None:
        return
    refused = {
        "search.anchors": "full" in config.search.anchors and "full fine-tuning; set [none, all]",
        "inner.from_scratch": config.inner.from_scratch and "weights drawn anew; take it out",
        "inner.ensemble.average": config.inner.ensemble.shards > 1
        and config.inner.ensemble.average == "refactored"
        and "dense offsets of weights; set shared_a",
    }
    for key, reason in refused.items():
        if reason:
            raise MemControlError(
                f"base_precision is {base.precision.quantized}, under which {key} asks for what quantised "
                f"weights cannot take: {reason}"
            )


def _warn_of_cut_captions(base: Base, parts: dict[str, Images], warn: Callable[[str], None]) -> None:
    found = find_limit(base.pipeline, base.source.base.max_sequence_length)
    records = [record for images in parts.values() for record in images.records]
    captions = [caption for record in records for caption in (record.caption, *record.further)]
    if found and (said := describe_cut(*found, captions)):
        warn(said)


def _check_low_memory(config: Config, base: Base) -> None:
    """Raises MemControlError where gradients would have to be scaled in the weights' own float16."""
    if config.inner.low_memory_full and base.precision.weights == torch.float16:
        raise MemControlError(
            "inner.low_memory_full trains the weights in their own type, and float16 is too narrow for that; "
            "set base_precision: bfloat16 or float32, or leave low_memory_full out"
        )


def _warn_of_device(config: Config, warn: Callable[[str], None]) -> None:
    """Of what is asked for on a machine that has not got it."""
    if torch.cuda.is_available():
        return
    if config.base_precision in ("bfloat16", "float16"):
        warn(
            f"base_precision is {config.base_precision}: without a GPU some fourteen times as slow as float32"
        )
    if config.search.gpus_per_trial > 1 and config.search.executor in ("local", "inline"):
        warn(
            f"search.gpus_per_trial is {config.search.gpus_per_trial}, and there is no GPU here: a trial's "
            "processes share the cores"
        )


def _check_sharded(config: Config, space: SearchSpace) -> None:
    """Raises MemControlError for what a sharded or offloaded base cannot do."""
    if not config.shards_base:
        return
    shards, kept_apart = config.inner.ensemble, {"lora", "ia3"}
    makes_offsets = shards.average == "refactored" or not kept_apart.issuperset(space.methods)
    refused = {
        "base_precision": config.base_precision in ("int8", "nf4") and "weights in 16 or 32 bits; set auto",
        "search.anchors": "full" in config.search.anchors and "no full fine-tuning; set [none, all]",
        "inner.from_scratch": config.inner.from_scratch and "weights as they were read; take it out",
        "inner.ensemble": shards.shards > 1
        and makes_offsets
        and "means without dense offsets of weights; set average: shared_a, and keep to lora or ia3",
    }
    n_gpus = config.search.gpus_per_trial
    said = (
        f"search.gpus_per_trial is {n_gpus}, which shards the base"
        if n_gpus > 1
        else f"base_offload is {config.base_offload}, which keeps the base's weights in host memory"
    )
    for other, reason in refused.items():
        if reason:
            raise MemControlError(f"{said}; {other} must then ask for {reason}")


def _check_shards(config: Config, images: Images) -> None:
    """Raises MemControlError where a shard would be empty."""
    n_train, n_shards = config.search.count_train(len(images)), config.inner.ensemble.shards
    if n_shards > n_train:
        raise MemControlError(
            f"inner.ensemble.shards is {n_shards} and there are {n_train} training images; ask for fewer"
        )
    n_groups = len(set(images.groups[:n_train]))
    if config.data.group and n_shards > n_groups and not config.inner.ensemble.split_groups:
        raise MemControlError(
            f"inner.ensemble.shards is {n_shards} and the training images are of {n_groups} groups "
            "(data.group), none of which may be in two shards; ask for fewer, or set "
            "inner.ensemble.split_groups: true"
        )


def _check_classes(config: Config, parts: Mapping[str, Images], warn: Callable[[str], None]) -> None:
    """Tells of classes that are too few images to be told, or in one part alone. Raises MemControlError where
    there are too many to be classes, or too few to measure an objective by."""
    if not config.data.label:
        return
    n_train = config.search.count_train(len(parts["train"]))
    sizes = {part: Counter(parts[part].labels) for part in PARTS}
    sizes["train"] = Counter(parts["train"].labels[:n_train])
    names = sorted(set().union(*sizes.values()))
    if len(names) > MOST_CLASSES:
        raise MemControlError(
            f"data.label is '{config.data.label}', which gives {len(names)} classes, such as '{names[0]}'; "
            f"at most {MOST_CLASSES} are told apart: name what says the class, or take it out"
        )
    few = [name for name in names if min(count[name] for count in sizes.values()) < FEWEST_OF_CLASS]
    asked = [name for name in (*config.rewards.names, *config.rewards.limits) if name.startswith("utility")]
    if len(names) - len(few) < 2 and asked:
        raise MemControlError(
            f"'{asked[0]}' needs two classes with {FEWEST_OF_CLASS} images or more in each part, and by "
            f"data.label '{config.data.label}' there are {len(names) - len(few)}; "
            "name what says the class, or add images"
        )
    if few:
        said = ", ".join(f"{count[few[0]]} {part}" for part, count in sizes.items())
        warn(
            f"data.label: of {len(names)} classes {len(few)} have under {FEWEST_OF_CLASS} images in a part, "
            f"such as '{few[0]}' ({said}): utility says little of them"
        )
    if shared := _find_shared_caption(parts["train"]):
        warn(
            f"data.label: images of several classes have the caption '{shared[0]}': it does not tell a model "
            "which class is meant, and utility is near chance where most are so"
        )


def _find_shared_caption(images: Images) -> list[str]:
    """One of several classes, where there is any."""
    classes: dict[str, str] = {}
    for caption, label in zip(images.captions, images.labels):
        if classes.setdefault(caption, label) != label:
            return [caption]
    return []


def _check_accounts(config: Config, space: SearchSpace, images: Images) -> None:
    """Raises MemControlError where a private fine-tuning that a choice may ask for has no account on these
    images."""
    searched = space.over[PRIVACY_KEY].options if PRIVACY_KEY in space.over else ()
    rules = [{PRIVACY_KEY: thaw(one)} for one in searched if one is not None]
    units = images.groups[: config.search.count_train(len(images))]
    for rule in [{}, *rules]:
        inner = apply_settings(config, rule, "search.over").inner
        if inner.privacy:
            open_account(inner, units)


def _choose_resolution(config: Config, base) -> int:
    resolution, step = config.data.resolution or base.resolution, base.side_multiple
    if resolution % step:
        raise MemControlError(
            f"data.resolution is {resolution}; base '{config.base}' needs a multiple of {step}"
        )
    return resolution


def record_extractor(path: Path, pinned: str, config: Config) -> None:
    """Numbers made with different feature networks are never compared: the study keeps to the one it began
    with."""
    if not path.exists():
        write_json(path, pinned)
    elif read_json(path) != pinned:
        raise MemControlError(
            f"the feature network is {pinned}, and study '{config.name}' began with "
            f"{read_json(path)}; restore it, or choose another name"
        )


def _record_split(place: StudyFolder, split: Split, config: Config, resolution: int) -> None:
    train = split.parts["train"]
    source, greys = train.source, train.greys
    record = {
        "source": source if source == DIGITS else str(Path(source).resolve()),
        "resolution": resolution,
        "fit": config.data.fit,
        "greys": [greys.black, greys.white] if greys else None,
        **split.found,
        "parts": dump_parts(split.parts),
    }
    known = place.read_split() if place.split_file.is_file() else record
    if known["parts"] == record["parts"] and known.get("greys") == record["greys"]:
        place.write_split(record)  # again, where the images have moved
    else:
        what = _tell_difference(known["parts"], record["parts"])
        raise MemControlError(
            f"{what} not those that study '{config.name}' began with (recorded in {place.split_file}); "
            "restore them, or choose another name"
        )


def _tell_difference(known: Mapping[str, list[dict]], found: Mapping[str, list[dict]]) -> str:
    """What of the parts is not as it was, and the first image that shows it."""
    before, now = (
        {(part, i): row for part, rows in parts.items() for i, row in enumerate(rows)}
        for parts in (known, found)
    )
    for what, keys in (("images", ("name", "digest")), ("captions", ("caption", "further"))):
        for place in dict.fromkeys((*before, *now)):
            was, row = before.get(place, {}), now.get(place, {})
            if any(was.get(key) != row.get(key) for key in keys):
                return f"the {what} (the first that differs: '{(row or was)['name']}') are"
    return "the groups or classes of images, or the scale of their greys, are"


def _describe_split(split: Split) -> list[str]:
    """What a person should know of how the images were dealt."""
    lines = []
    if groups := split.found.get("groups"):
        said = ", ".join(f"{len(split.parts[part])} images of {n} {part}" for part, n in groups.items())
        lines.append(f"groups: {said}")
    twins = split.found.get("twins", {})
    if pairs := twins.get("pairs"):
        lines.append(f"{len(pairs)} pairs of images are nearly the same, such as {' and '.join(pairs[0])}")
    return [*lines, *describe_plain(twins.get("plain", 0))]
