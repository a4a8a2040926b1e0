"""Owns STUDY.yaml: its keys, their types and defaults, and overrides written as key=value."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from memcontrol.errors import MemControlError

# What may change between two runs of one study: where and how fast it runs, not what it finds.
FREE_KEYS = ("storage", "search.trials", "search.workers", "search.executor")

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class DataConfig(Strict):
    """Images with captions: `digits` (embedded) or a folder; a part is a share of the images (0.5) or a count (128)."""

    path: str
    train: Share | Count = 0.5
    holdout: Share | Count = 0.25
    test: Share | Count = 0.25
    resolution: Annotated[int, Field(ge=8)] | None = None
    skip_unreadable: bool = False


class InnerConfig(Strict):
    """One fine-tuning: its budget in images seen, batch and optimizer."""

    budget_images: Count = 10_000
    batch_size: Count = 16
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    schedule: Literal["constant", "cosine"] = "cosine"
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    norm_shift_rate: Annotated[float, Field(gt=0)] | None = 1e-6  # of SV-Diff's norm shifts, as published; None: the choice's own


class RewardsConfig(Strict):
    """What each trial is scored on, and how its images are sampled."""

    objectives: Annotated[tuple[str, ...], Field(min_length=1)] = ("fid", "memorization")
    extractor: str = "tiny"
    n_samples: Count = 256
    sampling_steps: Count = 20
    guidance: Annotated[float, Field(ge=1)] = 1.0


class SearchConfig(Strict):
    """The outer loop: how many sampled trials beside the three anchors, how many at a time, and the study's seed."""

    trials: Annotated[int, Field(ge=0)] = 20
    workers: Count = 2
    seed: int = 0
    executor: Literal["inline", "local"] = "local"
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0


def path_alone(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Config(Strict):
    """A study: everything that its numbers depend on."""

    name: Annotated[str, Field(pattern=NAME)]
    storage: str | None = None
    base: str = "tiny"
    data: Annotated[DataConfig, BeforeValidator(path_alone)]
    space: str = "sd15-blocks"
    inner: InnerConfig = InnerConfig()
    rewards: RewardsConfig = RewardsConfig()
    search: SearchConfig = SearchConfig()

    @model_validator(mode="before")
    @classmethod
    def lists_to_tuples(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("rewards"), dict):
            objectives = value["rewards"].get("objectives")
            if isinstance(objectives, list):
                return {**value, "rewards": {**value["rewards"], "objectives": tuple(objectives)}}
        return value


def load_config(source: Path | str | dict, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file or a mapping, `overrides` ("inner.batch_size=8") applied. Raises MemControlError."""
    values = dict(source) if isinstance(source, dict) else read_yaml(Path(source))
    for override in overrides:
        values = with_override(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        where = "the config" if isinstance(source, dict) else str(source)
        raise MemControlError(f"{where}: " + "; ".join(explain(problem) for problem in error.errors())) from None


def read_yaml(path: Path) -> dict:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MemControlError(f"{path}: no such file; give a study file in YAML, see the README for an example") from None
    except IsADirectoryError:
        raise MemControlError(f"{path}: is a folder; give the study file, such as {path / 'study.yaml'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MemControlError(f"{path}: cannot be read ({error}); give a text file in YAML") from None
    except yaml.YAMLError as error:
        raise MemControlError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise MemControlError(f"{path}: holds {type(values).__name__}, not keys; a study file has {', '.join(Config.model_fields)}")
    return values


def with_override(values: dict, override: str) -> dict:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise MemControlError(f"override '{override}': write it as key=value, for example inner.batch_size=8")
    try:
        return placed(values, key.split("."), yaml_number(text))
    except yaml.YAMLError:
        raise MemControlError(f"override '{override}': '{text}' is not valid YAML") from None


def placed(values: Any, keys: list[str], value: Any) -> dict:
    """`values` with `value` at the dotted place; a short form such as `data: digits` keeps its meaning."""
    inside = path_alone(values) if values is not None else {}
    if not isinstance(inside, dict):
        inside = {}
    return {**inside, keys[0]: placed(inside.get(keys[0]), keys[1:], value) if keys[1:] else value}


def yaml_number(text: str) -> Any:
    """YAML 1.1 reads 1e-3 as text; people mean a number."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def explain(problem: dict) -> str:
    """One of pydantic's findings as: which key, what was given, what is allowed."""
    path = [str(part) for part in problem["loc"] if str(part) in known_names()] or [str(problem["loc"][0])]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        key = ".".join(str(part) for part in problem["loc"])
        valid = ", ".join(model_at(problem["loc"][:-1]).model_fields)
        return f"unknown key '{key}'; allowed: {valid}"
    if problem["type"] == "missing":
        return f"key '{key}' is missing"
    return f"key '{key}' is {problem['input']!r}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def known_names() -> set[str]:
    models = (Config, DataConfig, InnerConfig, RewardsConfig, SearchConfig)
    return {name for model in models for name in model.model_fields}


def model_at(place: Sequence) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for part in place:
        inner = model.model_fields[part].annotation
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else model
    return model


def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def differing_keys(stored: Config, given: Config) -> list[str]:
    """Dotted keys, of those that numbers depend on, whose values differ: "inner.batch_size (8 there, 16 here)"."""
    there, here = (flat(config.model_dump(mode="json")) for config in (stored, given))
    return [
        f"{key} ({there.get(key)} there, {here.get(key)} here)"
        for key in sorted({*there, *here})
        if key not in FREE_KEYS and there.get(key) != here.get(key)
    ]


def study_folder(study_file: Path, name: str) -> Path:
    """Where results go: runs/NAME beside the study file, or the file's own folder if that already is called NAME."""
    parent = study_file.resolve().parent
    return parent if parent.name == name else parent / "runs" / name
