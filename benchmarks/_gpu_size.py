"""What the parts of `python -m benchmarks gpu` are run at, on a card and in rehearsal on a CPU, and how they
tell their rows."""

from __future__ import annotations

import contextlib
import json
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

ROW = "ROW "  # how a line of a part's output begins that is a row
NO_CARD = "no card"
# warnings of libraries, and progress bars
NOISE = re.compile(r"W\d{4} |Writing model shards|Loading |Unable to import `torchao`|Failed to load /")


@dataclass(frozen=True)
class Size:
    """`base` is sd15 (random weights) or what `base:` in a study file takes. Of the search: `images` in the
    folder, of `side` pixels, `budget` images a trial in steps of `batch`, `samples` by `solver_steps`. Of the
    timed steps: `step_batch` images, `n_steps` steps. Of memory: bases and sides, `toys` of their kinds where
    that is set."""

    device: str
    base: str
    side: int
    images: int
    budget: int
    batch: int
    samples: int
    solver_steps: int
    step_batch: int
    n_steps: int
    memory: tuple[tuple[str, int], ...]
    toys: bool = False

    @property
    def on_card(self) -> bool:
        return self.device == "cuda"

    def find_base(self) -> str:
        """The base's folder, written first where it has random weights."""
        from benchmarks._models import stable_diffusion
        from memcontrol.model.batches import release_memory
        from memcontrol.model.source import find_base_path

        if self.base != "sd15":
            return find_base_path(self.base)
        path = stable_diffusion(self.device)
        release_memory()  # of a card, where the weights were drawn
        return path


SIZES = {
    "cuda": Size(
        "cuda",
        "sd15",
        512,
        48,
        256,
        8,
        16,
        8,
        32,
        10,
        tuple((base, side) for side in (512, 1024) for base in ("sd15", "sdxl", "sd3", "flux")),
    ),
    "cpu": Size("cpu", "tiny", 32, 32, 16, 8, 8, 1, 4, 2, (("tiny", 32), ("sd3", 64), ("flux", 64)), True),
}


def tell(what: str, figure: float | str, unit: str = "", beside: str = "") -> None:
    """A row of the running part, at once."""
    row = {"what": what, "figure": figure, "unit": unit, "beside": beside}
    print(ROW + json.dumps(row), flush=True)


@contextlib.contextmanager
def telling_failures(what: str) -> Iterator[None]:
    """What fails inside is a row, and the part goes on."""
    try:
        yield
    except Exception:
        tell(what, "failed", beside=shorten_error(traceback.format_exc()))


def shorten_error(said: str) -> str:
    """The last lines of what a process said on stderr, in one."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not NOISE.match(line)]
    return " / ".join(lines[-3:])[-400:].replace("|", "/")
