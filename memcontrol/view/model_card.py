"""Owns the model card of an exported folder: README.md with the metadata that the Hugging Face Hub reads, its
license, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from memcontrol.config.base import CHECKPOINT, BaseConfig
from memcontrol.config.spec import Spec
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import write_text
from memcontrol.core.published import publish_name
from memcontrol.core.reward_table import BLIND_SPOTS, REWARDS, UTILITIES, format_reward
from memcontrol.core.run_folder import StudyFolder
from memcontrol.core.version import __version__
from memcontrol.view.words import (
    describe_choice,
    describe_copied,
    describe_membership,
    describe_network_doubt,
    describe_privacy,
    format_markdown_table,
    name_groups,
    write_verdict,
)

_CARD_REWARDS = (
    "fid",
    "kid",
    "recall",
    "utility",
    "utility_real",
    "utility_network",
    "utility_network_real",
    "memorization",
    "copy_rate",
    "copy_rate_features",
    "clear_copy_rate",
    "carlini_rate",
    "authpct",
    "extraction_clique",
    "membership_auc",
    "membership_tpr",
    "epsilon_low",
    "epsilon",
    "loss_gap",
)
_LIMITS = (
    *BLIND_SPOTS,
    "It was fine-tuned on few images of one kind: outside of it, nothing is known of its quality.",
)
_EXPORTED_WITH = ("torch", "diffusers", "peft")
_FEWEST_NAMED = 5  # training images of a class that a card names
# what the rewards call held-out images, by the part that they are
_UNSEEN = {"holdout": "held-out", "test": "test"}
_PART_TITLES = {
    "holdout": "images held out of the search",
    "test": "test images that neither the fine-tuning nor the search has seen",
}


# what the Hub takes as `license` (huggingface.co/docs/hub/repositories-licenses), beside `other`
HUB_LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl apple-ascl
    apple-amlr mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown
    """.split()
)
_OTHER, _UNKNOWN = "other", "unknown"


@dataclass(frozen=True)
class License:
    """By the Hub's identifier, or `other` by a name and where its text is."""

    id: str = _UNKNOWN
    name: str | None = None
    link: str | None = None

    @property
    def metadata(self) -> dict[str, str]:
        more = {"license_name": self.name, "license_link": self.link} if self.id == _OTHER else {}
        return {"license": self.id, **{key: value for key, value in more.items() if value}}


def choose_license(given: str | None, link: str | None) -> License | None:
    """The one that is asked for; None where none is. Raises MemControlError for a name that is not the Hub's
    and has no link."""
    if given is None:
        if link:
            raise MemControlError("--license-link is given without --license; name the license too")
        return None
    if given in HUB_LICENSES:
        return License(given)
    if given == _OTHER or not link:
        raise MemControlError(
            f"license '{given}' is no identifier of the Hub's; give one, such as apache-2.0 or "
            "creativeml-openrail-m, or a name of your own and with it --license-link, where its text is"
        )
    return License(_OTHER, _write_license_name(given), link)


