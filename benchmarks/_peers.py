"""What people run today, written in the straightforward way: MemControl's recipe for a trial, and diffusers'
script for LoRA.

Each is given what our trial is given: base, training images and captions, mask, first weights, batches,
noise, learning rates, number of steps and of samples, feature network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """One trial as its peers get it. `draw`: of a step, the rows of its batch, and the generator of its
    noise."""

    base: str
    images: np.ndarray  # uint8 [N, 3, H, W]
    captions: Sequence[str]
    holdout: np.ndarray
    prompts: Sequence[str]  # of the samples
    modules: Sequence[str]  # that get LoRA
    first: dict[str, Tensor]  # their first weights
    rank: int
    alpha: float
    rate: Callable[[int], float]  # step to learning rate
    draw: Callable[[int], tuple[Tensor, torch.Generator]]
    n_steps: int
    guidance: float
    extract: Callable[[np.ndarray], np.ndarray]
    n_features: int
    device: str
    precision: str


@dataclass(frozen=True)
class Recipe:
    """How a peer goes about it."""

    whole_graph: bool  # gradients go back to the first layer, whatever is trained
    sampling_steps: int
    sampling_batch: int


RECIPES = {
    "MemControl's recipe": Recipe(whole_graph=True, sampling_steps=50, sampling_batch=64),
    "diffusers' LoRA recipe": Recipe(whole_graph=False, sampling_steps=30, sampling_batch=64),
}


def trial(task: Task, recipe: Recipe) -> tuple[list[float], float]:
    """Loads the pipeline, fine-tunes, samples and scores. Returns the losses and the FID."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        task.base, safety_checker=None, requires_safety_checker=False
    ).to(task.device)
    pipe.set_progress_bar_config(disable=True)
    parameters = add_lora(pipe, task)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    losses = [step(pipe, task, recipe, optimizer, parameters, number) for number in range(task.n_steps)]
    return losses, fid(task, samples(pipe, task, recipe))


def add_lora(pipe, task: Task) -> list[Tensor]:
    from peft import LoraConfig

    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=task.rank, lora_alpha=task.alpha, target_modules=list(task.modules)))
    unknown = pipe.unet.load_state_dict(task.first, strict=False).unexpected_keys
    assert not unknown, unknown
    return [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]


def step(pipe, task: Task, recipe: Recipe, optimizer, parameters: list[Tensor], number: int) -> float:
    """Images and captions are encoded again each time."""
    rows, generator = task.draw(number)
    pixels = torch.from_numpy(task.images[rows.numpy()]).to(task.device).float() / 127.5 - 1
    with torch.no_grad():
        posterior, scale = pipe.vae.encode(pixels).latent_dist, pipe.vae.config.scaling_factor
        latents = scale * (
            posterior.mean
            + posterior.std * torch.randn(posterior.mean.shape, generator=generator).to(task.device)
        )
        torch.rand(len(rows), generator=generator)  # which captions are dropped, in our loop: none
        tokens = pipe.tokenizer(
            [task.captions[row] for row in rows],
            padding="max_length",
            max_length=pipe.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        text = pipe.text_encoder(tokens.input_ids.to(task.device))[0]
    noise = torch.randn(latents.shape, generator=generator).to(task.device)
    timesteps = torch.randint(
        pipe.scheduler.config.num_train_timesteps, (len(rows),), generator=generator
    ).to(task.device)
    noisy = pipe.scheduler.add_noise(latents, noise, timesteps).requires_grad_(recipe.whole_graph)
    with torch.autocast(task.device, getattr(torch, task.precision), enabled=task.precision != "float32"):
        predicted = pipe.unet(noisy, timesteps, text).sample
    loss = torch.nn.functional.mse_loss(predicted.float(), noise)
    for group in optimizer.param_groups:
        group["lr"] = task.rate(number)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def samples(pipe, task: Task, recipe: Recipe) -> np.ndarray:
    """uint8 [N, 3, H, W]"""
    found = []
    for start in range(0, len(task.prompts), recipe.sampling_batch):
        prompts = list(task.prompts[start : start + recipe.sampling_batch])
        side = task.images.shape[-1]
        with (
            torch.no_grad(),
            torch.autocast(task.device, getattr(torch, task.precision), enabled=task.precision != "float32"),
        ):
            found.append(
                pipe(
                    prompts,
                    num_inference_steps=recipe.sampling_steps,
                    guidance_scale=task.guidance,
                    height=side,
                    width=side,
                    output_type="np",
                ).images
            )
    return (np.concatenate(found).transpose(0, 3, 1, 2) * 255 + 0.5).astype(np.uint8)


class Features(torch.nn.Module):
    """Our feature network where torchmetrics wants a module."""

    def __init__(self, task: Task):
        super().__init__()
        self.extract, self.num_features = task.extract, task.n_features

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(self.extract(images.numpy()))).float()


def fid(task: Task, generated: np.ndarray) -> float:
    """Of torchmetrics, the reference's features taken anew."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=Features(task), input_img_size=generated.shape[1:])
    metric.update(torch.from_numpy(task.holdout), real=True)
    metric.update(torch.from_numpy(generated), real=False)
    return float(metric.compute())
