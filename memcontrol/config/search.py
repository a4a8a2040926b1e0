"""Owns `search`: the outer loop, and early stopping."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from memcontrol.config.strict import Count, NotNegative, Share, Strict, UpToOne
from memcontrol.core.choice import ANCHORS, Anchor
from memcontrol.core.space_yaml import parse_over


def _convert_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_over(entries: dict[str, Any]) -> dict[str, Any]:
    """Whether the entries are lists and ranges; what they name is looked at with the whole config."""

    def refuse(text: str) -> NoReturn:
        raise ValueError(text)

    parse_over("search.over", entries, refuse)
    return entries


class EarlyStopping(Strict):
    """At each rung, a share of a trial's budget, both rewards are measured on few samples; a trial that many
    others beat stops."""

    rungs: Annotated[tuple[Share, ...], BeforeValidator(_convert_list), Field(min_length=1)] = (0.25, 0.5)
    """shares of the budget at which a trial is measured and judged; each needs a round to end at"""
    n_samples: Count = 64
    """samples at a rung, of prompts and noise that all trials have in common"""
    beaten_by: Share = 0.05
    """a trial stops where so large a share of those that came to the rung beat it in every objective"""
    beyond: NotNegative = 0.25
    """beaten: by more than so many standard errors of the difference in pairs"""
    min_peers: Count = 4
    """others that must have come to the rung before anything stops there"""

    @model_validator(mode="after")
    def rising(self) -> EarlyStopping:
        if list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(
                f"search.early_stopping.rungs is {list(self.rungs)}; give rising shares of the "
                "budget, such as [0.25, 0.5]"
            )
        return self


class SearchConfig(Strict):
    """The outer loop: how many trials are sampled beside the anchors, how many run at a time, and the study's
    seed."""

    trials: Annotated[int, Field(ge=0)] = 20
    """sampled trials beside the anchors"""
    anchors: Annotated[tuple[Anchor, ...], BeforeValidator(_convert_list)] = ANCHORS
    """what sampled trials are compared with, which runs first: `none` (no training), `all` (plain PEFT, every
    group on), `full` (full fine-tuning); leave out what the GPU's memory does not suffice for, or give `[]`.
    What is added later is run by the next `search`"""
    workers: Count | None = None
    """trials at a time: processes, or Slurm jobs; none: of `local` ones one for each GPU (each
    `search.processes` or `search.gpus_per_trial` of them), and 2 where there are no GPUs or the executor is
    another"""
    processes: Count = 1
    """processes that train the shards of one trial side by side, a GPU each; no number changes (two cores
    gain nothing from it)"""
    gpus_per_trial: Count = 1
    """GPUs that hold the base together, for one that a single card does not hold: its frozen weights are
    sharded (FSDP2), each batch is computed in as many parts; numbers change by rounding alone. For methods
    beside the weights, such as LoRA"""
    seed: int = 0
    """every random draw follows from it"""
    sampler: Literal["auto", "gp", "tpe", "nsga2", "random"] = "auto"
    """`auto`: a Gaussian process with expected hypervolume improvement (`gp`) up to 250 trials, then
    multivariate `tpe`"""
    executor: Literal["inline", "local", "ray", "slurm"] = "local"
    """`local` worker processes, `ray`, `slurm`, or `inline` in one process"""
    early_stopping: EarlyStopping | None = None
    """stop trials that are clearly beaten on the way; `{}` turns it on with its defaults"""
    over: Annotated[dict[str, Any], AfterValidator(_check_over)] = {}
    """what else a choice decides, by dotted key of `inner`: values, `{inner.weight_decay: [0, 0.01]}`, or a
    range, `{inner.budget_images: {low: 1000, high: 20000, log: true}}`, a grid of whose `steps: 20` equal
    steps is tried. Inside a setting that some choices leave off (`inner.skip: [null, {}]`) a key counts
    where it is on. A list for `rewards.guidance`, `rewards.guidance_from` or `rewards.sampling_steps` needs
    no training: each fine-tuning is measured at all of them. A space may have the same under `over`"""
    weigh_cost: bool = True
    """`auto` and `gp` weigh the gain that a choice promises by what its `inner.budget_images` costs, where
    that is searched over"""
    strengths: Annotated[tuple[UpToOne, ...], BeforeValidator(_convert_list)] = ()
    """each fine-tuning is measured at these strengths s too, W0 + s (W - W0) for every weight, as trials of
    their own: `[0.75, 0.5]`. Nothing is trained for it, and `export` writes the weights that were measured"""
    checkpoints: Annotated[tuple[UpToOne, ...], BeforeValidator(_convert_list)] = ()
    """and, as trials of their own, as it was after these shares of its budget, at the end of a round:
    `[0.25, 0.5]`"""
    stop_when_flat: Count | None = None
    """end the search after so many trials in a row that raised the hypervolume by no more than its noise"""
    replicates: Annotated[int, Field(ge=0)] = 0
    """when all trials have ended, fine-tune those on the front, and full fine-tuning, so many times more from
    other seeds"""
    warm_start: Annotated[str, Field(min_length=1)] | None = None
    """the study file of an earlier search, on other data: its front is tried first"""
    time_limit_minutes: Annotated[float, Field(gt=0)] | None = None
    """of one attempt at a trial, which is then ended and tried again"""
    accumulate_on_oom: bool = True
    """a trial that runs out of GPU memory goes on once with half the images in a forward"""
    keep: Literal["all", "front"] = "all"
    """whose weights and samples stay: `all` trials', or `front`: those of the front, of what is off it within
    error only, and of anchors. What is surely beaten loses them when it ends, the rest once the front was
    measured again. Results and pictures always stay"""
    disk_gb: Annotated[float, Field(gt=0)] | None = None
    """how large the study's folder may be, in GB (10^9 bytes): no trial begins that would exceed it, and the
    search stops; none: as large as it gets"""
    track: Annotated[
        tuple[Literal["tensorboard", "mlflow", "wandb"], ...], BeforeValidator(_convert_list)
    ] = ()
    """experiment trackers that are told of each trial that ends: curves, rewards with their errors, pictures,
    training images among them. They write below `track/` in the study's folder, unless MLFLOW_TRACKING_URI,
    WANDB_MODE or WANDB_API_KEY says otherwise; each needs the extra of its name"""
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """share of the training images that trials see; `retrain` sees all, for as many passes"""

    @model_validator(mode="after")
    def anchors_once(self) -> SearchConfig:
        if len(set(self.anchors)) < len(self.anchors):
            raise ValueError(
                f"search.anchors is [{', '.join(self.anchors)}]; give each of {', '.join(ANCHORS)} once at "
                "most"
            )
        return self

    @model_validator(mode="after")
    def processes_share_one_way(self) -> SearchConfig:
        if self.processes > 1 and self.gpus_per_trial > 1:
            raise ValueError(
                f"search.processes is {self.processes} and search.gpus_per_trial {self.gpus_per_trial}: "
                "processes share a trial's shards or its base, not both; set one of them to 1"
            )
        return self

    @property
    def rungs(self) -> tuple[float, ...]:
        """Shares of a trial's budget at which it is judged; empty without early stopping."""
        return self.early_stopping.rungs if self.early_stopping else ()

    @property
    def processes_per_trial(self) -> int:
        """Processes that share one trial in one way or the other, a GPU each."""
        return max(self.processes, self.gpus_per_trial)

    def count_train(self, n_images: int) -> int:
        """How many of so many training images a trial sees."""
        return max(1, round(n_images * self.train_fraction))
