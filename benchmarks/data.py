"""Folders of real size: seconds and memory of `init`, which reads every image, and of what a search does with
it then, beside a plain loop that decodes with Pillow.

`[IMAGES=5000] [VARIANTS=jpg] python -m benchmarks data`: pictures of 512 pixels, of which every fifth is
another one, as PNG or JPEG. On 2 cores the three sizes take half an hour. Seconds of `init` are of all that
it does, those of a search of its data alone, once its base is loaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from memcontrol.reading.threads import count_cores

COUNTS = [int(os.environ["IMAGES"])] if "IMAGES" in os.environ else [5_000, 20_000, 100_000]
KIND = os.environ.get("VARIANTS", "png")
SIDE, LAYERS = 512, ((4, 60.0), (32, 30.0), (128, 12.0))  # sides of noise, and how strong it is
_EACH = 5  # images of one content
_N_LOOP = 2_000  # images that the plain loop decodes in each process
_INIT = """
from memcontrol.commands.init import init
init("images", "study.yaml", name="sized")
"""
_PREPARE = """
from pathlib import Path
from memcontrol.config.load import load_config
from memcontrol.core.run_folder import StudyFolder
from memcontrol.trial.loaded import LoadedModels
from memcontrol.trial.prepare import prepare_study
config, place, loaded = load_config("study.yaml"), StudyFolder(Path("runs/sized")), LoadedModels()
loaded.base(config), loaded.extractor(config.rewards.extractor)
began = time.perf_counter()
values = config.model_dump(mode="json")
prepare_study(values, place.path, loaded, lambda line: None, place.image_index, lambda *told: None)
"""
_AROUND = """
import resource, time
began = time.perf_counter()
{}
print("told", time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def draw_picture(number: int) -> Image.Image:
    random = np.random.default_rng(number)
    whole = np.full((SIDE, SIDE, 3), 128.0)
    for side, weight in LAYERS:
        noise = random.normal(0, weight, (side, side, 3 if side < 10 else 1)).astype(np.float32)
        planes = [Image.fromarray(noise[..., i]).resize((SIDE, SIDE), 3) for i in range(noise.shape[2])]
        whole += np.stack([np.asarray(plane) for plane in planes], 2)
    return Image.fromarray(whole.clip(0, 255).astype(np.uint8))


def make_pictures(folder: Path, numbers: range) -> None:
    """Each once, and as further names of the same file."""
    for number in numbers:
        first = folder / f"{number:06}.{KIND}"
        draw_picture(number).save(first, **({"compress_level": 1} if KIND == "png" else {"quality": 92}))
        for copy in range(1, _EACH):
            os.link(first, folder / f"{number:06}-{copy}.{KIND}")


def decode_plainly(folder: Path, names: list[str]) -> float:
    """Seconds of a plain loop."""
    began = time.perf_counter()
    for name in names:
        with Image.open(folder / name) as image:
            image.convert("RGB").load()
    return time.perf_counter() - began


def time_decoding(folder: Path, names: list[str]) -> float:
    """Seconds in which as many processes as there are cores would decode all of them, by some."""
    n, some = count_cores(), sorted(names)[:: max(1, len(names) // _N_LOOP)]
    with ProcessPoolExecutor(n) as pool:
        seconds = list(pool.map(partial(decode_plainly, folder), [some] * n))
    return sum(seconds) / n / len(some) * len(names) / n


def time_script(script: str, folder: Path) -> tuple[float, float]:
    """Seconds, without those of imports where the script says when it begins, and the peak in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", _AROUND.format(script)],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds, peak = done.stdout.split("told")[1].split()
    return float(seconds), float(peak)


def measure(n: int, folder: Path) -> dict:
    images = folder / "images"
    images.mkdir()
    numbers = range(n // _EACH)
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(make_pictures, images), [numbers[i::64] for i in range(64)]))
    names = os.listdir(images)
    plain = time_decoding(images, names)
    found = {"init": time_script(_INIT, folder)}
    (folder / "study.yaml").unlink()
    found["init again"] = time_script(_INIT, folder)
    found["search after init"] = time_script(_PREPARE, folder)
    found["search again"] = time_script(_PREPARE, folder)
    seconds = {f"{name}, s": took for name, (took, _) in found.items()}
    peaks = {f"{name}, peak MiB": peak for name, (_, peak) in found.items()}
    ratio = {"init / decoding": found["init"][0] / plain}
    return {"images": len(names), "decoding on all cores, s": plain, **ratio, **seconds, **peaks}


def run(device: str) -> list[dict]:
    found = []
    for n in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(n, Path(folder)))
    return found
