"""Owns reading what was fine-tuned: MemControl's own adapter files, and LoRA files of others, put into a
denoiser."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import parse_json, read_json
from memcontrol.core.run_folder import RunFolder
from memcontrol.core.space import SearchSpace
from memcontrol.core.space_yaml import parse_space
from memcontrol.model.adapter import Adapter, inject_adapter, undo_on_failure
from memcontrol.model.families import name_denoiser

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers' load_lora_weights looks for
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as peft saves a model's
_PEFT_NAME = re.compile(r"(base_model\.model\.)?(unet\.|transformer\.)?(.+\.lora_(?:A|B|magnitude_vector).*)")
_OF_ENCODER = re.compile(r"lora_te|text_encoder|te[12]?\.")
_AFTER_MODULE = re.compile(r"(\.lora|_lora|\.lokr_).*")


def load_adapter(pipeline, path: str | Path) -> Adapter:
    """Puts an exported adapter into a pipeline: a file, or the folder that `export --format adapter` or a run
    wrote.

    The result can `fuse()` or `remove()` itself. Raises MemControlError where the file is not MemControl's or
    does not fit.
    """
    path, part = find_adapter_file(Path(path)), name_denoiser(pipeline)
    if read_description(path) is None:
        raise MemControlError(
            f"{path} was not written by memcontrol; load it with the library that it came from"
        )
    return put_adapter(getattr(pipeline, part), part, path)


def find_adapter_file(path: Path) -> Path:
    """The file itself, or that of a run's or exported folder. Raises MemControlError."""
    if path.is_dir():
        places = (RunFolder(path).adapter_file, path / LORA_FILE, path / _PEFT_FILE)
        path = next((place for place in places if place.is_file()), path)
    if not path.is_file():
        why = "holds no adapter" if path.exists() else "is not there"
        raise MemControlError(
            f"adapter {path} {why}; give a run folder, what `memcontrol export --format adapter` wrote, or a "
            "LoRA's safetensors file"
        )
    return path


def read_description(path: Path) -> dict[str, Any] | None:
    """What the file says of itself: config, space and choice; None where another tool wrote it, or the
    names in it are another tool's."""
    names, described = _read_head(path)
    is_ours = described is not None and not any(name.endswith(".alpha") for name in names)
    found = parse_json(described, path) if described and is_ours else None
    if found is not None and not (isinstance(found, dict) and isinstance(found.get("config"), dict)):
        raise MemControlError(f"{path} is broken: its header does not say what it was trained with")
    return found


def is_own_file(path: Path) -> bool:
    """Whether MemControl wrote the adapter. Raises MemControlError where there is none."""
    return read_description(find_adapter_file(path)) is not None


def _read_head(path: Path) -> tuple[list[str], str | None]:
    """Names of the tensors, and the description. Raises MemControlError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            return list(opened.keys()), (opened.metadata() or {}).get("memcontrol")
    except SafetensorError as error:
        raise MemControlError(f"{path} is no safetensors file ({error}); give one") from None


def put_adapter(denoiser: torch.nn.Module, part: str, path: Path) -> Adapter:
    """Of MemControl's own file; `part` is what the pipeline calls its denoiser. Raises MemControlError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    values = read_description(path)
    assert values is not None, "only MemControl's own files are put in"
    try:
        space = parse_space(values["space"], str(values["config"]["space"]))
        choice = Choice.from_dict(values["choice"])
        state = {name.removeprefix(f"{part}."): tensor for name, tensor in load_file(path).items()}
        settings = [choice.setting(group) for group in choice.groups]
        _check_ranks(path, [setting.rank for setting in settings], state)
        with undo_on_failure(denoiser):
            return _inject_state(denoiser, space, choice, state)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise MemControlError(f"{path} is broken, or of another version ({said}); export it again") from None


def _inject_state(
    denoiser: torch.nn.Module, space: SearchSpace, choice: Choice, state: dict[str, torch.Tensor]
) -> Adapter:
    adapter = inject_adapter(denoiser, space, choice, 0)
    try:
        adapter.load_state(
            {
                f"{name}.weight" if name.endswith("lora_magnitude_vector") else name: tensor
                for name, tensor in state.items()
            }
        )
    except BaseException:
        adapter.remove()
        raise
    return adapter


