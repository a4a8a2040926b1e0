"""Owns what leaves MemControl: a run's fine-tuning as an adapter file, as a fused denoiser, or as a fused
pipeline."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from memcontrol.config.base import EMBEDDED
from memcontrol.config.spec import Spec, read_spec
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import make_public, name_full_disk, replace_file
from memcontrol.core.published import publish_name
from memcontrol.core.run_folder import RunFolder
from memcontrol.model.adapter import Adapter, format_header
from memcontrol.model.base import redraw_weights
from memcontrol.model.families import name_denoiser
from memcontrol.model.hub import read_hub_card
from memcontrol.model.peft_parts import Peft
from memcontrol.model.saved_adapter import LORA_FILE
from memcontrol.model.source import Source, find_base_path, find_source
from memcontrol.recipes.original_names import name_sdxl_layer
from memcontrol.trial.card_code import SOME_PROMPT, Exported, plan_call, write_code
from memcontrol.trial.example import (
    PICTURE_FILE,
    Withheld,
    choose_sample,
    draw_picture,
    find_instance_prompt,
    list_shared_captions,
)
from memcontrol.trial.loaded import derive_scratch_seed
from memcontrol.trial.tuned import inject_choice
from memcontrol.view.model_card import License, Shown, choose_license, parse_license, write_card

_FORMATS = ("adapter", "pipeline", "denoiser")
EXPORT_PRECISIONS = ("float32", "bfloat16", "float16")
COMFYUI_FILE, KOHYA_FILE = "comfyui/lora.safetensors", "kohya/lora.safetensors"


def export(
    run: str | Path,
    out: str | Path,
    format: str | None = None,
    precision: str = "float32",
    license: str | None = None,
    license_link: str | None = None,
    picture: bool = True,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Writes a run's model for plain diffusers to the new folder `out`. By default a LoRA as an adapter,
    anything else as a pipeline, and so a LoRA over a base that itself starts from an adapter. Returns the
    folder.

    adapter: a LoRA or DoRA as diffusers' and ComfyUI's LoRA files, and kohya's where it reads another, other
    adapters of peft in peft's format, and whatever is no LoRA as a file for `memcontrol.load_adapter`.
    pipeline and denoiser: what was learned is fused into the base in float32, unquantised, and saved in a
    `precision` of float32, bfloat16 or float16. The card, README.md, is under the `license` given, by an
    identifier of the Hub or a name of one's own with its `license_link`, or else the base's. It shows a
    `picture`, one of the samples that were measured, if one may be shown; that it is drawn, which takes its
    time, `tell` is told in a line. Raises MemControlError: no finished
    run, or `out` in use.
    """
    place, out = RunFolder(Path(run)), Path(out)
    spec = read_spec(place.path)
    _check_export(place, spec, out, format)
    if precision not in EXPORT_PRECISIONS:
        raise MemControlError(f"precision '{precision}' is unknown; allowed: {', '.join(EXPORT_PRECISIONS)}")
    given = choose_license(license, license_link)
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
            _write_adapter(adapter, part, out, spec, source)
        else:
            adapter.fuse()
            pipeline.to(dtype=getattr(torch, precision))
            kind = precision if precision != "float32" else kind if format == "denoiser" else None
            (denoiser if format == "denoiser" else pipeline).save_pretrained(out)
        for path in out.rglob("*.json"):
            _publish_names(path)
        exported = Exported(
            out,
            source,
            part,
            type(pipeline).__name__,
            kind,
            denoiser.config,
            sum(parameter.numel() for parameter in denoiser.parameters()),
            getattr(pipeline, "tokenizer", None),
        )
        del pipeline, denoiser, adapter  # the card's picture is drawn by what was written
        shown = _show_example(exported, place, spec, picture, tell)
        write_card(out, spec, place.read_result(), shown, given or _find_license(source, out))
        make_public(out)  # safetensors keeps what it writes to its owner
    return out


def _show_example(
    exported: Exported, run: RunFolder, spec: Spec, picture: bool, tell: Callable[[str], None] | None
) -> Shown:
    """The card's code, and its picture where there may be one."""
    measured, shared = run.read_result()["measured_with"], list_shared_captions(spec)
    try:
        if not picture:
            raise Withheld("it was exported without one")
        sample = choose_sample(run, spec, exported.tokenizer)
        call = plan_call(exported, measured, sample.prompt, sample.seed)
        if tell:
            tell(f"the files are written; they draw {PICTURE_FILE} now, which --no-picture leaves out")
        draw_picture(exported, call, sample)
        withheld = ""
    except Withheld as reason:
        prompt = next((caption for caption in shared if caption), SOME_PROMPT)
        call, withheld = plan_call(exported, measured, prompt, 0), str(reason)
    return Shown(
        code=write_code(exported, call),
        prompt=call.prompt,
        picture=None if withheld else PICTURE_FILE,
        withheld=withheld,
        instance_prompt=find_instance_prompt(spec),
        is_adapter=exported.is_adapter,
        is_lora=exported.is_lora,
        is_conditional=not exported.is_unconditional,
    )


def _find_license(source: Source, out: Path) -> License:
    """The base's own, as its card says it; what the card has as a file beside it is copied."""
    base = source.base
    if base.id == EMBEDDED:
        return License("apache-2.0")
    if source.commit:
        text = read_hub_card(source.path, source.commit)
        place = f"https://huggingface.co/{source.path}"
        return parse_license(text, f"{place}/blob/{source.commit}/", place)
    card = Path(base.id) / "README.md"
    found = parse_license(card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None)
    if not found.link or ":" in found.link:
        return found
    beside = card.parent / found.link
    if beside.is_file() and beside.parent == card.parent and not (out / beside.name).exists():
        shutil.copyfile(beside, out / beside.name)
        return found
    return replace(found, link=None)


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


