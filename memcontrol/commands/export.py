"""Owns what leaves MemControl: a run's fine-tuning as an adapter file, as a fused denoiser, or as a fused
pipeline."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from memcontrol.core.errors import MemControlError
from memcontrol.core.files import make_public, name_full_disk, replace_file
from memcontrol.core.published import publish_name
from memcontrol.core.run_folder import RunFolder
from memcontrol.core.spec import Spec, read_spec
from memcontrol.model.adapter import Adapter, format_header
from memcontrol.model.base import redraw_weights
from memcontrol.model.families import name_denoiser
from memcontrol.model.peft_parts import Peft
from memcontrol.model.saved_adapter import LORA_FILE, is_own_file
from memcontrol.model.source import Source, find_base_path, find_source
from memcontrol.trial.loaded import derive_scratch_seed
from memcontrol.trial.tuned import inject_choice
from memcontrol.view.model_card import write_card

_FORMATS = ("adapter", "pipeline", "denoiser")
EXPORT_PRECISIONS = ("float32", "bfloat16", "float16")
COMFYUI_FILE = "comfyui/lora.safetensors"


def export(run: str | Path, out: str | Path, format: str | None = None, precision: str = "float32") -> Path:
    """Writes a run's model for plain diffusers to the new folder `out`. By default a LoRA as an adapter,
    anything else as a pipeline, and so a LoRA over a base that itself starts from an adapter. Returns the
    folder.

    adapter: a LoRA or DoRA as diffusers' and ComfyUI's LoRA files, other adapters of peft in peft's format,
    and whatever is no LoRA as a file for `memcontrol.load_adapter`. pipeline and denoiser: what was learned
    is fused into the base in float32, unquantised, and saved in a `precision` of float32, bfloat16 or
    float16. Raises MemControlError: no finished run, or `out` in use.
    """
    place, out = RunFolder(Path(run)), Path(out)
    spec = read_spec(place.path)
    _check_export(place, spec, out, format)
    if precision not in EXPORT_PRECISIONS:
        raise MemControlError(f"precision '{precision}' is unknown; allowed: {', '.join(EXPORT_PRECISIONS)}")
    with name_full_disk(out):
        # The base, with what was learned put into it.
        source = find_source(spec.pinned_base)
        pipeline = source.open()
        kind = _choose_loaded_type(source, spec)
        part = name_denoiser(pipeline)
        denoiser = getattr(pipeline, part)
        if spec.config.inner.from_scratch:
            redraw_weights(denoiser, derive_scratch_seed(spec.config))
        adapter = inject_choice(denoiser, spec)
        adapter.load(place.path)

        # The files, and the card that says what they are.
        out.mkdir(parents=True, exist_ok=True)
        if (format or _choose_format(adapter, spec)) == "adapter":
            _write_adapter(adapter, place, part, out, spec)
        else:
            adapter.fuse()
            pipeline.to(dtype=getattr(torch, precision))
            kind = precision if precision != "float32" else kind if format == "denoiser" else None
            (denoiser if format == "denoiser" else pipeline).save_pretrained(out)
        for path in out.rglob("*.json"):
            _publish_names(path)
        make_public(out)  # safetensors keeps what it writes to its owner
        code = _write_loading_code(out, source, type(pipeline).__name__, part, kind)
        is_conditional = getattr(pipeline, "tokenizer", None) is not None
        write_card(out, spec, place.read_result(), code, (out / LORA_FILE).is_file(), is_conditional)
    return out


def _publish_names(path: Path) -> None:
    """Libraries note in the files that they save where they read the model."""
    values = json.loads(path.read_text(encoding="utf-8"))
    keys = [key for key in values if key.endswith("name_or_path")] if isinstance(values, dict) else []
    names = {key: publish_name(values[key], may_be_hub=True) for key in keys if isinstance(values[key], str)}
    if any(values[key] != name for key, name in names.items()):
        with replace_file(path, published=True) as part:
            text = json.dumps(values | names, indent=2, ensure_ascii=False)
            part.write_text(f"{text}\n", encoding="utf-8")


def _check_export(run: RunFolder, spec: Spec, out: Path, format: str | None) -> None:
    """Raises MemControlError."""
    if not run.is_complete:
        raise MemControlError(f"run {run.path} has not finished; export takes finished runs")
    run.refuse_dropped(run.adapter_file)
    if format not in (None, *_FORMATS):
        raise MemControlError(f"format '{format}' is unknown; allowed: {', '.join(_FORMATS)}")
    if spec.config.inner.from_scratch and format == "adapter":
        raise MemControlError(
            "this run trained a denoiser that was drawn anew, which no adapter holds; export it with "
            "--format pipeline"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MemControlError(f"{out} exists and is not an empty folder; give another one")


def _choose_loaded_type(source: Source, spec: Spec) -> str | None:
    """The type in which a reader should load the base: where some parts are stored in 16 bits, diffusers and
    transformers would load them in different ones. None where all are float32."""
    if not source.holds_half:
        return None
    asked = spec.config.base_precision
    return asked if asked in EXPORT_PRECISIONS else "float32"


def _is_lora(adapter: Adapter) -> bool:
    config = _find_lone_config(adapter)
    return config is not None and config.peft_type == "LORA"


def _choose_format(adapter: Adapter, spec: Spec) -> str:
    over_base = not spec.config.inner.from_scratch and not spec.config.base.adapter
    return "adapter" if _is_lora(adapter) and over_base else "pipeline"


def _write_adapter(adapter: Adapter, run: RunFolder, part: str, out: Path, spec: Spec) -> None:
    """`part` is what the pipeline calls its denoiser."""
    if _is_lora(adapter):
        _write_lora(adapter, part, out, spec)
    else:
        adapter.save(out, spec.describe_published())
        _write_peft(adapter, out)


def _write_loading_code(out: Path, source: Source, pipeline_class: str, part: str, kind: str | None) -> str:
    """What a reader of the folder's card types, with the folder's name and, but for a Hub id, the base's in
    place of paths; `part` is what the pipeline calls its denoiser, and `kind` the type to load all parts in,
    where it must be said."""
    typed = [f"torch_dtype=torch.{kind}"] if kind else []
    if (out / "model_index.json").is_file():
        given = ", ".join([f'"{out.name}"', *typed])
        return _add_imports([f"pipe = DiffusionPipeline.from_pretrained({given})"])
    denoiser_class = source.index[part][1]
    if (out / LORA_FILE).is_file():
        first, load = _write_start(source, part), f'pipe.load_lora_weights("{out.name}")'
    elif RunFolder(out).adapter_file.is_file():
        first, load = _write_start(source, part), f'memcontrol.load_adapter(pipe, "{out.name}")'
    else:
        opened = _write_opening(source, pipeline_class, f"{part}={part}", *typed)
        given = ", ".join([f'"{out.name}"', *typed])
        denoiser = f"{part} = {denoiser_class}.from_pretrained({given})"
        return _add_imports([denoiser, f"pipe = {opened}"], pipeline_class, denoiser_class)
    opened = _write_opening(source, pipeline_class, *typed)
    return _add_imports([f"pipe = {opened}", *first, load], pipeline_class, denoiser_class)


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


def _add_imports(lines: list[str], *classes: str) -> str:
    """The lines after the imports that they need."""
    code = "\n".join(lines)
    used = [name for name in ("DiffusionPipeline", *classes) if re.search(rf"\b{name}\.", code)]
    imports = [
        *(["import torch"] if "torch." in code else []),
        *(["import memcontrol"] if "memcontrol." in code else []),
        f"from diffusers import {', '.join(sorted(set(used)))}",
        *(["from memcontrol.models import TINY"] if "TINY" in code else []),
    ]
    return "\n".join([*imports, "", *lines])


def describe_loading(run: Path, out: Path) -> str:
    """One line that says what an exported folder is and how it is loaded."""
    base = read_spec(run).pinned_base
    is_plain = base.model_dump() == base.id and not base.is_file
    typed = re.search(r", (torch_dtype=[a-z0-9.]+)", (out / "README.md").read_text(encoding="utf-8"))
    more = f", {typed[1]}" if typed else ""
    opened = f'DiffusionPipeline.from_pretrained("{find_base_path(base.id)}"{more})'
    if (out / LORA_FILE).is_file():
        loaded = (
            f'{opened}.load_lora_weights("{out}")' if is_plain else f"for {base}; its README.md has the code"
        )
        return f"a LoRA: {loaded}; comfyui/ has it for ComfyUI"
    if RunFolder(out).adapter_file.is_file():
        loaded = f'memcontrol.load_adapter({opened}, "{out}")'
        return f"an adapter: {loaded if is_plain else f'for {base}; its README.md has the code'}"
    kind = "pipeline" if (out / "model_index.json").is_file() else "denoiser"
    length = base.max_sequence_length
    called = f"call it with max_sequence_length={length}; " if length else ""
    return (
        f"a fused {kind}: "
        f'{"DiffusionPipeline" if kind == "pipeline" else "its class"}.from_pretrained("{out}"{more}); '
        f"{called}--format adapter gives a small file instead"
    )


def _find_lone_config(adapter: Adapter):
    """peft's configuration, where the adapter is one of peft's and nothing else."""
    configs = [getattr(part, "config", None) for part in adapter.parts]
    dense = any(name.endswith(".offset") for name in adapter.state())
    return configs[0] if len(configs) == 1 and not dense else None


def _collect_peft_state(adapter: Adapter) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(adapter.denoiser).items()
    }


def _write_lora(adapter: Adapter, prefix: str, out: Path, spec: Spec) -> None:
    """The standard LoRA file, its configuration in the header (without it a reader guesses alpha), and one
    for ComfyUI."""
    from safetensors.torch import save_file

    config, state = _find_lone_config(adapter), _collect_peft_state(adapter)
    settings = {f"{prefix}.{key}": value for key, value in _convert_settings(config.to_dict()).items()}
    metadata = {"format": "pt", "memcontrol": format_header(spec.describe_published())}
    (out / COMFYUI_FILE).parent.mkdir()
    with replace_file(out / LORA_FILE, published=True) as part:
        save_file(
            {f"{prefix}.{name}": tensor for name, tensor in state.items()},
            part,
            metadata | {"lora_adapter_metadata": format_header(settings)},
        )
    with replace_file(out / COMFYUI_FILE, published=True) as part:
        save_file(_make_comfyui_state(adapter, prefix, state), part, metadata)


def _make_comfyui_state(
    adapter: Adapter, prefix: str, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """ComfyUI reads a U-Net's LoRA under kohya's names and a transformer's under diffusers' ones; alpha is a
    tensor beside each."""
    ends = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    layers = {
        module: layer
        for part in adapter.parts
        if isinstance(part, Peft)
        for module, layer in part.layers.items()
    }
    found = {}
    for module, layer in layers.items():
        name = f"lora_unet_{module.replace('.', '_')}" if prefix == "unet" else f"{prefix}.{module}"
        for end, kohya in ends.items():
            if f"{module}.{end}" in state:
                found[f"{name}.{kohya if prefix == 'unet' else end}"] = state[f"{module}.{end}"]
        if f"{module}.lora_magnitude_vector" in state:
            found[f"{name}.dora_scale"] = _make_dora_scale(layer)
        found[f"{name}.alpha"] = torch.tensor(float(layer.scaling["default"] * layer.r["default"]))
    return found


def _make_dora_scale(layer: Any) -> torch.Tensor:
    """A DoRA's magnitudes [out, 1, ...] as ComfyUI's comfy/weight_adapter/base.py takes them: it divides by
    the norms of the base's own rows, where peft, as the paper (arXiv 2402.09353, eq. 5), divides by those of
    W0 + BA."""
    weight = layer.get_base_layer().weight.detach().float()
    changed = weight + layer.get_delta_weight("default").detach().float()
    norms, own = (rows.flatten(1).norm(dim=1) for rows in (changed, weight))
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().float().flatten()
    return (magnitude * own / norms).view(-1, *[1] * (weight.ndim - 1)).cpu().contiguous()


def _write_peft(adapter: Adapter, out: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, as PeftModel.from_pretrained reads them, where all
    is of one peft method."""
    from safetensors.torch import save_file

    config = _find_lone_config(adapter)
    if config is not None:
        config.save_pretrained(out)
        with replace_file(out / "adapter_model.safetensors", published=True) as part:
            save_file(
                {f"base_model.model.{name}": tensor for name, tensor in _collect_peft_state(adapter).items()},
                part,
                {"format": "pt"},
            )


def _convert_settings(settings: dict) -> dict:
    """peft's configuration as JSON can hold it, less where the base lay."""
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in settings.items()
        if key != "base_model_name_or_path"
    }
