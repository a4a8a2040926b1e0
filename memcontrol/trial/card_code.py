"""Owns the Python on a model's card: what loads an exported folder, and the call that draws an image as the
figures were measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memcontrol.core.run_folder import RunFolder
from memcontrol.model.base import delay_guidance
from memcontrol.model.families import Unconditional
from memcontrol.model.saved_adapter import LORA_FILE, is_own_file, load_adapter
from memcontrol.model.source import Source

SOME_PROMPT = "a caption such as it was trained on"  # where no caption may be shown
_DDIM, _DPM = "DDIMPipeline", "DPMSolverMultistepScheduler"


@dataclass(frozen=True)
class Exported:
    """A folder that was exported: what the pipeline calls its denoiser (`part`), its class, and the `kind`,
    the type in which all parts are loaded, where it must be said; the denoiser's config and size, and the
    tokenizer."""

    out: Path
    source: Source
    part: str
    pipeline_class: str
    kind: str | None
    config: Any
    n_parameters: int
    tokenizer: Any

    @property
    def is_pipeline(self) -> bool:
        return (self.out / "model_index.json").is_file()

    @property
    def is_lora(self) -> bool:
        return (self.out / LORA_FILE).is_file()

    @property
    def is_adapter(self) -> bool:
        """Whether it changes a base, rather than to replace it or its denoiser."""
        return self.is_lora or RunFolder(self.out).adapter_file.is_file()

    @property
    def denoiser_class(self) -> str:
        return self.source.index[self.part][1]

    @property
    def is_unconditional(self) -> bool:
        return isinstance(self.source.family, Unconditional)


@dataclass(frozen=True)
class Call:
    """How the exported pipeline draws one image: the prompt, none of an unconditional one, the seed of the
    noise, the other arguments; `late`: steps without guidance, and the guidance that comes then."""

    prompt: str | None
    seed: int
    arguments: dict[str, Any]
    late: tuple[int, float] | None = None


def plan_call(exported: Exported, measured_with: Mapping[str, Any], prompt: str, seed: int) -> Call:
    """As a run's figures were measured."""
    sampling, family = measured_with["sampling"], exported.source.family
    steps, guidance = sampling["sampling_steps"], float(sampling["guidance"])
    arguments = {**family.describe_call(exported.config, guidance), "num_inference_steps": steps}
    if exported.is_unconditional:
        return Call(None, seed, arguments)
    side = measured_with["resolution"]
    arguments |= {"height": side, "width": side}
    n_without = round(sampling.get("guidance_from", 0.0) * steps) if guidance > 1 else 0
    if not n_without:
        return Call(prompt, seed, arguments)
    begins = delay_guidance(guidance, n_without)["guidance_scale"]
    return Call(prompt, seed, arguments | {"guidance_scale": begins}, (n_without, guidance))


def open_exported(exported: Exported) -> Any:
    """The pipeline that the card's code makes, on the CPU."""
    import diffusers

    kind = getattr(torch, exported.kind or "float32")
    if exported.is_pipeline:
        return diffusers.DiffusionPipeline.from_pretrained(exported.out, dtype=kind)
    pipeline = exported.source.open().to(dtype=kind)
    if exported.is_lora:
        pipeline.load_lora_weights(str(exported.out))
    elif exported.is_adapter:
        load_adapter(pipeline, exported.out)
    else:
        denoiser = getattr(diffusers, exported.denoiser_class).from_pretrained(exported.out, dtype=kind)
        pipeline.register_modules(**{exported.part: denoiser})
    return pipeline


def draw_image(pipeline: Any, exported: Exported, call: Call) -> Any:
    """The PIL image that the card's call gives."""
    import diffusers

    if exported.is_unconditional:
        pipeline = diffusers.DDIMPipeline(pipeline.unet, pipeline.scheduler)
    elif not exported.source.family.flow:
        pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    given = {} if call.prompt is None else {"prompt": call.prompt}
    late = {} if call.late is None else delay_guidance(call.late[1], call.late[0])
    generator = torch.Generator().manual_seed(call.seed)
    return pipeline(**given, **{**call.arguments, **late}, generator=generator).images[0]