def _write_adapter(adapter: Adapter, part: str, out: Path, spec: Spec, source: Source) -> None:
    """`part` is what the pipeline calls its denoiser."""
    if _is_lora(adapter):
        is_sdxl = source.index["_class_name"] == "StableDiffusionXLPipeline"
        _write_lora(adapter, part, out, spec, name_sdxl_layer if is_sdxl else str)
    else:
        adapter.save(out, spec.describe_published())
        _write_peft(adapter, out)


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
        others = "comfyui/ has it for ComfyUI"
        kohya = ", kohya/ for sd-scripts" if (out / KOHYA_FILE).is_file() else ""
        return f"a LoRA: {loaded}; {others}{kohya}"
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


def _write_lora(adapter: Adapter, prefix: str, out: Path, spec: Spec, rename: Callable[[str], str]) -> None:
    """The standard LoRA file, its configuration in the header (without it a reader guesses alpha), one for
    ComfyUI, and one for kohya's sd-scripts where that reads other names (`rename`) or computes otherwise."""
    config, state = _find_lone_config(adapter), _collect_peft_state(adapter)
    settings = {f"{prefix}.{key}": value for key, value in _convert_settings(config.to_dict()).items()}
    metadata = _describe_file(spec)
    standard = {f"{prefix}.{name}": tensor for name, tensor in state.items()}
    _save_public(out / LORA_FILE, standard, metadata | {"lora_adapter_metadata": format_header(settings)})
    _save_public(out / COMFYUI_FILE, _make_comfyui_state(adapter, prefix, state), metadata)
    if prefix == "unet" and (config.use_dora or rename is not str):
        with contextlib.suppress(MemControlError):  # layers outside of the blocks, which sd-scripts has not
            _save_public(out / KOHYA_FILE, _make_kohya_state(adapter, state, rename), metadata)


def _describe_file(spec: Spec) -> dict[str, str]:
    """A LoRA file's header: what it was trained over, where, and how strong it is, for people; and all that
    it was trained with."""
    choice = spec.choice
    return {
        "format": "pt",
        "base": str(spec.pinned_base.without_paths()),
        "mask": ", ".join(choice.groups),
        "strength": f"{choice.strength:g}",
        "memcontrol": format_header(spec.describe_published()),
    }


def _save_public(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    with replace_file(path, published=True) as part:
        save_file(state, part, metadata)


_KOHYA_ENDS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def _iterate_layers(adapter: Adapter) -> Iterator[tuple[str, Any]]:
    """peft's layers by the names of the modules that they are around."""
    for part in adapter.parts:
        if isinstance(part, Peft):
            yield from part.layers.items()


def _make_comfyui_state(
    adapter: Adapter, prefix: str, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """ComfyUI reads a U-Net's LoRA under kohya's names and a transformer's under diffusers' ones; alpha is a
    tensor beside each."""
    found = {}
    for module, layer in _iterate_layers(adapter):
        name = f"lora_unet_{module.replace('.', '_')}" if prefix == "unet" else f"{prefix}.{module}"
        for end, kohya in _KOHYA_ENDS.items():
            found[f"{name}.{kohya if prefix == 'unet' else end}"] = state[f"{module}.{end}"]
        if f"{module}.lora_magnitude_vector" in state:
            found[f"{name}.dora_scale"] = _shape_like_rows(layer, _make_comfyui_scale(layer))
        found[f"{name}.alpha"] = _find_alpha(layer)
    return found


def _make_kohya_state(
    adapter: Adapter, state: dict[str, torch.Tensor], rename: Callable[[str], str]
) -> dict[str, torch.Tensor]:
    """As sd-scripts' networks.lora (networks/lora.py) has a LoRA, and LyCORIS, which it trains DoRA by, a
    DoRA: that divides by the norms of the changed rows, as peft does, so that the scales are the magnitudes.
    Raises MemControlError for a layer that has no name there."""
    found = {}
    for module, layer in _iterate_layers(adapter):
        name = f"lora_unet_{rename(module).replace('.', '_')}"
        for end, kohya in _KOHYA_ENDS.items():
            found[f"{name}.{kohya}"] = state[f"{module}.{end}"].clone()
        if f"{module}.lora_magnitude_vector" in state:
            magnitude = layer.lora_magnitude_vector["default"].weight.detach().float().flatten()
            found[f"{name}.dora_scale"] = _shape_like_rows(layer, magnitude)
        found[f"{name}.alpha"] = _find_alpha(layer)
    return found


def _find_alpha(layer: Any) -> torch.Tensor:
    return torch.tensor(float(layer.scaling["default"] * layer.r["default"]))


def _shape_like_rows(layer: Any, scale: torch.Tensor) -> torch.Tensor:
    """[out, 1, ...], by which readers tell scales of rows from those of columns."""
    return scale.view(-1, *[1] * (layer.get_base_layer().weight.ndim - 1)).cpu().contiguous().clone()


def _make_comfyui_scale(layer: Any) -> torch.Tensor:
    """A DoRA's magnitudes [out] as ComfyUI's comfy/weight_adapter/base.py takes them: it divides by the norms
    of the base's own rows, where peft, as the paper (arXiv 2402.09353, eq. 5), divides by those of W0 +
    BA."""
    weight = layer.get_base_layer().weight.detach().float()
    changed = weight + layer.get_delta_weight("default").detach().float()
    norms, own = (rows.flatten(1).norm(dim=1) for rows in (changed, weight))
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().float().flatten()
    return magnitude * own / norms


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
