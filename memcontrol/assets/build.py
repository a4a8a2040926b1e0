"""Owns the embedded base: draws printed characters from fonts and pretrains a small Stable-Diffusion-shaped
pipeline on them.

`python -m memcontrol.tiny` rebuilds what ships in memcontrol/assets (about half an hour on one core). The
fonts are those that come with matplotlib; nothing is downloaded, and no handwritten digit is ever seen.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from memcontrol.scoring.extractors import TinyFeatures

_ASSETS = Path(__file__).parent
SIZE = 32
CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
)
INKS = {
    "red": (200, 30, 30),
    "green": (20, 130, 50),
    "blue": (30, 50, 200),
    "orange": (230, 130, 20),
    "purple": (120, 30, 150),
}
# One learned merge per frequent word keeps captions short; the corpus is this vocabulary, not a crawl.
CAPTION_WORDS = (
    "a an the of in on at and with to from is one two three four five six seven eight nine zero printed "
    "handwritten digit letter capital bold slanted blurred red green blue orange purple black white grey "
    "image photo photograph picture painting drawing person man woman child face dog cat bird flower tree "
    "car house street sky sea chest x-ray scan no finding normal abnormal left right small large young old "
    "style artist portrait landscape"
).split()


@dataclass(frozen=True)
class Page:
    """Drawn characters: images uint8 [N, H, W, 3], one caption each, and what the drawing varied (for the
    feature network)."""

    images: np.ndarray
    captions: list[str]
    characters: np.ndarray  # [N] index into CHARACTERS
    fonts: np.ndarray  # [N] index into FONTS
    strokes: np.ndarray  # [N, 5] height, stretch, rotation, shear and resolution, each about unit scale


def find_font(name: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


def draw_glyph(character: str, font: ImageFont.FreeTypeFont, stroke: int) -> Image.Image:
    """The character's ink (0..255) on a canvas cropped to it."""
    canvas = Image.new("L", (160, 160), 0)
    ImageDraw.Draw(canvas).text((80, 80), character, fill=255, font=font, anchor="mm", stroke_width=stroke)
    return canvas.crop(canvas.getbbox())


def choose_place(ink: Image.Image, height, stretch, rotation, shear, shift) -> Image.Image:
    """The glyph under an affine map, `height` pixels of the final 32 high, drawn at four times the size and
    reduced."""
    big = 4 * SIZE
    scale = 4 * height / ink.height
    scale_x = min(scale * stretch, 4 * 31 / ink.width)
    cos, sin = np.cos(rotation), np.sin(rotation)
    forward = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]]) @ np.diag([scale_x, scale])
    inverse = np.linalg.inv(forward)
    centre = np.array([ink.width, ink.height]) / 2 - inverse @ (
        np.array([big, big]) / 2 + 4 * np.asarray(shift)
    )
    coefficients = (*inverse[0], centre[0], *inverse[1], centre[1])
    return ink.transform((big, big), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC).reduce(4)


def crumple(ink: Image.Image, amplitude: float, rng: np.random.Generator) -> Image.Image:
    """The drawing under a smooth warp: the inner corners of a 4 x 4 mesh move by up to `amplitude` pixels."""
    cells, side = 4, ink.width // 4
    # [5, 5, xy]
    corners = np.stack(np.meshgrid(*[np.arange(cells + 1) * side] * 2, indexing="xy"), -1).astype(float)
    corners[1:-1, 1:-1] += rng.uniform(-amplitude, amplitude, (cells - 1, cells - 1, 2))
    mesh = []
    for row in range(cells):
        for column in range(cells):
            box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
            quad = [corners[row + dy, column + dx] for dx, dy in ((0, 0), (0, 1), (1, 1), (1, 0))]
            mesh.append((box, tuple(float(value) for point in quad for value in point)))
    return ink.transform(ink.size, Image.Transform.MESH, mesh, Image.Resampling.BICUBIC)


