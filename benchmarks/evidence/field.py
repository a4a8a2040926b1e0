"""The study of the field: what masks, published spaces, mitigations and a bound are worth on chest X-rays,
photographs and digits, from bases that have seen others of their kind.

`python -m benchmarks.evidence.field KIND [--images PATH] [--seeds 0 1 2] [--workers 2]`, where KIND is
`xrays` or `cifar` (PATH: an .npz of images with labels, or a folder whose folders are the classes) or
`digits`, writes field-KIND.json, field-KIND.md and field.png beside this file. Runs, images and the base are
kept in runs/field, so a second call goes on. `--tables` writes the tables of what was run, and runs nothing;
`digits --seeds 0 --workers 4 --minutes 8` is what a card does in so many minutes.

In this order: the base; the budget, the smallest of a ladder at which full fine-tuning copies for sure; each
method's learning rate, of three, by FID; then, for each seed (another split of the images), every arm on test
images, and two searches, whose picks are trained again and scored on test images as the arms are.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.evidence.field_images import KINDS, SIDE, prepare
from benchmarks.evidence.field_tables import write_tables
from benchmarks.evidence.inner_loop import AGC, IET, MSR, TAA, print_end, train_specs
from benchmarks.evidence.settings import search_arms
from memcontrol.commands.pick import pick
from memcontrol.config.load import load_config
from memcontrol.config.settings import configure_choice
from memcontrol.config.spec import Spec
from memcontrol.config.study import Config
from memcontrol.core.choice import EVERYTHING, Choice
from memcontrol.core.files import read_json, write_json
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.core.space import SearchSpace
from memcontrol.core.space_yaml import load_space
from memcontrol.execution.job_queue import JobQueue
from memcontrol.execution.local import Local
from memcontrol.search.orchestrator import run_preparation

HERE = Path(__file__).parent
LADDER = tuple(1_280 * 2**i for i in range(6))  # images seen
SURE = 0.01  # full fine-tuning copies for sure where the interval of its copy rate lies above this
N_MASKS = 5
EARLIER = (0.125, 0.25, 0.5, 1.0)  # shares of the budget that stopping early chooses among
# rates of three, by method, and the space whose every group is trained
RATES = {
    "full": (4.4e-4, 9.5e-4, 2.04e-3),
    "lora": (7.3e-4, 1.58e-3, 3.41e-3),
    "svdiff": (3e-3, 1e-2, 3e-2),
    "difffit": (1e-3, 3e-3, 1e-2),
    "attention": (5e-4, 1.5e-3, 5e-3),
}
SPACES = {
    "full": "digits",
    "lora": "digits",
    "svdiff": "memcontrol-sd15-svdiff",
    "difffit": "memcontrol-sd15-difffit",
    "attention": "memcontrol-sd15-attention",
}


@dataclass(frozen=True)
class Arm:
    """A method of RATES and what differs from the plain study."""

    method: str
    inner: Mapping[str, Any] = field(default_factory=dict)


ARMS: dict[str, Arm] = {
    "full fine-tuning": Arm("full"),
    "plain LoRA": Arm("lora"),
    "SV-Diff": Arm("svdiff"),
    "DiffFit": Arm("difffit"),
    "attention": Arm("attention"),
    "IET": Arm("full", IET),
    "AGC": Arm("full", AGC),
    "IET-AGC": Arm("full", {**IET, **AGC}),
    "IET-AGC+": Arm("full", {**IET, **AGC, **MSR, **TAA}),
    "random words in captions": Arm("full", {"captions": {"add_words": 0.5}}),
    "noise on the caption's encoding": Arm("full", {"embedding_noise": 0.1}),
    "most memorized images dropped": Arm("full", {"norm_threshold": "decile"}),
    "privacy, epsilon 8": Arm("lora", {"privacy": {"epsilon": 8, "multiplicity": 1}}),
}
EARLY, NONE = "full, stopped at the best held-out loss", "no training"
PICKS = {"pick, masks alone": "masks", "pick, everything searched": "settings"}
TRANSFERRED = "the pick of"  # and which other kind's


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("digits", *KINDS), nargs="?")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/field"))
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--no-picks", action="store_true", help="leave the two searches out")
    parser.add_argument("--minutes", type=float, help="begin no arm after these, and no search")
    args = parser.parse_args()
    if not args.tables:
        if args.kind is None or (args.images is None) == (args.kind in KINDS):
            parser.error("give digits, or another kind and --images")
        run_kind(args)
    write_tables(HERE)


def run_kind(args: argparse.Namespace) -> None:
    folder = (args.runs / args.kind).resolve()
    if args.kind in KINDS:
        prepare(KINDS[args.kind], args.images, folder)
    executor, ends = Local(args.workers), time.monotonic() + 60 * (args.minutes or math.inf)
    study = Field(args.kind, folder, JobQueue(executor, print_end), args.workers, ends)
    try:
        for seed in args.seeds:
            study.run_seed(seed, picks=not (args.no_picks or args.minutes))
    except OutOfTime:
        print("the time is over: the tables have what was done")
    finally:
        executor.close()
    rows = [row for seed in range(max(args.seeds) + 1) for row in study.read_rows(seed)]
    if rows:
        write_json(HERE / f"field-{args.kind}.json", {"kind": args.kind, **study.settled, "rows": rows})


def describe_study(kind: str, folder: Path, budget: int, seed: int) -> dict[str, Any]:
    """The plain study, of every arm and of both searches."""
    n_train, n_holdout, n_test = KINDS[kind].parts if kind in KINDS else (24, 881, 881)
    ours = kind in KINDS
    return {
        "name": "field",
        "base": str(folder / "base") if ours else "tiny",
        "data": {
            "path": str(folder / "images") if ours else "digits",
            "label": "caption",
            "train": n_train,
            "holdout": n_holdout,
            "test": n_test,
            "twins": "keep",
            **({"resolution": SIDE} if ours else {}),
        },
        "space": "digits",
        "inner": {"budget_images": budget, "batch_size": 16, "caption_dropout": 0.0},
        "rewards": {
            "objectives": ["fid", "memorization"],
            "extractor": "efficientnet-lite0",
            "force": True,
            "n_samples": 256,
            "confirm": 1,
            "sampling_steps": 8,
            "guidance": 2.0,
        },
        "search": {"seed": seed, "workers": 2},
    }


class OutOfTime(Exception):
    pass


class Field:
    """One kind's study: what was settled on the first seed's held-out images, and the arms of each seed."""

    def __init__(self, kind: str, folder: Path, jobs: JobQueue, at_a_time: int, ends: float):
        self.kind, self.folder, self.jobs = kind, folder, jobs
        self.at_a_time, self.ends = at_a_time, ends
        self.file = folder / "settled.json"
        self.settled: dict[str, Any] = read_json(self.file) if self.file.exists() else {}
        self.sizes: dict[int, int] = {}

    def run_seed(self, seed: int, picks: bool) -> None:
        """Raises OutOfTime."""
        budget = self.settle("budget", self.find_budget)
        self.settle("rates", lambda: self.find_rates(budget))
        self.settle("stopped after", lambda: self.find_stop(budget))
        self.train(dict(self.list_arms(seed)), seed)
        if picks:
            study = describe_study(self.kind, self.folder, budget, seed)
            search_arms(self.folder / str(seed) / "searches", study, N_MASKS)
            self.train(dict(self.list_picks(seed)), seed)

    def settle(self, name: str, find: Callable[[], Any]) -> Any:
        """Found once, and kept."""
        if name not in self.settled:
            self.settled[name] = find()
            write_json(self.file, self.settled)
            print(f"{self.kind}, {name}: {self.settled[name]}", flush=True)
        return self.settled[name]

    def find_budget(self) -> int:
        """The smallest of the ladder at which full fine-tuning, at the least of its rates, copies for sure;
        its end where none is enough."""
        for budget in LADDER:
            (rewards,) = self.measure([("full", RATES["full"][0], budget)])
            if rewards["copy_rate_low"] > SURE:
                return budget
        return LADDER[-1]

    def find_rates(self, budget: int) -> dict[str, float]:
        """By method, the rate with the least FID."""
        tried = [(method, rate, budget) for method, rates in RATES.items() for rate in rates]
        fids = dict(zip(tried, (rewards["fid"] for rewards in self.measure(tried))))
        return {
            method: min((one for one in tried if one[0] == method), key=fids.__getitem__)[1]
            for method in RATES
        }

    def find_stop(self, budget: int) -> int:
        """Images after which full fine-tuning has the least loss on held-out images."""
        tried = [("full", self.settled["rates"]["full"], round(share * budget)) for share in EARLIER]
        losses = [rewards["membership_holdout_loss"] for rewards in self.measure(tried)]
        return tried[losses.index(min(losses))][2]

    def measure(self, tried: Sequence[tuple[str, float, int]]) -> list[dict[str, float]]:
        """Rewards of method, rate and budget on the first seed's held-out images."""
        names = {
            f"settle-{method}-{rate:g}-{budget}": (method, rate, budget) for method, rate, budget in tried
        }
        self.train({name: self.make_spec(0, *one, {}, "holdout") for name, one in names.items()}, 0)
        return [read_rewards(self.locate(0, name)) for name in names]

    def make_spec(
        self,
        seed: int,
        method: str,
        rate: float,
        budget: int,
        inner: Mapping[str, Any],
        reference: str = "test",
    ) -> Spec:
        study = describe_study(self.kind, self.folder, budget, seed)
        # what is an objective is measured on all images, however short the training
        rewards = {**study["rewards"], "objectives": ["fid", "memorization", "membership_auc"]}
        config = load_config({**study, "inner": {**study["inner"], **inner}, "rewards": rewards})
        space = load_space(SPACES.get(method, "digits"))
        choice, folder = make_choice(space, method, rate), self.folder / str(seed)
        return Spec(config, space, choice, folder, "field", reference, self.split_images(seed, config))

    def split_images(self, seed: int, config: Config) -> int:
        """Splits the images of a seed, once. Returns how many are fine-tuned on."""
        if seed not in self.sizes:
            folder = StudyFolder(self.folder / str(seed))
            self.sizes[seed] = run_preparation(config, folder, self.jobs).sizes["train"]
        return self.sizes[seed]

    def list_arms(self, seed: int) -> Iterator[tuple[str, Spec]]:
        budget = self.settled["budget"]
        yield NONE, self.make_spec(seed, "none", 0.0, budget, {})
        yield (
            EARLY,
            self.make_spec(seed, "full", self.settled["rates"]["full"], self.settled["stopped after"], {}),
        )
        for name, arm in ARMS.items():
            rate = self.settled["rates"][arm.method]
            yield name, self.make_spec(seed, arm.method, rate, budget, arm.inner)

    def list_picks(self, seed: int) -> Iterator[tuple[str, Spec]]:
        """The picks of this kind's searches, and of those that other kinds had: whether masks transfer."""
        plain = self.make_spec(seed, "full", RATES["full"][0], self.settled["budget"], {})
        others = [path.name for path in self.folder.parent.iterdir() if path != self.folder]
        places = {name: (self.folder, study) for name, study in PICKS.items()}
        places |= {
            f"{TRANSFERRED} {other}": (self.folder.parent / other, "masks") for other in sorted(others)
        }
        for name, (folder, study) in places.items():
            file = folder / str(seed) / "searches" / f"{study}.yaml"
            if file.exists():
                choice = pick(file).chosen
                yield name, replace(plain, config=configure_choice(plain.config, choice), choice=choice)

    def train(self, specs: Mapping[str, Spec], seed: int) -> None:
        """Raises OutOfTime."""
        todo = [name for name in specs if not self.locate(seed, name).has_result]
        for first in range(0, len(todo), self.at_a_time):
            if time.monotonic() > self.ends:
                raise OutOfTime
            names = todo[first : first + self.at_a_time]
            train_specs({self.locate(seed, name): specs[name] for name in names}, self.jobs)

    def locate(self, seed: int, name: str) -> RunFolder:
        return RunFolder(self.folder / str(seed) / name.replace(",", "").replace("'", "").replace(" ", "-"))

    def read_rows(self, seed: int) -> Iterator[dict[str, Any]]:
        transferred = (f"{TRANSFERRED} {kind}" for kind in ("digits", *KINDS) if kind != self.kind)
        for name in (NONE, "full fine-tuning", EARLY, *list(ARMS)[1:], *PICKS, *transferred):
            run = self.locate(seed, name)
            if run.has_result:
                result = read_json(run.result_file)
                yield {
                    "arm": name,
                    "seed": seed,
                    "choice": result["choice"],
                    "steps": result["n_steps"],
                    "seconds": result["seconds"],
                    "rewards": read_rewards(run),
                }


def make_choice(space: SearchSpace, method: str, rate: float) -> Choice:
    if method == "none":
        return Choice((), "none", 0.0)
    if method == "full":
        return Choice((EVERYTHING,), method, rate)
    return Choice(tuple(space.groups), method, rate, 4 if method == "lora" else None)


def read_rewards(run: RunFolder) -> dict[str, float]:
    result = read_json(run.result_file)
    if result["state"] != "COMPLETE":
        raise SystemExit(f"{run.path}: {result['reason']}")
    return result["rewards"]


if __name__ == "__main__":
    main()
