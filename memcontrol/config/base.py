"""Owns `base`: where the model to fine-tune comes from, its short form, and its files' places."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from memcontrol.config.paths import find_beside, take_name
from memcontrol.config.problems import explain_problems
from memcontrol.config.strict import Count, Strict
from memcontrol.core.errors import MemControlError
from memcontrol.core.published import publish_name
from memcontrol.core.yaml_reader import parse_number

EMBEDDED = "tiny"  # the base that is embedded
CHECKPOINT = ".safetensors"  # how a base in one file ends


class BaseConfig(Strict):
    """Where the model to fine-tune comes from; its precision is `base_precision`, whatever its files hold."""

    id: str = EMBEDDED
    """`tiny` (embedded), a folder in diffusers' format, a Hub id (owner/name), or a checkpoint in a single
    `.safetensors` file, as ComfyUI has it"""
    revision: Annotated[str, Field(min_length=1)] | None = None
    """of a Hub id: a branch, tag or commit; none: `main`. A study keeps to the commit that it began with"""
    variant: Annotated[str, Field(min_length=1)] | None = None
    """which of several sets of weights, such as `fp16` for `*.fp16.safetensors`; none: those without a name,
    or the only ones"""
    adapter: Annotated[str, Field(min_length=1)] | None = None
    """what is fused into the denoiser before anything is trained: a LoRA file, a run folder, or what `export`
    wrote; seen from the study file"""
    config: Annotated[str, Field(min_length=1)] | None = None
    """of a single file: the folder in diffusers' format, or the Hub id, whose configs and tokenizers belong
    to it; none: those that diffusers knows, from the Hub. What the file lacks is read from there too"""
    max_sequence_length: Count | None = None
    """tokens of T5 or Gemma that a caption takes, in training and sampling; none: the pipeline's own default
    (Stable Diffusion 3: 256, Flux: 512, PixArt: 120 or 300, Sana: 300). Padding takes part in what Stable
    Diffusion 3 and Flux compute: give the same to diffusers' pipeline when you use the model"""

    @property
    def is_file(self) -> bool:
        """Whether it is a checkpoint in one file."""
        return self.id.endswith(CHECKPOINT)

    def __str__(self) -> str:
        """For people: the id, and what else is set, files by their names."""
        more = [(key, getattr(self, key)) for key in type(self).model_fields if key != "id"]
        said = [f"{key} {take_name(str(value))}" for key, value in more if value]
        return f"{self.id} ({', '.join(said)})" if said else self.id

    def without_paths(self) -> BaseConfig:
        """With the names of files and folders in place of where they lie on this machine."""
        values = {key: getattr(self, key) for key in ("id", "adapter", "config")}
        return self.model_copy(
            update={key: value and publish_name(value, key != "adapter") for key, value in values.items()}
        )

    @model_serializer(mode="wrap")
    def write_short(self, write: SerializerFunctionWrapHandler) -> dict[str, Any] | str:
        """The id alone where nothing else is set, as studies have always had it."""
        values = {key: value for key, value in write(self).items() if value is not None}
        return self.id if values.keys() <= {"id"} else values


def expand_id(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


def locate_base(base: BaseConfig, folder: Path) -> BaseConfig:
    """With absolute paths of its files and folders, which lie relative to `folder`. An id that is nothing
    there is left as it is: it may be the Hub's."""
    where = {
        "id": base.id if base.id == EMBEDDED else find_beside(base.id, folder),
        "adapter": base.adapter and str((folder / base.adapter).absolute()),
        "config": base.config and find_beside(base.config, folder),
    }
    return base.model_copy(update=where)


def read_base(value: BaseConfig | dict | str) -> BaseConfig:
    """From what a config holds under `base`."""
    return value if isinstance(value, BaseConfig) else BaseConfig.model_validate(expand_id(value))


def parse_base(text: str, key: str = "--base") -> BaseConfig:
    """A base as a command line has it: its id, or `{id: ..., adapter: ...}`. Raises MemControlError."""
    try:
        values = parse_number(text) if text.startswith("{") else text
        return locate_base(read_base(values), Path())
    except yaml.YAMLError:
        raise MemControlError(f"{key} is '{text}', which is not valid YAML") from None
    except ValidationError as error:
        raise MemControlError(f"{key}: {explain_problems(error.errors(), BaseConfig)}") from None