def _write_license_name(text: str) -> str:
    """As the Hub takes it: small letters, digits, dots and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def parse_license(card: str | None, files: str = "", page: str | None = None) -> License:
    """What the base's card says. `files` is the address that a link to a file beside the card begins with,
    `page` is where the base is to be found, on the Hub."""
    values = _read_card_head(card or "")
    said, link, name = (values.get(key) for key in ("license", "license_link", "license_name"))
    if isinstance(said, list):
        said = said[0] if len(said) == 1 else None
    if not isinstance(said, str) or not said:
        return License()
    if said in HUB_LICENSES:
        return License(said)
    known = _write_license_name(str(name or (said if said != _OTHER else "")))
    where = page if not isinstance(link, str) else link if ":" in link else f"{files}{link}"
    return License(_OTHER, known or "license-of-the-base", where) if known or where else License()


def _read_card_head(card: str) -> dict[str, Any]:
    """The metadata of a card; empty where there is none, or it is broken."""
    found = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    try:
        values = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


@dataclass(frozen=True)
class Shown:
    """What a card shows of the exported folder: the `code` that loads it and draws an image of a `prompt`,
    none of an unconditional model; the file of the `picture` that it gives, or why it is `withheld`; the
    `instance_prompt`, where all training images had the same; and what kind of export it is."""

    code: str
    prompt: str | None = None
    picture: str | None = None
    withheld: str = ""
    instance_prompt: str | None = None
    is_adapter: bool = False
    is_lora: bool = False
    is_conditional: bool = True


def write_card(out: Path, spec: Spec, result: dict[str, Any], shown: Shown, license: License) -> None:
    head = yaml.safe_dump(make_metadata(spec, shown, license), sort_keys=False, allow_unicode=True)
    text = f"---\n{head}---\n\n{compose_body(spec, result, shown, license)}"
    write_text(out / "README.md", text, published=True)


def _find_baseline(spec: Spec, result: dict[str, Any]) -> dict[str, Any]:
    """Full fine-tuning that was retrained beside the run and measured alike; empty where there is none."""
    for run in StudyFolder(spec.study_folder).list_retrained():
        other = run.read_result()
        is_alike = other.get("measured_with") == result["measured_with"]
        if other["choice"]["method"] == "full" and is_alike:
            return other
    return {}


def make_metadata(spec: Spec, shown: Shown, license: License) -> dict[str, Any]:
    """The base only where the Hub knows it: a path of this machine is nobody's business. Relations are the
    Hub's: an adapter needs its base, a finetune has changed weights of its own; a denoiser that was drawn
    anew is neither."""
    task = "text-to-image" if shown.is_conditional else "unconditional-image-generation"
    base, known = spec.config.base.id, {}
    if _is_public(base) and not spec.config.inner.from_scratch:
        known = {"base_model": base, "base_model_relation": "adapter" if shown.is_adapter else "finetune"}
    pictured: dict[str, Any] = {}
    if shown.picture:
        pictured = {"widget": [{"text": shown.prompt or " ", "output": {"url": shown.picture}}]}
    if shown.instance_prompt:
        pictured["instance_prompt"] = shown.instance_prompt
    return {
        **license.metadata,
        "library_name": "diffusers",
        "pipeline_tag": task,
        **known,
        "tags": _list_tags(spec, shown, task),
        **pictured,
    }


def _list_tags(spec: Spec, shown: Shown, task: str) -> list[str]:
    """By the last one the Hub shows a LoRA's pictures first."""
    methods = [method for method in spec.choice.methods if method not in ("none", "full")]
    lora = ["lora"] if shown.is_lora else []
    template = ["template:sd-lora"] if shown.is_lora and shown.picture else []
    return list(dict.fromkeys(["diffusers", task, "memcontrol", *lora, *methods, *template]))


def _is_public(base: str) -> bool:
    """Whether it is a name that the Hub knows."""
    return base != "tiny" and not base.endswith(CHECKPOINT) and not Path(base).exists()


def _describe_base(base: BaseConfig) -> str:
    """With the commit; of files and folders their names."""
    return str(base if _is_public(base.id) else base.model_copy(update={"id": Path(base.id).name}))


