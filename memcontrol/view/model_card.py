"""Owns the model card of an exported folder: README.md with the metadata that the Hugging Face Hub reads, and
what was measured."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from memcontrol.core.config import CHECKPOINT, BaseConfig
from memcontrol.core.files import write_text
from memcontrol.core.published import publish_name
from memcontrol.core.reward_table import BLIND_SPOTS, REWARDS, format_reward
from memcontrol.core.run_folder import StudyFolder
from memcontrol.core.spec import Spec
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
# what the rewards call held-out images, by the part that they are
_UNSEEN = {"holdout": "held-out", "test": "test"}
_PART_TITLES = {
    "holdout": "images held out of the search",
    "test": "test images that neither the fine-tuning nor the search has seen",
}


def write_card(
    out: Path, spec: Spec, result: dict[str, Any], code: str, is_lora: bool, is_conditional: bool
) -> None:
    """`code`: how the folder is loaded, in Python."""
    head = yaml.safe_dump(make_metadata(spec, is_lora, is_conditional), sort_keys=False)
    text = f"---\n{head}---\n\n{compose_body(spec, result, code)}"
    write_text(out / "README.md", text, published=True)


def _find_baseline(spec: Spec, result: dict[str, Any]) -> dict[str, Any]:
    """Full fine-tuning that was retrained beside the run and measured alike; empty where there is none."""
    for run in StudyFolder(spec.study_folder).list_retrained():
        other = run.read_result()
        is_alike = other.get("measured_with") == result["measured_with"]
        if other["choice"]["method"] == "full" and is_alike:
            return other
    return {}


def make_metadata(spec: Spec, is_lora: bool, is_conditional: bool) -> dict[str, Any]:
    """The base only where the Hub knows it: a path of this machine is nobody's business."""
    task, base = "text-to-image" if is_conditional else "unconditional-image-generation", spec.config.base.id
    tags = ["diffusers", task, "memcontrol", *(["lora"] if is_lora else [])]
    known = {}
    if _is_public(base):
        known = {"base_model": base, "base_model_relation": "adapter" if is_lora else "finetune"}
    return {"license": "other", "library_name": "diffusers", "pipeline_tag": task, **known, "tags": tags}


def _is_public(base: str) -> bool:
    """Whether it is a name that the Hub knows."""
    return base != "tiny" and not base.endswith(CHECKPOINT) and not Path(base).exists()


def _describe_base(base: BaseConfig) -> str:
    """With the commit; of files and folders their names."""
    return str(base if _is_public(base.id) else base.model_copy(update={"id": Path(base.id).name}))


def compose_body(spec: Spec, result: dict[str, Any], code: str) -> str:
    full = _find_baseline(spec, result) if spec.choice.method != "full" else {}
    columns = {"this model": result["rewards"]}
    if full:
        columns["full fine-tuning"] = full["rewards"]
    parts = [
        f"# {spec.config.name}",
        "A fine-tuned diffusion model, and how much it copies its training images. MemControl "
        "searches which parameters to fine-tune, so that quality stays and copying goes.",
        _list_facts(spec, result),
        "## How to load it",
        f"```python\n{code}\n```",
        "## How much it copies",
        write_verdict(result["rewards"], result["n_samples"]),
        describe_copied(result["rewards"]),
        describe_membership(result["rewards"]),
        describe_privacy(result["rewards"]),
        _tell_how_measured(spec, result),
        _make_card_table(spec, columns),
        "## Limits",
        "\n".join(f"- {line}" for line in _LIMITS),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _list_facts(spec: Spec, result: dict[str, Any]) -> str:
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
        "License": "the base's license and the rights in the images bind this model; say above, in place of "
        "`other`, under which one it is shared",
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


def _list_shown_rewards(spec: Spec) -> list[str]:
    own = [name for name in spec.config.rewards.names if name in REWARDS and name not in _CARD_REWARDS]
    return [*_CARD_REWARDS, *own]
