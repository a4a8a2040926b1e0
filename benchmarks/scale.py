"""What one study with 10,000 trials and one training set of 10 million images do to parts of which each is
measured at sizes that fit here: nearest neighbours by the number of training images, what is kept for each
image, and what is computed over all trials of a study.

TRIALS=100,1000 measures studies of other sizes: writing 10,000 trials takes minutes. The search loop with 512
simulated workers is `WORKERS=512 TRIALS=10000 python -m benchmarks overhead`.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

N_QUERIES, N_WANTED = 256, 10_000_000
# 32 x 32 pixels; Inception's features
PIXELS, FEATURES = (3072, (10_000, 30_000, 100_000)), (2048, (10_000, 30_000, 100_000))
TRIALS, N_LISTED = tuple(map(int, os.environ.get("TRIALS", "100,1000,10000").split(","))), 1_000_000


def run(device: str) -> list[dict]:
    return [*neighbours(), *caches(), *studies()]


def time_call(
    call: Callable[[], object], n: int = 3, clock: Callable[[], float] = time.perf_counter
) -> float:
    times = []
    for _ in range(n):
        started = clock()
        call()
        times.append(clock() - started)
    return sorted(times)[n // 2]


def row(what: str, size: str, figure: float, unit: str) -> dict:
    return {"what": what, "size": size, "figure": figure, "unit": unit}


def neighbours() -> list[dict]:
    from memcontrol.data.features import nearest

    rng, rows = np.random.default_rng(0), []
    for name, (d, sizes) in {"pixels": PIXELS, "2048 features": FEATURES}.items():
        queries, references = rng.random((N_QUERIES, d), np.float32), rng.random((sizes[-1], d), np.float32)
        for n in sizes:
            spent = time_call(lambda q=queries, r=references[:n]: nearest(q, r))
            rows.append(
                row(f"nearest training image of {N_QUERIES} samples, {name}", f"{n:,} images", spent, "s")
            )
        rows.append(
            row(
                f"the same, by the last one's time for each image, {name}",
                f"{N_WANTED:,} images",
                spent * N_WANTED / sizes[-1],
                "s",
            )
        )
        rows.append(
            row(f"descriptors in memory, {name}", f"{N_WANTED:,} images", 4 * d * N_WANTED / 2**30, "GiB")
        )
    return rows


def caches() -> list[dict]:
    """Of Stable Diffusion 1.5 at 512 pixels, from shapes: mean and deviation of the latents, and encodings,
    where every caption differs; and what is done with the list of images."""
    from memcontrol.data.images import ImageRecord, Images
    from memcontrol.data.split import dump_parts, parse_parts
    from memcontrol.training.loop import select_batch_rows, shuffle_rows

    latents, text = 2 * 4 * 64 * 64 * 4, 77 * 768 * 4
    images = Images(
        "x",
        512,
        tuple(ImageRecord(f"{i:09}.png", f"an image of number {i}", f"{i:016x}") for i in range(N_LISTED)),
    )
    stored = {"source": "x", "resolution": 512, "parts": dump_parts({"train": images})}
    wanted, listed = f"{N_WANTED:,} images", f"{N_LISTED:,} images"
    return [
        row("latents, on disk, memory-mapped", wanted, latents * N_WANTED / 2**30, "GiB"),
        row("caption encodings, all different, the same", wanted, text * N_WANTED / 2**30, "GiB"),
        row("split.json", wanted, len(json.dumps(stored)) / N_LISTED * N_WANTED / 2**30, "GiB"),
        row(
            "reading it, once a worker",
            listed,
            time_call(lambda: parse_parts(json.loads(json.dumps(stored))), 1),
            "s",
        ),
        row("the set's digest, once a worker", listed, time_call(lambda: images.digest, 1), "s"),
        row(
            "a step's batch, the first of a pass",
            wanted,
            time_call(lambda: (shuffle_rows.cache_clear(), select_batch_rows(N_WANTED, 32, 0, 0))),
            "s",
        ),
        row(
            "a step's batch, any other",
            wanted,
            time_call(lambda: select_batch_rows(N_WANTED, 32, 0, 1)),
            "s",
        ),
    ]


def studies() -> list[dict]:
    """Of a study whose trials have ended, in SQLite."""
    from memcontrol.config.load import load_config
    from memcontrol.core.run_folder import StudyFolder
    from memcontrol.core.space_yaml import load_space
    from memcontrol.dashboard.notes import Publisher
    from memcontrol.study.hypervolume import estimate_hypervolume, find_reference_point, is_flat
    from memcontrol.study.keeping import select_surely_beaten
    from memcontrol.study.opening import open_study
    from memcontrol.study.pick import choose_trial, select_front, select_ties

    rows, space = [], load_space("sd15-blocks")
    for n in TRIALS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            config = load_config({"name": "large", "data": "digits", "space": "sd15-blocks"})
            study = open_study(
                config, folder, folder / "large.yaml", create=True, directions=["minimize", "minimize"]
            )
            spent = time.perf_counter()
            fill(study, space, n)
            rows.append(
                row("writing the study, each trial", f"{n:,} trials", (time.perf_counter() - spent) / n, "s")
            )
            spent = time.perf_counter()
            again = open_study(config, folder, folder / "large.yaml", create=False)
            rows.append(row("reading the study", f"{n:,} trials", time.perf_counter() - spent, "s"))
            records = again.records()
            reference = find_reference_point(records)
            parts = {
                "the front": lambda records=records: select_front(records),
                "ties with it": lambda records=records: select_ties(records),
                "the pick": lambda records=records: choose_trial(records),
                "the hypervolume": lambda records=records, reference=reference: estimate_hypervolume(
                    records, reference
                ),
                "whether it has stopped growing": lambda records=records, reference=reference: is_flat(
                    records, reference, 50
                ),
                "which trials are surely beaten": lambda records=records: select_surely_beaten(records),
                **draws(space, records),
            }
            # which need one core and no disk: in seconds of it, whatever else the machine does
            spent = {what: time_call(call, clock=time.process_time) for what, call in parts.items()}
            rows += [row(what, f"{n:,} trials", seconds, "s of CPU") for what, seconds in spent.items()]
            publisher = Publisher(space, StudyFolder(folder))
            publisher.opened(again)
            rows.append(
                row(
                    "all notes and plots, in a thread",
                    f"{n:,} trials",
                    time_call(publisher.publish, 1),
                    "s",
                )
            )
            number = again.begin([records[-1].chosen], space)
            tell(again, number, records[-1].chosen, random.Random(1))
            rows.append(
                row("those after a further trial", f"{n:,} trials", time_call(publisher.publish, 1), "s")
            )
            rows.append(row("database", f"{n:,} trials", (folder / "study.db").stat().st_size / 2**20, "MiB"))
            study.close()
            again.close()
    return rows


def draws(space, records) -> dict[str, Callable[[], object]]:
    """By a sampler that knows nothing yet, as where a search goes on, and by one that has drawn before."""
    from memcontrol.search.sampler import Sampler

    parts: dict[str, Callable[[], object]] = {}
    for kind, name in {"tpe": "multivariate TPE", "nsga2": "NSGA-II", "random": "chance"}.items():
        living = Sampler(space, 0, 2, (), kind)
        living.draw(records)
        parts[f"a first draw by {name}"] = lambda kind=kind: Sampler(space, 0, 2, (), kind).draw(records)
        parts[f"any further draw by {name}"] = lambda living=living: living.draw(records)
    return parts


def fill(study, space, n: int) -> None:
    """Anchors, then random masks with figures that trade off."""
    rng, options = random.Random(0), space.list_coordinates()
    for anchor, candidates in space.list_anchors().items():
        tell(study, study.begin(candidates[:1], space, anchor), candidates[0], rng)
    for _ in range(n - 3):
        choice = space.make_choice_at(
            {name: rng.choice(list(values)) for name, values in options.items()} | {"rate": rng.random()}
        )
        tell(study, study.begin([choice], space), choice, rng)


def tell(study, number: int, choice, rng: random.Random) -> None:
    share = len(choice.groups) / 13 + 0.3 * rng.random()
    rewards = {
        "fid": 30 - 10 * share + rng.random(),
        "fid_error": 0.5,
        "memorization": share + 0.1 * rng.random(),
        "memorization_error": 0.02,
    }
    study.finish(
        number,
        [
            {
                "state": "COMPLETE",
                "choice": choice.as_dict(),
                "rewards": rewards,
                "seconds": 60.0,
                "measured_with": {"figures": 1},
            }
        ],
    )