def compose_body(spec: Spec, result: dict[str, Any], shown: Shown, license: License) -> str:
    full = _find_baseline(spec, result) if spec.choice.method != "full" else {}
    columns = {"this model": result["rewards"]}
    if full:
        columns["full fine-tuning"] = full["rewards"]
    parts = [
        f"# {spec.config.name}",
        "A fine-tuned diffusion model, and how much it copies its training images. MemControl "
        "searches which parameters to fine-tune, so that quality stays and copying goes.",
        _list_facts(spec, result, license),
        "## How to use it",
        f"```python\n{shown.code}\n```",
        _show_picture(shown),
        "## How much it copies",
        write_verdict(result["rewards"], result["n_samples"]),
        describe_copied(result["rewards"]),
        describe_membership(result["rewards"]),
        describe_privacy(result["rewards"]),
        _tell_how_measured(spec, result),
        _make_card_table(spec, columns),
        _make_classes_table(result.get("utility_by_class", {})),
        "## Limits",
        "\n".join(f"- {line}" for line in _LIMITS),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _show_picture(shown: Shown) -> str:
    """What the code gives, or why that is not to be seen."""
    if not shown.picture:
        return f"The code draws as the figures below were measured. There is no picture: {shown.withheld}."
    prompt = re.sub(r"([\\\[\]])", r"\\\1", shown.prompt or "without a prompt")
    return (
        f"![{prompt}]({shown.picture})\n\nThis is the image that the code gives, up to rounding: one of the "
        "samples that the figures below were measured on. No rule calls it a copy of a training image, and "
        "an unseen image is nearer to it than any training image."
    )


def _describe_license(license: License) -> str:
    if license.id == _UNKNOWN:
        return (
            "the base does not say under which it is; its license and the rights in the images bind this "
            "model. Whoever shares it says which, as `license` above (`memcontrol export --license`)"
        )
    named = f"[{license.name}]({license.link})" if license.link else f"`{license.name or license.id}`"
    return f"{named}; the rights in the images, and the base's own license, bind this model too"


def _list_facts(spec: Spec, result: dict[str, Any], license: License) -> str:
    """What it is made of and how."""
    config, choice = spec.config, spec.choice
    trained = format_reward("trained_fraction", result["rewards"])
    groups = name_groups(choice.groups, "nothing")
    exported_with = ", ".join(f"{name} {version(name)}" for name in _EXPORTED_WITH)
    length = config.base.max_sequence_length
    facts = {
        "Base": _describe_base(spec.pinned_base),
        **({"Prompts": _describe_prompts(length)} if length else {}),
        "Trained": f"{describe_choice(choice, len(spec.space.groups))}: {groups} ({trained} of the denoiser)",
        "Images": f"{spec.n_train:,} private images; they are not part of this folder",
        "Budget": _describe_budget(spec, result["measured_with"]["resolution"]),
        "Made by": f"[MemControl](https://arxiv.org/abs/2405.19458) {__version__}, study `{config.name}`, "
        f"choice `{choice.key}`; exported with {exported_with}",
        "License": _describe_license(license),
    }
    return "\n".join(f"- **{name}**: {text}" for name, text in facts.items())


def _describe_prompts(length: int) -> str:
    return (
        f"trained and measured at {length} tokens, which the pipeline does not know of itself: call it as "
        f"`pipe(prompt, max_sequence_length={length})`"
    )


def _describe_budget(spec: Spec, resolution: int) -> str:
    inner = spec.config.inner
    shards = f", in {inner.ensemble.shards} shards" if inner.ensemble.shards > 1 else ""
    return (
        f"{inner.budget_images:,} images in batches of {inner.batch_size}{shards}, {resolution} pixels, "
        f"seed {spec.config.search.seed}"
    )


def _tell_how_measured(spec: Spec, result: dict[str, Any]) -> str:
    settings = result["measured_with"]
    sampling, network = settings["sampling"], publish_name(settings["extractor"], may_be_hub=True)
    doubt = describe_network_doubt(spec.config.rewards.extractor, spec.config.data.path)
    return (
        f"Measured on {result['n_samples']} samples ({sampling['sampling_steps']} steps, guidance "
        f"{sampling['guidance']:g}) against {_PART_TITLES[spec.reference]}, in pixels and with the "
        f"feature network `{network}`, with standard errors or 95 % intervals; (few): "
        f"too few samples for an unbiased FID.{f' Note: {doubt}.' if doubt else ''}"
    )


def _make_card_table(spec: Spec, columns: dict[str, dict[str, float]]) -> str:
    """A row for each reward that was measured, a column for each model's rewards."""
    measured = next(iter(columns.values()))
    rows = [
        [
            REWARDS[name].title,
            *(format_reward(name, rewards) for rewards in columns.values()),
            REWARDS[name].direction,
            REWARDS[name].meaning.replace("held-out", _UNSEEN[spec.reference]),
        ]
        for name in _list_shown_rewards(spec)
        if name in measured
    ]
    return format_markdown_table(["reward", *columns, "better", "meaning"], rows)


def _make_classes_table(by_class: Mapping[str, Mapping[str, float]]) -> str:
    """How useful samples are, by class; empty where that was not measured. Classes of few training images are
    not named, since their names may be those of people."""
    by_class = {one: told for one, told in by_class.items() if told["train_images"] >= _FEWEST_NAMED}
    if not by_class:
        return ""
    columns = [name for name in UTILITIES if name in next(iter(by_class.values()))]
    rows = [
        [
            one.replace("|", "/"),
            str(told["generated_images"]),
            *(format_reward(name, told) for name in columns),
        ]
        for one, told in by_class.items()
    ]
    return format_markdown_table(["class", "samples", *(REWARDS[name].title for name in columns)], rows)


def _list_shown_rewards(spec: Spec) -> list[str]:
    own = [name for name in spec.config.rewards.names if name in REWARDS and name not in _CARD_REWARDS]
    return [*_CARD_REWARDS, *own]
