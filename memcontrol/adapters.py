"""Owns what is trained: injects a choice's trainable tensors into a denoiser, saves, loads, fuses and removes them."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from memcontrol.errors import MemControlError
from memcontrol.files import replacing
from memcontrol.seeds import seed_of
from memcontrol.space import Choice

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name and keys that diffusers' load_lora_weights reads
WEIGHTS_FILE = "trained_weights.safetensors"


def adaptable_modules(denoiser: nn.Module) -> list[str]:
    """Names of the Linear and Conv2d modules, the ones that a search space's patterns are matched against."""
    return [name for name, module in denoiser.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


class Adapter(ABC):
    """What a choice trains in one denoiser. Injecting changes no output; removing restores the base bit for bit."""

    file: str

    @abstractmethod
    def named_parameters(self) -> dict[str, nn.Parameter]: ...

    @abstractmethod
    def save(self, folder: Path, description: dict) -> None:
        """Writes the trained tensors to folder/file as safetensors, what they are in its header."""

    @abstractmethod
    def load(self, folder: Path) -> None: ...

    @abstractmethod
    def fuse(self) -> None:
        """Moves what was learned into the denoiser's own weights and leaves a plain diffusers model."""

    @abstractmethod
    def remove(self) -> None: ...

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())

    def n_trained(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


class Weights(Adapter):
    """Trains existing weights: attention projections of the chosen groups, the whole denoiser, or nothing."""

    file = WEIGHTS_FILE

    def __init__(self, denoiser: nn.Module, parameters: dict[str, nn.Parameter]):
        self.trained = parameters
        self.original = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.requires_grad_(True)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return self.trained

    def save(self, folder: Path, description: dict) -> None:
        from safetensors.torch import save_file

        with replacing(folder / self.file) as part:
            save_file({name: parameter.detach().cpu().contiguous() for name, parameter in self.trained.items()}, part, header(description))

    def load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self.copy_in(load_file(folder / self.file))

    @torch.no_grad()
    def copy_in(self, tensors: dict[str, Tensor]) -> None:
        if tensors.keys() != self.trained.keys():
            raise MemControlError(f"{self.file} holds other tensors than this choice trains; it belongs to another base or space")
        for name, parameter in self.trained.items():
            parameter.copy_(tensors[name])

    def fuse(self) -> None:
        for parameter in self.trained.values():
            parameter.requires_grad_(False)

    def remove(self) -> None:
        self.copy_in(self.original)
        self.fuse()


class Lora(Adapter):
    """Low-rank adaptation through the peft library, alpha = rank (Hu et al. 2021, arXiv 2106.09685)."""

    file = LORA_FILE

    def __init__(self, denoiser: nn.Module, modules: Sequence[str], rank: int, seed: int):
        from peft import LoraConfig, inject_adapter_in_model

        pattern = "|".join(re.escape(name) for name in modules)  # a string: peft shortens long lists to suffixes
        self.denoiser = denoiser
        self.config = LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern)
        inject_adapter_in_model(self.config, denoiser)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters().items():
            if ".lora_A." in name:  # peft's own start, drawn again from our generator
                bound = math.sqrt(6 / ((1 + 5) * parameter[0].numel()))
                drawn = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
                parameter.data.copy_(drawn)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.denoiser.named_parameters() if ".lora_" in name}

    def save(self, folder: Path, description: dict) -> None:
        """The standard LoRA file, with its configuration in the header: without it a reader guesses alpha."""
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        state = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.denoiser))
        tensors = {f"unet.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        settings = {f"unet.{key}": value for key, value in plain(self.config.to_dict()).items()}
        with replacing(folder / self.file) as part:
            save_file(tensors, part, header(description) | {"lora_adapter_metadata": json.dumps(settings, sort_keys=True)})

    def load(self, folder: Path) -> None:
        from diffusers.utils import convert_unet_state_dict_to_peft
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        stored = {name.removeprefix("unet."): tensor for name, tensor in load_file(folder / self.file).items()}
        result = set_peft_model_state_dict(self.denoiser, convert_unet_state_dict_to_peft(stored))
        lost = [name for name in (*result.unexpected_keys, *result.missing_keys) if ".lora_" in name]
        if lost:
            raise MemControlError(f"{self.file} does not fit this choice (for one, '{lost[0]}'); it belongs to another base or space")

    def fuse(self) -> None:
        for layer in lora_layers(self.denoiser).values():
            layer.merge()
        self.remove()

    def remove(self) -> None:
        for name, layer in lora_layers(self.denoiser).items():
            self.denoiser.set_submodule(name, layer.get_base_layer())
        del self.denoiser.peft_config
        self.denoiser.requires_grad_(False)


def header(description: dict) -> dict[str, str]:
    return {"format": "pt", "memcontrol": json.dumps(description, sort_keys=True)}


def plain(settings: dict) -> dict:
    """peft's configuration as JSON can hold it."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def lora_layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)}


def inject(denoiser: nn.Module, modules: Sequence[str], choice: Choice, seed: int) -> Adapter:
    """Freezes the denoiser and makes trainable what the choice names; `modules` are those of its groups."""
    denoiser.requires_grad_(False)
    if choice.method == "lora":
        return Lora(denoiser, modules, choice.rank or 1, seed_of(seed, "lora"))
    wanted = {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    trained = {
        name: parameter
        for name, parameter in denoiser.named_parameters()
        if choice.method == "full" or (choice.method == "attention" and name in wanted)
    }
    return Weights(denoiser, trained)