def write_code(exported: Exported, call: Call) -> str:
    """What a reader of the folder's card types, with the folder's name and, but for a Hub id, the base's in
    place of paths."""
    lines = [*_write_loading(exported), *_write_solver(exported)]
    lines.append('pipe.to("cuda" if torch.cuda.is_available() else "cpu")')
    if call.late:
        lines += _write_late_guidance(*call.late)
    return _add_imports([*lines, *_write_call(call)], exported)


def _write_loading(exported: Exported) -> list[str]:
    out, source = exported.out, exported.source
    typed = [f"torch_dtype=torch.{exported.kind}"] if exported.kind else []
    given = ", ".join([json.dumps(out.name), *typed])
    if exported.is_pipeline:
        return [f"pipe = DiffusionPipeline.from_pretrained({given})"]
    if not exported.is_adapter:
        part = exported.part
        opened = _write_opening(source, exported.pipeline_class, f"{part}={part}", *typed)
        return [f"{part} = {exported.denoiser_class}.from_pretrained({given})", f"pipe = {opened}"]
    is_lora = exported.is_lora
    load = (
        f'pipe.load_lora_weights("{out.name}")' if is_lora else f'memcontrol.load_adapter(pipe, "{out.name}")'
    )
    opened = _write_opening(source, exported.pipeline_class, *typed)
    return [f"pipe = {opened}", *_write_start(source, exported.part), load]


def _write_opening(source: Source, pipeline_class: str, *given: str) -> str:
    """The call that opens the base."""
    base = source.base
    name = base.id if not Path(base.id).exists() else Path(base.id).name
    settings = {"revision": base.revision, "variant": source.variant, "config": base.config}
    known = {
        key: value if "/" not in value or not Path(value).exists() else Path(value).name
        for key, value in settings.items()
        if value
    }
    more = [*(f'{key}="{value}"' for key, value in known.items()), *given]
    call = f"{pipeline_class}.from_single_file" if base.is_file else "DiffusionPipeline.from_pretrained"
    return f"{call}({', '.join(['TINY' if name == 'tiny' else json.dumps(name), *more])})"


def _write_start(source: Source, part: str) -> list[str]:
    """What puts the adapter that the base starts from into it."""
    if source.base.adapter is None:
        return []
    place = Path(source.base.adapter)
    if (place / "config.json").is_file():
        return [f'pipe.{part} = {source.index[part][1]}.from_pretrained("{place.name}")']
    if is_own_file(place):
        return [f'memcontrol.load_adapter(pipe, "{place.name}").fuse()']
    folder, name = (place.name, LORA_FILE) if place.is_dir() else (".", place.name)
    return [
        f'pipe.load_lora_weights("{folder}", weight_name="{name}")',
        f'pipe.fuse_lora(components=["{part}"])',
        "pipe.unload_lora_weights()",
    ]


def _write_solver(exported: Exported) -> list[str]:
    if exported.is_unconditional:
        return [f"pipe = {_DDIM}(pipe.unet, pipe.scheduler)"]
    if exported.source.family.flow:
        return []
    return [f"pipe.scheduler = {_DPM}.from_config(pipe.scheduler.config)"]


def _write_late_guidance(n_without: int, guidance: float) -> list[str]:
    return [
        "",
        "",
        "def guide_late(pipe, step, timestep, tensors):",
        f"    if step + 1 >= {n_without}:",
        f"        pipe._guidance_scale = {guidance}",
        "    return tensors",
        "",
        "",
    ]


def _write_call(call: Call) -> list[str]:
    prompt = [] if call.prompt is None else [_write_value(call.prompt)]
    given = [*prompt, *(f"{key}={_write_value(value)}" for key, value in call.arguments.items())]
    given += ["callback_on_step_end=guide_late"] if call.late else []
    given.append(f"generator=torch.Generator().manual_seed({call.seed})")
    return ["image = pipe(", *(f"    {one}," for one in given), ").images[0]"]


def _write_value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _add_imports(lines: list[str], exported: Exported) -> str:
    """The lines after the imports that they need."""
    code = "\n".join(lines)
    names = {"DiffusionPipeline", exported.pipeline_class, exported.denoiser_class, _DDIM, _DPM}
    used = sorted(name for name in names if re.search(rf"\b{name}[.(]", code))
    imports = [
        "import torch",
        *(["import memcontrol"] if "memcontrol." in code else []),
        f"from diffusers import {', '.join(used)}",
        *(["from memcontrol.models import TINY"] if "TINY" in code else []),
    ]
    return "\n".join([*imports, "", *lines])
