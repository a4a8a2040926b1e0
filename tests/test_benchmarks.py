"""Benchmarks that compare with what people run today, at sizes that take seconds: they run, and peers are
given what our trials are given."""

import importlib
import json
from dataclasses import replace

import pytest

from benchmarks import _gpu_parts, _peers, gpu, overhead, peers, scale, shards, solver, trial, utilisation
from benchmarks.__main__ import NAMES, main, table
from benchmarks._gpu_size import NO_CARD, ROW, SIZES
from benchmarks.evidence import inner_loop
from memcontrol.core.jobs import Done
from memcontrol.execution.job_queue import JobQueue
from memcontrol.execution.local import Inline


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(peers, "SMALL", True)
    monkeypatch.setattr(peers, "N_TRIALS", 1)


def test_every_benchmark_has_a_run_and_says_what_it_compares():
    for name in NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        assert module.__doc__ and callable(module.run), name


def test_a_gpu_that_is_not_there_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.gpu_found", lambda: False)
    monkeypatch.setattr("sys.argv", ["benchmarks", "trial", "--device", "cuda"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith(
        "torch finds no GPU here; leave it out to run on the CPU"
    )


def test_peers_losses_are_ours_for_the_same_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(
        _peers,
        "RECIPES",
        {name: _peers.Recipe(recipe.whole_graph, 2, 64) for name, recipe in _peers.RECIPES.items()},
    )
    seconds, (mine,), _ = peers.ours(peers.OURS[0], tmp_path / "ours", "cpu")
    assert len(mine) == 4 and len(seconds) == 1
    for name in peers.PEERS:
        _, (losses,), (fid,) = peers.theirs(name, tmp_path / name, "cpu")
        assert losses == pytest.approx(mine, abs=1e-6) and fid > 0, name


@pytest.fixture(scope="module")
def timed_trial():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "N_REPEATS", 1)
        patch.setattr(peers, "SMALL", True)
        patch.setattr(peers, "N_TRIALS", 1)
        return trial.run("cpu")


def test_where_a_trials_time_goes_adds_up(timed_trial):
    (row,) = timed_trial
    parts = ("denoiser, forward", "denoiser, backward", "optimizer", "decoding", "scoring", "rest")
    assert sum(row[name] for name in parts) == pytest.approx(row["seconds"]) and all(
        row[name] > 0 for name in parts
    )
    assert 0 < row["to the first step"] < row["seconds"] and row["share in the denoiser"] < 1


def test_solvers_are_compared_over_a_studys_runs(shown, monkeypatch):
    monkeypatch.setattr(solver, "STEPS", (1,))
    monkeypatch.setattr(solver, "REFERENCE", 2)
    rows = solver.ranked(shown.parent / "runs" / "seen")
    assert [row["figure"] for row in rows] == list(solver.FIGURES)
    for row in rows:
        assert (
            row["runs"] >= 4
            and -1 <= row["rank correlation"] <= 1
            and row["low"] < row["high"]
            and row["median error of measuring"] >= 0
        ), row


def test_scale_is_measured_at_several_sizes(monkeypatch):
    monkeypatch.setattr(scale, "PIXELS", (8, (100, 200)))
    monkeypatch.setattr(scale, "FEATURES", (4, (100, 200)))
    monkeypatch.setattr(scale, "TRIALS", (12,))
    monkeypatch.setattr(scale, "N_LISTED", 100)
    monkeypatch.setattr(scale, "N_WANTED", 1000)
    rows = scale.run("cpu")
    assert all(row["figure"] >= 0 for row in rows) and "1,000 images" in table(rows)


def test_the_outer_loop_is_measured_on_a_database_of_its_own(monkeypatch):
    monkeypatch.setattr(overhead, "N_WORKERS", 2)
    monkeypatch.setattr(overhead, "N_TRIALS", 4)
    monkeypatch.setattr(overhead, "SECONDS", 0.05)
    rows = {row["what"]: row["figure"] for row in overhead.run("cpu")}
    busy, transactions = rows["2 workers, 11 runs of 0 s: busy"], rows["transactions for each trial"]
    assert 0 < busy <= 1 and transactions > 1
    assert {name.split(",")[0] for name in rows} >= {"draw", "wait for a choice", "begin", "tell"}


def test_arms_of_the_inner_loop_are_trained_once_and_set_side_by_side(tmp_path, monkeypatch):
    small = {
        "inner": {"budget_images": 32, "batch_size": 16},
        "rewards": {"n_samples": 16, "force": True, "sampling_steps": 1, "confirm": 0},
        "data": {"path": "digits", "train": 20, "holdout": 20, "test": 20},
    }
    monkeypatch.setattr(inner_loop, "DIGITS_STUDY", {**inner_loop.DIGITS_STUDY, **small})
    monkeypatch.setattr(
        inner_loop, "ARMS", {"plain training": {}, "skipping": {"skip": {"ratio": 1.1, "bins": 1}}}
    )
    ends = []
    for _ in range(2):
        inner_loop.run_seed(0, tmp_path, JobQueue(Inline(), lambda event: ends.append(type(event))))
    rows = [inner_loop.row(arm, 0, tmp_path) for arm in inner_loop.ARMS]
    assert (
        ends.count(Done) == 2
        and [row["steps"] for row in rows] == [2, 2]
        and [row["seen"] for row in rows][0] == 32
    )
    inner_loop.picture(rows, tmp_path / "arms.png")
    assert (
        inner_loop.table(rows).count("| plain training |") == 1
        and (tmp_path / "arms.png").stat().st_size > 10_000
    )


def test_utilisation_counts_each_layout(monkeypatch):
    monkeypatch.setitem(utilisation.SIZES, "cpu", ((8, 8, 8, 8), 8, 2, "float32", 64))
    rows = utilisation.run("cpu")
    assert {row["layout"] for row in rows} == set(utilisation.LAYOUTS["cpu"]) and all(
        row["share of the matrix rate"] > 0 for row in rows
    )


@pytest.mark.parametrize("variant", ["1", "10", shards.COPIES])
def test_shards_are_measured_at_any_size(variant, monkeypatch):
    monkeypatch.setattr(shards, "N_STEPS", 20)
    monkeypatch.setattr(shards, "N_ROUNDS", 2)
    monkeypatch.setattr(shards, "WIDTHS", (8, 8, 8, 8))
    assert shards.measure(variant, "cpu")["seconds"] > 0


@pytest.fixture
def told(monkeypatch, capsys, timed_trial):
    """The rows of a part of `gpu`, in this process; what other tests here have measured is not again."""
    taken = {"seconds": [2.0], "losses": [[0.5, 0.25]], "fid": [1.0], "mib": 8.0}
    monkeypatch.setattr(peers, "measured", lambda name, device: [taken])
    monkeypatch.setattr("benchmarks._processes.measured", lambda *_: {"seconds": 2.0, "mib": 8.0})
    monkeypatch.setattr(trial, "run", lambda device: timed_trial)

    def run(part):
        name, *words = part.split()
        _gpu_parts.PARTS[name](SIZES["cpu"], *words)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(ROW)]
        return {row["what"]: row for row in (json.loads(line.removeprefix(ROW)) for line in lines)}

    return run


