"""Owns the model card of an exported folder: README.md with the metadata that the Hugging Face Hub reads, and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from memcontrol.auditing import verdict
from memcontrol.figures import BLIND, FIGURES, written
from memcontrol.files import replacing
from memcontrol.notes import said_of, table
from memcontrol.spec import Spec

SHOWN = ("fid", "kid", "recall", "memorization", "copy_rate", "copy_rate_features", "clear_copy_rate", "carlini_rate", "authpct", "extraction_clique", "loss_gap")
PARTS = {"holdout": "images held out of the search", "test": "test images that neither the fine-tuning nor the search has seen"}


def write_card(out: Path, spec: Spec, result: dict[str, Any], code: str, is_lora: bool, is_conditional: bool) -> None:
    """`code`: how the folder is loaded, in Python."""
    with replacing(out / "README.md") as part:
        part.write_text(f"---\n{yaml.safe_dump(metadata(spec, is_lora, is_conditional), sort_keys=False)}---\n\n{body(spec, result, code)}", encoding="utf-8")


def metadata(spec: Spec, is_lora: bool, is_conditional: bool) -> dict[str, Any]:
    """The base only where the Hub knows it: a path of this machine is nobody's business."""
    task, base = "text-to-image" if is_conditional else "unconditional-image-generation", spec.config.base
    on_hub = base != "tiny" and not Path(base).exists()
    tags = ["diffusers", task, "memcontrol", *(["lora"] if is_lora else [])]
    known = {"base_model": base, "base_model_relation": "adapter" if is_lora else "finetune"} if on_hub else {}
    return {"library_name": "diffusers", "pipeline_tag": task, **known, "tags": tags}


def body(spec: Spec, result: dict[str, Any], code: str) -> str:
    rewards, choice, inner = result["rewards"], spec.choice, spec.config.inner
    base = spec.config.base if spec.config.base == "tiny" or not Path(spec.config.base).exists() else Path(spec.config.base).name
    groups = ", ".join(choice.groups) if "*" not in choice.groups else "the whole denoiser"
    lines = [
        f"- **Base**: {base}",
        f"- **Trained**: {said_of(choice, len(spec.space.groups))}: {groups or 'nothing'} ({written('trained_fraction', rewards)} of the denoiser)",
        f"- **Images**: {spec.n_train:,} private images; they are not part of this folder",
        f"- **Budget**: {inner.budget_images:,} images in batches of {inner.batch_size}, {inner.ensemble.shards} shard(s), seed {spec.config.search.seed}",
        f"- **Made by**: [MemControl](https://arxiv.org/abs/2405.19458), study `{spec.config.name}`, choice `{choice.key}`",
    ]
    rows = [[FIGURES[name].title, written(name, rewards), FIGURES[name].direction, FIGURES[name].meaning] for name in names_of(spec) if name in rewards]
    about = f"Measured on {result['n_samples']} samples against {PARTS[spec.reference]}, with standard errors or 95 % intervals."
    parts = [
        f"# {spec.config.name}", "A fine-tuned diffusion model, chosen so that quality stays and copying of training images goes.", "\n".join(lines),
        "## How to load it", f"```python\n{code}\n```", "## How much it copies", verdict(rewards, result["n_samples"]), about,
        table(["figure", "value", "better", "meaning"], rows), "## Limits", "\n".join(f"- {line}" for line in BLIND),
        "- It was fine-tuned on few images of one kind: outside of it, nothing is known of its quality.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def names_of(spec: Spec) -> list[str]:
    return [*SHOWN, *(name for name in spec.config.rewards.names if name in FIGURES and name not in SHOWN)]