def draw_colour(ink: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Ink [H, W] in 0..1 to an image [H, W, 3]; one in six is printed in a named colour on tinted paper."""
    if rng.random() > 1 / 6:
        paper, pen, words = np.full(3, rng.uniform(235, 255)), np.full(3, rng.uniform(0, 40)), ""
    else:
        name = str(rng.choice(list(INKS)))
        paper, pen, words = rng.uniform(180, 255, 3), np.array(INKS[name], float), f" in {name}"
    return paper + ink[..., None] * (pen - paper), words


def describe_page(character: str, font: str, blurred: bool, ink_words: str) -> str:
    kind = "digit" if character.isdigit() else "capital letter" if character.isupper() else "letter"
    bold = "bold " if "Bol" in font or font == "cmb10" else ""
    slanted = "slanted " if any(word in font for word in ("Obl", "Ita", "cmti")) else ""
    return f"a {'blurred ' if blurred else ''}{bold}{slanted}printed {kind} {character.lower()}{ink_words}"


def draw_page(n: int, rng: np.random.Generator, progress=lambda done, total: None) -> Page:
    """Draws n random characters: font, size, slant, stroke, resolution and ink vary. n images of 32 x 32
    pixels."""
    loaded = [ImageFont.truetype(find_font(name), 96) for name in FONTS]
    images, captions = np.empty((n, SIZE, SIZE, 3), np.uint8), []
    # Half of the drawings are digits: the base is there to be fine-tuned on digits.
    pool = [CHARACTERS.index(c) for c in CHARACTERS] + [CHARACTERS.index(c) for c in string.digits] * 5
    characters, fonts = rng.choice(pool, n), rng.integers(len(FONTS), size=n)
    strokes = np.empty((n, 5), np.float32)
    for i in range(n):
        unit = np.clip(rng.standard_normal(4), -2.5, 2.5)
        resolution = int(rng.choice([0, 8, 12, 16], p=[0.3, 0.45, 0.1, 0.15]))
        ink = draw_glyph(CHARACTERS[characters[i]], loaded[fonts[i]], int(rng.integers(0, 7)))
        ink = choose_place(
            ink,
            28 + 1.8 * unit[0],
            np.exp(0.2 * unit[1]),
            0.12 * unit[2],
            0.15 * unit[3],
            rng.uniform(-1.5, 1.5, 2),
        )
        ink = crumple(ink, rng.uniform(0, 3), rng)
        if resolution:
            ink = ink.resize((resolution, resolution), Image.Resampling.BOX).resize(
                (SIZE, SIZE), Image.Resampling.BICUBIC
            )
        image, ink_words = draw_colour(np.asarray(ink, float) / 255, rng)
        images[i] = np.clip(image + 0.5, 0, 255).astype(np.uint8)
        captions.append(describe_page(CHARACTERS[characters[i]], FONTS[fonts[i]], resolution == 8, ink_words))
        strokes[i] = (*unit, (resolution or SIZE) / SIZE * 2 - 1)
        progress(i + 1, n)
    return Page(images, captions, characters, fonts, strokes)


def draw_clouds(n: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth coloured noise, uint8 [n, H, W, 3], so that the autoencoder also carries photographs."""
    images = np.empty((n, SIZE, SIZE, 3), np.uint8)
    for i in range(n):
        total = np.zeros((SIZE, SIZE, 3))
        for cells in (2, 4, 8, 16):
            coarse = rng.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
            total += (
                np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC), float)
                / cells
            )
        images[i] = np.clip(
            total / sum(1 / c for c in (2, 4, 8, 16)) * rng.uniform(0.8, 1.6) + rng.uniform(-60, 30), 0, 255
        )
    return images


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_tokenizer():
    """CLIP's tokenizer (byte-level BPE, lower case) with a vocabulary of its 512 byte symbols and our caption
    words."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in CAPTION_WORDS:
        for end in range(2, len(word) + 1):  # left to right: each prefix of the word becomes a token
            last = end == len(word)
            pair = (word[: end - 1], word[end - 1] + ("</w>" if last else ""))
            if pair not in merges:
                merges.append(pair)
                vocabulary.append("".join(pair))
    vocabulary = list(dict.fromkeys(vocabulary)) + ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        Path(folder, "merges.txt").write_text(
            "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n"
        )
        Path(folder, "tokenizer_config.json").write_text(
            json.dumps({"model_max_length": 32, "tokenizer_class": "CLIPTokenizer"})
        )
        return CLIPTokenizer.from_pretrained(folder)


def make_pipeline():
    """Stable Diffusion 1.5's structure at small widths: same block types and depths, latents of 4 x 8 x 8 for
    32 pixels."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = make_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        projection_dim=48,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(24, 40, 56, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=48,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=SIZE,
        block_out_channels=(16, 24, 40),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def iterate_batches(n: int, size: int, n_steps: int, generator: torch.Generator, say):
    """Yields (step, indices, share done) over reshuffled passes, and reports the pace."""
    order, started = torch.empty(0, dtype=torch.long), time.monotonic()
    for step in range(n_steps):
        if len(order) < size:
            order = torch.randperm(n, generator=generator)
        yield step, order[:size], step / n_steps
        order = order[size:]
        if step % 250 == 249:
            say(f"  step {step + 1}/{n_steps}, {(time.monotonic() - started) / (step + 1):.3f} s a step")


def cosine_rate(optimizer, rate: float, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1, 50 * share + 0.02) * (0.5 + 0.5 * np.cos(np.pi * share))