@pytest.mark.parametrize("part", [part for part in gpu.list_parts(SIZES["cpu"]) if part != "search"])
def test_every_part_of_the_gpus_script_is_rehearsed_on_a_cpu(part, told):
    rows = told(part)
    assert rows and not [row for row in rows.values() if row["figure"] == "failed"]
    numbers = {what: row["figure"] for what, row in rows.items() if row["figure"] != NO_CARD}
    assert all(figure >= 0 for figure in numbers.values()), numbers
    if part == "step":
        shares = [figure for what, figure in numbers.items() if what.startswith("kernel ")]
        assert len(shares) == 15 and 0 < sum(shares) <= 1 and shares == sorted(shares, reverse=True)
        assert 0 < numbers["MFU, without gradient checkpointing"] < 1
    if part.startswith("memory"):
        assert {"captions", "encode", "train", "sample", "decode"} <= set(numbers)
    if part in ("paths", "memory flux 64"):
        assert NO_CARD in [row["figure"] for row in rows.values()]
    if part == "peers":
        assert [numbers[f"ours / {name}"] for name in peers.PEERS] == [1, 1]


def test_a_part_that_fails_or_is_late_or_has_no_time_is_a_row(monkeypatch):
    kept = []
    size = replace(SIZES["cpu"], base="nowhere", memory=())
    monkeypatch.setattr(gpu, "list_parts", lambda size: ["paths"])
    (row,) = gpu.run_parts(size, 1, lambda rows: kept.append(len(rows)))
    assert row["part"] == "paths" and row["what"] == "failed" and "nowhere" in row["beside"]
    (late,) = gpu.run_part("search", SIZES["cpu"], 0.5)
    assert late["what"] == "cut off"
    (row,) = gpu.run_parts(size, 0.01, lambda rows: kept.append(len(rows)))
    assert row["figure"] == "no time left" and kept == [1, 1]
