"""Owns the model card of an exported folder: README.md with the metadata that the Hugging Face Hub reads, and
what was measured."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from memcontrol.core.files import replace_file
from memcontrol.core.reward_table import BLIND_SPOTS, REWARDS, format_reward
from memcontrol.core.run_folder import StudyFolder
from memcontrol.core.spec import Spec
from memcontrol.core.version import __version__
from memcontrol.view.words import describe_choice, format_markdown_table, write_verdict

CARD_REWARDS = (
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
    "loss_gap",
)
LIMITS = (
    *BLIND_SPOTS,
    "It was fine-tuned on few images of one kind: outside of it, nothing is known of its quality.",
)
EXPORTED_WITH = ("torch", "diffusers", "peft")
# what the figures call held-out images, by the part that they are
UNSEEN = {"holdout": "held-out", "test": "test"}
PART_TITLES = {
    "holdout": "images held out of the search",
    "test": "test images that neither the fine-tuning nor the search has seen",
}


def write_card(
    out: Path, spec: Spec, result: dict[str, Any], code: str, is_lora: bool, is_conditional: bool
) -> None:
    """`code`: how the folder is loaded, in Python."""
    with replace_file(out / "README.md") as part:
        head = yaml.safe_dump(make_metadata(spec, is_lora, is_conditional), sort_keys=False)
        part.write_text(f"---\n{head}---\n\n{compose_body(spec, result, code)}", encoding="utf-8")


def find_baseline(spec: Spec, result: dict[str, Any]) -> dict[str, Any]:
    """Full fine-tuning that was retrained beside the run and measured alike; empty where there is none."""
    found = (run.read_result() for run in StudyFolder(spec.study_folder).list_retrained())
    return next(
        (
            one
            for one in found
            if one["choice"]["method"] == "full" and one.get("measured_with") == result["measured_with"]
        ),
        {},
    )


def make_metadata(spec: Spec, is_lora: bool, is_conditional: bool) -> dict[str, Any]:
    """The base only where the Hub knows it: a path of this machine is nobody's business."""
    task, base = "text-to-image" if is_conditional else "unconditional-image-generation", spec.config.base
    on_hub = base != "tiny" and not Path(base).exists()
    tags = ["diffusers", task, "memcontrol", *(["lora"] if is_lora else [])]
    known = (
        {"base_model": base, "base_model_relation": "adapter" if is_lora else "finetune"} if on_hub else {}
    )
    return {"license": "other", "library_name": "diffusers", "pipeline_tag": task, **known, "tags": tags}


def compose_body(spec: Spec, result: dict[str, Any], code: str) -> str:
    rewards, choice, inner, settings = (
        result["rewards"],
        spec.choice,
        spec.config.inner,
        result["measured_with"],
    )
    full = find_baseline(spec, result) if choice.method != "full" else {}
    base = (
        spec.config.base
        if spec.config.base == "tiny" or not Path(spec.config.base).exists()
        else Path(spec.config.base).name
    )
    groups = ", ".join(choice.groups) if "*" not in choice.groups else "the whole denoiser"
    lines = [
        f"- **Base**: {base}",
        f"- **Trained**: {describe_choice(choice, len(spec.space.groups))}: {groups or 'nothing'} "
        f"({format_reward('trained_fraction', rewards)} of the denoiser)",
        f"- **Images**: {spec.n_train:,} private images; they are not part of this folder",
        f"- **Budget**: {inner.budget_images:,} images in batches of "
        f"{inner.batch_size}{f', in {inner.ensemble.shards} shards' if inner.ensemble.shards > 1 else ''}, "
        f"{settings['resolution']} pixels, seed {spec.config.search.seed}",
        f"- **Made by**: [MemControl](https://arxiv.org/abs/2405.19458) {__version__}, study "
        f"`{spec.config.name}`, choice `{choice.key}`; exported with "
        f"{', '.join(f'{name} {version(name)}' for name in EXPORTED_WITH)}",
        "- **License**: the base's license and the rights in the images bind this model; say "
        "above, in place of `other`, under which one it is shared",
    ]
    columns = [rewards, *([full["rewards"]] if full else [])]
    rows = [
        [
            REWARDS[name].title,
            *(format_reward(name, one) for one in columns),
            REWARDS[name].direction,
            REWARDS[name].meaning.replace("held-out", UNSEEN[spec.reference]),
        ]
        for name in list_shown_rewards(spec)
        if name in rewards
    ]
    sampling = settings["sampling"]
    about = (
        f"Measured on {result['n_samples']} samples ({sampling['sampling_steps']} steps, guidance "
        f"{sampling['guidance']:g}) against {PART_TITLES[spec.reference]}, in pixels and with the "
        f"feature network `{settings['extractor']}`, with standard errors or 95 % intervals; (few): "
        "too few samples for an unbiased FID."
    )
    parts = [
        f"# {spec.config.name}",
        "A fine-tuned diffusion model, and how much it copies its training images. MemControl "
        "searches which parameters to fine-tune, so that quality stays and copying goes.",
        "\n".join(lines),
        "## How to load it",
        f"```python\n{code}\n```",
        "## How much it copies",
        write_verdict(rewards, result["n_samples"]),
        about,
        format_markdown_table(
            ["figure", "this model", *(["full fine-tuning"] if full else []), "better", "meaning"], rows
        ),
        "## Limits",
        "\n".join(f"- {line}" for line in LIMITS),
    ]
    return "\n\n".join(parts) + "\n"


def list_shown_rewards(spec: Spec) -> list[str]:
    return [
        *CARD_REWARDS,
        *(name for name in spec.config.rewards.names if name in REWARDS and name not in CARD_REWARDS),
    ]
