"""Owns a fine-tuning as a whole: rounds over shards, their averaging and exchange."""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memcontrol.config.inner import InnerConfig
from memcontrol.config.methods import RedistributionConfig
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import read_json, write_json
from memcontrol.core.seeds import derive_seed
from memcontrol.data.cache import save_tensors
from memcontrol.model.adapter import Adapter
from memcontrol.model.base import Base
from memcontrol.model.parts import State
from memcontrol.training.checkpoints import Checkpoints, describe_shard, fits_on_disk
from memcontrol.training.loop import Loop
from memcontrol.training.loss_memory import LossMemory
from memcontrol.training.privacy import keep_seed
from memcontrol.training.probe import measure_loss_gap
from memcontrol.training.round_files import (
    STATE_KINDS,
    RoundFiles,
    ShardState,
    collect_tensors,
    locate_plan,
    select_tensors,
)
from memcontrol.training.shard import Material, Shard
from memcontrol.training.shards import deal_images, exchange_images

TellProgress = Callable[..., None]  # (done, total, round=, loss=, skipped=)

_PLAN_POLL_SECONDS = 0.05
_READ_SECONDS = 0.5  # between two looks at the losses, for which a card must wait


@dataclass(frozen=True)
class TrainLog:
    """What a fine-tuning did: optimizer steps, images seen, the mean loss of its first and last tenth, and
    its record by round."""

    n_steps: int = 0
    images_seen: int = 0
    first_loss: float = math.nan
    last_loss: float = math.nan
    record: dict = field(default_factory=dict)
    n_forward: int = 0  # images that went through the denoiser at a time, at the end
    paused: bool = False  # at the end of a round, with more to come


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train one fine-tuning's shards: this one's rank, and whether another one still
    lives."""

    rank: int = 0
    size: int = 1
    alive: Callable[[int], bool] = lambda rank: True

    def owns(self, shard: int) -> bool:
        """Rank 0 takes over what a dead process would have trained."""
        owner = shard % self.size
        return owner == self.rank or (self.rank == 0 and not self.alive(owner))


def train_rounds(
    base: Base,
    adapter: Adapter,
    material: Material,
    inner: InnerConfig,
    *,
    seed: int,
    folder: Path,
    identity: str = "",
    progress: TellProgress,
    team: ProcessGroup = ProcessGroup(),
    n_rounds: int | None = None,
    may_halve: bool = True,
) -> TrainLog:
    """Trains the adapter for inner.budget_steps steps in all, in inner.rounds rounds over
    inner.ensemble.shards shards; pauses after the first `n_rounds` of them where that is given.

    `may_halve`: where memory does not suffice, fewer images go through the denoiser at a time.

    Goes on from the last round in `folder` if that was begun with the same `identity` (whatever else the
    numbers depend on). Raises Diverged where a loss is not finite, MemControlError.
    """
    if not adapter.parameters():
        return TrainLog()
    # groups are the material's; rounds from before that key, and that of privacy, are gone on with
    unset = () if inner.privacy else ("privacy",)
    rest = inner.model_dump_json(
        exclude=dict.fromkeys((*inner.memory_keys, *unset), True) | {"ensemble": {"split_groups"}}
    )
    plan = hashlib.sha256(f"{identity} {seed} {rest}".encode()).hexdigest()
    _clear_other_plans(folder, plan, team)
    rounds = Rounds(base, adapter, material, inner, seed, folder, progress, team, may_halve)
    with base.hold_what_encodes(inner.captions.any, inner.augmentation is not None):
        return rounds.run(n_rounds or inner.rounds)


def _clear_other_plans(folder: Path, plan: str, team: ProcessGroup) -> None:
    """Clears away what another plan left in the folder; ranks above 0 wait until that is done."""
    path = locate_plan(folder)
    while not path.exists() or read_json(path) != plan:
        if team.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(path, plan)
        else:
            time.sleep(_PLAN_POLL_SECONDS)


class Rounds:
    """One fine-tuning in its folder."""

    def __init__(
        self,
        base: Base,
        adapter: Adapter,
        material: Material,
        inner: InnerConfig,
        seed: int,
        folder: Path,
        progress: TellProgress,
        team: ProcessGroup,
        may_halve: bool,
    ):
        self.n_forward, self.may_halve = inner.micro_batch_size or inner.batch_size, may_halve
        self.base, self.adapter, self.material, self.inner, self.seed = base, adapter, material, inner, seed
        self.files, self.progress, self.team = RoundFiles(folder, inner.skip, base.device), progress, team
        self.n_shards, self.n_rounds = inner.ensemble.shards, inner.rounds
        self.last = inner.rounds - 1  # the round that this process trains to
        self.live: Loop | None = None  # of the round before, where one shard goes on
        if self.n_shards > len(material.data.mean):
            raise MemControlError(
                f"inner.ensemble.shards is {self.n_shards} and there are {len(material.data.mean)} "
                "training images; ask for fewer"
            )
        # the adapter still holds it where there is one shard
        self.initial = (
            {name: tensor.cpu() for name, tensor in adapter.state().items()} if self.n_shards > 1 else {}
        )

    def measure_gap(self) -> float:
        return measure_loss_gap(self.base, self.material.data, self.material.holdout(), self.seed)

    def run(self, n_rounds: int) -> TrainLog:
        self.last = last = n_rounds - 1
        stopped = False

        # The loss gap before anything is learned: two sets of images differ a little.
        if self.inner.stop_gap and self.team.rank == 0 and not self.files.start.exists():
            write_json(self.files.start, self.measure_gap())

        for number in range(self.find_first_open(), n_rounds):
            # This process's shards, from where the last round left them.
            for shard in range(self.n_shards):
                if self.team.owns(shard) and not self.files.shard(number, shard).exists():
                    self.train_shard(number, shard)

            # The end of the round: averaging, exchange, and whether the training stops here.
            self.wait_for_shards(number)
            if self.team.rank == 0:
                self.close(number)
            if self.wait_for(self.files.end(number))["stopped"]:
                last, stopped = number, True
                break
        self.take(last)
        return replace(self.log(last), paused=not stopped and last < self.n_rounds - 1)

    def find_first_open(self) -> int:
        """The round to go on with; one that ended the training early is repeated as a look at its files."""
        if self.n_shards == 1:
            self.drop_unfit_rounds()
        done = [number for number in range(self.n_rounds) if self.files.end(number).exists()]
        return 0 if not done else done[-1] if read_json(self.files.end(done[-1]))["stopped"] else done[-1] + 1

    def drop_unfit_rounds(self) -> None:
        """Rounds after the last one that left its weights are trained again."""
        paths = {number: self.files.shard(number, 0) for number in range(self.n_rounds)}
        there = [number for number, path in paths.items() if path.exists()]
        fit = max((number for number in there if self.files.holds_weights(paths[number])), default=-1)
        for number in range(fit + 1, self.n_rounds):
            self.files.end(number).unlink(missing_ok=True)
            paths[number].unlink(missing_ok=True)
            if number > fit + 1:
                self.files.partial(number, 0).unlink(missing_ok=True)

    def averages(self, number: int) -> bool:
        return self.inner.averages_after(number)

    def exchanges(self, number: int) -> RedistributionConfig | None:
        """The rule of the exchange that ends a round, where one does."""
        rule = self.inner.redistribution
        return (
            rule
            if rule and number < self.n_rounds - 1 and (rule.rounds == "every" or (number + 1) % 2 == 1)
            else None
        )

    def count_slots(self, number: int, shard: int) -> tuple[int, int]:
        """First and last + 1 of the budget's steps that a shard has in a round: all steps in turn, as equal
        as can be."""
        part, n_parts = number * self.n_shards + shard, self.n_rounds * self.n_shards
        return part * self.inner.budget_steps // n_parts, (part + 1) * self.inner.budget_steps // n_parts

    def derive_shard_seed(self, shard: int) -> int:
        return derive_seed(self.seed, "shard", shard) if shard else self.seed

    def train_shard(self, number: int, shard: int) -> None:
        """One shard's part of a round, from what the last round or a checkpoint within this one left."""
        started, stored = time.monotonic(), self.start(number, shard)
        loop = self.live or self.loop(number, stored)
        self.live, state = None, loop.shard
        stored.begun = stored.begun or {"counts": dict(state.counts), "n_losses": len(state.losses)}
        partial = self.files.partial(number, shard)
        with contextlib.closing(Checkpoints(partial, self.inner, self.adapter, loop)) as checkpoints:
            self.take_slots(number, loop, stored, checkpoints)
        done = state.counts - Counter(stored.begun["counts"])
        losses = state.losses[stored.begun["n_losses"] :]
        stored.records.append(
            {
                "round": number + 1,
                "shard": shard,
                "images": len(state.rows),
                **{
                    name: done[name]
                    for name in ("steps", "seen", "trained", "skipped", "dropped", "queued", "surplus")
                },
                "loss": sum(losses) / len(losses) if losses else None,
                "moved": self.measure_move(number, shard),
                "seconds": round(time.monotonic() - started, 3),
            }
        )
        self.n_forward = loop.n_forward
        self.keep(number, loop, stored.records)

    def take_slots(self, number: int, loop: Loop, stored: ShardState, checkpoints: Checkpoints) -> None:
        """What is left of the shard's slots in the round. Losses are read, and checkpoints written, now and
        then."""
        state, counts = loop.shard, Counter(stored.begun["counts"])
        slots = [self.count_slots(i, state.number) for i in range(self.n_rounds)]
        lengths, (first, end) = [last - begin for begin, last in slots], slots[number]
        read_at = time.monotonic()
        for i in range(stored.n_done, end - first):
            loop.take_slot((sum(lengths[:number]) + i + 1) / sum(lengths))
            is_last, is_due = i + 1 == end - first, checkpoints.is_due()
            # ranks that share a base must all see in the same slot that a loss is not finite
            in_step = self.base.ranks.size > 1
            if is_last or is_due or in_step or time.monotonic() - read_at > _READ_SECONDS:
                loop.flush()
                read_at = time.monotonic()
            if is_due and not is_last:
                checkpoints.write({"records": stored.records, "n_done": i + 1, "begun": stored.begun})
            done = state.counts - counts
            self.progress(
                first + i + 1,
                self.inner.budget_steps,
                round=number + 1,
                loss=state.losses[-1] if state.losses else None,
                skipped=done["skipped"] / max(done["seen"], 1),
            )

    def keep(self, number: int, loop: Loop, records: list[dict]) -> None:
        """The shard's file. Too large a one holds what the record needs, and the loop goes on as it is."""
        kinds: tuple[str, ...] = (
            ("weights", "ema", "moments") if self.keeps_moments(number) else ("weights", "ema")
        )
        path = self.files.shard(number, loop.shard.number)
        goes_on = self.n_shards == 1 and not self.inner.stop_gap and number < self.last
        if goes_on and not fits_on_disk(self.adapter, loop, self.inner):
            kinds = ()
        if goes_on:
            self.live = loop
        save_tensors(
            path, collect_tensors(self.adapter, loop, kinds), describe_shard(loop, {"records": records})
        )
        self.files.partial(number, loop.shard.number).unlink(missing_ok=True)

    def loop(self, number: int, stored: ShardState) -> Loop:
        """The loop that goes on where the shard stands."""
        if stored.weights:
            self.adapter.load_state(stored.weights | self.offsets(number))
        loop = Loop(
            self.base,
            self.adapter,
            self.material,
            self.inner,
            stored.shard,
            self.derive_shard_seed(stored.shard.number),
            n_forward=self.n_forward,
            may_halve=self.may_halve,
            private_seed=keep_seed(self.files.noise, self.inner.privacy) if self.inner.privacy else None,
        )
        loop.load_moments(stored.moments)
        if stored.scaler:
            loop.scaler.load_state_dict(stored.scaler)
        if stored.ema:
            loop.load_shadows(stored.ema)
        stored.moments, stored.ema = {}, {}
        return loop

    def measure_move(self, number: int, shard: int) -> float | None:
        """How far the parameters trained are from where they were when the round began."""
        if self.n_shards == 1:
            return None
        before = self.start(number, shard, with_partial=False).weights
        trained = self.adapter.trained().items()
        return math.sqrt(
            sum(
                float((parameter.detach().cpu() - before[name]).square().sum()) for name, parameter in trained
            )
        )

    def keeps_moments(self, number: int) -> bool:
        """Whether anything after the round looks at its moments."""
        return number < self.n_rounds - 1 and not (
            self.averages(number) and self.inner.ensemble.moments == "reset"
        )

    def start(self, number: int, shard: int, with_partial: bool = True) -> ShardState:
        """What a shard begins a round with, or goes on with within it."""
        partial = self.files.partial(number, shard)
        if with_partial and partial.exists() and not self.live:
            return self.files.read(partial, shard, STATE_KINDS)
        if number == 0:
            return self.fresh(shard)
        kinds = () if self.live else self.list_kept(number - 1)
        stored = self.files.read_shard(number - 1, shard, kinds)
        if self.averages(number - 1):
            mean = self.files.mean(number - 1)
            stored.weights, stored.ema = select_tensors(mean, "weights"), select_tensors(mean, "ema")
            stored.moments |= select_tensors(mean, "moments")
            if select_tensors(mean, "offsets"):  # factors were made anew: their moments belong to others
                stored.moments = {}
        if rule := self.exchanges(number - 1):
            self.change_images(stored.shard, self.exchange_members(number - 1, rule)[shard])
        return stored

    def list_kept(self, number: int) -> tuple[str, ...]:
        """What each shard goes on with as it left it; the rest comes from the round's mean."""
        if not self.averages(number):
            return STATE_KINDS
        return ("moments",) if self.inner.ensemble.moments == "kept" else ()

    def fresh(self, shard: int) -> ShardState:
        data = self.material.data
        rows = deal_images(
            self.inner.ensemble.split,
            self.n_shards,
            data.caption_rows,
            data.mean.flatten(1),
            self.seed,
            self.groups,
        )[shard]
        memory = LossMemory.empty(self.inner.skip, self.base.device) if self.inner.skip else None
        zeros = torch.zeros(len(data.mean), dtype=torch.long)
        return ShardState(Shard(shard, rows, zeros, zeros.clone(), memory), self.initial, {}, {}, {}, [])

    @property
    def groups(self) -> Tensor | None:
        """Group numbers of the images, where a group must stay in one shard."""
        return None if self.inner.ensemble.split_groups else self.material.group_numbers

    def exchange_members(self, number: int, rule: RedistributionConfig) -> list[Tensor]:
        """Who has which images after a round's exchange."""
        shards = [self.files.read_shard(number, shard).shard for shard in range(self.n_shards)]
        return exchange_images(
            [shard.rows for shard in shards],
            [shard.skips for shard in shards],
            rule,
            derive_seed(self.seed, "exchange", number),
            self.groups,
        )

    def change_images(self, shard: Shard, rows: Tensor) -> None:
        shard.rows = rows
        shard.skips = torch.zeros_like(shard.skips)
        shard.exchanged_at = shard.counts["batches"]
        mine = torch.isin(shard.queue, rows)
        shard.queue, shard.queue_closeness = shard.queue[mine], shard.queue_closeness[mine]

    def offsets(self, number: int) -> State:
        """Of the last averaging before the round."""
        return select_tensors(self.files.last_mean(number), "offsets")

    def close(self, number: int) -> None:
        """Ends a round: averages if it is due, notes how far the shards were apart, drops the files of the
        round before."""
        end: dict[str, Any] = {"divergence": None, "gap": None, "stopped": False}
        if not self.files.end(number).exists():
            if self.n_shards > 1:
                end["divergence"] = self.measure_divergence(number)
            if self.averages(number):
                self.average(number)
            if (
                self.inner.stop_gap
                and number < self.n_rounds - 1
                and (self.n_shards == 1 or self.averages(number))
            ):
                self.take(number)
                end["gap"] = self.measure_gap() - read_json(self.files.start)
                end["stopped"] = end["gap"] > self.inner.stop_gap
            write_json(self.files.end(number), end)
        self.files.drop_before(number, range(self.n_shards), means=self.averages(number))

    def average(self, number: int) -> None:
        """Writes the mean of the shards, weighted by their images, of their moving averages and moments."""
        stored = [self.files.read_shard(number, shard, ("weights", "ema")) for shard in range(self.n_shards)]
        sizes, offsets = [len(one.shard.rows) for one in stored], self.offsets(number)
        self.adapter.load_state(stored[0].weights | offsets)
        mean, ema = self.adapter.average([one.weights | offsets for one in stored], sizes), {}
        if self.inner.ema:
            last = number == self.n_rounds - 1
            ema = self.adapter.average([one.weights | one.ema | offsets for one in stored], sizes)
            if any(name.endswith(".offset") for name in ema) and not last:
                ema = mean  # factors were made anew, so their moving average starts from them
        moments = self.average_moments(number, sizes) if self.inner.ensemble.moments == "averaged" else {}
        self.files.write_mean(number, mean, {name: tensor.clone() for name, tensor in ema.items()}, moments)

    def measure_divergence(self, number: int) -> float:
        """How far the shards are apart: root mean square distance from their mean over that from where they
        last were one.

        In the parameters trained, by size; 0 where all moved alike, 1 where their moves have nothing in
        common.
        """
        stored = [self.files.read_shard(number, shard, ("weights",)) for shard in range(self.n_shards)]
        start = select_tensors(self.files.last_mean(number), "weights") or self.initial
        sizes, apart, moved = [len(one.shard.rows) for one in stored], 0.0, 0.0
        for name in self.adapter.trained():
            mean = sum(size * one.weights[name] for size, one in zip(sizes, stored)) / sum(sizes)
            for size, one in zip(sizes, stored):
                apart += size * float((one.weights[name] - mean).square().sum())
                moved += size * float((one.weights[name] - start[name]).square().sum())
        return math.sqrt(apart / moved) if moved else 0.0

    def average_moments(self, number: int, sizes: Sequence[int]) -> State:
        """One shard's moments after the other: they are twice as large as what is trained."""
        mean: State = {}
        for shard, size in enumerate(sizes):
            for name, moment in select_tensors(self.files.shard(number, shard), "moments").items():
                mean[name] = mean.get(name, 0.0) + size / sum(sizes) * moment
        return mean

    def take(self, number: int) -> None:
        """Puts into the adapter what a round ended with, its moving average where there is one."""
        kind = "ema" if self.inner.ema else "weights"
        if self.averages(number):
            mean = self.files.mean(number)
            self.adapter.load_state(
                select_tensors(mean, kind)
                | select_tensors(mean, "offsets" if kind == "weights" else "ema_offsets")
            )
        else:
            stored = self.files.read_shard(number, 0, ("weights", kind))
            self.adapter.load_state(stored.weights | stored.ema | self.offsets(number))

    def wait_for_shards(self, number: int) -> None:
        """Until every shard of the round has its file, or the round has ended; rank 0 trains those of a
        process that died."""
        while not self.files.end(number).exists():
            missing = [
                shard for shard in range(self.n_shards) if not self.files.shard(number, shard).exists()
            ]
            if not missing:
                return
            for shard in missing:
                if self.team.owns(shard):
                    self.train_shard(number, shard)
            time.sleep(_PLAN_POLL_SECONDS)

    def wait_for(self, path: Path) -> dict:
        while not path.exists():
            time.sleep(_PLAN_POLL_SECONDS)
        return read_json(path)

    def log(self, last: int) -> TrainLog:
        """The whole fine-tuning's record, from the files of its last round."""
        stored = [self.files.read_shard(last, shard) for shard in range(self.n_shards)]
        counts = sum((one.shard.counts for one in stored), Counter())
        tenths = [
            (one.shard.losses[: _take_tenth(one)], one.shard.losses[-_take_tenth(one) :])
            for one in stored
            if one.shard.losses
        ]
        skipped = torch.stack([one.shard.skipped for one in stored]).sum(0)
        ends = [read_json(self.files.end(number)) for number in range(last + 1)]
        record = {
            "rounds": [{"round": number + 1, **end} for number, end in enumerate(ends)],
            "shards": sorted(
                (row for one in stored for row in one.records), key=lambda row: (row["round"], row["shard"])
            ),
            "images": [sorted(one.shard.rows.tolist()) for one in stored],
            "skips_by_image": skipped.tolist(),
            "waiting": sum(len(one.shard.queue) for one in stored),
        }
        return TrainLog(
            counts["steps"],
            counts["seen"],
            _average_losses([first for first, _ in tenths]),
            _average_losses([end for _, end in tenths]),
            record,
            self.n_forward,
        )


def _take_tenth(stored: ShardState) -> int:
    return max(1, len(stored.shard.losses) // 10)


def _average_losses(losses: list[list[float]]) -> float:
    each = [sum(part) / len(part) for part in losses]
    return sum(each) / len(each) if each else math.nan