def _check_ranks(path: Path, ranks: Iterable[Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises MemControlError for one beyond every side of every tensor, which would be paid for in memory
    before it is seen to fit nothing."""
    most = max((side for tensor in tensors.values() for side in tensor.shape), default=0)
    for rank in ranks:
        if rank is not None and not (isinstance(rank, int) and 0 < rank <= most):
            raise MemControlError(
                f"{path} is broken: a rank of {rank}, and no tensor has a side above {most}"
            )


def fuse_file(
    denoiser: Any,
    part: str,
    pipeline_class: Any,
    path: Path,
    strength: float = 1.0,
    given_as: str = "base.adapter",
) -> None:
    """Fuses what the file holds into the denoiser's own weights: W + strength (W' - W) (Wortsman et al. 2022,
    arXiv 2109.01903). `given_as` is the option it came by. Raises MemControlError where it does not fit."""
    if strength != 1:
        before = {name: tensor.detach().clone() for name, tensor in denoiser.named_parameters()}
    _fuse_whole(denoiser, part, pipeline_class, path, given_as)
    if strength != 1:
        for name, tensor in denoiser.named_parameters():
            tensor.data.copy_(torch.lerp(before[name], tensor, strength))


def _fuse_whole(denoiser: Any, part: str, pipeline_class: Any, path: Path, given_as: str) -> None:
    described = read_description(path)
    if described is None:
        _fuse_lora(denoiser, part, pipeline_class, path, given_as)
    elif described["config"].get("inner", {}).get("from_scratch"):
        raise MemControlError(
            f"{given_as} {path} belongs to a denoiser that was drawn anew; export that run with --format "
            "pipeline, and give the folder as base.id"
        )
    else:
        try:
            put_adapter(denoiser, part, path).fuse()
        except MemControlError as error:
            raise MemControlError(
                f"{given_as} {path} does not fit the base, it was trained over another: {error}"
            ) from None


def _fuse_lora(denoiser: Any, part: str, pipeline_class: Any, path: Path, given_as: str) -> None:
    """A LoRA under diffusers', kohya's, ComfyUI's or peft's names."""
    read = getattr(pipeline_class, "lora_state_dict", None)
    if read is None or not hasattr(denoiser, "load_lora_adapter"):
        raise MemControlError(
            f"{given_as} {path}: diffusers reads no LoRA for a {pipeline_class.__name__}; give a run "
            "folder or an export of memcontrol"
        )
    if any("dora_scale" in name for name in _read_head(path)[0]):
        raise MemControlError(
            f"{given_as} {path} is a DoRA under names of which diffusers cannot read its scale; give it "
            f"under diffusers' own ({LORA_FILE})"
        )
    try:
        own, given = _read_peft(path, part) or _read_lora(read, denoiser, part, path)
        if own:
            told = given.get("metadata") or {}
            ranks = [told.get(f"{part}.r"), *(told.get(f"{part}.rank_pattern") or {}).values()]
            _check_ranks(path, ranks, own)
            with _hush_diffusers():
                denoiser.load_lora_adapter(own, prefix=part, **given)
    except KeyError as error:
        _refuse(given_as, path, f"tensor {error} is missing")
    except (OSError, ValueError, TypeError, RuntimeError, AttributeError, IndexError, re.error) as error:
        said = " ".join(str(error).split())
        _refuse(given_as, path, "its layers have other shapes" if "size mismatch" in said else said[:200])
    if not own:
        _refuse(given_as, path, f"it holds no LoRA of a {part}")
    _check_finite(given_as, path, own)
    wanted = {_AFTER_MODULE.sub("", name) for name in own}
    n_found = sum(hasattr(module, "lora_A") or hasattr(module, "lokr_w1") for module in denoiser.modules())
    if n_found < len(wanted):
        _refuse(given_as, path, f"of the {len(wanted)} layers that it changes the denoiser has {n_found}")
    denoiser.fuse_lora()
    denoiser.unload_lora()


@contextlib.contextmanager
def _hush_diffusers() -> Iterator[None]:
    """What does not fit is raised; it need not be logged as well."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read_lora(read: Any, denoiser: Any, part: str, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The denoiser's tensors, and how diffusers is told of their scale."""
    state, *alphas, metadata = read(
        str(path.parent),
        weight_name=path.name,
        unet_config=denoiser.config if part == "unet" else None,
        return_alphas=True,
        return_lora_metadata=True,
    )
    own = {name: tensor for name, tensor in state.items() if name.startswith(f"{part}.")}
    return own, {"metadata": metadata} if metadata else {"network_alphas": alphas[0] if alphas else None}


def _read_peft(path: Path, part: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The same of what peft saved of a model, whose scale lies in a file beside it; None where it is no such
    file."""
    from safetensors.torch import load_file

    state = load_file(path)
    names = {name: _PEFT_NAME.fullmatch(name) for name in state}
    found = {name: match for name, match in names.items() if match and not _OF_ENCODER.match(match[3])}
    if len(found) < max(1, len(names)) or all(match[2] and not match[1] for match in found.values()):
        return None  # diffusers' own names begin with the part's
    own = {f"{part}.{match[3]}": state[name] for name, match in found.items()}
    config = path.parent / _PEFT_CONFIG
    if not config.is_file():  # alpha as large as the rank, as peft's own reader would not guess
        return own, {"network_alphas": None}
    settings = read_json(config)
    return own, {"metadata": {f"{part}.{key}": value for key, value in settings.items()}}


def _check_finite(given_as: str, path: Path, tensors: dict[str, Any]) -> None:
    """Raises MemControlError."""
    broken = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if broken:
        raise MemControlError(f"{given_as} {path} is broken: '{broken}' holds values that are not finite")


def _refuse(given_as: str, path: Path, reason: str) -> None:
    raise MemControlError(f"{given_as} {path} does not fit the base: {reason}; give the base it was made for")


def list_left_out(path: Path, given_as: str = "base.adapter") -> list[str]:
    """What of the file is not used, in sentences."""
    n = sum(bool(_OF_ENCODER.match(name)) for name in _read_head(path)[0])
    return (
        [f"{given_as} {path.name} also changes text encoders ({n} tensors); they stay as the base has them"]
        if n
        else []
    )