def train_vae(vae, images: torch.Tensor, n_steps: int, generator: torch.Generator, say) -> None:
    """L1 + MSE reconstruction with a light KL, then scales latents to unit deviation (latent diffusion,
    Rombach et al. 2022)."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    for step, rows, share in iterate_batches(len(images), 32, n_steps, generator, say):
        cosine_rate(optimizer, 2e-3, share)
        batch = images[rows]
        posterior = vae.encode(batch).latent_dist
        difference = vae.decode(posterior.sample(generator)).sample - batch
        loss = difference.abs().mean() + 2 * difference.square().mean() + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 249:
            say(f"  loss {loss.item():.4f}")
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images[:2048].split(128)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


@torch.no_grad()
def encode_images(pipe, images: torch.Tensor) -> torch.Tensor:
    """Latents [N, 4, 8, 8] of images [N, 3, 32, 32] in -1..1."""
    latents = torch.cat([pipe.vae.encode(chunk).latent_dist.mean for chunk in images.split(128)])
    return latents * pipe.vae.config.scaling_factor


def train_denoiser(
    pipe, latents: torch.Tensor, captions: list[str], n_steps: int, generator: torch.Generator, say
) -> None:
    """Noise prediction with the text encoder trained along; one caption in ten is empty, for guidance. Keeps
    the EMA."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    noise_schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    unique = sorted({*captions, ""})
    # [U, 32]
    tokens = pipe.tokenizer(unique, padding="max_length", truncation=True, return_tensors="pt").input_ids
    caption_of = torch.tensor([unique.index(caption) for caption in captions])
    parameters = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=1e-3, fused=True)
    average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.8)
    for step, rows, share in iterate_batches(len(latents), 64, n_steps, generator, say):
        cosine_rate(optimizer, 1.5e-3, share)
        clean = latents[rows]
        flip_to_empty = torch.rand(len(rows), generator=generator) < 0.1
        text = pipe.text_encoder(tokens[torch.where(flip_to_empty, unique.index(""), caption_of[rows])])[0]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(
            noise_schedule.config.num_train_timesteps, (len(rows),), generator=generator
        )
        predicted = pipe.unet(noise_schedule.add_noise(clean, noise, timesteps), timesteps, text).sample
        loss = (predicted - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.step(parameters)
        if step % 250 == 249:
            say(f"  loss {loss.item():.4f}")
    average.copy_to(parameters)


def _train_features(page: Page, n_steps: int, generator: torch.Generator, say) -> TinyFeatures:
    """A feature network that must tell character, font and drawing apart, so that its features see shape as
    well as style."""
    images = to_tensor(page.images)
    targets = [torch.from_numpy(x).long() for x in (page.characters, page.fonts)]
    strokes = torch.from_numpy(page.strokes)
    network = TinyFeatures()
    heads = torch.nn.ModuleList(
        torch.nn.Linear(network.n_features, n) for n in (len(CHARACTERS), len(FONTS), strokes.shape[1])
    )
    parameters = [*network.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-2)
    for step, rows, share in iterate_batches(len(images), 64, n_steps, generator, say):
        cosine_rate(optimizer, 2e-3, share)
        features = network(images[rows])
        character, font, stroke = (head(features) for head in heads)
        loss = torch.nn.functional.cross_entropy(character, targets[0][rows])
        loss = (
            loss
            + torch.nn.functional.cross_entropy(font, targets[1][rows])
            + (stroke - strokes[rows]).square().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 250 == 249:
            hit = (character.argmax(1) == targets[0][rows]).float().mean()
            say(f"  loss {loss.item():.3f}, characters right {hit:.2f}")
    return network


def _build_assets(
    out: Path, *, n_images: int, vae_steps: int, feature_steps: int, denoiser_steps: int, seed: int, say
) -> None:
    """Writes out/tiny (a diffusers pipeline) and out/features.safetensors."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)  # the initial weights; every later draw comes from the generator
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    out.mkdir(parents=True, exist_ok=True)
    say(f"drawing {n_images} characters")
    page = draw_page(n_images, rng)
    images = to_tensor(page.images)
    pipe = make_pipeline()
    say("autoencoder")
    with_clouds = torch.cat([images, to_tensor(draw_clouds(n_images // 4, rng))])
    train_vae(pipe.vae, with_clouds, vae_steps, generator, say)
    latents = encode_images(pipe, images)
    say("feature network")
    network = _train_features(page, feature_steps, generator, say)
    save_file(network.state_dict(), out / "features.safetensors")
    say("denoiser")
    train_denoiser(pipe, latents, page.captions, denoiser_steps, generator, say)
    pipe.save_pretrained(out / "tiny")


def build_from_command_line() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m memcontrol.tiny", description="Rebuild the embedded base and feature network."
    )
    parser.add_argument(
        "--out", type=Path, default=_ASSETS, help="folder to write (default: the package's own assets)"
    )
    parser.add_argument("--n-images", type=int, default=24_000)
    parser.add_argument("--vae-steps", type=int, default=1_500)
    parser.add_argument("--feature-steps", type=int, default=1_500)
    parser.add_argument("--denoiser-steps", type=int, default=3_600)
    parser.add_argument("--seed", type=int, default=0)
    _build_assets(**vars(parser.parse_args()), say=lambda line: print(line, file=sys.stderr, flush=True))


if __name__ == "__main__":
    build_from_command_line()
