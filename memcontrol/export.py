"""Owns export: a run's fine-tuning as a standard LoRA file, or fused into a pipeline that plain diffusers loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from memcontrol.adapters import LORA_FILE
from memcontrol.errors import MemControlError
from memcontrol.files import disk_full_named, read_json
from memcontrol.spec import RESULT, Spec, read_spec

FORMATS = ("adapter", "pipeline")


def export(run: Path, out: Path, format: str | None = None) -> Path:
    """Writes the run's model to the new folder `out`. By default a LoRA as an adapter, anything else as a pipeline.

    Raises MemControlError: no finished run, `out` in use, or an adapter asked of what is no LoRA.
    """
    spec = read_spec(run)
    if not (run / RESULT).is_file() or read_json(run / RESULT)["state"] != "COMPLETE":
        raise MemControlError(f"run {run} has not finished; export takes finished runs")
    is_lora = spec.choice.method == "lora"
    format = format or ("adapter" if is_lora else "pipeline")
    if format not in FORMATS:
        raise MemControlError(f"format '{format}' is unknown; allowed: {', '.join(FORMATS)}")
    if format == "adapter" and not is_lora:
        raise MemControlError(f"run {run} trained '{spec.choice.method}', which is no LoRA; use --format pipeline")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MemControlError(f"{out} exists and is not an empty folder; give another one")
    with disk_full_named(out):
        out.mkdir(parents=True, exist_ok=True)
        if format == "adapter":
            shutil.copyfile(run / LORA_FILE, out / LORA_FILE)
        else:
            fused_pipeline(run, spec).save_pretrained(out)
    return out


def fused_pipeline(run: Path, spec: Spec):
    """The base's own pipeline, scheduler included, with what the run learned in its weights."""
    from memcontrol.models import open_pipeline
    from memcontrol.run import chosen_adapter

    pipeline = open_pipeline(spec.config.base)
    adapter = chosen_adapter(pipeline.unet, spec)
    adapter.load(run)
    adapter.fuse()
    return pipeline
